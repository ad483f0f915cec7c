"""The VOC07 SVM benchmark: its views, its labels, and whole runs on small images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms as tv
from classy_vision.dataset.transforms import build_transform
from PIL import Image

from pirl_plugin.data.squashed_view import SquashedView


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# -- the squashed view -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (300, 256), (40, 31)])
@pytest.mark.parametrize(("resize", "square"), [(256, 224), (32, 32), (None, 224)])
def test_squashed_view_is_torchvisions(size, resize, square):
    image = picture(*size)
    steps = [] if resize is None else [tv.Resize(resize)]
    expected = tv.functional.pil_to_tensor(tv.Compose([*steps, tv.Resize([square, square])])(image))
    view = SquashedView(size=square, resize=resize)(image)["image"]
    assert torch.equal(view, expected)
    assert view.is_contiguous()


def test_squashed_view_keeps_the_border_that_a_crop_loses():
    """A wide white picture with a red left edge: the edge is still there in the square."""
    pixels = np.full((100, 200, 3), 255, dtype=np.uint8)
    pixels[:, :20] = (255, 0, 0)
    view = build_transform({"name": "squashed_view", "size": 50, "resize": None})(Image.fromarray(pixels))["image"]
    assert view[:, 25, 0].tolist() == [255, 0, 0]
    assert view[:, 25, -1].tolist() == [255, 255, 255]


def test_squashed_view_converts_other_modes():
    view = SquashedView(size=8, resize=None)(picture(20, 10).convert("L"))["image"]
    assert view.shape == (3, 8, 8)
