"""A model with a second, slowly following copy of itself: the momentum encoder of MoCo, the target network of BYOL."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from classy_vision.models import register_model
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pirl_plugin import distributed
from pirl_plugin.models.ssl_model import SSLModel, encoder_state, is_pixels, load_encoder
from pirl_plugin.schema import PositiveInt, checked


@register_model("momentum_ssl_model")
@checked
class MomentumSSLModel(SSLModel):
    """``ssl_model`` and a moving average of its parameters, whose embeddings come as ``momentum/<view>``.

    The copy gets no gradient and is no part of what the optimiser or ``DistributedDataParallel`` sees; the hook
    ``momentum_update`` moves it. Its batch statistics are those of its own forward passes, in training mode.

    Args:
        online_views: views that the trained network embeds; null: all of them.
        momentum_views: views that the copy embeds; null: all of them.
        shuffle_batch_norm: over several processes, the copy sees the global batch in random order, so that its batch
            statistics are of other images than the trained network's (MoCo). One process has something to shuffle where
            there are ``batch_norm_groups``.
        batch_norm_groups: parts of the batch that have batch statistics of their own in training, in both networks, as
            if each were on a GPU of its own (MoCo on CIFAR-10).
        **ssl_model: see ``SSLModel``.

    Attributes:
        momentum_trunk: the copy's trunk.
        momentum_heads: the copy's heads.
    """

    needed_hooks: ClassVar[tuple[str, ...]] = ("momentum_update",)

    def __init__(
        self,
        online_views: list[str] | None = None,
        momentum_views: list[str] | None = None,
        shuffle_batch_norm: bool = False,
        batch_norm_groups: PositiveInt = 1,
        **ssl_model: Any,
    ) -> None:
        super().__init__(**ssl_model)
        for view in (*(online_views or ()), *(momentum_views or ())):
            self.head_of(view)  # raises where there is none
        self.online_views, self.momentum_views = online_views, momentum_views
        self.shuffle_batch_norm, self.batch_norm_groups = shuffle_batch_norm, batch_norm_groups
        self.momentum_trunk = copy.deepcopy(self.trunk).requires_grad_(False)
        self.momentum_heads = copy.deepcopy(self.heads).requires_grad_(False)

    def forward(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As ``SSLModel.forward``, with the copy's embeddings after the trained network's."""
        pixels = {view: x for view, x in views.items() if is_pixels(x)}
        output = super().forward(
            {view: x for view, x in views.items() if view not in pixels or self._is_among(view, self.online_views)}
        )
        with torch.no_grad():
            for view, x in pixels.items():
                if self._is_among(view, self.momentum_views):
                    output |= {f"momentum/{name}": found for name, found in self._momentum_embeddings(view, x).items()}
        return output

    def embed(self, view: str, x: Tensor, trunk: nn.Module, heads: nn.ModuleDict) -> dict[str, Tensor]:
        """As ``SSLModel.embed``, in training by parts of the batch."""
        if not self.training or self.batch_norm_groups == 1:
            return super().embed(view, x, trunk, heads)
        parts = [super(MomentumSSLModel, self).embed(view, part, trunk, heads) for part in self._groups(x)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def update_momentum(self, momentum: float) -> None:
        """``copy <- momentum * copy + (1 - momentum) * trained``, for every parameter.

        Raises:
            ValueError: a momentum outside [0, 1].
        """
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], the weight of the copy's own parameters, got {momentum}.")
        copied = [*self.momentum_trunk.parameters(), *self.momentum_heads.parameters()]
        trained = [*self.trunk.parameters(), *self.heads.parameters()]
        get_ema_multi_avg_fn(momentum)(copied, trained, None)

    def compile_trunk(self) -> None:
        """Compiles both trunks in place."""
        super().compile_trunk()
        self.momentum_trunk.compile()

    @staticmethod
    def _is_among(view: str, chosen: list[str] | None) -> bool:
        return chosen is None or view in chosen

    def _momentum_embeddings(self, view: str, x: Tensor) -> dict[str, Tensor]:
        trunk, heads = self.momentum_trunk, self.momentum_heads
        several = distributed.is_distributed() or self.batch_norm_groups > 1
        if not (self.shuffle_batch_norm and self.training and several):
            return self.embed(view, x, trunk, heads)
        everyone = distributed.all_gather(x)
        order = distributed.broadcast_(torch.randperm(len(everyone), device=x.device))
        mine = slice(distributed.rank() * len(x), (distributed.rank() + 1) * len(x))
        shuffled = self.embed(view, everyone[order[mine]], trunk, heads)
        back = order.argsort()[mine]
        return {name: distributed.all_gather(found)[back] for name, found in shuffled.items()}

    def _groups(self, x: Tensor) -> Sequence[Tensor]:
        if len(x) % self.batch_norm_groups:
            raise ValueError(
                f"model.batch_norm_groups must divide the batch of a process, {len(x)}, got {self.batch_norm_groups}."
            )
        return x.chunk(self.batch_norm_groups)

    def get_classy_state(self, deep_copy: bool = False) -> dict[str, Any]:
        """As ``SSLModel.get_classy_state``, with ``momentum`` beside trunk and heads."""
        state = super().get_classy_state()
        state["model"]["momentum"] = encoder_state(self.momentum_trunk, self.momentum_heads)
        return copy.deepcopy(state) if deep_copy else state

    def set_classy_state(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """As ``SSLModel.set_classy_state``; a state without the copy is refused.

        Raises:
            ValueError: see there.
        """
        super().set_classy_state(state, strict)
        if "momentum" not in state["model"]:
            raise ValueError("the state is of a model without a momentum copy: use the same method.")
        load_encoder(self.momentum_trunk, self.momentum_heads, state["model"]["momentum"], strict)
