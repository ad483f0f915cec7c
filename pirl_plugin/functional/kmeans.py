"""Spherical k-means over rows that the processes share: equations alone, no state."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pirl_plugin.distributed import all_reduce_mean, broadcast_

_SCORES_AT_ONCE = 1 << 25  # 128 MiB of float32: 1.28 million rows x 3,000 centroids would be 15 GB
_ROWS_AT_ONCE = 1 << 16  # a copy of all in another type would be as large as the bank


@torch.no_grad()
def nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """Index of the centroid with the largest dot product.

    Args:
        rows: ``(N, D)``, of any floating type: a memory bank may store them in bfloat16.
        centroids: ``(K, D)``, whose type the products are taken in.

    Returns:
        ``(N,)`` int64; of equally near ones the first.
    """
    size = max(1, _SCORES_AT_ONCE // len(centroids))
    parts = [(part.to(centroids.dtype) @ centroids.T).argmax(dim=1) for part in rows.split(size)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=rows.device)


@torch.no_grad()
def spherical_kmeans_step(rows: Tensor, centroids: Tensor) -> Tensor:
    """Each centroid becomes the direction of the sum of the rows nearest to it; one without any stays where it was.

    Collective: each process passes its own share of the rows, and all get the same centroids.

    Args:
        rows: unit norm, ``(N, D)``, of any floating type; N may differ between processes.
        centroids: unit norm, ``(K, D)``, the same on every process; sums are taken in their type.

    Returns:
        ``(K, D)``.
    """
    sums = torch.zeros_like(centroids)
    for part, clusters in zip(rows.split(_ROWS_AT_ONCE), nearest(rows, centroids).split(_ROWS_AT_ONCE), strict=True):
        sums.index_add_(0, clusters, part.to(sums.dtype))
    sums = all_reduce_mean(sums)
    moved = sums.norm(dim=1, keepdim=True) > 1e-12  # opposite rows can cancel too
    return torch.where(moved, F.normalize(sums, dim=1), centroids)


@torch.no_grad()
def spherical_kmeans(rows: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """``iterations`` steps of ``spherical_kmeans_step`` from given centroids; the same bits on every process.

    In float32 at least, whatever the rows are stored in.
    """
    centroids = centroids.to(torch.promote_types(centroids.dtype, torch.float32))
    for _ in range(iterations):
        centroids = spherical_kmeans_step(rows, centroids)
    return broadcast_(centroids.contiguous())
