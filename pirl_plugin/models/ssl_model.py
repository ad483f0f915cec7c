"""One trunk, one head a view: the model that the pretraining task trains."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Annotated, Any

from classy_vision.models import ClassyModel, register_model
from torch import Tensor, nn

from pirl_plugin.models.normalize import Normalize
from pirl_plugin.registry import Configurable, build
from pirl_plugin.schema import Component, checked, did_you_mean


@register_model("ssl_model")
@checked
class SSLModel(Configurable, ClassyModel):
    """Embeds each view of a batch with a shared trunk and the view's own head.

    Each view makes one call of the trunk, so that batch statistics are per view, as in the released implementation of
    PIRL. Under ``DistributedDataParallel`` all work is in ``forward``; a head whose view never comes would leave
    parameters without gradient there, so configure only the heads that the transform feeds.

    Args:
        trunk: configuration of the trunk, e.g. ``{"name": "resnet_trunk", "depth": 50}``.
        heads: configuration of the head of each view, e.g. ``{"image": {"name": "linear"}, "patches": {"name":
            "jigsaw"}}``; ``in_dim`` comes from the trunk.
    """

    wrapper_cls = None  # classy-vision's own heads hang on blocks inside a model; these ones follow it, one a view

    def __init__(
        self,
        trunk: Annotated[dict[str, Any], Component("model")],
        heads: dict[str, Annotated[dict[str, Any], Component("head")]],
    ) -> None:
        super().__init__()
        if not heads:
            raise ValueError("heads must name at least one view, e.g. {'image': {'name': 'linear'}}, got none.")
        self.normalize = Normalize()
        self.trunk = build("model", trunk)
        if "res5" not in getattr(self.trunk, "channels", {}):
            raise ValueError(
                f"the trunk {trunk['name']!r} has no .channels['res5'], its output size: use resnet_trunk."
            )
        in_dim = self.trunk.channels["res5"]
        self.heads = nn.ModuleDict(
            {view: build("head", config, in_dim=in_dim, unique_id=view) for view, config in heads.items()}
        )

    def forward(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings of each view, not normalised.

        Args:
            views: for each view uint8 (or normalised float) images ``(B, 3, H, W)`` or patches ``(B, P, 3, h, w)``.

        Returns:
            ``{view: (B, dim)}``, for the views that came, in their order.

        Raises:
            ValueError: a view that has no head, or of another shape.
        """
        if not isinstance(views, Mapping):
            raise ValueError(
                f"the model wants a dict of views, {{'image': (B, 3, H, W), ...}}, got {type(views).__name__}."
            )
        return {view: self.heads[self._known(view)](self._trunk_features(view, x)) for view, x in views.items()}

    def _known(self, view: str) -> str:
        if view not in self.heads:
            raise ValueError(
                f"view {view!r} has no head. Heads: {', '.join(self.heads)}.{did_you_mean(view, self.heads)} "
                f"Add heads.{view} or leave the view out of the transform."
            )
        return view

    def _trunk_features(self, view: str, x: Tensor) -> Tensor:
        """``(B, C)`` for images, ``(B, P, C)`` for patches, which the trunk sees as one batch of ``B * P``."""
        if x.ndim == 4:
            return self.trunk(self.normalize(x))
        if x.ndim == 5:
            return self.trunk(self.normalize(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        raise ValueError(f"view {view!r} must be (B, 3, H, W) or (B, P, 3, h, w), got {tuple(x.shape)}.")

    def get_classy_state(self, deep_copy: bool = False) -> dict[str, Any]:
        """``{"model": {"trunk": state dict, "heads": {view: state dict}}}``, tied to the model unless copied."""
        state = {
            "model": {
                "trunk": self.trunk.state_dict(),
                "heads": {view: head.state_dict() for view, head in self.heads.items()},
            }
        }
        return copy.deepcopy(state) if deep_copy else state

    def set_classy_state(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Loads what ``get_classy_state`` gave.

        Raises:
            ValueError: not such a state, other heads, or (strict) other parameters or shapes; nothing is loaded then
                but for what torch itself had copied before it met the first wrong shape.
        """
        try:
            trunk, heads = state["model"]["trunk"], state["model"]["heads"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                "not a model state: it must be {'model': {'trunk': ..., 'heads': {view: ...}}}."
            ) from error
        if strict and set(heads) != set(self.heads):
            raise ValueError(
                f"the state has the heads {sorted(heads)}, the model {sorted(self.heads)}: use the same method."
            )
        parts = [("trunk", self.trunk, trunk)]
        parts += [(f"head {view!r}", self.heads[view], heads[view]) for view in self.heads if view in heads]
        for name, module, part in parts:
            try:
                module.load_state_dict(part, strict)
            except RuntimeError as error:
                raise ValueError(f"the state does not fit the model's {name}: {error}") from error
