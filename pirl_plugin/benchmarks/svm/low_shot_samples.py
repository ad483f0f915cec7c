"""Draws the few images that a low-shot classifier learns from: pure numpy."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Negatives = Literal["uniform", "per_class"]


def draw_low_shot(
    labels: npt.NDArray[np.int8], label: int, k: int, negatives: Negatives, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Rows of k images that show a class and of (C - 1) k that do not; images of difficult objects are never drawn.

    Where there are fewer than asked for, all are taken.

    Args:
        labels: ``(N, C)``: 1 present, 0 present only in difficult cases, -1 absent.
        label: the class.
        k: positives.
        negatives: ``uniform``: (C - 1) k drawn from all images without the class, as the released code of Goyal et al.
            and VISSL do; ``per_class``: k that show each other class, from those without this one; an image that shows
            several may be drawn for each but counts once.
        rng: decides.

    Returns:
        Ascending, no row twice.
    """
    present, absent = np.flatnonzero(labels[:, label] == 1), np.flatnonzero(labels[:, label] == -1)
    others = [other for other in range(labels.shape[1]) if other != label]
    drawn = [_draw(present, k, rng)]
    if negatives == "uniform":
        drawn.append(_draw(absent, k * len(others), rng))
    else:
        drawn += [_draw(absent[labels[absent, other] == 1], k, rng) for other in others]
    return np.unique(np.concatenate(drawn))


def _draw(rows: npt.NDArray[np.int64], count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    return rng.choice(rows, min(count, len(rows)), replace=False)


def sample_generator(seed: int, sample: int, k: int, label: int) -> np.random.Generator:
    """The generator of one draw: each (seed, sample, k, class) has its own, whatever else is drawn."""
    return np.random.default_rng(np.random.SeedSequence([seed, sample, k, label]))
