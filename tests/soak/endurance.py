"""A long run on the CPU: resident memory, file handles and throughput stay flat.

    python tests/soak/endurance.py --minutes 45

Trains with workers and frequent checkpoints, looks at the process every few seconds, and compares the second quarter of
the time with the last one.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from soak.processes import SMALL, Ranks, Starter


def sample(pid: int) -> tuple[float, int]:
    """Resident memory in MiB and the number of open files of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    rss = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return rss / 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def watch(made: Ranks, seconds: float, every: float) -> list[tuple[float, int]]:
    """Samples over some time."""
    found, end = [], time.monotonic() + seconds
    while time.monotonic() < end and made.codes == [None]:
        found.append(sample(made.processes[0].pid))
        time.sleep(every)
    return found


def rates(folder: Path) -> list[float]:
    """Images per second, line by line."""
    return [
        float(json.loads(line)["images_per_second"]) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def compared(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the second and of the last quarter."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 where all three are flat."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between looks at the process")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="pirl_endurance_") as scratch:
        folder = Path(scratch) / "run"
        often = ["num_epochs=1000000", "checkpoint.every_steps=20", "log_every=10", f"num_workers={options.workers}"]
        made = Starter().start([*SMALL, "batch_size=8", *often, f"run_dir={folder}"], Path(scratch) / "log")
        found = watch(made, 60 * options.minutes, options.every)
        made.send(signal.SIGTERM)
        codes = made.wait(120)
        figures = {
            "resident MiB": compared([memory for memory, _ in found]),
            "open files": compared([files for _, files in found]),
            "images/s": compared(rates(folder)),
        }
        steps = len(rates(folder)) * 10
    for name, (before, after) in figures.items():
        print(f"{name:14} {before:10.1f} in the second quarter, {after:10.1f} in the last ({after / before - 1:+.1%})")
    print(f"{steps} steps, exit code {codes[0]} after SIGTERM (75 is right)")
    (memory, memory_after), (files, files_after), (rate, rate_after) = figures.values()
    # a checkpoint that is being written while we look takes a file or two
    flat = memory_after < 1.03 * memory and files_after <= files + 3 and rate_after > 0.9 * rate
    return 0 if flat and codes == [75] else 1


if __name__ == "__main__":
    sys.exit(main())
