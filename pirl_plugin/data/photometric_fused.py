"""The fast path of photometric programs: one compiled call interprets the programs of all views of an image.

Held to the plain path (``photometric.apply_program``, Pillow) pixel by pixel: each formula below repeats Pillow's
arithmetic, its float32 and float64 steps and its rounding. Measured on random, natural and degenerate images, and on
every colour for the hue: no pixel differs, in any operation or whole program. Without numba the plain path is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pirl_plugin.data import photometric
from pirl_plugin.data.photometric import ByteArray, Operation, Programs

try:
    import numba
except ImportError:
    numba = None  # type: ignore[assignment]

FUSED_AVAILABLE = numba is not None


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles at the first call; the machine code is kept on disk where there is a writable place for it."""
    if numba is None:
        return function
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # "no locator available": neither the package's nor the user's cache folder is writable
        return numba.njit(**options)(function)


_BRIGHTNESS = int(Operation.BRIGHTNESS)
_CONTRAST = int(Operation.CONTRAST)
_SATURATION = int(Operation.SATURATION)
_HUE = int(Operation.HUE)
_POSTERIZE = int(Operation.POSTERIZE)
_SHARPNESS = int(Operation.SHARPNESS)
_SOLARIZE = int(Operation.SOLARIZE)
_AUTOCONTRAST = int(Operation.AUTOCONTRAST)
_EQUALIZE = int(Operation.EQUALIZE)
_GRAYSCALE = int(Operation.GRAYSCALE)
_BLUR = int(Operation.BLUR)
_FLIP = int(Operation.FLIP)

_F0, _F255, _F4, _F13TH, _HALF = np.float32(0), np.float32(255), np.float32(4), np.float32(1 / 13), np.float32(0.5)
# Pillow's luma, (19595 R + 38470 G + 7471 B + 32768) >> 16: all sums are integers below 2**24, so float32 is exact.
_LUMA_R, _LUMA_G, _LUMA_B = np.float32(19595), np.float32(38470), np.float32(7471)
_LUMA_ROUND, _LUMA_SCALE = np.float32(32768), np.float32(1 / 65536)


@_compiled
def _luma(r: Any, g: Any, b: Any) -> Any:
    weighted = np.float32(r) * _LUMA_R + np.float32(g) * _LUMA_G + np.float32(b) * _LUMA_B + _LUMA_ROUND
    return np.int32(weighted * _LUMA_SCALE)


@_compiled
def _blend(degenerate: Any, value: Any, factor: Any) -> Any:
    """Pillow's ``Image.blend``: float32, clipped, truncated."""
    blended = degenerate + factor * (np.float32(value) - degenerate)
    return np.uint8(np.int32(min(max(blended, _F0), _F255)))


@_compiled
def _contrast(view: Any, factor: Any) -> None:
    total = 0
    for i in range(view.shape[1]):
        total += _luma(view[0, i], view[1, i], view[2, i])
    mean = np.float32(int(total / view.shape[1] + 0.5))
    for c in range(3):
        for i in range(view.shape[1]):
            view[c, i] = _blend(mean, view[c, i], factor)


@_compiled
def _saturation(view: Any, factor: Any) -> None:
    for i in range(view.shape[1]):
        grey = np.float32(_luma(view[0, i], view[1, i], view[2, i]))
        view[0, i] = _blend(grey, view[0, i], factor)
        view[1, i] = _blend(grey, view[1, i], factor)
        view[2, i] = _blend(grey, view[2, i], factor)


@_compiled
def _hue(view: Any, shift: Any) -> None:
    """To Pillow's HSV bytes, ``shift`` added to the hue byte, which wraps around, and back."""
    for i in range(view.shape[1]):
        r, g, b = np.float32(view[0, i]), np.float32(view[1, i]), np.float32(view[2, i])
        v = max(r, max(g, b))
        spread = v - min(r, min(g, b))
        cr = max(spread, np.float32(1))
        rc, gc, bc = (v - r) / cr, (v - g) / cr, (v - b) / cr
        on_green = np.float32(2.0 + np.float64(rc) - np.float64(bc))
        on_blue = np.float32(4.0 + np.float64(gc) - np.float64(rc))
        sixths = bc - gc if r == v else (on_green if g == v else on_blue)
        turns = np.float64(sixths) / 6.0 + 1.0
        hue = np.int32(np.float64(np.float32(turns - np.floor(turns))) * 255.0)
        saturation = np.int32(np.float64(spread / max(v, np.float32(1))) * 255.0)

        position = np.float64((hue + shift) & 255) * 6.0 / 255.0
        sector = np.floor(position)
        f = np.float32(position - sector)
        fs = np.float32(np.float64(saturation) / 255.0)
        p = np.uint8(np.int32(np.float64(v) * (1.0 - np.float64(fs)) + 0.5))
        q = np.uint8(np.int32(np.float64(v) * (1.0 - np.float64(fs * f)) + 0.5))
        t = np.uint8(np.int32(np.float64(v) * (1.0 - np.float64(fs) * (1.0 - np.float64(f))) + 0.5))
        top = np.uint8(np.int32(v))
        s = np.int32(sector)  # 0..6; 6, of the byte 255 alone, is red again, as 0
        if saturation == 0:
            p, q, t = top, top, top
        view[0, i] = top if s == 0 or s >= 5 else (q if s == 1 else (t if s == 4 else p))
        view[1, i] = top if s == 1 or s == 2 else (t if s == 0 or s == 6 else (q if s == 3 else p))
        view[2, i] = top if s == 3 or s == 4 else (t if s == 2 else (q if s == 5 else p))


@_compiled
def _sharpness(view: Any, height: int, width: int, factor: Any, scratch: Any) -> None:
    """Blends with the 3x3 smoothing (centre 5, neighbours 1, sum 13); the outermost pixels stay, as in Pillow."""
    if height < 3 or width < 3:
        return
    for c in range(3):
        plane = view[c]
        scratch[: plane.size] = plane
        for y in range(1, height - 1):
            above, here, below = scratch[(y - 1) * width :], scratch[y * width :], scratch[(y + 1) * width :]
            out = plane[y * width :]
            for x in range(1, width - 1):
                total = (
                    np.float32(above[x - 1])
                    + np.float32(above[x])
                    + np.float32(above[x + 1])
                    + np.float32(here[x - 1])
                    + np.float32(here[x])
                    + np.float32(here[x + 1])
                    + np.float32(below[x - 1])
                    + np.float32(below[x])
                    + np.float32(below[x + 1])
                    + _F4 * np.float32(here[x])
                )
                smooth = np.float32(np.int32(total * _F13TH + _HALF))
                out[x] = _blend(smooth, here[x], factor)


@_compiled
def _autocontrast(plane: Any) -> None:
    low, high = plane[0], plane[0]
    for i in range(plane.size):
        low, high = min(low, plane[i]), max(high, plane[i])
    if high <= low:
        return
    scale = 255.0 / (np.float64(high) - np.float64(low))
    offset = -np.float64(low) * scale
    for i in range(plane.size):
        plane[i] = np.uint8(np.int32(min(max(np.float64(plane[i]) * scale + offset, 0.0), 255.0)))


@_compiled
def _equalize(plane: Any) -> None:
    histogram = np.zeros(256, np.int64)
    for i in range(plane.size):
        histogram[plane[i]] += 1
    last = 255
    while histogram[last] == 0:
        last -= 1
    step = (plane.size - histogram[last]) // 255
    if histogram[last] == plane.size or step == 0:
        return
    table = np.empty(256, np.uint8)
    count = step // 2
    for level in range(256):
        table[level] = min(count // step, 255)
        count += histogram[level]
    for i in range(plane.size):
        plane[i] = table[plane[i]]


@_compiled
def _box_blur_line(line: Any, out: Any, radius: int, ww: int, fw: int) -> None:
    """One pass of Pillow's extended box blur: full weight up to ``radius``, the remainder just outside of it."""
    last = line.size - 1
    inside = np.int64(line[0]) * (radius + 1)
    for x in range(radius):
        inside += line[min(x, last)]
    for x in range(last + 1):
        before, after = np.int64(line[max(x - radius - 1, 0)]), np.int64(line[min(x + radius + 1, last)])
        inside += np.int64(line[min(x + radius, last)]) - before
        out[x] = np.uint8((inside * ww + (before + after) * fw + (1 << 23)) >> 24)


@_compiled
def _blur(plane: Any, height: int, width: int, sigma: Any) -> None:
    """Pillow's Gaussian blur: three box blurs along the rows, then three along the columns (Gwosdek et al. 2011)."""
    variance = np.float32(np.float32(sigma * sigma) / np.float32(3))
    length = np.float32(np.sqrt(12.0 * np.float64(variance) + 1.0))
    whole = np.float32(np.floor((np.float64(length) - 1.0) / 2.0))
    one, two, three, six = np.float32(1), np.float32(2), np.float32(3), np.float32(6)
    part = (two * whole + one) * (whole * (whole + one) - three * variance)
    box = whole + part / (six * (variance - (whole + one) * (whole + one)))
    if box == 0:
        return
    radius = int(box)
    ww = int(np.float32(1 << 24) / (box * two + one))
    fw = ((1 << 24) - (radius * 2 + 1) * ww) // 2
    line, out = np.empty(max(height, width), np.uint8), np.empty(max(height, width), np.uint8)
    for vertical in range(2):
        count, size = (width, height) if vertical else (height, width)
        start, stride = (1, width) if vertical else (width, 1)
        for n in range(count):
            for x in range(size):
                line[x] = plane[n * start + x * stride]
            for _ in range(3):
                _box_blur_line(line[:size], out[:size], radius, ww, fw)
                line, out = out, line
            for x in range(size):
                plane[n * start + x * stride] = line[x]


@_compiled
def _pointwise(view: Any, code: int, strength: Any) -> None:
    """The operations in which a channel's value depends on nothing but itself."""
    flat = view.reshape(-1)
    if code == _BRIGHTNESS:
        for i in range(flat.size):
            flat[i] = _blend(_F0, flat[i], strength)
    elif code == _POSTERIZE:
        mask = np.uint8((0xFF << (8 - int(strength))) & 0xFF)
        for i in range(flat.size):
            flat[i] = flat[i] & mask
    else:
        threshold = int(strength)
        for i in range(flat.size):
            flat[i] = flat[i] if flat[i] < threshold else np.uint8(255) - flat[i]


@_compiled
def _apply(view: Any, height: int, width: int, code: int, strength: Any, scratch: Any) -> None:
    """One operation on one view ``(3, height * width)``, in place."""
    if code in (_BRIGHTNESS, _POSTERIZE, _SOLARIZE):
        _pointwise(view, code, strength)
    elif code == _CONTRAST:
        _contrast(view, strength)
    elif code == _SATURATION:
        _saturation(view, strength)
    elif code == _HUE:
        _hue(view, np.int32(np.float64(strength) * 255.0))
    elif code == _SHARPNESS:
        _sharpness(view, height, width, strength, scratch)
    elif code in (_AUTOCONTRAST, _EQUALIZE, _BLUR):
        for c in range(3):
            if code == _AUTOCONTRAST:
                _autocontrast(view[c])
            elif code == _EQUALIZE:
                _equalize(view[c])
            else:
                _blur(view[c], height, width, strength)
    elif code == _GRAYSCALE:
        for i in range(view.shape[1]):
            grey = np.uint8(_luma(view[0, i], view[1, i], view[2, i]))
            view[0, i], view[1, i], view[2, i] = grey, grey, grey
    elif code == _FLIP:
        flat = view.reshape(-1)
        for start in range(0, 3 * height * width, width):
            for x in range(width // 2):
                left, right = start + x, start + width - 1 - x
                flat[left], flat[right] = flat[right], flat[left]
    elif code != 0:
        raise ValueError("unknown operation code in a photometric program")


@_compiled
def _run(views: Any, programs: Any) -> None:
    """Interprets ``programs (N, P, 2)`` over ``views (N, 3, H, W)``, in place."""
    height, width = views.shape[2:]
    scratch = np.empty(height * width, np.uint8)
    for n in range(len(views)):
        view = views[n].reshape(3, height * width)
        for k in range(programs.shape[1]):
            _apply(view, height, width, int(programs[n, k, 0]), programs[n, k, 1], scratch)


def apply_programs(images: ByteArray, programs: Programs, fast: bool = True) -> ByteArray:
    """Applies a program to each image.

    Args:
        images: ``(N, 3, H, W)`` uint8; left as they are.
        programs: ``(N, num_operations, 2)`` float32.
        fast: the compiled path, where numba is installed; otherwise, or if false, Pillow.

    Returns:
        ``(N, 3, H, W)`` uint8, contiguous: the same on both paths.

    Raises:
        ValueError: an unknown operation code.
    """
    if not (fast and FUSED_AVAILABLE):
        return photometric.apply_programs(images, programs)
    views = np.array(images, order="C")
    _run(views, np.ascontiguousarray(programs, dtype=np.float32))
    return views
