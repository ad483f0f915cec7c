"""One trunk and the heads of the views: the model that the pretraining task trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Annotated, Any

import torch
from classy_vision.models import ClassyModel, register_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # what SyncBatchNorm and all dimensions share

from pirl_plugin.models.normalize import Normalize
from pirl_plugin.registry import Configurable, build
from pirl_plugin.schema import PROVIDED, Component, checked, did_you_mean


@register_model("ssl_model")
@checked
class SSLModel(Configurable, ClassyModel):
    """Embeds each view of a batch with a shared trunk and the view's own head.

    Each view makes one call of the trunk, so that batch statistics are per view, as in the released implementation of
    PIRL; the crops or patches of a view ``(B, V, 3, h, w)`` share one call. Under ``DistributedDataParallel`` all work
    is in ``forward``; a head whose view never comes would leave parameters without gradient there, so configure only
    the heads that the transform feeds.

    Args:
        trunk: configuration of the trunk, e.g. ``{"name": "resnet_trunk", "depth": 50}``; the task gives its own.
        heads: configuration of the head of each view, e.g. ``{"image": {"name": "linear"}, "patches": {"name":
            "jigsaw"}}``; ``in_dim`` comes from the trunk. The task gives its own.
        shared_heads: views that pass through the head of another view, e.g. ``{"crops": "image"}``.
        running_statistics_of: the views whose batches the running statistics of the trunk's batch norm follow, which
            stand in for batch statistics whenever the trunk is evaluated. None: all views, as in the released
            implementation; the average of whole images and small patches then fits neither.
    """

    wrapper_cls = None  # classy-vision's own heads hang on blocks inside a model; these ones follow it, one a view

    def __init__(
        self,
        trunk: Annotated[dict[str, Any], Component("model"), PROVIDED],
        heads: Annotated[dict[str, Annotated[dict[str, Any], Component("head")]], PROVIDED],
        shared_heads: dict[str, str] | None = None,
        running_statistics_of: list[str] | None = None,
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
        self.shared_heads = dict(shared_heads or {})
        for view, owner in self.shared_heads.items():
            if owner not in self.heads or view in self.heads:
                raise ValueError(
                    f"shared_heads: {view!r} must be a view without a head and {owner!r} one with a head. "
                    f"Heads: {', '.join(self.heads)}."
                )
        self.running_statistics_of = running_statistics_of
        for view in running_statistics_of or []:
            if view not in self.heads and view not in self.shared_heads:
                raise ValueError(
                    f"running_statistics_of: {view!r} is no view with a head. Heads: {', '.join(self.heads)}."
                )

    def forward(self, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings of each view, not normalised.

        Args:
            views: for each view uint8 (or normalised float) images ``(B, 3, H, W)``, or crops or patches
                ``(B, V, 3, h, w)``. Integers of any other type are no pixels but what a pretext knows of its views.

        Returns:
            ``{view: (B, dim)}``, or ``(B, V, dim)`` where the head keeps crops apart, for the views that came, in their
            order; a head that takes the trunk's map gives what it makes of that. A head that gives several embeddings
            adds ``view/name`` for each after the first. What is no pixels comes back as it is.

        Raises:
            ValueError: a view that has no head, or of another shape.
        """
        if not isinstance(views, Mapping):
            raise ValueError(
                f"the model wants a dict of views, {{'image': (B, 3, H, W), ...}}, got {type(views).__name__}."
            )
        output: dict[str, Tensor] = {}
        for view, x in views.items():
            output |= self.embed(view, x, self.trunk, self.heads) if is_pixels(x) else {view: x}
        return output

    def embed(self, view: str, x: Tensor, trunk: nn.Module, heads: nn.ModuleDict) -> dict[str, Tensor]:
        """Embeddings of one view by a trunk and heads of the model's kind, by their names in the output."""
        head = heads[self.head_of(view)]
        found = head(self._trunk_features(view, x, trunk, pooled=not takes_map(head)))
        if not isinstance(found, Mapping):
            return {view: found}
        return {f"{view}/{name}" if name else view: embedding for name, embedding in found.items()}

    def head_of(self, view: str) -> str:
        """Name of the head that a view passes through.

        Raises:
            ValueError: there is none.
        """
        head = self.shared_heads.get(view, view)
        if head not in self.heads:
            raise ValueError(
                f"view {view!r} has no head. Heads: {', '.join(self.heads)}.{did_you_mean(view, self.heads)} "
                f"Add heads.{view} or leave the view out of the transform."
            )
        return head

    def compile_trunk(self) -> None:
        """Compiles the trunk in place with ``torch.compile``."""
        self.trunk.compile()

    def _trunk_features(self, view: str, x: Tensor, trunk: nn.Module, pooled: bool) -> Tensor:
        """``(B, C)`` for images, ``(B, V, C)`` for crops or patches, which the trunk sees as one batch of ``B * V``.

        Not pooled, ``(B, C, h, w)`` or ``(B, V, C, h, w)``.
        """
        if x.ndim not in (4, 5):
            raise ValueError(f"view {view!r} must be (B, 3, H, W) or (B, V, 3, h, w), got {tuple(x.shape)}.")
        followed = self.running_statistics_of is None or view in self.running_statistics_of
        call = trunk if pooled else partial(trunk, pooled=False)
        with nullcontext() if followed else kept_running_statistics(trunk):
            if x.ndim == 4:
                return call(self.normalize(x))
            return call(self.normalize(x.flatten(0, 1))).unflatten(0, x.shape[:2])

    def get_classy_state(self, deep_copy: bool = False) -> dict[str, Any]:
        """``{"model": {"trunk": state dict, "heads": {view: state dict}}}``, tied to the model unless copied."""
        state = {"model": encoder_state(self.trunk, self.heads)}
        return copy.deepcopy(state) if deep_copy else state

    def set_classy_state(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Loads what ``get_classy_state`` gave; what it holds besides trunk and heads is ignored.

        Raises:
            ValueError: not such a state, other heads, or (strict) other parameters or shapes; nothing is loaded then
                but for what torch itself had copied before it met the first wrong shape.
        """
        load_encoder(self.trunk, self.heads, state.get("model") if isinstance(state, Mapping) else None, strict)


@contextmanager
def kept_running_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norm normalises by its batch as ever, but its running statistics stay as they are."""
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def is_pixels(x: Tensor) -> bool:
    """Whether an entry of a batch is a view: uint8 pixels, or floats that are normalised already."""
    return x.dtype == torch.uint8 or x.is_floating_point()


def takes_map(head: nn.Module | type) -> bool:
    """Whether a head sees the trunk's last map instead of its average over the places."""
    return bool(getattr(head, "takes_map", False))


def main_embedding(found: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Of what a head gives, the embedding that benchmarks use: the one under ``""`` where there are several."""
    return found[""] if isinstance(found, Mapping) else found


def encoder_state(trunk: nn.Module, heads: nn.ModuleDict) -> dict[str, Any]:
    """State dicts of a trunk and of each head."""
    return {"trunk": trunk.state_dict(), "heads": {view: head.state_dict() for view, head in heads.items()}}


def load_encoder(trunk: nn.Module, heads: nn.ModuleDict, state: Any, strict: bool = True) -> None:
    """Loads what ``encoder_state`` gave.

    Raises:
        ValueError: not such a state, other heads, or (strict) other parameters or shapes.
    """
    try:
        trunk_part, head_parts = state["trunk"], state["heads"]
    except (KeyError, TypeError) as error:
        raise ValueError("not a model state: it must be {'model': {'trunk': ..., 'heads': {view: ...}}}.") from error
    if strict and set(head_parts) != set(heads):
        raise ValueError(
            f"the state has the heads {sorted(head_parts)}, the model {sorted(heads)}: use the same method."
        )
    parts = [("trunk", trunk, trunk_part)]
    parts += [(f"head {view!r}", heads[view], head_parts[view]) for view in heads if view in head_parts]
    for name, module, part in parts:
        try:
            module.load_state_dict(part, strict)
        except RuntimeError as error:
            raise ValueError(f"the state does not fit the model's {name}: {error}") from error
