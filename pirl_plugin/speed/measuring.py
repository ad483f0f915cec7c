"""Time and memory of two ways to do the same, measured fairly: one process, one allocator, taken in turns."""

from __future__ import annotations

import ctypes
import gc
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

Work = Callable[[], object]

_PROC = Path("/proc/self")


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        quick: smaller sizes, so that all areas together take about two minutes.
        repeats: measurements of which the median counts.
        device: where the loss and the step are computed.
        threads: of torch, on both sides.
        images: folder of JPEG files for the views; None: the area makes its own.
    """

    quick: bool = False
    repeats: int = 5
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    threads: int = 1
    images: Path | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        what: ours, with its sizes.
        against: what it is compared with.
        ours: in ``unit``.
        theirs: in ``unit``.
        unit: ``s``, ``bytes``, or anything per second such as ``images/s``.
        ratio: how many times better ours is, or what else ``wanted`` bounds.
        wanted: the ratio to reach; None where nothing is promised.
        at_most: ``wanted`` is an upper bound, not a lower one.
        detail: the floor in bytes and operations, and whatever else explains the numbers.
    """

    what: str
    against: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    wanted: float | None = None
    at_most: bool = False
    detail: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the ratio is as wanted; None where nothing is promised."""
        if self.wanted is None:
            return None
        return self.ratio <= self.wanted if self.at_most else self.ratio >= self.wanted


def less(
    what: str,
    against: str,
    ours: float,
    theirs: float,
    wanted: float | None = None,
    unit: str = "s",
    detail: str = "",
) -> Row:
    """A row in which less is better (seconds, bytes): the ratio is ``theirs / ours``."""
    return Row(what, against, ours, theirs, unit, theirs / ours if ours else float("inf"), wanted, detail=detail)


def more(
    what: str, against: str, ours: float, theirs: float, wanted: float | None = None, unit: str = "", detail: str = ""
) -> Row:
    """A row in which more is better (images/s): the ratio is ``ours / theirs``."""
    return Row(what, against, ours, theirs, unit, ours / theirs if theirs else float("inf"), wanted, detail=detail)


def interleaved(
    sides: Mapping[str, Work], repeats: int = 5, warm_up: int = 1, device: torch.device | None = None
) -> dict[str, float]:
    """Median seconds of each side, measured in turns so that a busy machine disturbs all of them alike.

    Args:
        sides: what to time, by name.
        repeats: measurements of each side.
        warm_up: calls of each side before, which do not count.
        device: a GPU is waited for before the clock is read.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_up + repeats):
        for name, work in sides.items():
            taken = seconds_of(work, device)
            if turn >= warm_up:
                seconds[name].append(taken)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def seconds_of(work: Work, device: torch.device | None = None) -> float:
    """Wall time of one call; a GPU's work is waited for."""
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def extra_peak_bytes(work: Work, device: torch.device | None = None) -> int:
    """Most memory that a call holds at any moment, beyond what was held before it.

    On a GPU that of torch's allocator. Else the resident set of this process, so that every allocator counts: its peak
    as Linux keeps it where it can be set back, elsewhere by looking at it every millisecond. What the C library had
    kept for later is given back first. The call is made once before, so that nothing is counted that stays for good.

    Raises:
        RuntimeError: neither a GPU nor Linux's ``/proc``.
    """
    work()
    gc.collect()
    if device is not None and device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not (_PROC / "status").exists():
        raise RuntimeError("Memory is measured on Linux or on a GPU only: leave these rows out.")
    give_back_memory()
    before = _status("VmRSS")
    try:
        (_PROC / "clear_refs").write_text("5")  # the peak is the present from now on (proc(5))
    except OSError:
        return _sampled_peak(work) - before
    work()
    return max(0, _status("VmHWM") - before)


def give_back_memory() -> None:
    """Has glibc return its free memory to the system, where there is a glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _sampled_peak(work: Work) -> int:
    done, seen = threading.Event(), [_status("VmRSS")]

    def look() -> None:
        while not done.wait(0.001):
            seen.append(_status("VmRSS"))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(seen)


def _status(key: str) -> int:
    """A line of ``/proc/self/status``, in bytes."""
    lines = (_PROC / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
