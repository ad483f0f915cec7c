"""Rotated views: beside the image (PIRL with rotation), or by themselves with the angle to be told (RotNet)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from classy_vision.dataset.transforms import register_transform
from PIL import Image
from torch import Tensor

from pirl_plugin.data.views import ImageView, Views, generator_or_torch
from pirl_plugin.functional.operations import Operation
from pirl_plugin.functional.pending_colours import program_name
from pirl_plugin.schema import checked


def rotated(view: Tensor, quarter_turns: int) -> Tensor:
    """A view ``(3, S, S)`` turned anticlockwise, contiguous."""
    return view.rot90(quarter_turns, dims=(1, 2)).contiguous()


def turned(views: Views, name: str, quarter_turns: int) -> Views:
    """One of the views turned anticlockwise, coloured already or not.

    No colour operation but the blur knows up from left, so that they may come after the turn as well as before it; only
    a flip that is still to come reverses it.
    """
    program = views.get(program_name(name))
    if program is not None and (program[:, 0] == Operation.FLIP).sum() % 2:
        quarter_turns = -quarter_turns
    return {**views, name: rotated(views[name], quarter_turns)}


class _Turning(ImageView):
    """What the transforms that turn their views refuse."""

    def __init__(self, **image_view: Any) -> None:
        super().__init__(**image_view)
        if self.colours == "device" and self.photometric.blur_probability > 0:
            raise ValueError(
                "colours=device with blur_probability > 0 is not the same on a turned view (the blur rounds along the "
                "rows first): use colours=loader."
            )


@register_transform("image_and_rotation")
@checked
class ImageAndRotation(_Turning):
    """An augmented crop and another, turned: ``{"image": (3, S, S), "rotated": (3, S, S), "rotation": ()}`` (PIRL).

    The two are drawn alike and independently; the second is then turned by 0, 90, 180 or 270 degrees anticlockwise,
    ``rotation`` quarter turns.
    """

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Views:
        """See the class; without a generator, torch's global random state decides."""
        rng = generator_or_torch(rng)
        first, second = self.image_view(image, rng), self.image_view(image, rng, "rotated")
        turns = int(rng.integers(4))
        return {**first, **turned(second, "rotated", turns), "rotation": torch.tensor(turns)}


@register_transform("rotated_image")
@checked
class RotatedImage(_Turning):
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
        views = self.image_view(image, rng)
        if self.rotations == "all":
            four = [turned(views, "image", turns) for turns in range(4)]
            return {**{name: torch.stack([one[name] for one in four]) for name in views}, "rotation": torch.arange(4)}
        turns = int(rng.integers(4))
        return {**turned(views, "image", turns), "rotation": torch.tensor(turns)}
