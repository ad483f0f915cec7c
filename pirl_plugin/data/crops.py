"""Crops: where they lie and how they are cut and resized. Shared by all views."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from pirl_plugin.data.decoded import pixels_of

Box = tuple[float, float, float, float]

_TRIES = 10


def draw_crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draws the box of a random resized crop, with torchvision's ``RandomResizedCrop`` distribution.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        scale: range of the crop's area as a fraction of the image's.
        ratio: range of width / height, drawn log-uniformly.
        rng: source of randomness.

    Returns:
        left, top, right, bottom in whole pixels; after ten boxes that do not fit, the central one of the nearest ratio.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, ratio_draw, y_draw, x_draw in rng.random((_TRIES, 4)).tolist():
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * ratio_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x_draw * (width - w + 1)), int(y_draw * (height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def draw_resized_crop_box(width: int, height: int, resize: int, crop: int, rng: np.random.Generator) -> Box:
    """The box, in the image as it is, that ``Resize(resize)`` (the shorter side) and ``RandomCrop(crop)`` would show.

    Args:
        width: of the image, pixels.
        height: of the image, pixels.
        resize: length of the shorter side after the resize, pixels.
        crop: side of the square crop after it, pixels; at most ``resize``.
        rng: source of randomness.

    Returns:
        left, top, right, bottom in pixels of the image, not whole numbers; uniform over all places.
    """
    side = crop * min(width, height) / resize
    left, top = (float(draw) * (length - side) for draw, length in zip(rng.random(2), (width, height), strict=True))
    return left, top, left + side, top + side


def crop_resize(image: Image.Image, box: Box, size: int, fast: bool = True) -> npt.NDArray[np.uint8]:
    """Cuts a box and resizes it to a square in one antialiased bilinear step; a small box is enlarged.

    A box of whole pixels is cut before it is resized, as torchvision's ``RandomResizedCrop`` does it. Around any other
    box, which has no pixels of its own at its border, the filter sees the image.

    Args:
        image: any size; modes other than RGB are converted.
        box: left, top, right, bottom in pixels of the image.
        size: side of the result, pixels.
        fast: whole boxes by torch's vectorised kernel: four times faster than Pillow, no grey level further than 1
            from it, and hardly any that far.

    Returns:
        ``(3, size, size)`` uint8.
    """
    between_pixels = any(edge != int(edge) for edge in box)
    if fast and not between_pixels:
        left, top, right, bottom = map(int, box)
        pixels = torch.from_numpy(pixels_of(image)[top:bottom, left:right])
        as_channels_last = pixels.permute(2, 0, 1).unsqueeze(0)
        resized = F.interpolate(as_channels_last, (size, size), mode="bilinear", antialias=True)
        return resized[0].numpy()
    if image.mode != "RGB":
        image = image.convert("RGB")
    if between_pixels:
        square = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    else:
        cut = image.crop(tuple(map(int, box)))  # type: ignore[arg-type]
        square = cut.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(square).transpose(2, 0, 1)


def resize_shorter_side(image: Image.Image, size: int) -> Image.Image:
    """As torchvision's ``Resize(size)``: the shorter side becomes ``size`` pixels long, antialiased bilinear, RGB."""
    if image.mode != "RGB":
        image = image.convert("RGB")
    width, height = image.size
    if width <= height:
        new_size = size, int(size * height / width)
    else:
        new_size = int(size * width / height), size
    return image if new_size == image.size else image.resize(new_size, Image.Resampling.BILINEAR)


def central_crop(image: Image.Image, resize: int, crop: int) -> npt.NDArray[np.uint8]:
    """As torchvision's ``Resize(resize)`` (the shorter side) and ``CenterCrop(crop)``, antialiased bilinear.

    Returns:
        ``(crop, crop, 3)`` uint8.
    """
    image = resize_shorter_side(image, resize)
    width, height = image.size
    left, top = round((width - crop) / 2), round((height - crop) / 2)
    return np.asarray(image.crop((left, top, left + crop, top + crop)))
