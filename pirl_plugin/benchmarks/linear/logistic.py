"""Logistic regression on cached features, to convergence: the same result from any seed.

Labels are classes, ``(N,)`` int64 (multinomial), or ``(N, C)`` with 1 present, -1 absent and 0 ignored (a binary
regression of each class).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pirl_plugin.benchmarks.linear.targets import mean_loss

_MOST_AXES = 4096  # above it finding the principal axes takes longer than it saves


@dataclass(frozen=True)
class Standardizer:
    """Zero mean and unit deviation per feature of a training set, then a rotation to its principal axes.

    The rotation changes neither the L2 norm of a classifier nor its scores: it only lets the solver know how much each
    direction varies, which makes it several times faster.

    Attributes:
        mean: of each feature.
        scale: reciprocal deviation of each feature; zero for one that never varies.
        axes: ``(D, D)`` rotation, or None for more than 4,096 features.
        variance: of the training set along each new feature, ``(D,)``.
    """

    mean: Tensor
    scale: Tensor
    axes: Tensor | None
    variance: Tensor

    @classmethod
    def fit(cls, x: Tensor) -> Standardizer:
        """From ``(N, D)`` float32."""
        deviation, mean = torch.std_mean(x, dim=0, correction=0)
        varies = deviation > 1e-6 * (1 + mean.abs())
        scale = torch.where(varies, 1 / deviation.clamp(min=1e-30), torch.zeros_like(deviation))
        if x.shape[1] > _MOST_AXES:
            return cls(mean, scale, None, varies.to(x.dtype))
        standard = (x - mean) * scale
        variance, axes = torch.linalg.eigh((standard.T @ standard).double() / len(x))
        return cls(mean, scale, axes.to(x.dtype), variance.clamp(min=0).to(x.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """``(N, D)`` to ``(N, D)``."""
        standard = (x - self.mean) * self.scale
        return standard if self.axes is None else standard @ self.axes


@dataclass(frozen=True)
class Classifier:
    """``scores = x @ weight + bias``: weight ``(D, C)``, bias ``(C,)``."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Scores ``(N, C)`` of ``(N, D)``."""
        return x @ self.weight + self.bias


def fit_logistic(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    l2: float,
    variance: Tensor | None = None,
    start: Classifier | None = None,
    tolerance: float = 1e-5,
    max_iter: int = 500,
) -> Classifier:
    """Minimises ``mean loss + l2 / 2 * ||weight||^2`` by L-BFGS; the bias is free. The loss is ``mean_loss``'s.

    The Hessian is at most ``variance / 2 + l2`` along uncorrelated features (Boehning 1992; a quarter of the variance
    for binary regressions), by whose square root the solver's coordinates are scaled.

    Args:
        x: features, ``(N, D)`` float32.
        labels: ``(N,)`` int64 in ``[0, num_classes)``, or ``(N, num_classes)``.
        num_classes: C.
        l2: weight of the penalty, >= 0.
        variance: of each feature, ``(D,)``; one by default. Like ``start`` it changes the time, not the result.
        start: where to start; zero by default.
        tolerance: largest entry of the gradient to end with, in coordinates of curvature about 1.
        max_iter: L-BFGS iterations at most.
    """
    bound = 0.5 if labels.ndim == 1 else 0.25
    curvature = bound * (1.0 if variance is None else variance[:, None]) + l2 + 1e-6
    unit = torch.as_tensor(curvature, device=x.device, dtype=x.dtype).rsqrt()
    zero = Classifier(x.new_zeros(x.shape[1], num_classes), x.new_zeros(num_classes))
    weight, bias = (start or zero).weight / unit, (start or zero).bias.clone()
    weight.requires_grad_(True)
    bias.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        tolerance_grad=tolerance,
        tolerance_change=0.01 * tolerance,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        scaled = unit * weight
        loss = mean_loss(torch.addmm(bias, x, scaled), labels) + l2 / 2 * scaled.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return Classifier((unit * weight).detach(), bias.detach())


@dataclass(frozen=True)
class Choice:
    """The penalty chosen, and how every one tried did on what was held out.

    Attributes:
        l2: of the smallest held-out loss.
        loss: mean held-out loss of each penalty, nats.
        accuracy: held-out accuracy of each penalty, percent; empty for multi-labels.
    """

    l2: float
    loss: dict[float, float]
    accuracy: dict[float, float]


def choose_l2(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    candidates: Sequence[float],
    held_out: Sequence[Tensor],
    variance: Tensor | None = None,
) -> tuple[Choice, Classifier]:
    """The penalty of smallest loss on held-out parts of the TRAINING set; of equals, the strongest.

    The loss, not the accuracy, chooses: it moves far less from one random part to another. It falls and then rises as
    the penalty gets weaker, so that the search ends with the first that is worse than the one before.

    Args:
        x: standardised features, ``(N, D)``.
        labels: see ``fit_logistic``.
        num_classes: C.
        candidates: penalties to try.
        held_out: parts, each a bool ``(N,)``, true for the images that are not fitted.
        variance: see ``fit_logistic``.

    Returns:
        The choice, and the classifier fitted with it beside the first part: a start for the fit on all.
    """
    loss: dict[float, float] = {}
    accuracy: dict[float, float] = {}
    total = sum(int(part.sum()) for part in held_out)
    splits = [(x[~part], labels[~part], x[part], labels[part]) for part in held_out]
    fitted: list[Classifier | None] = [None] * len(splits)
    start: Classifier | None = None
    for l2 in sorted(candidates, reverse=True):  # from strong to weak, each starting where the one before ended
        loss[l2] = 0.0
        right = 0.0
        for index, (fit_x, fit_labels, test_x, test_labels) in enumerate(splits):
            classifier = fit_logistic(fit_x, fit_labels, num_classes, l2, variance, fitted[index], tolerance=1e-4)
            fitted[index] = classifier
            scores = classifier(test_x)
            loss[l2] += float(mean_loss(scores, test_labels)) * len(test_labels) / total
            if labels.ndim == 1:
                right += 100 * int((scores.argmax(dim=1) == test_labels).sum()) / total
        if labels.ndim == 1:
            accuracy[l2] = right
        if loss[l2] > min(loss.values()):
            break
        start = fitted[0]
    assert start is not None  # there is at least one candidate and one part
    return Choice(min(loss, key=lambda l2: (loss[l2], -l2)), loss, accuracy), start


def held_out_parts(labels: Tensor, parts: int, generator: torch.Generator) -> list[Tensor]:
    """Disjoint random parts with about as many images of each class, bool ``(N,)`` each; of multi-labels at random.

    The only image of a class is in none: without it the class would be unknown to the fit. There may be fewer parts
    than asked for where there are hardly any images.
    """
    part_of = torch.full((len(labels),), -1)
    on_host = labels.cpu() if labels.ndim == 1 else torch.zeros(len(labels), dtype=torch.int64)
    for label in on_host.unique():
        members = (on_host == label).nonzero()[:, 0]
        if len(members) > 1:
            first = int(torch.randint(parts, (), generator=generator))
            order = torch.randperm(len(members), generator=generator)
            part_of[members[order]] = (torch.arange(len(members)) + first) % parts
    found = [(part_of == part).to(labels.device) for part in range(parts)]
    return [part for part in found if part.any()]
