"""The crops that losses of the SwAV family compare: some large ones, which get codes or clusters, and small ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = "image"


def views_of(small_view: str | None) -> list[str]:
    """Outputs of the model that hold the crops."""
    return [LARGE] if small_view is None else [LARGE, small_view]


def unit_crops(output: Mapping[str, Tensor], small_view: str | None, num_views: int, dim: int) -> tuple[Tensor, Tensor]:
    """Unit-norm embeddings of the large crops ``(B, V, D)`` and of the small ones ``(B, C, D)``, float32 at least.

    Raises:
        KeyError: the model gave no large or no small crops.
        ValueError: embeddings of another shape.
    """
    for name in views_of(small_view):
        if name not in output:
            raise KeyError(
                f"The loss needs the output {name!r}; the model gave {sorted(output)}: use the transform image_views, "
                "with num_crops and model.shared_heads={crops: image} for small crops, or set loss.small_view=null."
            )
    large = output[LARGE]
    if large.ndim != 3 or large.shape[1:] != (num_views, dim):
        raise ValueError(
            f"The output {LARGE!r} must hold (B, {num_views}, {dim}): loss.num_views crops, loss.dim dimensions; got "
            f"{tuple(large.shape)}. Set transform.num_views and the head's dim to the same values."
        )
    small = large[:, :0] if small_view is None else output[small_view]
    if small.ndim != 3 or small.shape[::2] != large.shape[::2]:
        raise ValueError(f"The output {small_view!r} must be (B, C, {dim}), got {tuple(small.shape)}.")
    dtype = torch.promote_types(large.dtype, torch.float32)
    return F.normalize(large.to(dtype), dim=-1), F.normalize(small.to(dtype), dim=-1)
