"""Distances between two views of the same image against those of different images, all pairs of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Distances of identical embeddings come out as anything up to 2e-8 in float64: finer differences are no differences.
_RESOLUTION = 1e-6


@dataclass(frozen=True)
class PairDistances:
    """What the distances between the unit embeddings of n images and of their n transformed views look like.

    Attributes:
        same: distance of each image to its own view, ``(n,)`` float64, in [0, 2].
        same_mean: their mean.
        different_mean: mean over the ``n (n - 1)`` pairs of an image and another image's view.
        different_std: standard deviation of those.
        same_cosine: mean cosine of an image and its own view.
        different_cosine: mean cosine of an image and another image's view.
        auc: probability that a pair of the same image is nearer than a pair of different images; a tie counts half.
        retrieval: how often an image is the nearest one to its own view, as a fraction; ties are broken at random.
        edges: of the histograms' bins, ``(bins + 1,)``, from 0 to 2.
        same_histogram: fraction of the same-image pairs in each bin, ``(bins,)``.
        different_histogram: likewise for pairs of different images.
    """

    same: Tensor
    same_mean: float
    different_mean: float
    different_std: float
    same_cosine: float
    different_cosine: float
    auc: float
    retrieval: float
    edges: Tensor
    same_histogram: Tensor
    different_histogram: Tensor


@torch.no_grad()
def pair_distances(images: Tensor, views: Tensor, bins: int = 100, chunk_elements: int = 1 << 22) -> PairDistances:
    """Compares every view with every image, by the l2 distance of their embeddings scaled to unit length.

    The cosine is ``1 - distance ** 2 / 2``. Everything is computed in float64; distances that differ by less than 1e-6
    are the same.

    Args:
        images: ``(n, D)``, embeddings of n images, of any length.
        views: ``(n, D)``, row i that of image i's transformed view.
        bins: of the histograms.
        chunk_elements: how many distances are in memory at once, at least n.

    Raises:
        ValueError: not two equal shapes, fewer than two images, or a value that is not finite.
    """
    if images.ndim != 2 or images.shape != views.shape or len(images) < 2:
        raise ValueError(
            "embeddings of at least two images and of as many views are needed, both (n, D), got "
            f"{tuple(images.shape)} and {tuple(views.shape)}."
        )
    if not (bool(torch.isfinite(images).all()) and bool(torch.isfinite(views).all())):
        raise ValueError("the embeddings hold values that are not finite: the weights have diverged.")
    images, views = (F.normalize(x.double(), dim=1) for x in (images, views))
    n = len(images)
    same = _distance((images * views).sum(dim=1))
    ranked = same.sort().values
    totals = torch.zeros(4, dtype=torch.float64, device=images.device)  # sum, of squares, of wins, of cosines
    histogram = torch.zeros(bins, dtype=torch.float64, device=images.device)
    found = 0.0
    rows = max(1, chunk_elements // n)
    for start in range(0, n, rows):
        table = _distance(views[start : start + rows] @ images.T)
        own = torch.arange(start, start + len(table), device=table.device)
        right = same[own, None]  # not the table's own, which may be rounded to the other side
        is_other = torch.arange(n, device=table.device) != own[:, None]
        nearer = ((table < right) & is_other).sum(dim=1)
        tied = 1 + ((table == right) & is_other).sum(dim=1)
        found += float(((1 - nearer) / tied).clamp(0, 1).sum())
        other = table[is_other]
        below, upto = (torch.searchsorted(ranked, other, right=side) for side in (False, True))
        totals += torch.stack([other.sum(), (other**2).sum(), (below + upto).sum() / 2, (1 - other**2 / 2).sum()])
        histogram += _histogram(other, bins)
    total, squares, wins, cosines = (totals / (n * (n - 1))).tolist()
    return PairDistances(
        same=same,
        same_mean=float(same.mean()),
        different_mean=total,
        different_std=max(0.0, squares - total**2) ** 0.5,
        same_cosine=float((1 - same**2 / 2).mean()),
        different_cosine=cosines,
        auc=wins / n,
        retrieval=found / n,
        edges=torch.linspace(0, 2, bins + 1, dtype=torch.float64),
        same_histogram=_histogram(same, bins).cpu() / n,
        different_histogram=histogram.cpu() / (n * (n - 1)),
    )


def _distance(cosine: Tensor) -> Tensor:
    """l2 distance of unit vectors, as a whole multiple of the resolution."""
    return (2 - 2 * cosine).clamp(0, 4).sqrt().div(_RESOLUTION).round() * _RESOLUTION


def _histogram(distances: Tensor, bins: int) -> Tensor:
    places = (distances * (bins / 2)).long().clamp(max=bins - 1)
    return torch.bincount(places, minlength=bins).double()
