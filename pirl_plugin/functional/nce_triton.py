"""The contrast of :mod:`pirl_plugin.functional.nce` on a GPU, where every image has negatives of its own.

Floor: the ``B K D`` numbers of the bank's rows are read once (4.2 GB in float32 at B = 256, K = 32,000, D = 128). One
kernel fetches a tile of rows, takes the logits of all V views from it, adds up the terms of the losses, and adds the
rows, weighted with the terms' derivatives, to the gradient. Neither rows nor logits are written anywhere; the backward
pass only scales the gradient. For ``infonce`` the sums are relative to the largest logit so far, and rescaled where a
larger one turns up (Milakov & Gimelshein 2018, arXiv:1805.02867, Algorithm 3).

Needs triton, which comes with torch's CUDA builds. ``TRITON_INTERPRET=1`` runs the kernel on the CPU, for tests.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pirl_plugin.functional import nce
from pirl_plugin.functional.nce_blocks import Contrast, count_candidates

try:
    import triton
    import triton.language as tl
except ImportError:  # torch without CUDA
    triton = None

_TILE = 32  # rows of a step: 16 KB in float32 at D = 128, in registers
_PROGRAMS = 4096  # at least as many, so that every processor of a large GPU has several to hide its loads behind


def usable(queries: Tensor, ids: Tensor, estimator: str) -> bool:
    """Whether :func:`contrast` does this: on a GPU with triton, in float32, a set of negatives for each image.

    ``softmax`` is left to the plain path: its derivatives need the sum over all candidates before the first of them.
    """
    one_each = ids.ndim == 2 and estimator in ("nce", "infonce")
    return triton is not None and queries.is_cuda and queries.dtype == torch.float32 and one_each


def contrast(
    queries: Tensor,
    positive: Tensor,
    rows: Tensor,
    ids: Tensor,
    own: Tensor | None,
    estimator: str,
    log_normalizer: Tensor | float,
) -> Contrast:
    """As :func:`pirl_plugin.functional.nce_blocks.contrast`, for what :func:`usable` says."""
    candidates = count_candidates(ids, own, positive)
    excluded = ids.new_full((len(ids),), -1) if own is None else own
    if estimator == "nce":
        offset = nce.offset(candidates, log_normalizer, len(rows))
        losses, logits = _Terms.apply(queries, rows, ids, excluded, offset, False)
        return Contrast(losses - F.logsigmoid(positive - offset), logits, candidates)
    log_sum, logits = _Terms.apply(queries, rows, ids, excluded, torch.zeros_like(positive), True)
    return Contrast(torch.logaddexp(positive, log_sum) - positive, logits, candidates)


class _Terms(torch.autograd.Function):
    """Of the negatives alone: ``sum softplus(logit - offset)``, or ``logsumexp(logit)`` if ``infonce``; ``(V, B)``."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        queries: Tensor,
        rows: Tensor,
        ids: Tensor,
        excluded: Tensor,
        offset: Tensor,
        infonce: bool,
    ) -> tuple[Tensor, Tensor]:
        views, images, dim = queries.shape
        count = ids.shape[1]
        splits = max(1, min(triton.cdiv(_PROGRAMS, images), triton.cdiv(count, 4 * _TILE)))
        span = triton.cdiv(triton.cdiv(count, splits), _TILE) * _TILE
        sums = queries.new_empty((3, images, splits, views))  # of the terms, of the logits, and the largest logit
        weighted = queries.new_empty((images, splits, views, dim))
        _kernel[(images, splits)](
            queries.contiguous(), rows, ids.contiguous(), excluded, offset.contiguous(), sums, weighted,
            images, splits, count, span, dim,
            VIEWS=views, DIM=triton.next_power_of_2(dim), TILE=_TILE, INFONCE=infonce,
        )  # fmt: skip
        terms, logits, largest = sums
        if infonce:
            scale = (largest - largest.amax(dim=1, keepdim=True)).exp()
            total = (terms * scale).sum(dim=1)
            losses = total.log() + largest.amax(dim=1)
            gradient = (weighted * scale.unsqueeze(3)).sum(dim=1) / total.unsqueeze(2)
        else:
            losses, gradient = terms.sum(dim=1), weighted.sum(dim=1)
        ctx.save_for_backward(gradient.transpose(0, 1))  # type: ignore[attr-defined]
        mean = logits.sum(dim=1).T
        ctx.mark_non_differentiable(mean)  # type: ignore[attr-defined]
        return losses.T, mean

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grads[0].unsqueeze(2) * gradient, None, None, None, None, None


def _program(
    queries: tl.tensor,  # (V, B, D) float32
    rows: tl.tensor,  # (n, D)
    ids: tl.tensor,  # (B, K) int64
    excluded: tl.tensor,  # (B,) int64
    offset: tl.tensor,  # (V, B) float32
    sums: tl.tensor,  # (3, B, splits, V) float32, written
    weighted: tl.tensor,  # (B, splits, V, D) float32, written
    images: tl.tensor,
    splits: tl.tensor,
    count: tl.tensor,
    span: tl.tensor,
    dim: tl.tensor,
    VIEWS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
    INFONCE: tl.constexpr,
) -> None:
    """One image and one span of its candidates."""
    image, split = tl.program_id(0), tl.program_id(1)
    view, column = tl.arange(0, VIEWS), tl.arange(0, DIM)
    of_query = (view * images + image)[:, None] * dim + column[None, :]
    query = tl.load(queries + of_query, mask=(column < dim)[None, :], other=0.0)
    shift = tl.load(offset + view * images + image)
    own = tl.load(excluded + image)
    terms = tl.zeros([VIEWS], tl.float32)
    logit_sum = tl.zeros([VIEWS], tl.float32)
    largest = tl.full([VIEWS], -float("inf"), tl.float32)
    gradient = tl.zeros([VIEWS, DIM], tl.float32)
    for first in range(split * span, tl.minimum(split * span + span, count), TILE):
        place = first + tl.arange(0, TILE)
        chosen = tl.load(ids + image.to(tl.int64) * count + place, mask=place < count, other=0)
        counts = (place < count) & (chosen != own)
        here = chosen.to(tl.int64)[:, None] * dim + column[None, :]
        tile = tl.load(rows + here, mask=counts[:, None] & (column < dim)[None, :], other=0.0).to(tl.float32)
        logits = tl.sum(query[:, None, :] * tile[None, :, :], axis=2)
        logit_sum += tl.sum(logits, axis=1)  # rows that do not count are zero
        if INFONCE:
            logits = tl.where(counts[None, :], logits, -float("inf"))
            above = tl.maximum(largest, tl.max(logits, axis=1))
            above = tl.maximum(above, -1e30)  # a tile in which nothing counts: exp(-inf + inf) would be NaN
            shrink = tl.exp(largest - above)
            weights = tl.exp(logits - above[:, None])
            terms = terms * shrink + tl.sum(weights, axis=1)
            gradient = gradient * shrink[:, None]
            largest = above
        else:
            away = logits - shift[:, None]
            small = tl.exp(-tl.abs(away))  # softplus without overflow
            softplus = tl.maximum(away, 0.0) + _log1p(small)
            terms += tl.sum(tl.where(counts[None, :], softplus, 0.0), axis=1)
            weights = tl.where(away >= 0, 1.0, small) / (1.0 + small)
        gradient += tl.sum(weights[:, :, None] * tile[None, :, :], axis=1)
    here = (image * splits + split) * VIEWS + view
    size = images * splits * VIEWS
    tl.store(sums + here, terms)
    tl.store(sums + size + here, logit_sum)
    tl.store(sums + 2 * size + here, largest)
    tl.store(weighted + here[:, None] * dim + column[None, :], gradient, mask=(column < dim)[None, :])


def _log1p_of(x: tl.tensor) -> tl.tensor:
    """``log(1 + x)`` for x in [0, 1], exact also where ``1 + x`` is rounded (Kahan): triton has none of its own."""
    total = 1.0 + x
    lost = total == 1.0
    return tl.where(lost, x, tl.log(total) * (x / tl.where(lost, 1.0, total - 1.0)))


if triton is not None:
    _log1p, _kernel = triton.jit(_log1p_of), triton.jit(_program)
