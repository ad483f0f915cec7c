"""How published work fine-tunes on a part of ImageNet's labels: the numbers, and the learning rate they mean."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from pirl_plugin.benchmarks.changes import Changes, changes

_ONE, _TEN = 0.01, 0.1
_SAME = 0.02  # a list of 12,811 of 1,281,167 images is 1 %


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum for a trunk and a linear classifier on it.

    Attributes:
        num_epochs: passes over the labelled part.
        batch_size: images of one step, all processes together.
        trunk_lr: learning rate of the trunk, of the first epoch.
        head_lr: likewise of the classifier.
        milestones: epochs (0-based) from which both are multiplied by ``factor`` once more.
        factor: see ``milestones``.
        cosine: the rates follow half a cosine from epoch to epoch instead, to 0 after the last.
        nesterov: Nesterov's momentum.
        weight_decay: of all weights but batch norms' and biases.
        momentum: of SGD.
        sampling: how the labelled images are chosen.
        lr_batch_size: the rates are meant for this batch size and grow with it; None: they stand as they are.
        top: headline is the top-``top`` accuracy.
    """

    num_epochs: int
    batch_size: int
    trunk_lr: float
    head_lr: float
    milestones: tuple[int, ...] = ()
    factor: float = 0.1
    cosine: bool = False
    nesterov: bool = False
    weight_decay: float = 0.0
    momentum: float = 0.9
    sampling: str = "balanced"
    lr_batch_size: int | None = None
    top: int = 1

    def multiplier(self, epoch: int) -> float:
        """What the rates are multiplied with in an epoch (0-based), for schedule and batch size."""
        scale = self.batch_size / self.lr_batch_size if self.lr_batch_size else 1.0
        if self.cosine:
            return scale * (1 + math.cos(math.pi * epoch / self.num_epochs)) / 2
        return scale * self.factor ** sum(epoch >= milestone for milestone in self.milestones)


# Misra & van der Maaten 2020: random 1 % and 10 %, "the procedure of" Wu et al. 2018, 70 epochs, lr 0.01, divided by 10
# every 30. They name no batch size, momentum and weight decay: these are those of VISSL.
_PAPER = Recipe(70, 256, 0.01, 0.01, (30, 60), nesterov=True, sampling="random", top=5)
# VISSL, eval_resnet_8gpu_transfer_in1k_semi_sup_fulltune.yaml: SimCLR's balanced lists; the rate grows with the batch
_VISSL = Recipe(70, 256, 0.05, 0.05, (30,), nesterov=True, lr_batch_size=256)
# VISSL, dataset/pirl_in1k_per01.yaml over that
_VISSL_PIRL = dataclasses.replace(_VISSL, trunk_lr=0.01, head_lr=0.01, sampling="random", top=5)
# Chen et al. 2020; the schedule is that of their code, which decays by a cosine without warm-up
_SIMCLR = Recipe(60, 4096, 0.05, 0.05, cosine=True, nesterov=True, lr_batch_size=256)
# Caron et al. 2020 and eval_semisup.py
_SWAV = Recipe(20, 256, 0.02, 5.0, (12, 16), factor=0.2)
# Zbontar et al. 2021: the paper's rates; the schedule and the rest are those of evaluate.py
_BARLOW_TWINS = Recipe(20, 256, 0.002, 0.5, cosine=True)

RECIPES: dict[str, dict[float, Recipe]] = {
    "paper": {_ONE: _PAPER, _TEN: _PAPER},
    "vissl": {_ONE: _VISSL, _TEN: _VISSL},
    "vissl_pirl": {_ONE: _VISSL_PIRL, _TEN: _VISSL_PIRL},
    "simclr": {_ONE: _SIMCLR, _TEN: dataclasses.replace(_SIMCLR, num_epochs=30)},
    "swav": {_ONE: _SWAV, _TEN: dataclasses.replace(_SWAV, trunk_lr=0.01, head_lr=0.2)},
    "barlow_twins": {_ONE: _BARLOW_TWINS, _TEN: _BARLOW_TWINS},
}


def published_recipe(protocol: str, fraction: float) -> Recipe:
    """The protocol's numbers for a fraction of the labels; between 1 % and 10 % those of the nearer, by ratio."""
    return RECIPES[protocol][_ONE if fraction < math.sqrt(_ONE * _TEN) else _TEN]


def changed_recipe(
    recipe: Recipe,
    num_epochs: int | None = None,
    batch_size: int | None = None,
    trunk_lr: float | None = None,
    head_lr: float | None = None,
    milestones: tuple[int, ...] | None = None,
    weight_decay: float | None = None,
) -> Recipe:
    """A recipe with some numbers changed; None leaves one as it is.

    Milestones keep their place in a run of another length, unless they are given too.

    Raises:
        ValueError: milestones that are not ascending or not before the end, or that the schedule has no use for.
    """
    if milestones is not None and recipe.cosine:
        raise ValueError("milestones have no effect on this protocol, whose learning rate follows a cosine.")
    if num_epochs is not None and milestones is None:
        milestones = tuple(max(1, round(epoch * num_epochs / recipe.num_epochs)) for epoch in recipe.milestones)
    given: dict[str, Any] = {
        "num_epochs": num_epochs,
        "batch_size": batch_size,
        "trunk_lr": trunk_lr,
        "head_lr": head_lr,
        "milestones": milestones,
        "weight_decay": weight_decay,
    }
    changed = dataclasses.replace(recipe, **{key: value for key, value in given.items() if value is not None})
    if (
        list(changed.milestones) != sorted(changed.milestones)
        or max(changed.milestones, default=0) > changed.num_epochs
    ):
        raise ValueError(
            f"milestones must ascend and lie within the {changed.num_epochs} epochs, got {list(changed.milestones)}."
        )
    return changed


def changed_numbers(recipe: Recipe, protocol: str, fraction: float) -> Changes:
    """In what a recipe and its fraction of the labels differ from the protocol's."""
    published = published_recipe(protocol, fraction)
    pairs = {name: (value, getattr(recipe, name)) for name, value in vars(published).items()}
    parts = list(RECIPES[protocol])
    known = any(abs(fraction - part) <= _SAME * part for part in parts)
    return changes(pairs) | ({} if known else {"fraction": [parts, fraction]})
