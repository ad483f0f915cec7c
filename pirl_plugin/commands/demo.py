"""``make demo``: pretrains on generated scenes and compares the methods with the random trunk, in minutes on a CPU."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pirl_plugin.commands.benchmark import benchmark, table
from pirl_plugin.commands.running import exit_code
from pirl_plugin.commands.train import train
from pirl_plugin.hooks.checkpoint import checkpoints
from pirl_plugin.records import Record

_METHODS = ("pirl_64", "npid_64")
_DATASET = ["dataset=generated_scenes", "dataset.num_images=2000"]
_TRUNK = ["trunk=resnet18_medium_narrow"]
_TRAINING = ["batch_size=32", "optimizer.lr=0.06", "device=cpu", "num_workers=0", "log_every=20"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; prints the table of the comparison."""
    parser = argparse.ArgumentParser(
        prog="demo", description="PIRL and NPID on generated scenes, linear probe and kNN."
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/demo"), help="folder (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=30, help="epochs of pretraining (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: demo(arguments.run_dir, arguments.epochs), arguments.debug)


def demo(run_dir: Path, num_epochs: int) -> None:
    """Trains, benchmarks, prints. Started again it goes on where it stopped."""
    start = time.perf_counter()
    records = [record for name in ("linear", "knn") for record in _measure(name, "random", _TRUNK, run_dir / "random")]
    for method in _METHODS:
        folder = run_dir / method
        print(f"\n== {method}: pretraining without labels ==", file=sys.stderr)
        train([f"method={method}", *_DATASET, *_TRUNK, *_TRAINING, f"num_epochs={num_epochs}", f"run_dir={folder}"])
        weights = str(checkpoints(folder)[-1])
        records += [record for name in ("linear", "knn") for record in _measure(name, weights, [], folder)]
    minutes = (time.perf_counter() - start) / 60
    print(f"\n{table(records)}\n\n{minutes:.1f} minutes on {os.cpu_count()} cores; everything lies in {run_dir}")


def _measure(name: str, weights: str, trunk: Sequence[str], folder: Path) -> list[Record]:
    overrides = [f"benchmark={name}", f"weights={weights}", *trunk, *_DATASET, f"run_dir={folder / name}", "device=cpu"]
    return benchmark(overrides, quiet=True)
