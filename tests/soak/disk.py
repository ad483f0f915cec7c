"""A disk that fills up while a checkpoint is written: one clear line, and the previous checkpoint loads.

    python tests/soak/disk.py

Needs the right to mount a small tmpfs; without it, a limit on the size of files stands in for the full disk.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from soak.processes import SMALL, Starter

_ARGUMENTS = [*SMALL, "batch_size=8", "num_epochs=2", "log_every=1", "checkpoint.keep=100"]


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A tmpfs of some bytes on a folder; False where this process may not mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file of this process and its children may become larger; what would make it is an error, as of a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def survey(scratch: Path) -> tuple[str, list[str]]:
    """Fills a disk: what the run said at last, and faults."""
    from pirl_plugin.hooks.checkpoint import checkpoint_folder, checkpoints
    from pirl_plugin.hooks.checkpoint_files import newest_usable

    starter, wrong = Starter(), list[str]()
    made = starter.start([*_ARGUMENTS, f"run_dir={scratch / 'first'}"], scratch / "log")
    if made.wait() != [0]:
        return made.said()[-2000:], ["the run on a large disk failed"]
    one = checkpoints(scratch / "first")[-1].stat().st_size
    with small_disk(scratch / "disk", int(3.5 * one)) as mounted:
        if not mounted:
            return "no tmpfs could be mounted here", []
        run_dir = scratch / "disk" / "run"
        steps = ["num_epochs=4", "checkpoint.every_steps=1", f"run_dir={run_dir}"]
        made = starter.start([*_ARGUMENTS, *steps], scratch / "log2")
        codes, last = made.wait(), made.said().strip().splitlines()[-1]
        if codes != [1]:
            wrong.append(f"exit codes {codes}")
        if "No space left" not in made.said() or "Traceback" in made.said():
            wrong.append(made.said()[-2000:])
        found = newest_usable(run_dir)
        if found is None or found[0] != checkpoints(run_dir)[-1]:
            wrong.append(f"the newest checkpoint that is there cannot be used: {found and found[0]}")
        left = [path.name for path in checkpoint_folder(run_dir).iterdir() if path.suffix != ".pt"]
        wrong += [f"left over: {left}"] if left else []
    return last, wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 where the previous checkpoint loads."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="pirl_disk_") as scratch:
        said, wrong = survey(Path(scratch))
    print(said)
    print("; ".join(wrong) or "the previous checkpoint loads")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
