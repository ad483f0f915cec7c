"""The operations that a photometric program is made of, and what their strengths mean."""

from __future__ import annotations

from enum import IntEnum


class Operation(IntEnum):
    """Codes of the operations; the strength's meaning and unit stand behind each.

    The fast path keeps compiled code on disk that knows these numbers: append new ones, never renumber.
    """

    NONE = 0  # leaves the image as it is
    BRIGHTNESS = 1  # factor, 1 changes nothing
    CONTRAST = 2  # factor, 1 changes nothing
    SATURATION = 3  # factor, 1 changes nothing
    HUE = 4  # shift in turns of the colour circle, -0.5..0.5
    POSTERIZE = 5  # bits kept, 1..8
    SHARPNESS = 6  # factor, 1 changes nothing
    SOLARIZE = 7  # grey levels from here on are inverted, 0..256
    AUTOCONTRAST = 8  # no strength
    EQUALIZE = 9  # no strength
    GRAYSCALE = 10  # no strength
    BLUR = 11  # Gaussian blur, sigma in pixels
    FLIP = 12  # horizontal, no strength
