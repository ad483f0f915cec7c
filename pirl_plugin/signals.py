"""Signals that ask a run to stop: it finishes its step, writes a checkpoint and ends with an exit code of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def told_to_stop(note: Callable[[str], None]) -> Iterator[None]:
    """Calls ``note`` with the signal's name for each of ``STOPPING``, while the block runs.

    Only a program's main thread can take signals; in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def take(number: int, frame: FrameType | None) -> None:
        note(signal.Signals(number).name)

    before = {number: signal.signal(number, take) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def children_of(pid: int) -> list[int]:
    """The processes that a process of this machine started; none where the system does not tell."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def keep_torchrun_from_restarting() -> None:
    """Has ``torchrun --max-restarts`` end as well: it takes a run that was told to stop for one that has failed."""
    left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) - int(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    )
    if left <= 0:
        return
    if os.environ.get("LOCAL_RANK") == "0":
        os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(5)  # until torchrun ends this process; one that ends before that would be started again


def end_with_parent() -> None:
    """Ends this process as soon as the one that started it is gone, killed or not.

    Looking at ``os.getppid()``, as torch's loaders do, is not enough: that is the fork server where processes are
    started by one (Python's own way from 3.14 on), and it lives on as long as one of its children does.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end_with_parent", daemon=True).start()
