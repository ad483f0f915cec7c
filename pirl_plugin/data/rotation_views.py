"""Rotated views: beside the image (PIRL with rotation), or by themselves with the angle to be told (RotNet)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from classy_vision.dataset.transforms import register_transform
from PIL import Image
from torch import Tensor

from pirl_plugin.data.views import ImageView, Views, generator_or_torch
from pirl_plugin.schema import checked


def rotated(view: Tensor, quarter_turns: int) -> Tensor:
    """A view ``(3, S, S)`` turned anticlockwise, contiguous."""
    return view.rot90(quarter_turns, dims=(1, 2)).contiguous()


@register_transform("image_and_rotation")
@checked
class ImageAndRotation(ImageView):
    """An augmented crop and another, turned: ``{"image": (3, S, S), "rotated": (3, S, S), "rotation": ()}`` (PIRL).

    The two are drawn alike and independently; the second is then turned by 0, 90, 180 or 270 degrees anticlockwise,
    ``rotation`` quarter turns.
    """

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Views:
        """See the class; without a generator, torch's global random state decides."""
        rng = generator_or_torch(rng)
        first, second = self.image_view(image, rng), self.image_view(image, rng)
        turns = int(rng.integers(4))
        return {"image": first, "rotated": rotated(second, turns), "rotation": torch.tensor(turns)}


@register_transform("rotated_image")
@checked
class RotatedImage(ImageView):
    """An augmented crop, turned, and by how much: ``{"image": (3, S, S), "rotation": ()}`` (RotNet).

    ``rotation`` is the number of quarter turns anticlockwise.

    Args:
        rotations: ``one`` of the four at random (VISSL), or ``all`` of them, of the same crop (Gidaris et al. 2018):
            ``{"image": (4, 3, S, S), "rotation": (4,)}``.
        **image_view: see ``ImageView``.
    """

    def __init__(self, rotations: Literal["one", "all"] = "one", **image_view: Any) -> None:
        super().__init__(**image_view)
        self.rotations = rotations

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Views:
        """See the class; without a generator, torch's global random state decides."""
        rng = generator_or_torch(rng)
        view = self.image_view(image, rng)
        if self.rotations == "all":
            return {"image": torch.stack([rotated(view, turns) for turns in range(4)]), "rotation": torch.arange(4)}
        turns = int(rng.integers(4))
        return {"image": rotated(view, turns), "rotation": torch.tensor(turns)}
