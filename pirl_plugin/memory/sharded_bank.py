"""The memory bank for datasets whose rows do not fit one process: every rank keeps a part of them."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from pirl_plugin import distributed
from pirl_plugin.functional import bank_rows
from pirl_plugin.memory import shard_logits, shard_parts
from pirl_plugin.registry import Configurable, register_memory_bank
from pirl_plugin.schema import PROVIDED, Fraction, PositiveInt, checked

log = logging.getLogger(__name__)

_SEEDED_ROWS = 8192  # rows that begin from one seed, so that they do not depend on the number of ranks


@register_memory_bank("sharded_ema_memory_bank")
@checked
class ShardedEMAMemoryBank(Configurable, nn.Module):
    """``ema_memory_bank`` with the rows split over the ranks: n / R on each, never all of them anywhere.

    Rank r of R keeps the rows ``r n // R`` to ``(r + 1) n // R``, moved by the same rule. A step costs each rank about
    what it costs with all rows, whatever n is: it gets the queries of all ranks (``R V B D`` numbers), compares them
    with K / R rows out of its own (``V B K`` products in all), and the logits go back to whose query they are of
    (``V B K`` numbers); the gradient takes the same way back.

    Negatives are drawn from every rank's rows alike, ceil(K / R) from each: as uniform as from all rows at once, but
    spread more evenly. An image's own row is left out where it is drawn. Checkpoints hold each rank's rows in files of
    their own (``torch.distributed.checkpoint``), which any other number of ranks can read.

    100 million images x 128 in bfloat16 on 8 ranks take 3.2 GB on each.

    Args:
        num_images: rows of all ranks, n.
        dim: dimensions of an embedding, D.
        momentum: weight of the OLD row, in [0, 1]; 0.5 in the paper.
        dtype: what rows are stored in, as for ``ema_memory_bank``.

    Attributes:
        storage: this rank's rows and, last, one that nobody reads; not part of the state dict.
    """

    rows_by_image: ClassVar[bool] = False  # nobody may look for all images' rows here

    storage: Tensor

    def __init__(
        self,
        num_images: Annotated[PositiveInt, PROVIDED],
        dim: Annotated[PositiveInt, PROVIDED],
        momentum: Fraction = 0.5,
        dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        self.num_images, self.dim, self.momentum = num_images, dim, momentum
        rank, self.num_shards = distributed.planned_place()
        if num_images < self.num_shards:
            raise ValueError(f"{num_images} rows cannot be split over {self.num_shards} processes: start fewer.")
        self.first, self.last = rank * num_images // self.num_shards, (rank + 1) * num_images // self.num_shards
        self.register_buffer("storage", self._random_rows(dtype), persistent=False)

    def _random_rows(self, dtype: str) -> Tensor:
        """Random directions that depend on the global generator and on the id, not on the number of ranks."""
        seed = int(torch.randint(2**62, (), device="cpu"))
        storage: Tensor | None = None
        for start in range(self.first // _SEEDED_ROWS * _SEEDED_ROWS, self.last, _SEEDED_ROWS):
            generator = torch.Generator().manual_seed(seed + start)
            rows = bank_rows.random_rows(_SEEDED_ROWS, self.dim, dtype, generator)
            if storage is None:
                storage = rows.new_zeros((self.last - self.first + 1, self.dim))
            begin, end = max(start, self.first), min(start + _SEEDED_ROWS, self.last)
            storage[begin - self.first : end - self.first] = rows[begin - start : end - start]
        assert storage is not None
        return storage

    @property
    def shard(self) -> Tensor:
        """This rank's rows, those of the images ``first`` to ``last - 1``."""
        return self.storage[:-1]

    def synchronize(self) -> None:
        """Says how much memory each rank gives; nothing is copied, since every row is in one place only.

        Raises:
            ValueError: the rows were split over another number of processes than there are.
        """
        if distributed.world_size() != self.num_shards:
            raise ValueError(
                f"The memory bank was split over {self.num_shards} processes, but there are "
                f"{distributed.world_size()}: start them with torchrun, or build the loss after init_process_group."
            )
        size = self.storage.numel() * self.storage.element_size()
        log.info(
            "Memory bank: %d rows, %d on each of %d processes, %.2f GB (%s)",
            self.num_images, self.last - self.first, self.num_shards, size / 1e9, self.storage.dtype,
        )  # fmt: skip

    def check_ids(self, ids: Tensor) -> None:
        """Raises where an id has no row on any rank, see ``bank_rows.check_ids``."""
        bank_rows.check_ids(ids, self.num_images)

    @torch.no_grad()
    def rows_of(self, ids: Tensor) -> Tensor:
        """The rows of these images, ``(B, D)`` float32; collective: every rank asks for as many."""
        everyone = distributed.all_gather(ids)
        is_here, place = self._places(everyone)
        found = self.storage[place].float().masked_fill(~is_here.unsqueeze(1), 0)
        return distributed.all_reduce_sum(found)[distributed.rank() * len(ids) :][: len(ids)]

    def negative_logits(
        self, queries: Tensor, own: Tensor, ids: Tensor | None, num_negatives: int, shared: bool
    ) -> Tensor:
        """Logits with negatives from all ranks' rows; collective, forward and backward.

        Args:
            queries: embeddings over the temperature, ``(V, B, D)``, the same shape on every rank.
            own: image ids ``(B,)``, which are left out.
            ids: candidates ``(B, K)`` or ``(K,)``; None: drawn.
            num_negatives: K, how many to draw; rounded up to a multiple of the number of ranks. n - 1 takes all.
            shared: one draw for the images of all ranks, instead of one for each image.

        Returns:
            ``(V, B, K')``, each rank's candidates one after another, with -inf at those that do not count.
        """
        images = distributed.all_gather(own)
        if ids is not None:
            asked = ids if ids.ndim == 2 else ids.expand(len(own), -1)
            counts, places = self._places(distributed.all_gather(asked))
        else:
            places = self._draw(1 if shared else len(images), num_negatives, own.device)
            counts = places < len(self.shard)
            places = places.squeeze(0) if shared else places
        counts = counts & (places + self.first != images.unsqueeze(1))
        return shard_logits.shard_logits(queries, self.storage, places, counts)

    def _draw(self, sets: int, num_negatives: int, device: torch.device) -> Tensor:
        """This rank's share of K negatives, places in its shard ``(sets, K / R)``; all of them for K = n - 1."""
        here = len(self.shard)
        if num_negatives == self.num_images - 1:
            most = math.ceil(self.num_images / self.num_shards)  # one more than there are here: the row nobody reads
            return torch.arange(most, device=device).expand(sets, -1)
        return torch.randint(here, (sets, math.ceil(num_negatives / self.num_shards)), device=device)

    def _places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Whether images are here, and where in ``storage``; of others the place of the row that nobody reads."""
        is_here = (ids >= self.first) & (ids < self.last)
        return is_here, torch.where(is_here, ids - self.first, self.last - self.first)

    @torch.no_grad()
    def update(self, ids: Tensor, embeddings: Tensor) -> None:
        """Moves the rows of a batch, each on the rank that has it; collective. As ``EMAMemoryBank.update``.

        Raises:
            IndexError: an id outside the bank (CPU; an asynchronous assertion on a GPU).
            ValueError: shapes that do not match.
        """
        bank_rows.check_shape(ids, embeddings, self.dim)
        self.check_ids(ids)
        ids, new = distributed.all_gather(ids), distributed.all_gather(bank_rows.unit(embeddings))
        _, places = self._places(ids)
        moved = bank_rows.moved(self.storage[places], bank_rows.mean_by_id(ids, new), self.momentum)
        self.storage.index_copy_(0, places, moved.to(self.storage.dtype))  # other ranks' images go to the spare row

    def save_parts(self, folder: Path) -> None:
        """Writes this rank's rows to ``folder``; collective."""
        shard_parts.save(self.shard, self.first, folder)

    def load_parts(self, folder: Path) -> None:
        """Takes this rank's rows from what any number of ranks wrote.

        Raises:
            ValueError: rows are missing, or are not of this bank.
        """
        shard_parts.load(self.shard, self.first, self.num_images, folder)

    def extra_repr(self) -> str:
        """Shape, momentum and what is here, for ``print(loss)``."""
        here = f"rows {self.first}..{self.last - 1} of {self.num_shards} shards"
        return f"num_images={self.num_images}, dim={self.dim}, momentum={self.momentum}, {here}"
