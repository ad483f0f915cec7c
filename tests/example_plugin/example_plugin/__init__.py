"""A loss, a collator and a benchmark of one's own; their YAMLs lie in ``benchmark_configs/`` beside this file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from classy_vision.losses import ClassyLoss, register_loss
from torch import Tensor

from pirl_plugin.benchmarks.context import Benchmark, BenchmarkContext, Result
from pirl_plugin.benchmarks.features import train_and_test
from pirl_plugin.data.collators import ViewCollator
from pirl_plugin.registry import Configurable, register_benchmark, register_collator
from pirl_plugin.schema import PositiveFloat, checked


@register_loss("uniformity")
@checked
class Uniformity(Configurable, ClassyLoss):
    """Log of the mean Gaussian potential between embeddings (Wang & Isola 2020): small where they spread evenly.

    Args:
        t: inverse width of the potential.
    """

    def __init__(self, t: PositiveFloat = 2.0) -> None:
        super().__init__()
        self.t = t

    def forward(self, output: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Of one batch."""
        distances = F.pdist(F.normalize(output["image"].float(), dim=1))
        return distances.square().mul(-self.t).exp().mean().log()


@register_collator("upside_down")
class UpsideDown(ViewCollator):
    """All views, each turned upside down."""

    def __call__(self, samples: Any) -> dict[str, Any]:
        """``{"input": {view: (B, ...)}, "target": ids (B,)}``."""
        batch = super().__call__(samples)
        return {**batch, "input": {view: x.flip(-2) for view, x in batch["input"].items()}}


@register_benchmark("centroid")
@checked
class Centroid(Benchmark):
    """Nearest class centroid of frozen features: top-1."""

    def run(self, context: BenchmarkContext) -> Iterator[Result]:
        """Yields one number, in percent of the test images."""
        train, test, classes, _ = train_and_test(context, ["res5"], "avg")
        centroids = F.one_hot(train.labels, classes).float().T @ F.normalize(train.of["res5"], dim=1)
        hits = (test.of["res5"] @ F.normalize(centroids, dim=1).T).argmax(dim=1) == test.labels
        yield Result({"layer": "res5"}, "top1", 100 * hits.float().mean().item(), "centroid", headline=True)
