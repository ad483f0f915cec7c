"""The contrast of PIRL (Misra & van der Maaten 2020, arXiv:1912.01991) as pure functions of logits.

A logit is ``s(q, m) / tau``: a cosine similarity over a temperature. Everything stays in log space, so that a
temperature of 0.01 (logits of +-100) neither overflows nor loses the small terms.

The three estimators differ in ``h``, the probability that a candidate shows the query's image, and in which terms of
Eq. 4 they keep:

========= ========================================================================= ==========================
estimator ``h``                                                                      loss
========= ========================================================================= ==========================
nce       ``P / (P + N / n)``, ``P = exp(logit) / Z``; Z a constant (released code)  Eq. 4
softmax   softmax over the positive and its N negatives (Eq. 3)                      Eq. 4
infonce   the same softmax                                                           ``-log h(q, m_I)`` alone
========= ========================================================================= ==========================
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nce(positive: Tensor, negatives: Tensor, log_normalizer: Tensor | float, num_images: int) -> Tensor:
    """Eq. 4 with a fixed normaliser, as in the released implementation and in Wu et al. 2018 (Eq. 4-7).

    With ``a = logit - log Z - log(N / n)``, ``h = sigmoid(a)`` and ``1 - h = sigmoid(-a)``.

    Args:
        positive: logits of the query with its own image's row, ``(B,)``.
        negatives: logits with N other images' rows, ``(B, N)``; ``-inf`` marks a candidate to leave out.
        log_normalizer: ``log Z``.
        num_images: ``n``; the noise distribution is uniform, ``P_n = 1 / n``.

    Returns:
        The loss of each query in nats, ``(B,)``.
    """
    count = torch.isfinite(negatives).sum(dim=1).to(negatives.dtype)
    shift = offset(count, log_normalizer, num_images)
    return -F.logsigmoid(positive - shift) - F.logsigmoid(shift.unsqueeze(1) - negatives).sum(dim=1)


def offset(count: Tensor, log_normalizer: Tensor | float, num_images: int) -> Tensor:
    """``log Z + log(N / n)``: the logit at which the estimator ``nce`` is undecided, ``h = 1 / 2``.

    Args:
        count: N, negatives of each query, of any shape.
        log_normalizer: ``log Z``.
        num_images: n.
    """
    return torch.log(count / num_images) + log_normalizer


def softmax(positive: Tensor, negatives: Tensor) -> Tensor:
    """Eq. 4 with the ``h`` of Eq. 3: a softmax over the positive and its negatives.

    The paper writes Eq. 3 for the positive pair only. For a negative ``m'`` this takes the same denominator, so that
    the ``h`` of all candidates sum to 1; taken to the letter, ``m'`` would be counted twice and, with one negative,
    never be pushed away (``h = 1/2`` whatever the similarity).

    Args:
        positive: ``(B,)`` logits.
        negatives: ``(B, N)`` logits; ``-inf`` marks a candidate to leave out.

    Returns:
        The loss of each query in nats, ``(B,)``.
    """
    logits = torch.cat([positive.unsqueeze(1), negatives], dim=1)
    return infonce(positive, negatives) - _log_one_minus_h(logits)[:, 1:].sum(dim=1)


def infonce(positive: Tensor, negatives: Tensor) -> Tensor:
    """Cross entropy of the positive among ``N + 1`` candidates: Eq. 4 without its second term.

    Args:
        positive: ``(B,)`` logits.
        negatives: ``(B, N)`` logits; ``-inf`` marks a candidate to leave out.

    Returns:
        The loss of each query in nats, ``(B,)``; ``log(N + 1)`` where nothing is told apart.
    """
    return torch.logsumexp(torch.cat([positive.unsqueeze(1), negatives], dim=1), dim=1) - positive


def log_mean_exp(logits: Tensor) -> Tensor:
    """``log(mean(exp(logits)))`` over all finite entries, a scalar."""
    count = torch.isfinite(logits).sum()
    return torch.logsumexp(logits.flatten(), dim=0) - count.to(logits.dtype).log()


def _log_one_minus_h(logits: Tensor) -> Tensor:
    """``log(1 - softmax(logits))`` of every candidate, exact also where one candidate takes (almost) all.

    Only the largest ``h`` can exceed one half; there ``1 - h`` is the share of all the others, summed anew. Everywhere
    else ``log1p`` loses nothing. Clamping ``h`` below 1 would be finite too, but would stop the gradient that is needed
    most.
    """
    log_total = torch.logsumexp(logits, dim=1, keepdim=True)
    largest = logits.argmax(dim=1, keepdim=True)
    is_largest = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, largest, True)
    others = torch.logsumexp(logits.masked_fill(is_largest, -torch.inf), dim=1, keepdim=True) - log_total
    # where() alone would pass NaN gradients on from the branch that is not taken
    small = torch.log1p(-torch.exp((logits - log_total).masked_fill(is_largest, -1.0)))
    return torch.where(is_largest, others, small)


class _GatheredLogits(torch.autograd.Function):
    """``einsum("vbd,bkd->vbk", queries, rows[ids])`` without ever holding the ``(B, K, D)`` block."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, queries: Tensor, rows: Tensor, ids: Tensor, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(rows, ids)  # type: ignore[attr-defined]
        ctx.chunk = chunk  # type: ignore[attr-defined]
        by_image = queries.transpose(0, 1)  # (B, V, D): one small matrix product per image serves all views
        logits = queries.new_empty((queries.shape[0], *ids.shape))
        for start in range(0, ids.shape[1], chunk):
            part = slice(start, start + chunk)
            block = rows[ids[:, part]].to(queries.dtype)
            logits[:, :, part] = torch.bmm(by_image, block.transpose(1, 2)).transpose(0, 1)
        return logits

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows, ids = ctx.saved_tensors  # type: ignore[attr-defined]
        return weighted_rows(grads[0], rows, ids, ctx.chunk), None, None, None  # type: ignore[attr-defined]


def candidate_logits(queries: Tensor, rows: Tensor, ids: Tensor, chunk: int | None = None) -> Tensor:
    """Cosine similarities over temperature between queries and bank rows chosen by id; the plain way, in two passes.

    Args:
        queries: embeddings of V views of B images over the temperature, ``(V, B, D)``.
        rows: unit-norm bank rows, ``(n, D)``; no gradient flows into them.
        ids: rows to compare with: ``(B, K)``, a set of its own for each image, or ``(K,)``, one set for the batch.
        chunk: candidates gathered at a time when each image has its own; bounds the memory at ``B * chunk * D``.
            Default: 65,536 rows in all.

    Returns:
        Logits ``(V, B, K)``.
    """
    if ids.ndim == 1:
        return queries @ rows[ids].to(queries.dtype).T
    return _GatheredLogits.apply(queries, rows, ids, chunk or _chunk(ids))


def weighted_rows(weights: Tensor, rows: Tensor, ids: Tensor, chunk: int | None = None) -> Tensor:
    """The derivative of ``candidate_logits`` by the queries: sums of the candidates' rows.

    Args:
        weights: ``(V, B, K)``.
        rows: bank rows, ``(n, D)``.
        ids: ``(B, K)`` or ``(K,)``.
        chunk: as for ``candidate_logits``.

    Returns:
        ``(V, B, D)``.
    """
    if ids.ndim == 1:
        return weights @ rows[ids].to(weights.dtype)
    by_image, chunk = weights.transpose(0, 1), chunk or _chunk(ids)
    total = weights.new_zeros((*by_image.shape[:2], rows.shape[1]))
    for start in range(0, ids.shape[1], chunk):
        part = slice(start, start + chunk)
        total.baddbmm_(by_image[:, :, part], rows[ids[:, part]].to(weights.dtype))
    return total.transpose(0, 1)


def _chunk(ids: Tensor) -> int:
    return max(1, (1 << 16) // len(ids))


def without_own(logits: Tensor, ids: Tensor, own: Tensor | None) -> Tensor:
    """Sets logits ``(V, B, K)`` with an image's own row to -inf; ``own`` is ``(B,)``, None where it cannot occur."""
    return logits if own is None else logits.masked_fill(ids == own.unsqueeze(1), -torch.inf)
