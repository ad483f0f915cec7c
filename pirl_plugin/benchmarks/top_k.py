"""Top-k accuracy that neither rewards nor punishes ties."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k_credits(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Probability that each image's right class is among the first k when ties are broken at random.

    With ``h`` classes scored above the right one and ``t`` scored the same (itself included) it is
    ``clamp((k - h) / t, 0, 1)``.

    Args:
        scores: ``(..., N, C)``, higher is likelier.
        labels: right classes, ``(N,)`` int64.
        k: 1 or more; C or more gives 1.

    Returns:
        ``(..., N)``; NaN where an image's scores hold NaN.
    """
    right = scores.gather(-1, labels[:, None].expand(*scores.shape[:-1], 1))
    higher = (scores > right).sum(dim=-1)
    tied = (scores == right).sum(dim=-1)
    return ((k - higher) / tied).clamp(0, 1).masked_fill(torch.isnan(scores).any(dim=-1), torch.nan)


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int) -> float:
    """Expected top-k accuracy in percent when ties are broken at random.

    See ``top_k_credits``: constant scores give ``100 k / C``, not 0 and not 100.

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
    return 100 * float(top_k_credits(scores, labels, k).double().mean())
