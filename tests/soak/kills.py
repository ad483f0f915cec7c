"""Runs that are killed at any moment, again and again, end in the same bits as those that are not.

    python tests/soak/kills.py --kills 50

Each setting is trained once without interruption. Then the same command is killed (SIGKILL, all its processes) after a
random time and started again, until it has been killed often enough; at last it is left to finish. Compared are
weights, batch statistics, momentum, memory bank, Z, queue, random states and metrics.jsonl, bit by bit.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from soak.processes import SMALL, Starter, differences, steps_logged

_HOOKS = "hooks=[{name:health,every_steps:5},{name:memory_bank_update},{name:metrics_jsonl}]"
_OTHER = [argument for argument in SMALL if argument.startswith(("trunk", "dataset", "optimizer", "device"))]
_QUEUE = ["method=moco_v2_32", "loss.memory_bank.size=20", "model.batch_norm_groups=2"]
_LARGER = [
    "transform.image_size=32",
    "transform.jigsaw_size=72",
    "transform.patch_size=20",
]
SETTINGS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, [*SMALL, _HOOKS, "batch_size=8", "loss.estimator=nce", "loss.normalizer_steps=5"]),
    "two processes": (2, [*SMALL, _HOOKS, "batch_size=4", "loss.estimator=nce", "loss.normalizer_steps=5"]),
    "two workers": (1, [*SMALL, _HOOKS, "batch_size=8", "num_workers=2"]),
    "accumulated": (1, [*SMALL, _HOOKS, "batch_size=4", "accumulate_steps=2", "clip_grad_norm=1.0"]),
    "queue": (
        1,
        ["method=moco_v2_32", *_OTHER, "batch_size=8", "loss.memory_bank.size=20", "model.batch_norm_groups=2"],
    ),
    "clusters": (1, ["method=deepcluster_v2_32", *_OTHER, "batch_size=8", "loss.num_clusters=[4,4]"]),
    "bfloat16": (1, [*SMALL, _HOOKS, "batch_size=8", "precision=bf16", *_LARGER]),
}
"""Number of processes and command line; with ``queue`` there is a momentum copy, too."""


def arguments_of(name: str, epochs: int) -> tuple[int, list[str]]:
    """A setting; every third step logged and every second one saved: most checkpoints are in the middle of a line."""
    ranks, own = SETTINGS[name]
    return ranks, [*own, f"num_epochs={epochs}", "log_every=3", "checkpoint.every_steps=2"]


def uninterrupted(starter: Starter, name: str, epochs: int, folder: Path) -> float:
    """Makes the whole run; seconds that it took."""
    ranks, arguments = arguments_of(name, epochs)
    start = time.monotonic()
    made = starter.start([*arguments, f"run_dir={folder}"], folder.with_name(folder.name + "_log"), ranks)
    codes = made.wait()
    if any(codes):
        raise RuntimeError(f"{name}: the uninterrupted run failed: {codes}\n{made.said()[-3000:]}")
    return time.monotonic() - start


def killed_again_and_again(
    starter: Starter, name: str, epochs: int, folder: Path, kills: int, seconds: float, generator: random.Random
) -> tuple[int, list[int]]:
    """Kills the run at random moments, then lets it finish; kills that hit it alive, and the steps it had reached."""
    ranks, arguments = arguments_of(name, epochs)
    logs, hit, steps = folder.with_name(folder.name + "_log"), 0, list[int]()
    for _ in range(20 * kills):
        made = starter.start([*arguments, f"run_dir={folder}"], logs, ranks)
        if hit == kills:
            codes = made.wait()
            if any(codes):
                raise RuntimeError(f"{name}: the run started again failed: {codes}\n{made.said()[-3000:]}")
            return hit, steps
        # some while it starts, most after it has logged something new: at any moment of a step or of a save
        if generator.random() < 0.8:
            before = steps_logged(folder)
            made.until(lambda before=before: steps_logged(folder) > before)
        made.until(lambda: False, generator.uniform(0, seconds / (kills + 1)))
        alive = any(code is None for code in made.codes)
        reached = steps_logged(folder)
        made.kill()
        if alive:
            hit += 1
            steps.append(reached)
        elif any(code not in (0, -9) for code in made.codes):
            raise RuntimeError(f"{name}: the run failed by itself: {made.codes}\n{made.said()[-3000:]}")
        else:  # it was finished before it was killed: once more from the start, or nothing would be tried
            shutil.rmtree(folder, ignore_errors=True)
    raise RuntimeError(f"{name}: could not be killed {kills} times.")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 where every resume was exact."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="over all settings")
    parser.add_argument("--epochs", type=int, default=20, help="of 3 steps")
    parser.add_argument("--only", choices=list(SETTINGS), help="one setting")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args(argv)
    names = [options.only] if options.only else list(SETTINGS)
    generator, starter, total, wrong = random.Random(options.seed), Starter(), 0, list[str]()
    with tempfile.TemporaryDirectory(prefix="pirl_kills_") as scratch:
        for index, name in enumerate(names):
            kills = options.kills * (index + 1) // len(names) - options.kills * index // len(names)
            whole, pieces = (Path(scratch) / f"{index}_{kind}" for kind in ("whole", "pieces"))
            seconds = uninterrupted(starter, name, options.epochs, whole)
            hit, steps = killed_again_and_again(starter, name, options.epochs, pieces, kills, seconds, generator)
            found = differences(whole, pieces)
            total += hit
            wrong += [f"{name}: {line}" for line in found]
            print(f"{name}: killed {hit} times, at steps {steps}: {found if found else 'exact'}", flush=True)
    print(f"{total} kills, {'all resumes exact' if not wrong else f'{len(wrong)} DIFFERENCES'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
