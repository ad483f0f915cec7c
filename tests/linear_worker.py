"""Small images for the tests of streamed linear classifiers, and what is compared between one process and two.

Run as a program, with RANK and WORLD_SIZE set: ``python linear_worker.py FOLDER`` writes ``FOLDER/rank_R.pt``.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import pirl_plugin  # noqa: F401  (registers all components)
from pirl_plugin import distributed
from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.benchmarks.linear.benchmark import Linear
from pirl_plugin.benchmarks.linear.probes import GridPoint, ProbeGrid
from pirl_plugin.benchmarks.linear.protocols import PROTOCOLS, Protocol
from pirl_plugin.benchmarks.linear.streamed import Plan, StreamedProbes
from pirl_plugin.benchmarks.linear.targets import Outcome, Targets
from pirl_plugin.registry import build

SIZE = 16
TRUNK = {"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "small"}
VIEW = {"name": "eval_view", "resize": SIZE, "crop": SIZE}
COLOURS = [(255, 60, 60), (60, 255, 60), (60, 60, 255), (220, 220, 60), (220, 60, 220), (60, 220, 220)]


class Squares:
    """Noisy squares, one colour a class; with several classes an image, halves of two colours.

    Ids in ``unreadable`` give the next image, under its own id. Every image that is read is counted in ``seen``.
    """

    labels: np.ndarray | None = None
    multi_labels: np.ndarray | None = None

    def __init__(
        self, size: int, classes: int = 4, seed: int = 0, noise: int = 120, multi: bool = False, unreadable: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        self.size, self.unreadable, self.seen = size, unreadable, 0
        self.fingerprint = f"{size} {classes} {seed} {noise} {multi}"
        self.class_names = [str(c) for c in range(classes)]
        first = np.arange(size) % classes
        second = rng.integers(0, classes, size) if multi else first
        if multi:
            self.multi_labels = np.full((size, classes), -1, dtype=np.int8)
            self.multi_labels[np.arange(size), second] = 1
            self.multi_labels[np.arange(size), first] = 1
            self.multi_labels[rng.random((size, classes)) < 0.1] = 0
        else:
            self.labels = first.astype(np.int64)
        colours = np.array(COLOURS)[np.stack([first, second], axis=1)]  # (N, 2, 3)
        pixels = np.repeat(colours, SIZE // 2, axis=1)[:, :, None] + rng.normal(0, noise, (size, SIZE, SIZE, 3))
        self.pixels = np.clip(pixels, 0, 255).astype(np.uint8)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, image_id: int) -> tuple[Image.Image, int]:
        image_id = max(image_id, self.unreadable)
        self.seen += 1
        return Image.fromarray(self.pixels[image_id]), image_id

    def file_name(self, image_id: int) -> str:
        return f"{image_id}.png"


def context(train: Squares, test: Squares, **changes: Any) -> BenchmarkContext:
    torch.manual_seed(0)
    return BenchmarkContext(
        **{
            "trunk": build("model", TRUNK).eval().requires_grad_(False),
            "train": train,
            "test": test,
            "transform": build("transform", VIEW),
            "view": VIEW,
            "image_size": SIZE,
            "trunk_config": TRUNK,
            "batch_size": 17,
            "progress": lambda items, total, what: items,
            **changes,
        }
    )


class Kept(StreamedProbes):
    """Keeps the classifiers, to look at them afterwards."""

    grids: dict[str, ProbeGrid]
    chosen_from: dict[str, ProbeGrid]

    def _measure(self, dataset: Any, targets: torch.Tensor, grids: dict[str, ProbeGrid], what: str) -> Any:
        setattr(self, "grids" if what == "test" else "chosen_from", grids)
        return super()._measure(dataset, targets, grids, what)

    def weights(self) -> dict[str, torch.Tensor]:
        return {
            f"{layer}.{name}": value.detach()
            for layer, grid in self.grids.items()
            for part in ("parameters", "running")
            for name, value in getattr(grid, part).items()
        }


def kept(one: BenchmarkContext, the_plan: Any) -> Kept:
    """Trained and measured."""
    probes = Kept(one, the_plan, Targets.of(one))
    probes.outcomes = probes.run()  # type: ignore[attr-defined]
    return probes


def plan(
    protocol: Protocol = PROTOCOLS["vissl"],
    points: Iterable[GridPoint] = (GridPoint(0.05, 5e-4),),
    layers: Iterable[str] = ("conv1", "res5"),
    num_epochs: int = 3,
    **changes: Any,
) -> Plan:
    return Plan("test", protocol, list(layers), num_epochs, list(points), **changes)


def small_batches(name: str, size: int = 12) -> Protocol:
    return dataclasses.replace(PROTOCOLS[name], batch_size=size)


SCENARIOS: dict[str, dict[str, Any]] = {
    "vissl": {"plan": plan(small_batches("vissl"))},
    "grid": {"plan": plan(small_batches("paper"), [GridPoint(0.1, 0.0), GridPoint(0.001, 0.01)], ["res2"], 2)},
    "multi": {"plan": plan(small_batches("paper"), num_epochs=2), "multi": True},
}


def run(name: str) -> dict[str, Any]:
    scenario = SCENARIOS[name]
    multi = scenario.get("multi", False)
    train, test = Squares(40, multi=multi, unreadable=1), Squares(21, seed=1, multi=multi, unreadable=2)
    one = context(train, test)
    probes = Kept(one, scenario["plan"], Targets.of(one))
    found: dict[str, Outcome] = probes.run()
    return {
        "metrics": {layer: outcome.metrics for layer, outcome in found.items()},
        "extra": {layer: outcome.extra for layer, outcome in found.items()},
        "weights": probes.weights(),
        "seen": train.seen,
    }


CACHED = ("small", "goyal19_cached")


def run_cached(protocol: str) -> dict[str, Any]:
    """A protocol on features that every process has all of."""
    (found,) = Linear(layers=["res2"], protocol=protocol).run(context(Squares(40), Squares(21, seed=1)))
    return {"top1": found.value, "extra": found.extra}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    assert distributed.world_size() == world_size
    found = {name: run(name) for name in SCENARIOS} | {name: run_cached(name) for name in CACHED}
    torch.save(found, folder / f"rank_{rank}.pt")
    dist.destroy_process_group()
