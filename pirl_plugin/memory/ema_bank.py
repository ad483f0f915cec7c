"""The memory bank of NPID (Wu et al. 2018) and PIRL: a moving average of every image's embedding."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from pirl_plugin.distributed import all_gather, broadcast_
from pirl_plugin.functional import bank_rows
from pirl_plugin.registry import Configurable, register_memory_bank
from pirl_plugin.schema import PROVIDED, Fraction, PositiveInt, checked


@register_memory_bank("ema_memory_bank")
@checked
class EMAMemoryBank(Configurable, nn.Module):
    """One unit-norm row per image: ``m <- normalise(momentum * m + (1 - momentum) * f)`` (PIRL, weight 0.5).

    Every rank holds all rows and applies every rank's update, so that the copies never differ. Where that is too much
    memory, ``sharded_ema_memory_bank`` splits them.

    Args:
        num_images: rows, n.
        dim: dimensions of an embedding, D.
        momentum: weight of the OLD row, in [0, 1]; 0.5 in the paper.
        dtype: what rows are stored in. ``bfloat16`` halves memory and checkpoints; moving averages and products are
            still taken in float32. With a momentum above about 0.99 its steps are too coarse for a row to move.

    Attributes:
        rows: ``(n, D)`` of that type, unit norm, part of the state dict. Random directions at first.
    """

    rows: Tensor

    def __init__(
        self,
        num_images: Annotated[PositiveInt, PROVIDED],
        dim: Annotated[PositiveInt, PROVIDED],
        momentum: Fraction = 0.5,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        self.num_images, self.dim, self.momentum = num_images, dim, momentum
        self.register_buffer("rows", bank_rows.random_rows(num_images, dim, dtype))

    def synchronize(self) -> None:
        """Gives every rank rank 0's rows; collective, to be called once before training."""
        broadcast_(self.rows)

    def check_ids(self, ids: Tensor) -> None:
        """Raises where an id has no row, see ``bank_rows.check_ids``."""
        bank_rows.check_ids(ids, self.num_images)

    def rows_of(self, ids: Tensor) -> Tensor:
        """The rows of these images, ``(B, D)``, as stored."""
        return self.rows[ids]

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
        bank_rows.check_shape(ids, embeddings, self.dim)
        self.check_ids(ids)
        ids, new = all_gather(ids), all_gather(bank_rows.unit(embeddings))
        # repeats all carry the same bits: any order of writing will do
        moved = bank_rows.moved(self.rows[ids], bank_rows.mean_by_id(ids, new), self.momentum)
        self.rows.index_copy_(0, ids, moved.to(self.rows.dtype))

    def extra_repr(self) -> str:
        """Shape, momentum and type, for ``print(loss)``."""
        return f"num_images={self.num_images}, dim={self.dim}, momentum={self.momentum}, dtype={self.rows.dtype}"
