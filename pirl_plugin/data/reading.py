"""One image file to one 8-bit RGB picture, whatever the file holds; or one exception that says why not."""

from __future__ import annotations

import errno
import os
import warnings
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

from pirl_plugin.data.decoded import DecodedImage
from pirl_plugin.text import printable

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

# Pillow refuses above this number itself, unless a program has lifted Pillow's limit: ours holds then, too.
MAX_PIXELS = 2 * 89_478_485

_ORIENTATION_TAG = 0x0112
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The machine is at fault, not the image: to skip the image would hide it.
_MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class UnreadableImageError(ValueError):
    """An image file that cannot be read; ``path`` and ``reason`` say which and why."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(path, reason)

    def __str__(self) -> str:
        return f"Cannot read image {printable(self.path)}: {printable(self.reason)}"


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> DecodedImage:
    """Reads an image file as 8-bit RGB, every pixel exactly as the decoder gives it.

    EXIF orientation is applied; of an animation the first frame counts; transparent parts become white; 16-bit
    greyscale is scaled to 8 bits (65535 -> 255), float and 32-bit greyscale are scaled by their range.

    Args:
        path: the file.
        max_pixels: images with more pixels are refused before they are decoded.

    Returns:
        A Pillow image of mode RGB.

    Raises:
        UnreadableImageError: no file, no image, damaged, truncated, or too large.
    """
    name = os.fspath(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of odd metadata and large images; what counts is raised
            with open(name, "rb") as file, Image.open(file) as image:
                if image.width * image.height > max_pixels:
                    raise UnreadableImageError(name, _too_large(image.size, max_pixels))
                pixels = _jpeg_pixels(file, image)
                if pixels is None:
                    _load(image)  # before the orientation, for which Pillow loads some formats and hides what is broken
                    pixels = np.array(_upright(_to_rgb(image), _orientation(image)))
                return DecodedImage(pixels)
    except (UnreadableImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise all sorts on damaged files: OSError, SyntaxError, struct.error, ...
        if isinstance(error, OSError) and error.errno in _MACHINE_ERRORS:
            raise
        raise UnreadableImageError(name, _reason(name, error)) from error


def _jpeg_pixels(file: BinaryIO, image: Image.Image) -> npt.NDArray[np.uint8] | None:
    """Pixels of a sound upright colour JPEG, Pillow's own and a quarter sooner; None: it is left to Pillow."""
    if simplejpeg is None or image.format != "JPEG" or image.mode != "RGB" or _orientation(image) != 1:
        return None
    file.seek(0)
    try:
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(file.read())
    except ValueError:  # damaged, at least a little: Pillow says how badly
        file.seek(0)
        return None
    return pixels


def _load(image: Image.Image) -> None:
    if ImageFile.LOAD_TRUNCATED_IMAGES:  # set by some other library: half-grey images must not pass for whole ones
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            image.load()
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = True
    else:
        image.load()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy() if image.readonly else image
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return Image.fromarray(_to_8_bits(np.asarray(image), image.mode)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """Greyscale values of more than 8 bits as uint8: by the type's range where it is known, else by their own range."""
    exact = values.astype(np.float64)
    exact = np.nan_to_num(exact, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(exact.min()), float(exact.max())
    if mode == "F" and low >= 0 and high <= 255:
        scaled = exact * 255 if high <= 1 else exact
    elif mode != "F" and low >= 0 and high <= 65535:  # 16 bits; older Pillow opens 16-bit files as mode "I"
        scaled = exact / 257
    else:
        scaled = (exact - low) * (255 / (high - low)) if high > low else np.zeros_like(exact)
    return np.rint(scaled).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; damaged EXIF data counts as upright."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # the parser raises SyntaxError, struct.error, KeyError, ... on damaged data
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    transposition = _TRANSPOSITIONS.get(orientation)
    return image if transposition is None else image.transpose(transposition)


def _too_large(size: tuple[int, int], max_pixels: int) -> str:
    return f"{size[0]} x {size[1]} pixels, more than the {max_pixels} allowed (decompression bomb?)"


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file does not exist (any more)"
    if isinstance(error, Image.DecompressionBombError):
        return f"{error} More pixels than Pillow allows."
    if isinstance(error, UnidentifiedImageError):
        with open(name, "rb") as file:
            head = file.read(16)
        return f"not an image; it begins with {head!r}" if head else "the file is empty (0 bytes)"
    return str(error) or type(error).__name__
