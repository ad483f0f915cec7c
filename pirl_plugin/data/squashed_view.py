"""The view of the VOC07 SVM protocols: the whole image, its sides' ratio not kept."""

from __future__ import annotations

import numpy as np
import torch
from classy_vision.dataset.transforms import ClassyTransform, register_transform
from PIL import Image

from pirl_plugin.data.crops import resize_shorter_side
from pirl_plugin.data.views import Views
from pirl_plugin.registry import Configurable
from pirl_plugin.schema import PositiveInt, checked


@register_transform("squashed_view")
@checked
class SquashedView(Configurable, ClassyTransform):
    """The whole image squashed into a square, nothing cropped away: ``{"image": (3, size, size)}`` uint8.

    Args:
        size: side of the square, pixels.
        resize: first the shorter side becomes this long, pixels, the ratio kept; null: straight to the square.
    """

    def __init__(self, size: PositiveInt = 224, resize: PositiveInt | None = 256) -> None:
        self.size, self.resize = size, resize

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Views:
        """``{"image": (3, size, size)}``; the generator is not used."""
        if self.resize is not None:
            image = resize_shorter_side(image, self.resize)
        square = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BILINEAR)
        return {"image": torch.from_numpy(np.asarray(square).transpose(2, 0, 1).copy())}
