"""One rank that dies, hangs or freezes takes the others down with a message, and the run goes on when started again.

    python tests/soak/ranks.py --times 10

Each time two processes train, one of them comes to harm at a random step, and all must have ended by themselves within
a minute, naming rank and step; the same command then finishes, in the bits of a run that nothing happened to. With the
kind ``torchrun``, ``torchrun --max-restarts=1`` starts them again, and all the rest happens by itself.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from soak.processes import SMALL, Ranks, Starter, differences

COMMON = [*SMALL, "batch_size=4", "log_every=1", "checkpoint.every_steps=2", "plugins=[soak.saboteur]"]
_EXPECTED = {
    "die": ("rank 1 (process", "rank 0 ends"),
    "hang": ("rank 1 (process", "has made no progress for", "rank 0 ends"),
    "freeze": ("rank 1 (process", "has given no sign of life for", "rank 0 ends"),
    "raise": ("error: sabotage",),
}


def arguments_of(folder: Path, epochs: int, patience: float, how: str | None, step: int) -> list[str]:
    """The command line; without harm for ``how=None``."""
    harm = f"{{name:saboteur,how:{how},step:{step}}}," if how else ""
    hooks = f"hooks=[{harm}{{name:memory_bank_update}},{{name:metrics_jsonl}}]"
    return [*COMMON, f"num_epochs={epochs}", f"patience={patience}", hooks, f"run_dir={folder}"]


def harm(starter: Starter, folder: Path, epochs: int, patience: float, how: str, step: int) -> tuple[float, list[str]]:
    """Lets one rank come to harm: seconds from then until all others had ended, and faults."""
    made = starter.start(arguments_of(folder, epochs, patience, how, step), _logs(folder, how), 2)
    try:
        if not made.until(lambda: (folder / "sabotaged").exists()):
            return 0.0, [f"the run ended before step {step}: {made.codes}\n{made.said()[-2000:]}"]
        start = time.monotonic()
        others_end(made, how)
        seconds, wrong = time.monotonic() - start, []
        if made.codes[0] is None or (made.codes[1] is None and how != "freeze"):
            wrong.append(f"{how}: still running after {seconds:.0f} s: {made.codes}")
        if made.codes[0] in (0, None):
            wrong.append(f"{how}: exit codes {made.codes}")
        said = made.said()
        wrong += [
            f"{how}: nobody said {words!r} ({made.codes}): {said[-1500:]}"
            for words in _EXPECTED[how]
            if words not in said
        ]
        wrong += [f"{how}: a traceback was shown: {said[-3000:]}"] if "Traceback" in said else []
        return seconds, wrong
    finally:
        made.send(signal.SIGKILL)  # a frozen one is ended by its launcher
        made.wait(60)


def others_end(made: Ranks, how: str) -> None:
    """Waits until all have ended that can."""
    end = time.monotonic() + 120
    while time.monotonic() < end and any(code is None for code in made.codes[: 1 if how == "freeze" else 2]):
        time.sleep(0.05)


def started_again(starter: Starter, folder: Path, epochs: int, patience: float, how: str, step: int) -> list[str]:
    """The same command: faults."""
    made = starter.start(arguments_of(folder, epochs, patience, how, step), _logs(folder, how), 2)
    codes = made.wait()
    return [] if codes == [0, 0] else [f"{how}: started again, it failed: {codes}\n{made.said()[-2000:]}"]


def restarted_by_torchrun(folder: Path, epochs: int, patience: float, step: int) -> tuple[float, list[str]]:
    """One rank is killed; torchrun starts both again, once: seconds that all of it took, and faults."""
    root = Path(__file__).resolve().parents[2]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    command = [*launcher, str(root / "tools" / "train.py"), *arguments_of(folder, epochs, patience, "die", step)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root / "tests")}
    start = time.monotonic()
    made = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=600, check=False)
    wrong = [] if made.returncode == 0 else [f"torchrun ended with {made.returncode}: {made.stderr[-3000:]}"]
    expected = [f"Finished after {3 * epochs} steps", *(["Going on from"] if step > 2 else [])]
    wrong += [f"nobody said {words!r}: {made.stderr[-3000:]}" for words in expected if made.stderr.count(words) != 1]
    wrong += [] if (folder / "sabotaged").exists() else ["nobody was killed"]
    return time.monotonic() - start, wrong


def _logs(folder: Path, how: str) -> Path:
    return folder.with_name(f"{folder.name}_{how}_log")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 where all ended in time and all restarts finished."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=10, help="of each kind")
    parser.add_argument("--epochs", type=int, default=8, help="of 3 steps")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds without progress")
    parser.add_argument("--kinds", nargs="+", default=[*_EXPECTED, "torchrun"], choices=[*_EXPECTED, "torchrun"])
    options = parser.parse_args(argv)
    starter, generator, wrong, longest = Starter(), random.Random(0), list[str](), 0.0
    with tempfile.TemporaryDirectory(prefix="pirl_ranks_") as scratch:
        whole = Path(scratch) / "whole"
        made = starter.start(arguments_of(whole, options.epochs, options.patience, None, 1), Path(scratch) / "log", 2)
        if made.wait() != [0, 0]:
            print(made.said()[-3000:])
            return 1
        for how in options.kinds:
            taken = []
            for index in range(options.times):
                step, folder = generator.randrange(3, 3 * options.epochs - 1), Path(scratch) / f"{how}{index}"
                settings = (folder, options.epochs, options.patience)
                if how == "torchrun":
                    seconds, faults = restarted_by_torchrun(*settings, step)
                else:
                    seconds, faults = harm(starter, *settings, how, step)
                    faults = faults or started_again(starter, *settings, how, step)
                taken.append(seconds)
                wrong += faults or differences(whole, folder)
            if how != "torchrun":
                longest = max(longest, *taken)
            what = "finished by itself" if how == "torchrun" else "all ended"
            print(f"{how}: {options.times} times, {what} after {min(taken):.0f} to {max(taken):.0f} s", flush=True)
    print(f"longest {longest:.0f} s; {len(wrong)} faults")
    for line in wrong[:10]:
        print("  " + line)
    return 1 if wrong or longest > 60 else 0


if __name__ == "__main__":
    sys.exit(main())
