"""What is said of linear classifiers while they are trained: memory, loss and accuracy, choices, divergence."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pirl_plugin import distributed
from pirl_plugin.benchmarks.linear.probes import GridPoint, ProbeGrid
from pirl_plugin.benchmarks.linear.protocols import Protocol
from pirl_plugin.records import memory_gib

log = logging.getLogger(__name__)

_WORTH_SAYING = 2**30  # bytes


class Running:
    """Loss and accuracy of an epoch's training views, of each classifier of a grid."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.loss = torch.zeros(count, device=device, dtype=torch.float64)
        self.hits = torch.zeros(count, device=device, dtype=torch.float64)
        self.images, self.steps, self.multi = 0, 0, False

    def add(self, losses: Tensor, scores: Tensor, targets: Tensor) -> None:
        """What ``ProbeGrid.train_step`` gave for a batch."""
        self.loss += losses
        self.steps += 1
        self.images += len(targets)
        self.multi = targets.ndim == 2
        if not self.multi:
            self.hits += (scores.argmax(dim=-1) == targets).sum(dim=-1)

    def summary(self, grid: ProbeGrid, layer: str) -> str:
        """``res5 loss 3.21, top-1 45.6 %`` of the classifier with the smallest loss.

        Raises:
            ValueError: every classifier has diverged.
        """
        loss = distributed.all_reduce_mean(self.loss) / self.steps
        hits = distributed.all_reduce_mean(self.hits) / self.images
        if not bool(torch.isfinite(loss).any()):
            raise diverged(layer, grid.points)
        best = int(loss.nan_to_num(torch.inf).argmin())
        accuracy = "" if self.multi else f", top-1 {100 * float(hits[best]):.1f} %"
        which = f" ({grid.points[best]})" if len(grid.points) > 1 else ""
        return f"{layer} loss {float(loss[best]):.3f}{accuracy}{which}"


def diverged(layer: str, points: Sequence[GridPoint]) -> ValueError:
    """The error to raise where no classifier of a layer is left."""
    tried = "; ".join(map(str, points))
    return ValueError(f"the linear classifiers of {layer} have diverged ({tried}): set a lower benchmark.lr.")


def best_index(values: Sequence[float], layer: str, points: Sequence[GridPoint]) -> int:
    """Index of the largest value; of equals the first; what is not finite has diverged.

    Raises:
        ValueError: all have diverged.
    """
    known = [index for index, value in enumerate(values) if math.isfinite(value)]
    if not known:
        raise diverged(layer, points)
    return max(known, key=lambda index: (values[index], -index))


def say_where_at_the_end(layer: str, chosen: GridPoint, points: Sequence[GridPoint]) -> None:
    """Warns where the best value is the lowest or the highest that was tried."""
    for name in ("lr", "weight_decay"):
        tried, value = sorted({getattr(point, name) for point in points}), getattr(chosen, name)
        if len(tried) > 1 and value in (tried[0], tried[-1]):
            log.warning(
                "%s: the chosen %s = %g is at the end of the grid: a wider one may do better.", layer, name, value
            )


def say_memory(
    shapes: Mapping[str, tuple[int, int]],
    num_classes: int,
    points: Mapping[str, Sequence[GridPoint]],
    protocol: Protocol,
    device: torch.device,
) -> None:
    """Says what the classifiers take where it is much.

    Raises:
        ValueError: more than there is.
    """
    copies = 3 + (2 if protocol.norm == "affine" else 0)  # weights, gradients, momentum; the scaled ones and theirs
    size = 4 * copies * sum(num_classes * dims * len(points[layer]) for layer, (_, dims) in shapes.items())
    available = memory_gib() if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory / 2**30
    count = sum(map(len, points.values()))
    text = f"{count} linear classifiers with {num_classes} classes take {size / 2**30:.1f} GiB while they are trained"
    if available is not None and size / 2**30 > 0.9 * available:
        raise ValueError(f"{text}, of {available:.1f} GiB: use fewer layers or a smaller grid.")
    if size > _WORTH_SAYING and distributed.is_primary():
        log.info("%s.", text)
