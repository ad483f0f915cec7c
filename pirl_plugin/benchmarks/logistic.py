"""Multinomial logistic regression on cached features, to convergence: the same result from any seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Standardizer:
    """Mean and scale of each feature of a training set."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, x: Tensor) -> Standardizer:
        """From ``(N, D)``; a feature that never varies is only centred."""
        deviation, mean = torch.std_mean(x, dim=0, correction=0)
        varies = deviation > 1e-6 * (1 + mean.abs())
        return cls(mean, torch.where(varies, 1 / deviation.clamp(min=1e-30), torch.zeros_like(deviation)))

    def __call__(self, x: Tensor) -> Tensor:
        """Zero mean and unit deviation per feature."""
        return (x - self.mean) * self.scale


@dataclass(frozen=True)
class Classifier:
    """``scores = x @ weight + bias``: weight ``(D, C)``, bias ``(C,)``."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Scores ``(N, C)`` of ``(N, D)``."""
        return x @ self.weight + self.bias


def fit_logistic(
    x: Tensor, labels: Tensor, num_classes: int, l2: float, start: Classifier | None = None, max_iter: int = 300
) -> Classifier:
    """Minimises ``mean cross entropy + l2 / 2 * ||weight||^2`` by L-BFGS; the bias is free.

    Args:
        x: standardised features, ``(N, D)`` float32.
        labels: ``(N,)`` int64 in ``[0, num_classes)``.
        num_classes: C.
        l2: weight of the penalty, >= 0.
        start: where to start; zero by default. The problem is convex: it changes the time, not the end.
        max_iter: L-BFGS iterations at most.
    """
    weight = torch.zeros(x.shape[1], num_classes, device=x.device) if start is None else start.weight.clone()
    bias = torch.zeros(num_classes, device=x.device) if start is None else start.bias.clone()
    weight.requires_grad_(True)
    bias.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        tolerance_grad=1e-5,
        tolerance_change=1e-7,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(torch.addmm(bias, x, weight), labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Classifier(weight.detach(), bias.detach())


@dataclass(frozen=True)
class Choice:
    """The penalty chosen, and how every one tried did on what was held out.

    Attributes:
        l2: of the smallest held-out loss.
        loss: mean held-out cross entropy of each penalty, nats.
        accuracy: held-out accuracy of each penalty, percent.
    """

    l2: float
    loss: dict[float, float]
    accuracy: dict[float, float]


def choose_l2(
    x: Tensor, labels: Tensor, num_classes: int, candidates: Sequence[float], held_out: Sequence[Tensor]
) -> tuple[Choice, Classifier]:
    """The penalty of smallest cross entropy on held-out parts of the TRAINING set; of equals, the strongest.

    The loss, not the accuracy, chooses: it moves far less from one random part to another.

    Args:
        x: standardised features, ``(N, D)``.
        labels: ``(N,)``.
        num_classes: C.
        candidates: penalties to try.
        held_out: parts, each a bool ``(N,)``, true for the images that are not fitted.

    Returns:
        The choice, and the classifier fitted with it beside the last part: a start for the fit on all.
    """
    loss, accuracy = dict.fromkeys(candidates, 0.0), dict.fromkeys(candidates, 0.0)
    fitted: dict[float, Classifier] = {}
    total = sum(int(part.sum()) for part in held_out)
    for part in held_out:
        fit_x, fit_labels, test_x, test_labels = x[~part], labels[~part], x[part], labels[part]
        last: Classifier | None = None
        for l2 in sorted(candidates, reverse=True):  # from strong to weak, each starting where the one before ended
            last = fitted[l2] = fit_logistic(fit_x, fit_labels, num_classes, l2, last)
            scores = last(test_x)
            loss[l2] += float(F.cross_entropy(scores, test_labels, reduction="sum")) / total
            accuracy[l2] += 100 * int((scores.argmax(dim=1) == test_labels).sum()) / total
    best = min(loss, key=lambda l2: (loss[l2], -l2))
    return Choice(best, loss, accuracy), fitted[best]


def held_out_parts(labels: Tensor, parts: int, generator: torch.Generator) -> list[Tensor]:
    """Disjoint random parts with about as many images of each class, bool ``(N,)`` each.

    The only image of a class is in none: without it the class would be unknown to the fit. There may be fewer parts
    than asked for where there are hardly any images.
    """
    part_of = torch.full((len(labels),), -1)
    on_host = labels.cpu()
    for label in on_host.unique():
        members = (on_host == label).nonzero()[:, 0]
        if len(members) > 1:
            first = int(torch.randint(parts, (), generator=generator))
            order = torch.randperm(len(members), generator=generator)
            part_of[members[order]] = (torch.arange(len(members)) + first) % parts
    found = [(part_of == part).to(labels.device) for part in range(parts)]
    return [part for part in found if part.any()]
