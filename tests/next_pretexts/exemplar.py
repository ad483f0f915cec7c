"""Exemplar networks (Dosovitskiy et al., arXiv:1406.6909): every image is a class of its own.

Views and head are the package's own; the classifier grows with the dataset, so that the loss holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from classy_vision.losses import register_loss
from torch import Tensor, nn

from pirl_plugin.losses.cross_entropy import CrossEntropy
from pirl_plugin.schema import PROVIDED, PositiveInt, checked


@register_loss("exemplar_classes")
@checked
class ExemplarClasses(CrossEntropy):
    """Cross entropy of each crop with its image's id.

    Args:
        num_images: images in the training set, and so classes.
        dim: D, dimensions of an embedding.
        view: name of the embeddings ``(B, V, D)``.
    """

    def __init__(
        self, num_images: Annotated[PositiveInt, PROVIDED], dim: PositiveInt = 128, view: str = "image"
    ) -> None:
        super().__init__(view)
        self.classes = nn.Linear(dim, num_images)

    def forward(self, output: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Loss of one batch of image ids ``(B,)``."""
        scores = self.classes(output[self.view])
        return self.cross_entropy({self.view: scores}, target.unsqueeze(1).expand(scores.shape[:2]))
