"""An image that is decoded into an array once, and still is a Pillow image to whoever asks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


class DecodedImage(Image.Image):
    """An RGB Pillow image whose pixels lie in an array; Pillow gets a copy of its own, when it first needs one.

    To cut a crop out of an array copies nothing, while Pillow copies an image on the way in, in the crop, and twice on
    the way out: a third of the time of PIRL's crops. Drawing on the image changes Pillow's copy alone.

    Args:
        pixels: ``(H, W, 3)`` uint8; not copied.

    Attributes:
        pixels: the same.
    """

    def __init__(self, pixels: npt.NDArray[np.uint8]) -> None:
        super().__init__()
        self.pixels = pixels
        self._mode, self._size = "RGB", (pixels.shape[1], pixels.shape[0])
        self._is_loaded = False

    def load(self) -> Any:
        """Pillow calls this before it touches an image, as for one that is still in its file."""
        if not self._is_loaded:
            self._is_loaded = True
            self.im = Image.fromarray(self.pixels).im
        return super().load()

    def __reduce__(self) -> tuple[Any, ...]:
        return DecodedImage, (self.pixels,)


def pixels_of(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Pixels of any image as RGB, ``(H, W, 3)`` uint8; not to be written to."""
    if isinstance(image, DecodedImage):
        return image.pixels
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
