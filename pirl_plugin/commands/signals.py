"""Signals that ask a run to stop: it finishes its step, writes a checkpoint and ends with an exit code of its own."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
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
