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


CTRL_C = signal.SIGINT.name
_SAME_KEY_PRESS = 2.0  # seconds: torchrun hands on what the terminal has sent to all processes already


@contextlib.contextmanager
def told_to_stop(note: Callable[[str], None], ctrl_c: bool = False) -> Iterator[None]:
    """Calls ``note`` with the signal's name for each of ``STOPPING``, while the block runs.

    Only a program's main thread can take signals; in another one this does nothing.

    Args:
        note: called in the middle of whatever runs.
        ctrl_c: for Ctrl-C, too, which raises ``KeyboardInterrupt`` only when it is pressed again. An exception may be
            lost where Python ignores it, in a finaliser, say, and may come in the middle of a step. Where Ctrl-C is
            ignored, as by a shell's background jobs, it stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[float] = []

    def take(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            asked.append(time.monotonic())
            if asked[-1] - asked[0] > _SAME_KEY_PRESS:
                raise KeyboardInterrupt
            if len(asked) > 1:
                return
        note(signal.Signals(number).name)

    listened: tuple[signal.Signals, ...] = STOPPING
    if ctrl_c and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        listened = (*STOPPING, signal.SIGINT)
    before = {number: signal.signal(number, take) for number in listened}
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
