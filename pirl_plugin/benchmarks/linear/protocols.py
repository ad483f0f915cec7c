"""Published recipes of linear evaluation as data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pirl_plugin.models.trunks import LAYERS

Norm = Literal["affine", "plain", "none"]
Schedule = Literal["imagenet", "places205", "inaturalist2018"]

# The published schedules are of these datasets, which their number of classes tells from all others.
SCHEDULE_OF_CLASSES: dict[int, str] = {1000: "imagenet", 205: "places205", 8142: "inaturalist2018"}

_GOYAL_EPOCHS = {"imagenet": 28, "places205": 14, "inaturalist2018": 84}
_SEVENTHS = (2 / 7, 4 / 7, 6 / 7)


@dataclass(frozen=True)
class Protocol:
    """How linear classifiers are trained on a frozen trunk with SGD.

    Attributes:
        layers: those that it measures.
        pooling: ``grid`` (about 9,000 numbers) or ``avg`` (global).
        norm: batch norm per channel before the classifier: ``affine``, ``plain`` (without scale and shift) or ``none``.
        init: of the classifier: ``normal`` N(0, 0.01) and bias 0, or ``uniform`` in +- 1 / sqrt(inputs), as torch does.
        lr: at the start, for ``batch_size`` images a step.
        weight_decay: of the weights and the bias; never of the batch norm.
        nesterov: whether the momentum is Nesterov's.
        drops: parts of the training after which the learning rate is divided by 10, from the next epoch's start on.
        cosine: the learning rate falls to 0 along a cosine, from epoch to epoch, instead.
        epochs: passes over the training images, for each dataset that a number is published for, or for ``any``.
        colours: training views also jitter brightness, contrast and saturation and the light's colour.
        momentum: of SGD.
        batch_size: images of a step, over all processes.
        cached: features are computed once, of the evaluation view, instead of training views of every epoch.
        unstated: what the source leaves open, and what is done here.
    """

    layers: Sequence[str]
    pooling: Literal["grid", "avg"]
    norm: Norm
    init: Literal["normal", "uniform"]
    lr: float
    weight_decay: float
    nesterov: bool
    drops: tuple[float, ...]
    epochs: Mapping[str, int]
    cosine: bool = False
    colours: bool = False
    momentum: float = 0.9
    batch_size: int = 256
    cached: bool = False
    unstated: Sequence[str] = field(default=())

    def published_epochs(self, num_classes: int) -> int | None:
        """Number of epochs for the dataset with this number of classes; None where none is published."""
        return self.epochs.get(SCHEDULE_OF_CLASSES.get(num_classes, ""), self.epochs.get("any"))

    def lr_factor(self, epoch: int, num_epochs: int) -> float:
        """Learning rate of an epoch (0-based) as a fraction of the first one's."""
        done = epoch / num_epochs
        if self.cosine:
            return 0.5 * (1 + math.cos(math.pi * done))
        return 10.0 ** -sum(done >= drop for drop in self.drops)


_PAPER = Protocol(
    layers=LAYERS,
    pooling="grid",
    norm="plain",
    init="normal",
    lr=0.01,
    weight_decay=5e-4,
    nesterov=False,
    drops=(1 / 3, 2 / 3),
    epochs=_GOYAL_EPOCHS,
    unstated=(
        "batch size: 256",
        "batch norm without scale and shift before the classifier, as Goyal et al.",
        "initial weights: N(0, 0.01), as Goyal et al.",
        "plain momentum, not Nesterov's",
        "training views: random resized crop and flip",
    ),
)

PROTOCOLS: dict[str, Protocol] = {
    # Misra & van der Maaten 2020: two drops, weight decay 5e-4.
    "paper": _PAPER,
    # VISSL's benchmark/linear_image_classification: three drops, the batch norm has a scale and a shift.
    "vissl": Protocol(
        layers=LAYERS,
        pooling="grid",
        norm="affine",
        init="uniform",
        lr=0.01,
        weight_decay=5e-4,
        nesterov=True,
        drops=_SEVENTHS,
        epochs=_GOYAL_EPOCHS,
    ),
    # The code of Goyal et al. 2019 for a ResNet-50: 140,000 steps, a drop each 40,000.
    "goyal19": Protocol(
        layers=LAYERS,
        pooling="grid",
        norm="plain",
        init="normal",
        lr=0.01,
        weight_decay=1e-4,
        nesterov=True,
        drops=_SEVENTHS,
        epochs=_GOYAL_EPOCHS,
        colours=True,
        unstated=("batch statistics of all 256 images; there, of the 32 of each GPU",),
    ),
    # MoCo's own linear classifier.
    "moco": Protocol(
        layers=("res5",),
        pooling="avg",
        norm="none",
        init="normal",
        lr=30.0,
        weight_decay=0.0,
        nesterov=False,
        drops=(0.6, 0.8),
        epochs={"imagenet": 100},
    ),
    # SwAV's own linear classifier.
    "swav": Protocol(
        layers=("res5",),
        pooling="avg",
        norm="none",
        init="normal",
        lr=0.3,
        weight_decay=1e-6,
        nesterov=False,
        drops=(),
        cosine=True,
        epochs={"imagenet": 100},
    ),
    # Nobody's: rate, weight decay and drops of the PIRL paper, but res5 of unaugmented images, Nesterov's momentum and
    # 28 epochs for any dataset. Quick, and comparable with nothing published.
    "goyal19_cached": Protocol(
        layers=("res5",),
        pooling="grid",
        norm="plain",
        init="normal",
        lr=0.01,
        weight_decay=5e-4,
        nesterov=True,
        drops=(1 / 3, 2 / 3),
        epochs={"any": 28},
        cached=True,
    ),
}


def equally_spaced(num_drops: int) -> tuple[float, ...]:
    """Points that divide a training into ``num_drops + 1`` equal parts."""
    return tuple(part / (num_drops + 1) for part in range(1, num_drops + 1))
