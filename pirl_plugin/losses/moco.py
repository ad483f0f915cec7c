"""The loss of MoCo: a query, its key, and a queue of earlier keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from classy_vision.losses import ClassyLoss, register_loss
from torch import Tensor

from pirl_plugin.functional import nce
from pirl_plugin.registry import Configurable, build
from pirl_plugin.schema import Component, PositiveFloat, PositiveInt, checked


@register_loss("moco")
@checked
class MoCoLoss(Configurable, ClassyLoss):
    """Cross entropy of a query's own key among all keys of the queue, nats, batch mean (He et al. 2020, Eq. 1).

    The loss only reads the queue; the hook ``memory_bank_update`` with ``view: momentum/key`` writes it, after the
    optimiser step, so that a batch's own keys are no negatives of it.

    Args:
        dim: D, dimensions of an embedding.
        temperature: tau, dimensionless.
        query: name of the queries in the model's output.
        key: name of the keys there, the momentum copy's.
        memory_bank: configuration of the queue; null: ``fifo_queue`` with its defaults.

    Attributes:
        memory_bank: the queue; part of the state dict.
        last_statistics: 0-dim tensors of the last call, for logging: mean similarity with the own key and with the
            queue, and ``accuracy``, how often no key of the queue is as similar as the own one.
    """

    needed_hooks: ClassVar[tuple[str, ...]] = ("memory_bank_update",)

    def __init__(
        self,
        dim: PositiveInt = 128,
        temperature: PositiveFloat = 0.07,
        query: str = "image",
        key: str = "momentum/key",
        memory_bank: Annotated[Mapping[str, Any], Component("memory_bank")] | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.temperature, self.query, self.key = dim, temperature, query, key
        self.memory_bank = build("memory_bank", memory_bank or {"name": "fifo_queue"}, dim=dim)
        self.last_statistics: dict[str, Tensor] = {}

    @property
    def views(self) -> list[str]:
        """Outputs of the model that enter the loss."""
        return [self.query, self.key]

    @property
    def stored_view(self) -> str:
        """What the memory bank must be written with."""
        return self.key

    def forward(self, output: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Loss of one batch; ``target``, the image ids, is not needed.

        Raises:
            KeyError: the model gave no queries or no keys.
            ValueError: embeddings that do not fit each other or the queue.
        """
        for name in self.views:
            if name not in output:
                raise KeyError(
                    f"The loss needs the output {name!r}; the model gave {sorted(output)}: use momentum_ssl_model."
                )
        queries, keys = output[self.query], output[self.key]
        if queries.shape != (len(target), self.dim) or keys.shape != queries.shape:
            raise ValueError(
                f"Queries and keys must be {(len(target), self.dim)} (batch, loss.dim), got {tuple(queries.shape)} and "
                f"{tuple(keys.shape)}: give the head's dim and loss.dim the same value."
            )
        with torch.autocast(target.device.type, enabled=False):
            dtype = torch.promote_types(queries.dtype, torch.float32)
            queries, keys = F.normalize(queries.to(dtype), dim=1), F.normalize(keys.detach().to(dtype), dim=1)
            own = (queries * keys).sum(dim=1)
            others = queries @ self.memory_bank.rows.to(dtype).T
            self._keep_statistics(own.detach(), others.detach())
            return nce.infonce(own / self.temperature, others / self.temperature).mean()

    def _keep_statistics(self, own: Tensor, others: Tensor) -> None:
        self.last_statistics = {
            "positive_similarity": own.mean(),
            "negative_similarity": others.mean(),
            "accuracy": (own > others.amax(dim=1)).float().mean(),
        }
