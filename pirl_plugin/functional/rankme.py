"""RankMe: the effective rank of an embedding matrix (Garrido et al., ICML 2023, arXiv 2210.02885)."""

from __future__ import annotations

import torch
from torch import Tensor


def rankme(embeddings: Tensor, epsilon: float = 1e-7) -> float:
    """Exponential of the entropy of the singular values' distribution (Garrido et al. 2022, Eq. 1-2).

    ``p_k = sigma_k / ||sigma||_1 + epsilon`` and ``RankMe = exp(-sum_k p_k log p_k)``, over the ``min(N, D)`` singular
    values of the matrix as it is: neither centred nor normalised, as in the paper.

    Args:
        embeddings: ``(N, D)``, one row an image; the paper uses 25,600 of them, and N >= D at the least.
        epsilon: the paper's 1e-7, keeps the logarithm finite.

    Returns:
        A smooth rank, about 1 for collapsed embeddings and at most ``min(N, D)`` (but for epsilon).

    Raises:
        ValueError: not a matrix, no rows, or a value that is not finite.
    """
    if embeddings.ndim != 2 or 0 in embeddings.shape:
        raise ValueError(
            f"embeddings must be a matrix (N, D) with at least one row, got shape {tuple(embeddings.shape)}."
        )
    matrix = embeddings.detach().double()
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("embeddings hold values that are not finite: RankMe is not defined for them.")
    sigma = _singular_values(matrix)
    total = sigma.sum()
    if total == 0:
        raise ValueError("all embeddings are zero: RankMe is not defined for them.")
    p = sigma / total + epsilon
    return float(torch.exp(-(p * p.log()).sum()))


def _singular_values(matrix: Tensor) -> Tensor:
    """Singular values in float64; a tall matrix goes through QR first, whose triangle has the same ones, for speed."""
    if matrix.shape[0] > 2 * matrix.shape[1]:
        matrix = torch.linalg.qr(matrix, mode="r").R
    return torch.linalg.svdvals(matrix)
