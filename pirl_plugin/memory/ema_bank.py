"""The memory bank of NPID (Wu et al. 2018) and PIRL: a moving average of every image's embedding."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pirl_plugin.distributed import all_gather, broadcast_
from pirl_plugin.registry import Configurable, register_memory_bank
from pirl_plugin.schema import PROVIDED, Fraction, PositiveInt, checked


@register_memory_bank("ema_memory_bank")
@checked
class EMAMemoryBank(Configurable, nn.Module):
    """One unit-norm row per image: ``m <- normalise(momentum * m + (1 - momentum) * f)`` (PIRL, weight 0.5).

    Every rank holds all rows and applies every rank's update, so that the copies never differ.

    Args:
        num_images: rows, n.
        dim: dimensions of an embedding, D.
        momentum: weight of the OLD row, in [0, 1]; 0.5 in the paper.

    Attributes:
        rows: ``(n, D)`` float32, unit norm, part of the state dict. Random directions at first.
    """

    rows: Tensor

    def __init__(
        self,
        num_images: Annotated[PositiveInt, PROVIDED],
        dim: Annotated[PositiveInt, PROVIDED],
        momentum: Fraction = 0.5,
    ) -> None:
        super().__init__()
        self.num_images, self.dim, self.momentum = num_images, dim, momentum
        self.register_buffer("rows", F.normalize(torch.randn(num_images, dim), dim=1))

    def synchronize(self) -> None:
        """Gives every rank rank 0's rows; collective, to be called once before training."""
        broadcast_(self.rows)

    def check_ids(self, ids: Tensor) -> None:
        """Raises where an id has no row. On a GPU the check runs there, without waiting for it."""
        valid = ((ids >= 0) & (ids < self.num_images)).all()
        n = self.num_images
        hint = f"the bank has {n} rows, valid 0..{n - 1}: set loss.num_images to the dataset's size."
        if ids.is_cuda:
            torch._assert_async(valid, f"An image id is outside the memory bank; {hint}")
        elif not valid:
            outside = ids[(ids < 0) | (ids >= self.num_images)][0].item()
            raise IndexError(f"Image id {outside} is outside the memory bank; {hint}")

    @torch.no_grad()
    def update(self, ids: Tensor, embeddings: Tensor) -> None:
        """Moves the rows of a batch towards its embeddings; collective: all ranks see the same rows after it.

        An image that stands several times in the global batch (a sampler's padding) moves once, towards the mean of its
        normalised embeddings; the last one does not win.

        Args:
            ids: image ids ``(B,)`` int64, the same B on every rank.
            embeddings: embeddings of the untransformed images ``(B, D)``; normalised here.

        Raises:
            IndexError: an id outside the bank (CPU; an asynchronous assertion on a GPU).
            ValueError: shapes that do not match.
        """
        if embeddings.shape != (ids.shape[0], self.dim):
            raise ValueError(
                f"embeddings must be {(ids.shape[0], self.dim)} for these ids, got {tuple(embeddings.shape)}."
            )
        self.check_ids(ids)
        ids = all_gather(ids)
        new = all_gather(F.normalize(embeddings.detach().to(self.rows.dtype), dim=1))

        # torch.unique would make the host wait for a GPU; a (B, B) comparison does not
        same = ids.unsqueeze(0) == ids.unsqueeze(1)
        mean = same.to(new.dtype) @ new / same.sum(dim=1, keepdim=True)
        mean = mean[
            same.to(torch.uint8).argmax(dim=1)
        ]  # repeats all carry their first one's bits: any write order will do

        old = self.rows[ids]
        mixed = self.momentum * old + (1 - self.momentum) * mean
        norm = mixed.norm(dim=1, keepdim=True)
        # opposite vectors can cancel; a row without a direction would stay zero for ever
        updated = torch.where(norm > 1e-6, mixed / norm.clamp_min(1e-6), old)
        self.rows.index_copy_(0, ids, updated)

    def extra_repr(self) -> str:
        """Shape and momentum, for ``print(loss)``."""
        return f"num_images={self.num_images}, dim={self.dim}, momentum={self.momentum}"
