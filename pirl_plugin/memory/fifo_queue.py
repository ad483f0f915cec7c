"""The queue of MoCo (He et al. 2020): embeddings of the most recent batches, whatever images they were of."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pirl_plugin.distributed import all_gather, broadcast_
from pirl_plugin.registry import Configurable, register_memory_bank
from pirl_plugin.schema import PROVIDED, PositiveInt, checked


@register_memory_bank("fifo_queue")
@checked
class FIFOQueue(Configurable, nn.Module):
    """The last ``size`` embeddings of all ranks, unit norm; the oldest make room for the newest.

    Every rank holds the same rows in the same order. The global batch need not divide the queue.

    Args:
        dim: dimensions of an embedding, D.
        size: rows, K (MoCo: 65,536).

    Attributes:
        rows: ``(K, D)`` float32, part of the state dict. Random directions at first.
        position: 0-dim int64, part of the state dict: the row that is written next.
    """

    rows_by_image: ClassVar[bool] = False  # nobody may look for an image's own row here

    rows: Tensor
    position: Tensor

    def __init__(self, dim: Annotated[PositiveInt, PROVIDED], size: PositiveInt = 65536) -> None:
        super().__init__()
        self.size, self.dim = size, dim
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def synchronize(self) -> None:
        """Gives every rank rank 0's rows; collective, to be called once before training."""
        broadcast_(self.rows)
        broadcast_(self.position)

    @torch.no_grad()
    def enqueue(self, embeddings: Tensor) -> None:
        """Appends the embeddings of all ranks, in rank order; collective: all ranks see the same rows after it.

        Args:
            embeddings: ``(B, D)``, the same B on every rank; normalised here. Of a global batch larger than the queue
                the last K stay.

        Raises:
            ValueError: another shape.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.dim:
            raise ValueError(f"embeddings must be (B, {self.dim}), got {tuple(embeddings.shape)}.")
        new = all_gather(F.normalize(embeddings.detach().to(self.rows.dtype), dim=1))
        count = len(new)
        kept = min(count, self.size)  # an index must not occur twice: which write wins is not defined on a GPU
        steps = torch.arange(count - kept, count, device=self.rows.device)
        self.rows.index_copy_(0, (self.position + steps) % self.size, new[count - kept :])
        self.position.copy_((self.position + count) % self.size)

    def update(self, ids: Tensor, embeddings: Tensor) -> None:
        """``enqueue``, as the hook ``memory_bank_update`` calls every bank; a queue does not ask for the ids."""
        self.enqueue(embeddings)

    def extra_repr(self) -> str:
        """Shape, for ``print(loss)``."""
        return f"size={self.size}, dim={self.dim}"
