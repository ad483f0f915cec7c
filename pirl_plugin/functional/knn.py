"""Weighted nearest-neighbour classification (Wu et al. 2018, arXiv 1805.01978)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def knn_votes(
    queries: Tensor,
    neighbours: Tensor,
    labels: Tensor,
    k: Sequence[int],
    temperature: float,
    num_classes: int,
    chunk_elements: int = 1 << 25,
) -> dict[int, Tensor]:
    """Votes of each query's k nearest neighbours by cosine, each worth ``exp(cos / temperature)``, per class.

    The votes of one query are divided by its largest weight, which changes no order and no ratio but cannot overflow.

    Args:
        queries: ``(Q, D)``, of any norm.
        neighbours: ``(N, D)``, of any norm.
        labels: class of each neighbour, ``(N,)`` int64 in ``[0, num_classes)``.
        k: numbers of neighbours, each in ``[1, N]``; all come from one search.
        temperature: dimensionless, > 0 (0.07 in the paper).
        num_classes: C.
        chunk_elements: similarities held at a time; bounds the memory.

    Returns:
        ``{k: (Q, C)}`` float32.

    Raises:
        ValueError: a k outside ``[1, N]``, a temperature <= 0, or sizes that do not fit together.
    """
    count = len(neighbours)
    if not k or any(not 1 <= one <= count for one in k):
        raise ValueError(f"k must be in 1..{count} (the number of neighbours), got {list(k)}.")
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}.")
    if labels.shape != (count,) or queries.ndim != 2 or queries.shape[1:] != neighbours.shape[1:]:
        raise ValueError(
            f"queries (Q, D), neighbours (N, D) and labels (N,) do not fit: {tuple(queries.shape)}, "
            f"{tuple(neighbours.shape)}, {tuple(labels.shape)}."
        )
    bank = F.normalize(neighbours.float(), dim=1).T
    unit = F.normalize(queries.float(), dim=1)
    votes = {one: torch.empty(len(queries), num_classes, device=queries.device) for one in k}
    step = max(1, chunk_elements // count)
    for start in range(0, len(queries), step):
        similarity, nearest = (unit[start : start + step] @ bank).topk(max(k), dim=1)
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        classes = labels[nearest]
        for one, table in votes.items():
            rows = torch.zeros(len(weights), num_classes, device=queries.device)
            table[start : start + step] = rows.scatter_add_(1, classes[:, :one], weights[:, :one])
    return votes
