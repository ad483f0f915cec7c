"""Photometric augmentation as explicit programs: what is drawn is data, and how it is applied is a pure function of it.

A *program* is a float32 array ``(num_operations, 2)`` of rows (operation code, strength), applied from the first row to
the last. The same program gives the same view on the plain path (here, with Pillow) and on the fast one
(``photometric_fused``), and on a device in batches (``functional.photometric_batch``), which is how those two are held
to the plain one.

The default settings are those of VISSL's PIRL configuration: colour jitter in random order, then with p = 0.66 all of
posterize, sharpness, solarize and autocontrast, then greyscale and a horizontal flip.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from pirl_plugin.functional.operations import Operation

ByteArray = npt.NDArray[np.uint8]
Programs = npt.NDArray[np.float32]


@dataclass(frozen=True)
class PhotometricSettings:
    """Ranges and probabilities that programs are drawn from; the defaults are the released implementation's.

    ``brightness``, ``contrast`` and ``saturation`` b mean a factor uniform in [max(0, 1 - b), 1 + b], ``hue`` a shift
    uniform in [-hue, hue]; the four come in random order (torchvision's ColorJitter). ``photometric_probability`` is
    that of posterize, sharpness, solarize and autocontrast together. ``equalize_probability`` exists for the paper's
    text, which names equalize; the released code has none. ``solarize_probability`` is of a solarisation by itself, at
    grey level 128, after the blur (BYOL, Barlow Twins).

    Raises:
        ValueError: a value out of its range.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.2
    jitter_probability: float = 1.0
    photometric_probability: float = 0.66
    posterize_bits: tuple[int, int] = (4, 8)
    sharpness: tuple[float, float] = (0.1, 1.9)
    solarize_threshold: tuple[int, int] = (0, 256)
    equalize_probability: float = 0.0
    grayscale_probability: float = 0.2
    blur_probability: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.0
    flip_probability: float = 0.5

    def __post_init__(self) -> None:
        for name, largest in (("brightness", np.inf), ("contrast", np.inf), ("saturation", np.inf), ("hue", 0.5)):
            if not 0 <= getattr(self, name) <= largest:
                raise ValueError(f"{name} must be in [0, {largest}], got {getattr(self, name)}.")
        for name in vars(self):
            if name.endswith("_probability") and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}.")
        limits = {"posterize_bits": (1, 8), "solarize_threshold": (0, 256), "sharpness": (0, np.inf)}
        limits["blur_sigma"] = (0, np.inf)
        for name, (lowest, highest) in limits.items():
            low, high = getattr(self, name)
            if not lowest <= low <= high <= highest:
                raise ValueError(f"{name} must be a range in [{lowest}, {highest}], low end first, got {low}, {high}.")

    @classmethod
    def flip_only(cls, flip_probability: float = 0.5) -> PhotometricSettings:
        """No change of colour at all, only the horizontal flip."""
        return cls(
            jitter_probability=0, photometric_probability=0, grayscale_probability=0, flip_probability=flip_probability
        )


# What is drawn for each view, in the order in which it is applied; the first four are shuffled per view.
_SLOTS = tuple(op for op in Operation if op is not Operation.NONE)
_JITTER = slice(0, 4)
_GROUP = slice(4, 8)
_CODES = np.array(_SLOTS, dtype=np.float32)
_INTEGER_SLOTS = [_SLOTS.index(Operation.POSTERIZE), _SLOTS.index(Operation.SOLARIZE)]
_SOLARIZE_LEVEL = 128


@functools.lru_cache(maxsize=64)
def _tables(settings: PhotometricSettings) -> tuple[npt.NDArray[np.float64], ...]:
    """Per slot: lowest strength, width of the strength's range, highest strength, probability."""
    jitter = {
        Operation.BRIGHTNESS: settings.brightness,
        Operation.CONTRAST: settings.contrast,
        Operation.SATURATION: settings.saturation,
        Operation.HUE: settings.hue,
    }
    ranges: dict[Operation, tuple[float, float]] = {
        op: (max(0.0, 1 - half), 1 + half) if op is not Operation.HUE else (-half, half) for op, half in jitter.items()
    }
    ranges[Operation.POSTERIZE] = settings.posterize_bits
    ranges[Operation.SHARPNESS] = settings.sharpness
    ranges[Operation.SOLARIZE] = settings.solarize_threshold
    ranges[Operation.BLUR] = settings.blur_sigma
    probability = {op: settings.jitter_probability if width > 0 else 0.0 for op, width in jitter.items()}
    probability |= {op: settings.photometric_probability for op in _SLOTS[_GROUP]}
    probability[Operation.EQUALIZE] = settings.equalize_probability
    probability[Operation.GRAYSCALE] = settings.grayscale_probability
    probability[Operation.BLUR] = settings.blur_probability
    probability[Operation.FLIP] = settings.flip_probability
    low, high = np.array([ranges.get(op, (0.0, 0.0)) for op in _SLOTS], dtype=np.float64).T
    width = high - low
    width[_INTEGER_SLOTS] += 1  # the floor of a draw from [low, high + 1) is uniform over low..high
    return low, width, high, np.array([probability[op] for op in _SLOTS])


def draw_programs(settings: PhotometricSettings, num_views: int, rng: np.random.Generator) -> Programs:
    """Draws an independent program for each view.

    The number of random numbers taken does not depend on the settings, so that changing one of them leaves the other
    draws of a view as they were.

    Returns:
        ``(num_views, 13, 2)`` float32: rows (operation code, strength); code 0 for an operation that was not drawn.
    """
    low, width, high, probability = _tables(settings)
    slots = len(_SLOTS)
    draws = rng.random((num_views, 2 * slots + 4))
    strength = low + width * draws[:, :slots]
    strength[:, _INTEGER_SLOTS] = np.floor(strength[:, _INTEGER_SLOTS])
    np.minimum(strength, high, out=strength)
    gate = draws[:, slots : 2 * slots]
    solarized = gate[:, 1] < settings.solarize_probability  # a draw that the jitter, happening as a whole, leaves over
    gate[:, _JITTER] = gate[:, :1]  # the jitter happens as a whole, and so does the group of four
    gate[:, _GROUP] = gate[:, _GROUP.start : _GROUP.start + 1]
    programs = np.empty((num_views, slots + 1, 2), dtype=np.float32)
    programs[:, :-1, 0] = np.where(gate < probability, _CODES, 0)
    programs[:, :-1, 1] = strength
    programs[:, -1, 0] = np.where(solarized, Operation.SOLARIZE, 0)  # after the flip, which it does not mind
    programs[:, -1, 1] = _SOLARIZE_LEVEL
    order = draws[:, 2 * slots :].argsort(axis=1)
    programs[:, _JITTER] = programs[np.arange(num_views)[:, None], order]
    return programs


def _shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """As torchvision's ``adjust_hue`` of a Pillow image: the hue is an unsigned byte and wraps around."""
    hue, saturation, value = image.convert("HSV").split()
    shifted = np.asarray(hue) + np.int32(turns * 255).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(shifted), saturation, value)).convert("RGB")


_APPLY: dict[Operation, Callable[[Image.Image, float], Image.Image]] = {
    Operation.NONE: lambda image, _: image,
    Operation.BRIGHTNESS: lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    Operation.CONTRAST: lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    Operation.SATURATION: lambda image, factor: ImageEnhance.Color(image).enhance(factor),
    Operation.HUE: _shift_hue,
    Operation.POSTERIZE: lambda image, bits: ImageOps.posterize(image, int(bits)),
    Operation.SHARPNESS: lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor),
    Operation.SOLARIZE: lambda image, threshold: ImageOps.solarize(image, int(threshold)),
    Operation.AUTOCONTRAST: lambda image, _: ImageOps.autocontrast(image),
    Operation.EQUALIZE: lambda image, _: ImageOps.equalize(image),
    Operation.GRAYSCALE: lambda image, _: image.convert("L").convert("RGB"),
    Operation.BLUR: lambda image, sigma: image.filter(ImageFilter.GaussianBlur(sigma)),
    Operation.FLIP: lambda image, _: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def apply_program(image: ByteArray, program: Programs) -> ByteArray:
    """Applies one program with Pillow, one operation after the other (the plain path).

    Args:
        image: ``(H, W, 3)`` uint8.
        program: ``(num_operations, 2)`` float32.

    Returns:
        ``(H, W, 3)`` uint8, a copy.

    Raises:
        ValueError: an unknown operation code.
    """
    view = Image.fromarray(np.ascontiguousarray(image))
    for code, strength in program.tolist():
        view = _APPLY[Operation(int(code))](view, strength)
    return np.array(view)


def apply_programs(images: ByteArray, programs: Programs) -> ByteArray:
    """``apply_program`` of each image, channels first, as the networks want it.

    Args:
        images: ``(N, 3, H, W)`` uint8.
        programs: ``(N, num_operations, 2)`` float32.

    Returns:
        ``(N, 3, H, W)`` uint8, contiguous.
    """
    views = np.empty(images.shape, dtype=np.uint8)
    for view, image, program in zip(views, images.transpose(0, 2, 3, 1), programs, strict=True):
        view[:] = apply_program(image, program).transpose(2, 0, 1)
    return views
