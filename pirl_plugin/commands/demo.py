"""``make demo``: pretrains on generated scenes and compares the methods with the random trunk, in minutes on a CPU."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pirl_plugin.commands.benchmark import benchmark
from pirl_plugin.commands.running import exit_code
from pirl_plugin.commands.train import train
from pirl_plugin.hooks.checkpoint import checkpoints
from pirl_plugin.records import Record
from pirl_plugin.text import aligned

_METHODS = ("pirl_32", "npid_32")
_BENCHMARKS = ("linear", "knn")
_DATASET = ["dataset=generated_scenes", "dataset.num_images=2000"]
_TRUNK = ["trunk=resnet18_narrow"]
_VIEW = ["image_size=32"]  # random weights were trained at no size
_TRAINING = [
    "batch_size=32",
    "optimizer.lr=0.1",
    # a scene's colours tell it from the others but say nothing of its class: in grey, shapes and textures must do
    "transform.grayscale_probability=1.0",
    "transform.image_scale=[0.5,1.0]",
    "device=cpu",
    "log_every=20",
    "checkpoint.every_epochs=10",
]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; prints the table of the comparison."""
    parser = argparse.ArgumentParser(
        prog="demo", description="PIRL and NPID on generated scenes, linear probe and kNN."
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="folder (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=60, help="epochs of pretraining (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: demo(arguments.run_dir, arguments.epochs), arguments.debug)


def demo(run_dir: Path, num_epochs: int) -> None:
    """Trains, benchmarks, prints. Started again it goes on where it stopped."""
    start = time.perf_counter()
    parts = len(_METHODS) + 1
    _say(f"[1/{parts}] random: the same trunk, untrained")
    records = _measure("random", [*_TRUNK, *_VIEW], run_dir / "random")
    for part, method in enumerate(_METHODS, start=2):
        folder = run_dir / method
        _say(f"[{part}/{parts}] {method}: {num_epochs} epochs without labels, then the probes")
        train([f"method={method}", *_DATASET, *_TRUNK, *_TRAINING, f"num_epochs={num_epochs}", f"run_dir={folder}"])
        records += _measure(str(checkpoints(folder)[-1]), [], folder)
    minutes = (time.perf_counter() - start) / 60
    print(f"\n{comparison(records)}\n\n{minutes:.1f} minutes on {os.cpu_count()} cores. Everything lies in {run_dir}.")


def comparison(records: Sequence[Record]) -> str:
    """Methods in rows, top-1 of each benchmark in columns."""
    values: dict[str, dict[str, str]] = {}
    for record in records:
        if record.metric == "top1" and record.value is not None:
            detail = f", k = {record.setting['k']}" if "k" in record.setting else ""
            values.setdefault(record.method, {})[record.benchmark + detail] = f"{record.value:.1f} {record.unit}"
    columns = list(dict.fromkeys(column for row in values.values() for column in row))
    rows = [
        [method, *(row.get(column, "-").rjust(len(column)) for column in columns)] for method, row in values.items()
    ]
    return "\n".join(["Top-1 accuracy on held-out images:", "", aligned([["method", *columns], *rows])])


def _measure(weights: str, more: Sequence[str], folder: Path) -> list[Record]:
    """Runs every benchmark on the weights."""
    found = []
    for name in _BENCHMARKS:
        place = [f"weights={weights}", f"run_dir={folder / name}", "device=cpu"]
        found += benchmark([f"benchmark={name}", *place, *_DATASET, *more], quiet=True)
    return found


def _say(line: str) -> None:
    print(f"\n{line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
