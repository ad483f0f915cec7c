"""Views: what the networks see of an image. Transforms ``(PIL image, numpy Generator) -> {view: uint8 tensor}``.

A view is a pure function of the image and of the generator's state. uint8 all the way: the model normalises on its
device.
A pretext task is one class here, put together from four parts: ``draw_crop_box`` and ``crop_resize`` (``crops.py``),
``draw_programs`` (``photometric.py``) and ``apply_programs`` (``photometric_fused.py``).

Images of any size go in. One that is smaller than the crop's target size, even smaller than a patch, is enlarged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Interval, Len
from classy_vision.dataset.transforms import ClassyTransform, register_transform
from PIL import Image
from torch import Tensor

from pirl_plugin.data.crops import central_crop, crop_resize, draw_crop_box
from pirl_plugin.data.photometric import PhotometricSettings, draw_programs
from pirl_plugin.data.photometric_fused import apply_programs
from pirl_plugin.functional.jigsaw import cut_patches, draw_offsets, draw_permutation, largest_offset, patch_boxes
from pirl_plugin.registry import Configurable
from pirl_plugin.schema import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, checked

HueShift = Annotated[float, Interval(ge=0, le=0.5)]
AreaRange = Annotated[Sequence[Annotated[float, Interval(gt=0, le=1)]], Len(2, 2)]
PositiveRange = Annotated[Sequence[PositiveFloat], Len(2, 2)]
Views = dict[str, Tensor]


def generator_or_torch(rng: np.random.Generator | None) -> np.random.Generator:
    """The generator itself, or one seeded from torch's global state, for use in a plain program."""
    if rng is None:
        return np.random.default_rng(int(torch.randint(2**63 - 1, ()).item()))
    return rng


def ordered(name: str, values: Sequence[float]) -> tuple[float, float]:
    """A range as a tuple.

    Raises:
        ValueError: the low end is above the high one.
    """
    low, high = values
    if low > high:
        raise ValueError(f"{name} must be a range, low end first, got [{low}, {high}].")
    return low, high


@register_transform("image_view")
@checked
class ImageView(Configurable, ClassyTransform):
    """One augmented crop of the image: ``{"image": (3, S, S)}`` uint8 (NPID; the image branch of PIRL).

    Args:
        image_size: side S of the view, pixels.
        image_scale: range of the crop's area, as a fraction of the image's.
        image_ratio: range of the crop's width / height.
        brightness: factor uniform in 1 +- this; likewise ``contrast`` and ``saturation``.
        contrast: see brightness.
        saturation: see brightness.
        hue: shift uniform in +- this, in turns of the colour circle.
        jitter_probability: that of the four above, together, in random order.
        photometric_probability: that of posterize, sharpness, solarize and autocontrast, together.
        equalize_probability: of histogram equalisation (named in PIRL's text, absent from its released code).
        grayscale_probability: of greyscale.
        blur_probability: of a Gaussian blur.
        blur_sigma: range of the blur's sigma, pixels.
        flip_probability: of a horizontal flip.
        fast: fused kernel instead of Pillow for the photometric part: the same pixels, sooner. Plain without numba.
    """

    def __init__(
        self,
        image_size: PositiveInt = 224,
        image_scale: AreaRange = (0.08, 1.0),
        image_ratio: PositiveRange = (3 / 4, 4 / 3),
        brightness: NonNegativeFloat = 0.4,
        contrast: NonNegativeFloat = 0.4,
        saturation: NonNegativeFloat = 0.4,
        hue: HueShift = 0.2,
        jitter_probability: Fraction = 1.0,
        photometric_probability: Fraction = 0.66,
        equalize_probability: Fraction = 0.0,
        grayscale_probability: Fraction = 0.2,
        blur_probability: Fraction = 0.0,
        blur_sigma: PositiveRange = (0.1, 2.0),
        flip_probability: Fraction = 0.5,
        fast: bool = True,
    ) -> None:
        self.image_size = image_size
        self.image_scale = ordered("image_scale", image_scale)
        self.image_ratio = ordered("image_ratio", image_ratio)
        self.fast = fast
        self.photometric = PhotometricSettings(
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
            jitter_probability=jitter_probability,
            photometric_probability=photometric_probability,
            equalize_probability=equalize_probability,
            grayscale_probability=grayscale_probability,
            blur_probability=blur_probability,
            blur_sigma=ordered("blur_sigma", blur_sigma),
            flip_probability=flip_probability,
        )

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Views:
        """``{"image": (3, S, S)}``; without a generator, torch's global random state decides."""
        return {"image": self.image_view(image, generator_or_torch(rng))}

    def image_view(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """One augmented crop, ``(3, S, S)`` uint8."""
        box = draw_crop_box(*image.size, self.image_scale, self.image_ratio, rng)
        programs = draw_programs(self.photometric, 1, rng)
        pixels = crop_resize(image, box, self.image_size)
        return torch.from_numpy(apply_programs(pixels[None], programs, self.fast)[0])


@register_transform("image_and_jigsaw_patches")
@checked
class ImageAndJigsawPatches(ImageView):
    """An augmented crop and shuffled jigsaw patches: ``{"image": (3, S, S), "patches": (grid**2, 3, s, s)}`` (PIRL).

    The two come from independent crops of the image. Each patch has a photometric program of its own, drawn from the
    same settings as the image's, as in the paper and in the released implementation.

    Args:
        image_size: side S of the image view, pixels.
        image_scale: range of the image crop's area, as a fraction of the image's.
        image_ratio: range of both crops' width / height.
        jigsaw_size: side of the crop that the patches are cut from, pixels.
        jigsaw_scale: range of that crop's area, as a fraction of the image's.
        patch_size: side s of a patch, pixels; at most ``jigsaw_size // grid``.
        grid: patches per side.
        shuffle_patches: bring the patches into a uniformly random order.
        patch_flip: where the patches are flipped, with ``flip_probability``: each ``patch`` by itself (released
            implementation), the whole ``crop`` before it is cut (PyContrast), or ``none``. The paper does not say.
        patch_photometric: false leaves the patches' colours as they are (PyContrast).
        brightness: factor uniform in 1 +- this; likewise ``contrast`` and ``saturation``.
        contrast: see brightness.
        saturation: see brightness.
        hue: shift uniform in +- this, in turns of the colour circle.
        jitter_probability: that of the four above, together, in random order.
        photometric_probability: that of posterize, sharpness, solarize and autocontrast, together.
        equalize_probability: of histogram equalisation (named in PIRL's text, absent from its released code).
        grayscale_probability: of greyscale.
        blur_probability: of a Gaussian blur.
        blur_sigma: range of the blur's sigma, pixels.
        flip_probability: of a horizontal flip.
        fast: fused kernel instead of Pillow for the photometric part: the same pixels, sooner. Plain without numba.

    Raises:
        ValueError: patches that do not fit into their cells; a range with its ends swapped.
    """

    def __init__(
        self,
        image_size: PositiveInt = 224,
        image_scale: AreaRange = (0.08, 1.0),
        image_ratio: PositiveRange = (3 / 4, 4 / 3),
        jigsaw_size: PositiveInt = 255,
        jigsaw_scale: AreaRange = (0.6, 1.0),
        patch_size: PositiveInt = 64,
        grid: PositiveInt = 3,
        shuffle_patches: bool = True,
        patch_flip: Literal["patch", "crop", "none"] = "patch",
        patch_photometric: bool = True,
        brightness: NonNegativeFloat = 0.4,
        contrast: NonNegativeFloat = 0.4,
        saturation: NonNegativeFloat = 0.4,
        hue: HueShift = 0.2,
        jitter_probability: Fraction = 1.0,
        photometric_probability: Fraction = 0.66,
        equalize_probability: Fraction = 0.0,
        grayscale_probability: Fraction = 0.2,
        blur_probability: Fraction = 0.0,
        blur_sigma: PositiveRange = (0.1, 2.0),
        flip_probability: Fraction = 0.5,
        fast: bool = True,
    ) -> None:
        super().__init__(
            image_size=image_size,
            image_scale=image_scale,
            image_ratio=image_ratio,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=hue,
            jitter_probability=jitter_probability,
            photometric_probability=photometric_probability,
            equalize_probability=equalize_probability,
            grayscale_probability=grayscale_probability,
            blur_probability=blur_probability,
            blur_sigma=blur_sigma,
            flip_probability=flip_probability,
            fast=fast,
        )
        largest_offset(jigsaw_size, grid, patch_size)  # raises where a patch does not fit
        self.jigsaw_size, self.patch_size, self.grid = jigsaw_size, patch_size, grid
        self.jigsaw_scale = ordered("jigsaw_scale", jigsaw_scale)
        self.shuffle_patches = shuffle_patches
        self.crop_flip_probability = flip_probability if patch_flip == "crop" else 0.0
        own_flip = flip_probability if patch_flip == "patch" else 0.0
        self.patch_settings = (
            dataclasses.replace(self.photometric, flip_probability=own_flip)
            if patch_photometric
            else PhotometricSettings.flip_only(own_flip)
        )

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Views:
        """``{"image": (3, S, S), "patches": (grid**2, 3, s, s)}``; without a generator, torch's state decides."""
        rng = generator_or_torch(rng)
        return {"image": self.image_view(image, rng), "patches": self.patches(image, rng)}

    def patches(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """Augmented patches of one crop, ``(grid**2, 3, s, s)`` uint8, in shuffled order."""
        box = draw_crop_box(*image.size, self.jigsaw_scale, self.image_ratio, rng)
        flipped = rng.random() < self.crop_flip_probability
        offsets = draw_offsets(self.jigsaw_size, self.grid, self.patch_size, rng)
        boxes = patch_boxes(self.jigsaw_size, self.grid, self.patch_size, offsets)
        programs = draw_programs(self.patch_settings, len(boxes), rng)
        if self.shuffle_patches:
            boxes = boxes[draw_permutation(len(boxes), rng)]
        pixels = crop_resize(image, box, self.jigsaw_size)
        patches = cut_patches(pixels[:, ::-1] if flipped else pixels, boxes)
        return torch.from_numpy(apply_programs(patches, programs, self.fast))


@register_transform("eval_view")
@checked
class EvalView(Configurable, ClassyTransform):
    """The deterministic view of the benchmarks, resize and central crop: ``{"image": (3, crop, crop)}`` uint8.

    Args:
        resize: the image's shorter side becomes this long, pixels (equal to ``crop`` for small images).
        crop: side of the central square that is kept, pixels.

    Raises:
        ValueError: the crop is larger than the resized image.
    """

    def __init__(self, resize: PositiveInt = 256, crop: PositiveInt = 224) -> None:
        if crop > resize:
            raise ValueError(f"crop must be <= resize = {resize}, got {crop}.")
        self.resize, self.crop = resize, crop

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Views:
        """``{"image": (3, crop, crop)}``; the generator is not used."""
        pixels = central_crop(image, self.resize, self.crop)
        return {"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy())}
