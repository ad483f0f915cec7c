"""What a linear classifier learns and how it is judged: one class an image, or any number of them (VOC)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pirl_plugin.benchmarks.average_precision import mean_average_precision
from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.benchmarks.features import class_labels, number_of_classes
from pirl_plugin.benchmarks.top_k import top_k_accuracy

Metrics = dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """What came of one layer: metrics on the test images in percent, and what else to record."""

    metrics: Metrics
    extra: dict[str, Any]


@dataclass(frozen=True)
class Targets:
    """Labels of both splits, in the order of image ids.

    Attributes:
        train: class of each image, ``(N,)`` int64; or ``(N, C)`` int8: 1 present, -1 absent, 0 ignored (VOC: shown by
            difficult objects only).
        test: likewise.
        num_classes: C.
    """

    train: Tensor
    test: Tensor
    num_classes: int

    @property
    def tops(self) -> tuple[int, ...]:
        """Which top-k accuracies are of interest: top-5 only among more than five classes."""
        return (1, 5) if self.num_classes > 5 else (1,)

    @property
    def multi(self) -> bool:
        """Whether an image can have several classes."""
        return self.train.ndim == 2

    @classmethod
    def of(cls, context: BenchmarkContext) -> Targets:
        """Those of the context's datasets: classes where they have them, else multi-labels.

        Raises:
            ValueError: splits without labels, or with different classes.
        """
        splits = (context.train, context.test)
        if any(getattr(split, "labels", None) is not None for split in splits):
            train, test = (
                torch.from_numpy(class_labels(split, what))
                for split, what in zip(splits, ("train", "test"), strict=True)
            )
            return cls(train, test, number_of_classes(context))
        multi = [getattr(split, "multi_labels", None) for split in splits]
        for split, labels, what in zip(splits, multi, ("train", "test"), strict=True):
            if labels is None:
                class_labels(split, what)  # says what is missing
        names = [list(getattr(split, "class_names", []) or []) for split in splits]
        train, test = (torch.from_numpy(np.asarray(labels, dtype=np.int8)) for labels in multi)
        if names[0] != names[1] or train.shape[1] != test.shape[1]:
            different = sorted(set(names[0]) ^ set(names[1]))[:5]
            raise ValueError(
                f"the train and test splits have different classes, for example {different}: use matching splits."
            )
        return cls(train, test, train.shape[1])


def mean_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of the images, in nats.

    One class an image: cross entropy. Several: binary cross entropy, summed over the classes, so that each class is a
    logistic regression of its own; what is ignored adds nothing.

    Args:
        scores: ``(..., B, C)``.
        targets: ``(B,)`` int64, or ``(B, C)``: 1, -1, or 0 for ignored.

    Returns:
        ``(...)``.
    """
    if targets.ndim == 1:
        log_probability = F.log_softmax(scores, dim=-1)
        index = targets.view(-1, 1).expand(*scores.shape[:-1], 1)
        return -log_probability.gather(-1, index).squeeze(-1).mean(dim=-1)
    sign = targets.to(scores.dtype)
    return (F.softplus(-sign * scores) * sign.abs()).sum(dim=-1).mean(dim=-1)


def metrics_of(scores: Tensor, targets: Tensor, tops: Sequence[int] = (1,)) -> Metrics:
    """Accuracies ``top1``, ``top5``, ..., or ``mAP`` of multi-labels (area under the interpolated curve), in percent.

    Raises:
        ValueError: scores that are not a number.
    """
    if targets.ndim == 1:
        return {f"top{k}": top_k_accuracy(scores, targets, k) for k in tops}
    return {"mAP": 100 * mean_average_precision(scores.double().cpu().numpy(), targets.cpu().numpy())}


def held_out_mask(targets: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Images to choose with, bool ``(N,)`` on the CPU: the same share of each class, as near as whole images allow.

    At least one image of a class remains to be learned from. Of multi-labels the images are drawn without regard to
    them.
    """
    groups = torch.zeros(len(targets), dtype=torch.int64) if targets.ndim == 2 else targets.cpu()
    order = torch.randperm(len(groups), generator=generator)
    order = order[groups[order].argsort(stable=True)]  # class by class, each in random order
    counts = groups.bincount()
    rank = torch.arange(len(groups)) - (counts.cumsum(0) - counts)[groups[order]]
    # whole images: one more with the probability of what is left, so that small classes are not forgotten
    wanted = counts * fraction
    chosen = (wanted.floor() + (torch.rand(len(counts), generator=generator) < wanted % 1)).clamp(
        max=(counts - 1).clamp(min=0)
    )
    mask = torch.zeros(len(groups), dtype=torch.bool)
    mask[order] = rank < chosen[groups[order]]
    return mask
