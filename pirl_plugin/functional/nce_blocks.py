"""The contrast of :mod:`pirl_plugin.functional.nce` at the memory's speed: each bank row is fetched once.

Floor for B images with K negatives each and V views: ``B K D`` numbers read from random rows (524 MB in float32 at
B = 32, K = 32,000, D = 128) and ``4 V B K D`` operations, which take a third of the reading's time. The plain way also
writes what it read, once for each view, reads it again, and again in the backward pass.

Here some thousand rows at a time are gathered, small enough to stay in a core's cache, and used up before the next
ones: the logits of all views, the losses, their derivatives by the logits, and the sum of the rows weighted with these,
which is the gradient. The backward pass only scales it. Memory: one such block; never ``(B, K, D)``, forward or
backward. The estimators that need all logits of an image before they know any derivative (``softmax``, ``infonce``)
keep the rows of one image, ``(K, D)``.

Queries that share their candidates form a group: the V views of an image, or all images' where ``ids`` is one set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pirl_plugin.functional import nce

_HOT_ROWS = 2048  # gathered at a time: 1 MB in float32 at D = 128
_EXACT = 40.0  # above it softplus(x) is x to the last bit, also in float64; its default, 20, is not


class Contrast(NamedTuple):
    """Outcome for V views of B images.

    Attributes:
        losses: ``(V, B)``, nats.
        logits: sum of each query's logits with its candidates, ``(V, B)``, without gradient.
        candidates: how many there are, the own image left out, ``(V, B)``.
    """

    losses: Tensor
    logits: Tensor
    candidates: Tensor


def contrast(
    queries: Tensor,
    positive: Tensor,
    rows: Tensor,
    ids: Tensor,
    own: Tensor | None,
    estimator: str,
    log_normalizer: Tensor | float,
) -> Contrast:
    """Losses of all queries against bank rows chosen by id.

    Args:
        queries: embeddings over the temperature, ``(V, B, D)``, float32 or float64.
        positive: logits with the own rows, ``(V, B)``.
        rows: the bank, ``(n, D)``, of any float type: products are taken in that of the queries. Gets no gradient.
        ids: candidates, ``(B, K)`` or ``(K,)``.
        own: image ids ``(B,)``, to be left out of the candidates; None: they are not among them.
        estimator: ``nce``, ``softmax`` or ``infonce``, see :mod:`pirl_plugin.functional.nce`.
        log_normalizer: log Z of the estimator ``nce``.
    """
    group, ungroup = _grouping(len(queries), shared=ids.ndim == 1)
    mine = None if own is None else group(own.expand(len(queries), -1))
    candidates = count_candidates(ids, own, positive)
    by_group = ids.unsqueeze(0) if ids.ndim == 1 else ids
    if estimator == "nce":
        offset = nce.offset(candidates, log_normalizer, len(rows))
        losses, logits = _NCE.apply(group(queries), rows, by_group, mine, group(offset))
        return Contrast(ungroup(losses) - F.logsigmoid(positive - offset), ungroup(logits), candidates)
    losses, logits = _Whole.apply(group(queries), group(positive), rows, by_group, mine, getattr(nce, estimator))
    return Contrast(ungroup(losses), ungroup(logits), candidates)


def count_candidates(ids: Tensor, own: Tensor | None, like: Tensor) -> Tensor:
    """Candidates of each query, the own image left out, in the shape ``(V, B)`` and type of ``like``."""
    repeats = 0 if own is None else (ids == own.unsqueeze(1)).sum(dim=1)
    return torch.full_like(like, ids.shape[-1], requires_grad=False) - repeats


def _grouping(views: int, shared: bool) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """``(V, B, ...)`` to ``(groups, queries of a group, ...)`` and back."""
    if shared:
        return lambda x: x.flatten(0, 1).unsqueeze(0), lambda x: x.squeeze(0).unflatten(0, (views, -1))
    return lambda x: x.transpose(0, 1).contiguous(), lambda x: x.transpose(0, 1)


class _NCE(torch.autograd.Function):
    """Second term of Eq. 4 for the estimator ``nce``: a sum over candidates, each of which stands alone.

    ``-log(1 - h) = softplus(logit - offset)``, with the derivative ``h = sigmoid(logit - offset)`` by the logit.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        queries: Tensor,
        rows: Tensor,
        ids: Tensor,
        own: Tensor | None,
        offset: Tensor,
    ) -> tuple[Tensor, Tensor]:
        losses, total, gradient = torch.zeros_like(offset), torch.zeros_like(offset), torch.zeros_like(queries)
        for some, part, block in _blocks(queries, rows, ids, _HOT_ROWS):
            logits = torch.bmm(queries[some], block.mT)
            total[some] += _leave_out_own(logits, ids[some, part], own, some)
            logits -= offset[some].unsqueeze(2)
            losses[some] += F.softplus(logits, threshold=_EXACT).sum(dim=2)
            gradient[some].baddbmm_(torch.sigmoid_(logits), block)
        ctx.save_for_backward(gradient)  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(total)  # type: ignore[attr-defined]
        return losses, total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0].unsqueeze(2) * gradient, None, None, None, None


class _Whole(torch.autograd.Function):
    """Losses of an estimator that sees all logits of a query at once; autograd gives their derivatives by these."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        queries: Tensor,
        positive: Tensor,
        rows: Tensor,
        ids: Tensor,
        own: Tensor | None,
        estimate: Callable[[Tensor, Tensor], Tensor],
    ) -> tuple[Tensor, Tensor]:
        losses, total = torch.empty_like(positive), torch.empty_like(positive)
        by_positive, by_queries = torch.empty_like(positive), torch.empty_like(queries)
        for some, _, block in _blocks(queries, rows, ids, ids.shape[1]):
            logits = torch.bmm(queries[some], block.mT)
            total[some] = _leave_out_own(logits, ids[some], own, some)
            here, others = positive[some].flatten().requires_grad_(), logits.flatten(0, 1).requires_grad_()
            with torch.enable_grad():
                values = estimate(here, others)
            by_here, by_others = torch.autograd.grad(values, (here, others), torch.ones_like(values))
            losses[some], by_positive[some] = values.view_as(losses[some]), by_here.view_as(losses[some])
            by_queries[some] = torch.bmm(by_others.view_as(logits), block)
        ctx.save_for_backward(by_queries, by_positive)  # type: ignore[attr-defined]
        ctx.mark_non_differentiable(total)  # type: ignore[attr-defined]
        return losses, total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        by_queries, by_positive = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0].unsqueeze(2) * by_queries, grads[0] * by_positive, None, None, None, None


def _blocks(queries: Tensor, rows: Tensor, ids: Tensor, at_a_time: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Groups, candidates of them, and these candidates' rows ``(g, k, D)``, in memory that the next block reuses.

    A block holds up to ``at_a_time`` candidates of one group, or all of several groups where these are few.
    """
    groups, count = ids.shape
    several = max(1, _HOT_ROWS // count)
    memory = queries.new_empty(several * min(count, at_a_time) * rows.shape[1])
    for start in range(0, groups, several):
        some = slice(start, start + several)
        for first in range(0, count, at_a_time):
            part = slice(first, first + at_a_time)
            chosen = ids[some, part]
            block = memory[: chosen.numel() * rows.shape[1]].view(chosen.numel(), -1)
            if rows.dtype == block.dtype:
                torch.index_select(rows, 0, chosen.flatten(), out=block)  # into the cache, not into new memory
            else:
                block.copy_(rows.index_select(0, chosen.flatten()))
            yield some, part, block.view(*chosen.shape, -1)


def _leave_out_own(logits: Tensor, ids: Tensor, own: Tensor | None, some: slice) -> Tensor:
    """Sets logits ``(g, q, k)`` with a query's own image to -inf; gives back the sum of the others, ``(g, q)``."""
    if own is None:
        return logits.sum(dim=2)
    is_own = ids.unsqueeze(1) == own[some].unsqueeze(2)
    total = logits.masked_fill(is_own, 0).sum(dim=2)
    logits.masked_fill_(is_own, -torch.inf)
    return total
