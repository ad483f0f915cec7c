"""Views: what the networks see of an image. Transforms ``(PIL image, numpy Generator) -> {view: uint8 tensor}``.

A view is a pure function of the image and of the generator's state. uint8 all the way: the model normalises on its
device. A view is ``(3, H, W)``, or ``(V, 3, H, W)`` for several crops or patches that pass through one head. What a
pretext must know besides pixels (which rotation, which permutation) stands beside the views under a name of its own, as
int64 of any shape; and so do the programs of a view that is to be coloured on a device (``colours``).

A pretext task is one class, put together from four parts: ``draw_crop_box`` and ``crop_resize`` (``crops.py``),
``draw_programs`` (``photometric.py``) and ``apply_programs`` (``photometric_fused.py``). Here are the parts of all
transforms and the single views; ``multi_views.py``, ``jigsaw_views.py`` and ``rotation_views.py`` hold the others.

Images of any size go in. One that is smaller than the crop's target size, even smaller than a patch, is enlarged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Interval, Len
from classy_vision.dataset.transforms import ClassyTransform, register_transform
from PIL import Image
from torch import Tensor

from pirl_plugin.data.crops import central_crop, crop_resize, draw_crop_box
from pirl_plugin.data.photometric import ByteArray, PhotometricSettings, Programs, draw_programs
from pirl_plugin.data.photometric_fused import apply_programs
from pirl_plugin.functional.pending_colours import program_name
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


@checked
class PhotometricTransform(Configurable, ClassyTransform):
    """Base of the transforms that change colours: the one place of the settings that they share.

    Args:
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
        solarize_probability: of a solarisation by itself, at grey level 128 (BYOL, Barlow Twins).
        flip_probability: of a horizontal flip.
        fast: compiled kernels instead of Pillow, several times sooner: for the colours the same pixels (plain without
            numba), for the resize no grey level further than 1 off.
        colours: where pixels are coloured and flipped: in the ``loader``'s processes, or on the training's ``device``,
            in batches. The views are the same to the last bit; ``device`` frees the processors for decoding and crops
            and pays where a GPU waits for them, never on a CPU. Refused where something comes after the colours and the
            order matters: turned views with a blur, and ``jigsaw_puzzle`` with colours of the whole crop.

    Attributes:
        photometric: the settings, to draw programs from.
    """

    def __init__(
        self,
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
        solarize_probability: Fraction = 0.0,
        flip_probability: Fraction = 0.5,
        fast: bool = True,
        colours: Literal["loader", "device"] = "loader",
    ) -> None:
        self.fast, self.colours = fast, colours
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
            solarize_probability=solarize_probability,
            flip_probability=flip_probability,
        )

    def view(self, name: str, pixels: ByteArray, programs: Programs) -> Views:
        """A view ``(..., 3, H, W)`` by its name, coloured; or as it is, beside its programs ``(..., P, 2)``."""
        if self.colours == "device":
            return {name: torch.from_numpy(np.array(pixels, order="C")), program_name(name): torch.from_numpy(programs)}
        flat = pixels.reshape(-1, *pixels.shape[-3:]), programs.reshape(-1, *programs.shape[-2:])
        return {name: torch.from_numpy(apply_programs(*flat, self.fast).reshape(pixels.shape))}


@register_transform("image_view")
@checked
class ImageView(PhotometricTransform):
    """One augmented crop of the image: ``{"image": (3, S, S)}`` uint8 (NPID; the image branch of PIRL).

    Args:
        image_size: side S of the view, pixels.
        image_scale: range of the crop's area, as a fraction of the image's.
        image_ratio: range of the crop's width / height.
        **photometric: see ``PhotometricTransform``.
    """

    def __init__(
        self,
        image_size: PositiveInt = 224,
        image_scale: AreaRange = (0.08, 1.0),
        image_ratio: PositiveRange = (3 / 4, 4 / 3),
        **photometric: Any,
    ) -> None:
        super().__init__(**photometric)
        self.image_size = image_size
        self.image_scale = ordered("image_scale", image_scale)
        self.image_ratio = ordered("image_ratio", image_ratio)

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Views:
        """``{"image": (3, S, S)}``; without a generator, torch's global random state decides."""
        return self.image_view(image, generator_or_torch(rng))

    def image_view(self, image: Image.Image, rng: np.random.Generator, name: str = "image") -> Views:
        """One augmented crop, ``{name: (3, S, S)}`` uint8."""
        return self.view(name, *self.draw_crop(image, rng, self.image_size, self.image_scale, self.photometric))

    def draw_crop(
        self,
        image: Image.Image,
        rng: np.random.Generator,
        size: int,
        scale: tuple[float, float],
        photometric: PhotometricSettings,
    ) -> tuple[ByteArray, Programs]:
        """A random resized crop ``(3, size, size)`` and a program ``(num_operations, 2)`` for it."""
        box = draw_crop_box(*image.size, scale, self.image_ratio, rng)
        programs = draw_programs(photometric, 1, rng)
        return crop_resize(image, box, size, self.fast), programs[0]


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
