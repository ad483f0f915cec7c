"""Heads from lightly: what is here gives them the trunk's size, several crops at once, and names for their outputs.

Where a method predicts one view's projection from another's, the projection is the head's embedding, the one that
benchmarks use, and the prediction comes as ``view/prediction``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from classy_vision.heads import ClassyHead, register_head
from torch import Tensor, nn

from pirl_plugin.optional import optional
from pirl_plugin.registry import Configurable
from pirl_plugin.schema import PROVIDED, PositiveInt, checked


class LightlyHead(Configurable, ClassyHead):
    """Base of the heads that hold lightly's: all leading dimensions make up the batch of their batch norm.

    Args:
        unique_id: name under which classy-vision knows the head.
        dim: size of the embedding.
        projection: lightly's projection head.
        prediction: lightly's prediction head, for the methods that have one.
    """

    def __init__(self, unique_id: str, dim: int, projection: nn.Module, prediction: nn.Module | None = None) -> None:
        super().__init__(unique_id, dim)
        self.projection, self.prediction = projection, prediction

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """``(..., in_dim)`` to ``(..., dim)``; with a prediction head ``{"": projection, "prediction": ...}``."""
        projection = self.projection(x.flatten(0, -2))
        if self.prediction is None:
            return projection.unflatten(0, x.shape[:-1])
        found = {"": projection, "prediction": self.prediction(projection)}
        return {name: embedding.unflatten(0, x.shape[:-1]) for name, embedding in found.items()}


@register_head("simclr")
@checked
class SimCLRHead(LightlyHead):
    """SimCLR's projection head: linear, batch norm, ReLU, linear, batch norm.

    Args:
        in_dim: channels of the trunk; the model provides it.
        hidden_dim: null means ``in_dim``.
        dim: size of the embedding.
        num_layers: linear layers (3 in SimCLR v2).
        batch_norm: after each linear layer.
        unique_id: name under which classy-vision knows the head; the model gives the view's.

    Raises:
        ImportError: lightly is not installed.
    """

    def __init__(
        self,
        in_dim: Annotated[PositiveInt, PROVIDED],
        hidden_dim: PositiveInt | None = None,
        dim: PositiveInt = 128,
        num_layers: PositiveInt = 2,
        batch_norm: bool = True,
        unique_id: Annotated[str, PROVIDED] = "simclr",
    ) -> None:
        heads = _lightly("simclr")
        hidden = hidden_dim or in_dim
        super().__init__(unique_id, dim, heads.SimCLRProjectionHead(in_dim, hidden, dim, num_layers, batch_norm))


@register_head("byol")
@checked
class BYOLHead(LightlyHead):
    """BYOL's projection and prediction heads: linear, batch norm, ReLU, linear each.

    Args:
        in_dim: channels of the trunk; the model provides it.
        hidden_dim: of both.
        dim: size of the projection and of its prediction.
        unique_id: name under which classy-vision knows the head; the model gives the view's.

    Raises:
        ImportError: lightly is not installed.
    """

    def __init__(
        self,
        in_dim: Annotated[PositiveInt, PROVIDED],
        hidden_dim: PositiveInt = 4096,
        dim: PositiveInt = 256,
        unique_id: Annotated[str, PROVIDED] = "byol",
    ) -> None:
        heads = _lightly("byol")
        projection = heads.BYOLProjectionHead(in_dim, hidden_dim, dim)
        super().__init__(unique_id, dim, projection, heads.BYOLPredictionHead(dim, hidden_dim, dim))


@register_head("simsiam")
@checked
class SimSiamHead(LightlyHead):
    """SimSiam's projection head, batch norm after each layer, and its prediction head with a bottleneck.

    Args:
        in_dim: channels of the trunk; the model provides it.
        hidden_dim: of the projection head.
        dim: size of the projection and of its prediction.
        bottleneck_dim: hidden size of the prediction head.
        num_layers: linear layers of the projection head: 3, or 2 as in the paper's experiments on CIFAR-10.
        unique_id: name under which classy-vision knows the head; the model gives the view's.

    Raises:
        ImportError: lightly is not installed.
    """

    def __init__(
        self,
        in_dim: Annotated[PositiveInt, PROVIDED],
        hidden_dim: PositiveInt = 2048,
        dim: PositiveInt = 2048,
        bottleneck_dim: PositiveInt = 512,
        num_layers: Literal[2, 3] = 3,
        unique_id: Annotated[str, PROVIDED] = "simsiam",
    ) -> None:
        heads = _lightly("simsiam")
        # two layers with a batch norm after each are SimCLR's
        layers = heads.SimSiamProjectionHead if num_layers == 3 else heads.SimCLRProjectionHead
        projection = layers(in_dim, hidden_dim, dim)
        super().__init__(unique_id, dim, projection, heads.SimSiamPredictionHead(dim, bottleneck_dim, dim))


@register_head("barlow_twins")
@checked
class BarlowTwinsHead(LightlyHead):
    """The projection head of Barlow Twins, which is VICReg's expander: linear, batch norm, ReLU, ..., linear.

    Args:
        in_dim: channels of the trunk; the model provides it.
        hidden_dim: of the layers before the last.
        dim: size of the embedding.
        num_layers: linear layers: 3, or 2 for small images.
        unique_id: name under which classy-vision knows the head; the model gives the view's.

    Raises:
        ImportError: lightly is not installed.
    """

    def __init__(
        self,
        in_dim: Annotated[PositiveInt, PROVIDED],
        hidden_dim: PositiveInt = 8192,
        dim: PositiveInt = 8192,
        num_layers: Literal[2, 3] = 3,
        unique_id: Annotated[str, PROVIDED] = "barlow_twins",
    ) -> None:
        heads = _lightly("barlow_twins")
        # with two layers it is BYOL's
        layers = heads.BarlowTwinsProjectionHead if num_layers == 3 else heads.BYOLProjectionHead
        super().__init__(unique_id, dim, layers(in_dim, hidden_dim, dim))


def _lightly(head: str) -> Any:
    return optional("lightly.models.modules.heads", "methods", f"The head {head}")
