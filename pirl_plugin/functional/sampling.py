"""Draws of negatives: uniform, without an alias table, the own image left out exactly."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_negative_ids(ids: Tensor, num_negatives: int, num_images: int) -> Tensor:
    """Other images for each image of a batch, uniform with replacement (PIRL App. A: "randomly for each data point").

    Args:
        ids: image ids ``(B,)``.
        num_negatives: K. At ``K = num_images - 1`` every other image is taken exactly once instead.
        num_images: n, > 1.

    Returns:
        ``(B, K)`` ids, none of them the row's own.
    """
    if num_negatives == num_images - 1:
        others = torch.arange(num_images - 1, device=ids.device).repeat(ids.shape[0], 1)
    else:
        others = torch.randint(num_images - 1, (ids.shape[0], num_negatives), device=ids.device)
    return others.add_(others >= ids.unsqueeze(1))


def draw_shared_ids(num_negatives: int, num_images: int, device: torch.device) -> Tensor:
    """One set of candidates for a whole batch; the caller leaves out an image's own id.

    Returns:
        ``(K,)`` ids, uniform with replacement; all ``n`` of them when ``K = num_images - 1`` asks for every other one.
    """
    if num_negatives == num_images - 1:
        return torch.arange(num_images, device=device)
    return torch.randint(num_images, (num_negatives,), device=device)
