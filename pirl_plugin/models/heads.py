"""Heads: from pooled trunk features to the embedding that the loss compares.

A head maps the last dimension and keeps those before it, so that it takes one image ``(B, C)`` as well as several crops
``(B, V, C)``; only heads that join patches consume V. One that gives several embeddings returns them by name, the
one that benchmarks use under ``""``: ``{"": projection, "prediction": prediction}``.

A head for a pretext that answers for each place of the image (colorization) says so with ``takes_map = True`` in its
class: it gets the map before the pooling, ``(B, C, h, w)`` or ``(B, V, C, h, w)``.
"""

from __future__ import annotations

import itertools
from typing import Annotated

from classy_vision.heads import ClassyHead, register_head
from torch import Tensor, nn

from pirl_plugin.registry import Configurable
from pirl_plugin.schema import PROVIDED, PositiveInt, checked


@register_head("linear")
@checked
class LinearHead(Configurable, ClassyHead):
    """One linear layer, the head f of PIRL (res5, average pooling, linear projection to 128).

    Args:
        in_dim: channels of the trunk; the model provides it.
        dim: size of the embedding.
        bias: the released implementation has one.
        unique_id: name under which classy-vision knows the head; the model gives the view's.
    """

    def __init__(
        self,
        in_dim: Annotated[PositiveInt, PROVIDED],
        dim: PositiveInt = 128,
        bias: bool = True,
        unique_id: Annotated[str, PROVIDED] = "linear",
    ) -> None:
        super().__init__(unique_id, dim)
        self.linear = nn.Linear(in_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_dim)`` to ``(..., dim)``; not normalised, the loss does that."""
        return self.linear(x)


@register_head("mlp")
@checked
class MLPHead(Configurable, ClassyHead):
    """Linear, (batch norm,) ReLU, linear: the projection head of SimCLR and MoCo v2.

    Args:
        in_dim: channels of the trunk; the model provides it.
        hidden_dim: null means ``in_dim``.
        dim: size of the embedding.
        batch_norm: between the first linear layer and the ReLU.
        unique_id: name under which classy-vision knows the head; the model gives the view's.
    """

    def __init__(
        self,
        in_dim: Annotated[PositiveInt, PROVIDED],
        hidden_dim: PositiveInt | None = None,
        dim: PositiveInt = 128,
        batch_norm: bool = False,
        unique_id: Annotated[str, PROVIDED] = "mlp",
    ) -> None:
        super().__init__(unique_id, dim)
        hidden = hidden_dim or in_dim
        norm = [nn.BatchNorm1d(hidden)] if batch_norm else []
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden, bias=not batch_norm), *norm, nn.ReLU(inplace=True), nn.Linear(hidden, dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_dim)`` to ``(..., dim)``; all leading dimensions make up the batch of the batch norm."""
        return self.mlp(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


@register_head("jigsaw")
@checked
class JigsawHead(Configurable, ClassyHead):
    """The head g of PIRL: one shared linear layer per patch, concatenation, one linear layer.

    As in VISSL, no batch norm and, but for ``hidden_dim``, no nonlinearity. The patches are concatenated in the order
    given, which is the shuffled one.

    Args:
        in_dim: channels of the trunk; the model provides it.
        num_patches: 9 for the 3 x 3 grid.
        patch_dim: size of each patch's projection; num_patches * patch_dim = 1,152 enter the last layer.
        dim: size of the embedding.
        hidden_dim: null: each patch's projection is linear. A number: two layers of that hidden size, a ReLU after each
            (VISSL's variant with MLP heads).
        unique_id: name under which classy-vision knows the head; the model gives the view's.
    """

    def __init__(
        self,
        in_dim: Annotated[PositiveInt, PROVIDED],
        num_patches: PositiveInt = 9,
        patch_dim: PositiveInt = 128,
        dim: PositiveInt = 128,
        hidden_dim: PositiveInt | None = None,
        unique_id: Annotated[str, PROVIDED] = "jigsaw",
    ) -> None:
        super().__init__(unique_id, dim)
        self.in_dim, self.num_patches = in_dim, num_patches
        self.patch = nn.Linear(in_dim, patch_dim) if hidden_dim is None else _mlp(in_dim, hidden_dim, patch_dim)
        self.joint = nn.Linear(num_patches * patch_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, num_patches, in_dim)`` to ``(B, dim)``.

        Raises:
            ValueError: another number of patches, or a view that has none.
        """
        check_patches(self.unique_id, x, self.num_patches, self.in_dim)
        return self.joint(self.patch(x).flatten(1))


@register_head("classifier")
@checked
class ClassifierHead(Configurable, ClassyHead):
    """Scores of the dataset's classes: one linear layer.

    Args:
        in_dim: channels of the trunk; the model provides it.
        num_classes: the task takes it from the dataset.
        unique_id: name under which classy-vision knows the head; the model gives the view's.
    """

    def __init__(
        self,
        in_dim: Annotated[PositiveInt, PROVIDED],
        num_classes: Annotated[PositiveInt, PROVIDED],
        unique_id: Annotated[str, PROVIDED] = "classifier",
    ) -> None:
        super().__init__(unique_id, num_classes)
        self.linear = nn.Linear(in_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_dim)`` to ``(..., num_classes)``."""
        return self.linear(x)


@register_head("jigsaw_classifier")
@checked
class JigsawClassifierHead(Configurable, ClassyHead):
    """Scores of a puzzle's permutations: linear, batch norm, ReLU on each patch, concatenation, linear (Jigsaw).

    Args:
        in_dim: channels of the trunk; the model provides it.
        num_permutations: as many as the transform chooses from.
        num_patches: 9 for the 3 x 3 grid.
        patch_dim: size of each patch's projection (VISSL: 1,000).
        unique_id: name under which classy-vision knows the head; the model gives the view's.
    """

    def __init__(
        self,
        in_dim: Annotated[PositiveInt, PROVIDED],
        num_permutations: PositiveInt = 2000,
        num_patches: PositiveInt = 9,
        patch_dim: PositiveInt = 1000,
        unique_id: Annotated[str, PROVIDED] = "jigsaw_classifier",
    ) -> None:
        super().__init__(unique_id, num_permutations)
        self.in_dim, self.num_patches = in_dim, num_patches
        self.patch = nn.Sequential(nn.Linear(in_dim, patch_dim), nn.BatchNorm1d(patch_dim), nn.ReLU(inplace=True))
        self.joint = nn.Linear(num_patches * patch_dim, num_permutations)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, num_patches, in_dim)`` to ``(B, num_permutations)``; the patches of a batch share their statistics.

        Raises:
            ValueError: another number of patches, or a view that has none.
        """
        check_patches(self.unique_id, x, self.num_patches, self.in_dim)
        return self.joint(self.patch(x.flatten(0, 1)).unflatten(0, x.shape[:2]).flatten(1))


def check_patches(head: str, x: Tensor, num_patches: int, in_dim: int) -> None:
    """Raises where features are not ``(B, num_patches, in_dim)``."""
    if x.ndim != 3 or x.shape[1:] != (num_patches, in_dim):
        raise ValueError(
            f"the jigsaw head {head!r} wants (B, {num_patches} patches, {in_dim} channels), "
            f"got {tuple(x.shape)}: set num_patches to what the transform cuts."
        )


def _mlp(*dims: int) -> nn.Sequential:
    """Linear layers, a ReLU after each."""
    return nn.Sequential(*(m for i, o in itertools.pairwise(dims) for m in (nn.Linear(i, o), nn.ReLU(inplace=True))))
