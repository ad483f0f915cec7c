"""The loss of PIRL: two noise-contrastive terms against one memory bank."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from classy_vision.losses import ClassyLoss, register_loss
from torch import Tensor

from pirl_plugin.distributed import all_reduce_mean
from pirl_plugin.functional import nce, nce_blocks, nce_triton
from pirl_plugin.functional.nce_blocks import Contrast
from pirl_plugin.functional.sampling import draw_negative_ids, draw_shared_ids
from pirl_plugin.registry import Configurable, build
from pirl_plugin.schema import PROVIDED, Component, Fraction, PositiveFloat, PositiveInt, checked


@register_loss("pirl_nce")
@checked
class PIRLNCELoss(Configurable, ClassyLoss):
    """``lam * L(g(I^t), m_I) + (1 - lam) * L(f(I), m_I)``, nats, batch mean (PIRL Eq. 5).

    ``L`` contrasts an embedding with the bank row ``m_I`` of its own image and with rows of other images; see
    :mod:`pirl_plugin.functional.nce` for the estimators. Both views share one draw of negatives. The loss only reads
    the bank; the hook ``memory_bank_update`` writes it. Once Z is known no ``(B, K, D)`` block of rows is ever in
    memory: see :mod:`pirl_plugin.functional.nce_blocks` for the CPU, ``nce_triton`` for a GPU.

    Args:
        num_images: n, rows of the bank: images in the training set.
        dim: D, dimensions of an embedding.
        num_negatives: N, other images' rows to contrast with; clipped to n - 1 with a warning.
        temperature: tau of Eq. 3, dimensionless.
        lam: lambda of Eq. 5, weight of the transformed view's term; 0 is NPID and needs no transformed view.
        estimator: ``nce`` (fixed normaliser, the released implementation), ``softmax`` (Eq. 3 and 4 as printed) or
            ``infonce`` (cross entropy).
        negatives: ``per_image`` (App. A: drawn for each data point) or ``shared`` (one set for the batch).
        memory_bank: configuration of the bank.
        normalizer: Z of the ``nce`` estimator; null estimates it from the first ``normalizer_steps`` training batches,
            as n times the mean of ``exp(s / tau)`` over all candidates of all ranks, and keeps it from then on.
        normalizer_steps: training batches that Z is averaged over; the released implementation takes 1. Small datasets
            want more: see the README on the fixed normaliser.
        transformed_view: key of the transformed view in the model's output.

    Attributes:
        memory_bank: the bank; part of the state dict, like Z.
        last_statistics: 0-dim tensors of the last call, for logging: mean similarity with the own row and with the
            negatives, by view and over all views.
    """

    needed_hooks: ClassVar[tuple[str, ...]] = ("memory_bank_update",)

    log_normalizer: Tensor
    normalizer_batches: Tensor

    def __init__(
        self,
        num_images: Annotated[PositiveInt | None, PROVIDED],
        dim: PositiveInt = 128,
        num_negatives: PositiveInt = 32000,
        temperature: PositiveFloat = 0.07,
        lam: Fraction = 0.5,
        estimator: Literal["nce", "softmax", "infonce"] = "nce",
        negatives: Literal["per_image", "shared"] = "per_image",
        memory_bank: Annotated[Mapping[str, Any], Component("memory_bank")] | None = None,
        normalizer: PositiveFloat | None = None,
        normalizer_steps: PositiveInt = 1,
        transformed_view: str = "patches",
    ) -> None:
        super().__init__()
        if num_images is None or num_images < 2:
            raise ValueError(f"num_images must be the number of training images, at least 2, got {num_images}.")
        if num_negatives > num_images - 1:
            warnings.warn(
                f"num_negatives={num_negatives} is more than the other images of a set of {num_images}: "
                f"using all {num_images - 1} of them.",
                stacklevel=3,
            )
        self.num_images, self.dim, self.lam, self.temperature = num_images, dim, lam, temperature
        self.num_negatives = min(num_negatives, num_images - 1)
        self.estimator, self.negatives, self.transformed_view = estimator, negatives, transformed_view
        self.normalizer_steps = normalizer_steps if normalizer is None else 0
        self.memory_bank = build(
            "memory_bank", memory_bank or {"name": "ema_memory_bank"}, num_images=num_images, dim=dim
        )
        # log Z, because Z itself leaves float32 at small temperatures; float64, because nothing else is as cheap
        start = torch.tensor(0.0 if normalizer is None else normalizer, dtype=torch.float64).log()
        self.register_buffer("log_normalizer", start)
        self.register_buffer("normalizer_batches", torch.tensor(0))
        self._normalizer_fixed = False
        self.last_statistics: dict[str, Tensor] = {}

    @property
    def normalizer(self) -> float:
        """Z of the ``nce`` estimator, 0 before its first batch. Reading it waits for the device."""
        return float(self.log_normalizer.exp())

    @property
    def views(self) -> list[str]:
        """Views whose embeddings enter the loss: those of a weight above 0."""
        return list(self._weights)

    @property
    def _weights(self) -> dict[str, float]:
        return {view: w for view, w in (("image", 1 - self.lam), (self.transformed_view, self.lam)) if w > 0}

    def forward(self, output: Mapping[str, Tensor], target: Tensor, negative_ids: Tensor | None = None) -> Tensor:
        """Loss of one batch.

        Args:
            output: embeddings by view: ``"image"`` and, unless lam is 0, ``transformed_view``; each ``(B, D)``,
                normalised here.
            target: image ids ``(B,)`` int64.
            negative_ids: candidates to contrast with, ``(B, K)`` or ``(K,)``; drawn when not given. An image's own id
                among them is left out.

        Returns:
            Scalar in nats, float32 at least, whatever autocast says.

        Raises:
            KeyError: a view that the loss needs is not in ``output``.
            IndexError: an id outside the bank.
        """
        weights = self._weights
        missing = [view for view in weights if view not in output]
        if missing:
            raise KeyError(f"The loss needs the view {missing[0]!r} (lam={self.lam}); the model gave {sorted(output)}.")
        for view in weights:
            if output[view].shape != (len(target), self.dim):
                raise ValueError(
                    f"The embedding of view {view!r} must be {(len(target), self.dim)} (batch, loss.dim), got "
                    f"{tuple(output[view].shape)}: give the head's dim and loss.dim the same value."
                )
        self.memory_bank.check_ids(target)
        with torch.autocast(target.device.type, enabled=False):
            embeddings = torch.stack([output[view] for view in weights])
            dtype = torch.promote_types(embeddings.dtype, torch.float32)
            queries = F.normalize(embeddings.to(dtype), dim=-1)
            own_rows = self.memory_bank.rows_of(target).to(dtype)
            positive = torch.einsum("vbd,bd->vb", queries, own_rows) / self.temperature
            contrast = self._contrast(queries / self.temperature, positive, target, negative_ids)
            terms = zip(weights.values(), contrast.losses.mean(dim=1), strict=True)
            value = torch.stack([weight * term for weight, term in terms]).sum()
        self._keep_statistics(list(weights), positive.detach(), contrast)
        return value

    def _contrast(self, queries: Tensor, positive: Tensor, target: Tensor, negative_ids: Tensor | None) -> Contrast:
        """The losses by view and image, in the fastest way that there is for this device, bank and estimator."""
        if negative_ids is not None:
            self.memory_bank.check_ids(negative_ids)
        z_is_known = self.estimator != "nce" or self._normalizer_is_fixed()
        if hasattr(self.memory_bank, "negative_logits"):  # no process has all rows
            shared, count = self.negatives == "shared", self.num_negatives
            negative = self.memory_bank.negative_logits(queries, target, negative_ids, count, shared)
            return self._plain(positive, negative, z_is_known)
        rows = self.memory_bank.rows
        own = target if negative_ids is not None or self.negatives == "shared" else None  # where it can occur
        if negative_ids is None and self.negatives == "shared":
            negative_ids = draw_shared_ids(self.num_negatives, self.num_images, target.device)
        elif negative_ids is None:
            negative_ids = draw_negative_ids(target, self.num_negatives, self.num_images)
        if z_is_known and nce_triton.usable(queries, negative_ids, self.estimator):
            fast = nce_triton.contrast
        elif z_is_known and not queries.is_cuda:
            fast = nce_blocks.contrast
        else:
            negative = nce.candidate_logits(queries, rows, negative_ids)
            return self._plain(positive, nce.without_own(negative, negative_ids, own), z_is_known)
        return fast(queries, positive, rows, negative_ids, own, self.estimator, self.log_normalizer.to(queries.dtype))

    def _plain(self, positive: Tensor, negative: Tensor, z_is_known: bool) -> Contrast:
        """From all logits, ``(V, B)`` and ``(V, B, K)``; candidates that do not count are at -inf."""
        own, others = positive.flatten(), negative.flatten(0, 1)
        if self.estimator == "nce":
            log_z = self.log_normalizer if z_is_known else self._update_normalizer(positive, negative)
            losses = nce.nce(own, others, log_z.to(positive.dtype), self.num_images)
        else:
            losses = (nce.softmax if self.estimator == "softmax" else nce.infonce)(own, others)
        counts = torch.isfinite(negative)
        total = negative.detach().masked_fill(~counts, 0).sum(dim=2)
        return Contrast(losses.view_as(positive), total, counts.sum(dim=2).to(total.dtype))

    def _normalizer_is_fixed(self) -> bool:
        """Whether Z changes no more. Waits for the device as long as it does, in the first training batches."""
        if not self._normalizer_fixed:
            self._normalizer_fixed = int(self.normalizer_batches) >= self.normalizer_steps
        return self._normalizer_fixed

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._normalizer_fixed = False  # the restored Z may be one that is not fixed yet

    @torch.no_grad()
    def _update_normalizer(self, positive: Tensor, negative: Tensor) -> Tensor:
        """Log Z to use now, 0-dim float64. Branches are on the device: no host synchronisation."""
        batch = nce.log_mean_exp(torch.cat([positive.unsqueeze(-1), negative], dim=-1).double())
        shift = 1 / self.temperature  # the largest possible logit: the mean over ranks is taken below overflow
        batch = all_reduce_mean((batch - shift).exp()).log() + shift + math.log(self.num_images)
        seen = self.normalizer_batches
        mean = torch.logaddexp(self.log_normalizer + seen.double().log(), batch) - (seen + 1).double().log()
        used = torch.where(seen < self.normalizer_steps, mean, self.log_normalizer)
        if self.training:
            self.log_normalizer.copy_(used)
            self.normalizer_batches.add_((seen < self.normalizer_steps).to(seen.dtype))
        return used

    def _keep_statistics(self, views: list[str], positive: Tensor, contrast: Contrast) -> None:
        own = positive.mean(dim=1) * self.temperature
        total, count = contrast.logits.sum(dim=1), contrast.candidates.sum(dim=1)
        others = total / count * self.temperature
        self.last_statistics = {"positive_similarity": own.mean(), "negative_similarity": others.mean()}
        for index, view in enumerate(views):
            self.last_statistics[f"{view}/positive_similarity"] = own[index]
            self.last_statistics[f"{view}/negative_similarity"] = others[index]
