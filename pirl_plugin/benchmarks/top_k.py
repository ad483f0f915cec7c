"""Top-k accuracy that neither rewards nor punishes ties."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int) -> float:
    """Expected top-k accuracy in percent when ties are broken at random.

    With ``h`` classes scored above the right one and ``t`` scored the same (itself included), the right one is among
    the first k with probability ``clamp((k - h) / t, 0, 1)``: constant scores give ``100 k / C``, not 0 and not 100.

    Args:
        scores: ``(N, C)``, higher is likelier.
        labels: right classes, ``(N,)`` int64.
        k: 1 or more; C or more gives 100.

    Raises:
        ValueError: no rows, wrong shapes, or scores that are not a number.
    """
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or len(labels) == 0:
        raise ValueError(f"scores (N, C) and labels (N,) do not fit: {tuple(scores.shape)}, {tuple(labels.shape)}.")
    if bool(torch.isnan(scores).any()):
        raise ValueError("the scores hold NaN: the classifier has diverged.")
    right = scores.gather(1, labels[:, None])
    higher = (scores > right).sum(dim=1)
    tied = (scores == right).sum(dim=1)
    credit = ((k - higher) / tied).clamp(0, 1)
    return 100 * float(credit.double().mean())
