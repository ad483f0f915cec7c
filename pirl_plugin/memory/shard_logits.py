"""Logits of every rank's queries with rows that lie on all ranks; the scores travel, the rows stay."""

from __future__ import annotations

import torch
from torch import Tensor

from pirl_plugin.distributed import all_gather, all_reduce_sum, all_to_all, rank, world_size
from pirl_plugin.functional import nce


def shard_logits(queries: Tensor, rows: Tensor, places: Tensor, counts: Tensor) -> Tensor:
    """Compares all ranks' queries with rows of each rank; collective, forward and backward.

    Args:
        queries: this rank's embeddings over the temperature, ``(V, B, D)``.
        rows: this rank's rows, ``(n_r, D)``.
        places: which of them, for the images of all ranks in rank order ``(R B, k)``, or one set for all ``(k,)``; the
            same k on every rank.
        counts: which of these are candidates, ``(R B, k)``.

    Returns:
        ``(V, B, R k)``: the candidates of rank 0, then those of rank 1, ...; -inf where one does not count.
    """
    return _ShardLogits.apply(queries, rows, places, counts)


class _ShardLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, queries: Tensor, rows: Tensor, places: Tensor, counts: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows, places, counts)  # type: ignore[attr-defined]
        everyone = all_gather(queries.transpose(0, 1)).transpose(0, 1)  # (V, R B, D)
        logits = nce.candidate_logits(everyone, rows, places)
        return _to_queries(logits.masked_fill(~counts, -torch.inf))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows, places, counts = ctx.saved_tensors  # type: ignore[attr-defined]
        weights = _to_rows(grads[0]).masked_fill(~counts, 0)
        gradient = all_reduce_sum(nce.weighted_rows(weights, rows, places).contiguous())  # (V, R B, D)
        return gradient.unflatten(1, (world_size(), -1))[:, rank()], None, None, None


def _to_queries(logits: Tensor) -> Tensor:
    """``(V, R B, k)`` of all images and this rank's rows to ``(V, B, R k)`` of this rank's images and all rows."""
    received = all_to_all(logits.unflatten(1, (world_size(), -1)).transpose(0, 1))  # (R, V, B, k)
    return received.permute(1, 2, 0, 3).flatten(2)


def _to_rows(weights: Tensor) -> Tensor:
    """The way back of ``_to_queries``."""
    received = all_to_all(weights.unflatten(2, (world_size(), -1)).permute(2, 0, 1, 3))  # (R, V, B, k)
    return received.transpose(0, 1).flatten(1, 2)
