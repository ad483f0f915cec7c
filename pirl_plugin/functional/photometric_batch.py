"""Photometric programs over a whole batch, on the device of the pixels: Pillow's pixels, bit for bit.

Each formula repeats Pillow's arithmetic step by step, its float32 and float64 roundings included, as the compiled path
of the loader does. Two things that torch may do on a GPU would break that, and are avoided throughout: to divide by a
number, which becomes a multiplication by its inverse (so divisors are tensors), and to add a scaled tensor, which
rounds once instead of twice.

The programs are in the host's memory. Which images an operation concerns is worked out there and sent along, so that
the host never waits for the device. On a CPU, where nothing is gained, the compiled path is twenty times as fast.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pirl_plugin.functional.operations import Operation

CHUNK = 2**23
"""Values (``n * 3 * H * W``) that are worked on at a time; the hue takes some twenty bytes for each."""


def apply_programs_batched(images: Tensor, programs: Tensor, chunk: int = CHUNK) -> Tensor:
    """Applies a program to each image.

    Args:
        images: ``(N, 3, H, W)`` uint8 on any device; left as they are.
        programs: ``(N, num_operations, 2)`` float32 in the host's memory: rows (operation code, strength).
        chunk: values worked on at a time, which bounds the memory; one image at least.

    Returns:
        ``(N, 3, H, W)`` uint8, contiguous, on the images' device.

    Raises:
        ValueError: other shapes, programs on another device, or an unknown operation code.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(f"images must be (N, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}.")
    if programs.ndim != 3 or programs.shape[2] != 2 or len(programs) != len(images):
        raise ValueError(f"programs must be ({len(images)}, num_operations, 2), got {tuple(programs.shape)}.")
    if programs.device.type != "cpu":
        raise ValueError(
            f"programs must be in the host's memory, got {programs.device}: the device would be waited for."
        )
    codes, strengths = programs[..., 0].long(), programs[..., 1].float()
    unknown = set(codes.unique().tolist()) - set(_APPLY) - {Operation.NONE}
    if unknown:
        raise ValueError(f"unknown operation code in a photometric program: {', '.join(map(str, sorted(unknown)))}.")
    views = images.clone(memory_format=torch.contiguous_format)
    if not views.numel():
        return views
    size = max(1, chunk // views[0].numel())
    for part, part_codes, part_strengths in zip(
        views.split(size), codes.split(size), strengths.split(size), strict=True
    ):
        for slot in range(codes.shape[1]):
            _apply_slot(part, part_codes[:, slot], part_strengths[:, slot])
    return views


def _apply_slot(views: Tensor, codes: Tensor, strengths: Tensor) -> None:
    """One operation of each image, in place: images with the same code together."""
    for code in codes.unique().tolist():
        if code != Operation.NONE:
            chosen = (codes == code).nonzero()[:, 0]
            rows = chosen.to(views.device, non_blocking=True)
            changed = _APPLY[code](views.index_select(0, rows), strengths[chosen])
            views.index_copy_(0, rows, changed.contiguous())


# -- operations: (n, 3, H, W) uint8 on the device and (n,) strengths of the host to (n, 3, H, W) uint8 -----------------


def _beside(x: Tensor, values: Tensor) -> Tensor:
    """A number for each image, to where the image is, as ``(n, 1, 1, 1)``."""
    return values.to(x.device, non_blocking=True).view(-1, 1, 1, 1)


def _blend(degenerate: Tensor | float, x: Tensor, factor: Tensor) -> Tensor:
    """Pillow's ``Image.blend``: float32, clipped, truncated."""
    difference = x.float() - degenerate
    return difference.mul_(factor).add_(degenerate).clamp_(0, 255).to(torch.uint8)


def _grey(x: Tensor) -> Tensor:
    """Pillow's luma, ``(n, 1, H, W)`` int32."""
    r, g, b = x.int().split(1, dim=1)
    return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(0.0, x, _beside(x, factor))


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    count = x.shape[2] * x.shape[3]
    total = _grey(x).sum(dim=(1, 2, 3), keepdim=True, dtype=torch.int64)
    mean = torch.div(2 * total + count, 2 * count, rounding_mode="floor")  # total / count + 0.5, rounded down
    return _blend(mean.float(), x, _beside(x, factor))


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(_grey(x).float(), x, _beside(x, factor))


def _hue(x: Tensor, turns: Tensor) -> Tensor:
    """To Pillow's HSV bytes, the shift added to the hue byte, which wraps around, and back."""
    shift = _beside(x, (turns.double() * 255).int())
    hue, saturation, top = _to_hsv(x)
    return _to_rgb((hue + shift) & 255, saturation, top)


def _to_hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue and saturation as int32 bytes, value as float32, each ``(n, 1, H, W)``."""
    r, g, b = x.float().split(1, dim=1)
    top, spread = x.amax(1, keepdim=True).float(), (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)).float()
    divisor = spread.clamp(min=1)
    rc, gc, bc = (((top - channel) / divisor).double() for channel in (r, g, b))
    sixths = torch.where(r == top, bc - gc, torch.where(g == top, 2.0 + rc - bc, 4.0 + gc - rc)).float().double()
    turns = sixths / sixths.new_full((), 6.0) + 1.0
    hue = ((turns - turns.floor()).float().double() * 255.0).int()
    return hue, ((spread / top.clamp(min=1)).double() * 255.0).int(), top


def _to_rgb(hue: Tensor, saturation: Tensor, top: Tensor) -> Tensor:
    """``(n, 3, H, W)`` uint8: in each sixth of the colour circle one channel is highest, one lowest, one between."""
    value, byte = top.double(), top.new_full((), 255.0, dtype=torch.float64)
    position = hue.double() * 6.0 / byte
    sector = position.floor()
    fraction = (position - sector).float()
    share = (saturation.double() / byte).float()
    falling, rising = (share * fraction).double(), share.double() * (1.0 - fraction.double())
    sector = sector.int()  # 0..6; 6, of the byte 255 alone, is red again, as 0
    between = (value * (1.0 - torch.where(sector % 2 == 1, falling, rising)) + 0.5).to(torch.uint8)
    lowest = (value * (1.0 - share.double()) + 0.5).to(torch.uint8)
    highest = value.to(torch.uint8)

    def channel(tops: tuple[int, ...], betweens: tuple[int, ...]) -> Tensor:
        is_top, is_between = _among(sector, tops), _among(sector, betweens)
        return torch.where(is_top, highest, torch.where(is_between, between, lowest))

    red, green, blue = channel((0, 5, 6), (1, 4)), channel((1, 2), (0, 3, 6)), channel((3, 4), (2, 5))
    return torch.where(saturation == 0, highest, torch.cat([red, green, blue], dim=1))


def _among(x: Tensor, values: tuple[int, ...]) -> Tensor:
    found = x == values[0]
    for value in values[1:]:
        found |= x == value
    return found


def _posterize(x: Tensor, bits: Tensor) -> Tensor:
    mask = (255 << (8 - bits.int())) & 255
    return x & _beside(x, mask.to(torch.uint8))


def _sharpness(x: Tensor, factor: Tensor) -> Tensor:
    """Blends with the 3x3 smoothing (centre 5, neighbours 1, sum 13); the outermost pixels stay, as in Pillow."""
    if min(x.shape[2:]) < 3:
        return x
    columns = x.short()
    columns = columns[..., :-2] + columns[..., 1:-1] + columns[..., 2:]
    inner = x[..., 1:-1, 1:-1]
    total = columns[..., :-2, :] + columns[..., 1:-1, :] + columns[..., 2:, :] + 4 * inner.short()
    smooth = total.float().mul_(1 / 13).add_(0.5).floor_()
    x[..., 1:-1, 1:-1] = _blend(smooth, inner, _beside(x, factor))
    return x


def _solarize(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x.short() < _beside(x, threshold.short()), x, 255 - x)


def _autocontrast(x: Tensor, _: Tensor) -> Tensor:
    low, high = (bound.double().unsqueeze(2) for bound in (x.flatten(2).amin(2), x.flatten(2).amax(2)))
    levels = torch.arange(256, device=x.device, dtype=torch.float64)
    scale = low.new_full((), 255.0) / (high - low).clamp(min=1)
    table = (levels * scale + -low * scale).clamp_(0, 255)
    return _looked_up(torch.where(high > low, table, levels), x)


def _equalize(x: Tensor, _: Tensor) -> Tensor:
    size = x.shape[2] * x.shape[3]
    index = x.flatten(2).long()
    histogram = torch.zeros((*x.shape[:2], 256), device=x.device, dtype=torch.int64)
    histogram.scatter_add_(2, index, histogram.new_ones(1).expand_as(index))
    levels = torch.arange(256, device=x.device)
    highest = ((histogram > 0) * levels).amax(2, keepdim=True)
    step = torch.div(size - histogram.gather(2, highest), 255, rounding_mode="floor")
    below = histogram.cumsum(2) - histogram
    table = torch.div(step // 2 + below, step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    return _looked_up(torch.where(step > 0, table, levels), x)


def _looked_up(table: Tensor, x: Tensor) -> Tensor:
    """New levels of each image and channel, by ``table (n, 3, 256)``."""
    return table.to(torch.uint8).gather(2, x.flatten(2).long()).view_as(x)


def _grayscale(x: Tensor, _: Tensor) -> Tensor:
    return _grey(x).to(torch.uint8).expand_as(x)


def _flip(x: Tensor, _: Tensor) -> Tensor:
    return x.flip(3)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Pillow's Gaussian blur: three box blurs along the rows, then three along the columns (Gwosdek et al. 2011)."""
    radius, inner, outer = _box_weights(sigma.numpy())
    for common in np.unique(radius).tolist():
        alike = torch.from_numpy(np.flatnonzero(radius == common))
        rows = alike.to(x.device, non_blocking=True)
        weights = _beside(x, torch.from_numpy(inner)[alike]), _beside(x, torch.from_numpy(outer)[alike])
        blurred = x.index_select(0, rows)
        for _ in range(2):
            for _ in range(3):
                blurred = _box_blur(blurred, common, *weights)
            blurred = blurred.transpose(2, 3)
        x.index_copy_(0, rows, blurred.contiguous())
    return x


def _box_weights(sigma: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], ...]:
    """Of Pillow's extended box blur: radius of the pixels of full weight, their weight, and that of the two outside.

    The weights are in units of 2**-24.
    """
    one, two, three, six = (np.float32(number) for number in (1, 2, 3, 6))
    variance = sigma * sigma / three
    length = np.sqrt(12.0 * variance.astype(np.float64) + 1.0).astype(np.float32)
    whole = np.floor((length.astype(np.float64) - 1.0) / 2.0).astype(np.float32)
    part = (two * whole + one) * (whole * (whole + one) - three * variance)
    box = whole + part / (six * (variance - (whole + one) * (whole + one)))
    radius = box.astype(np.int64)
    inner = (np.float32(1 << 24) / (box * two + one)).astype(np.int64)
    return radius, inner, ((1 << 24) - (radius * 2 + 1) * inner) // 2


def _box_blur(x: Tensor, radius: int, inner: Tensor, outer: Tensor) -> Tensor:
    """One pass along the last axis; beyond its ends stand the outermost pixels."""
    width = x.shape[3]
    place = torch.arange(-radius - 1, width + radius + 1, device=x.device).clamp_(0, width - 1)
    padded = x.index_select(3, place).int()
    inside = padded[..., 1 : 1 + width].clone()
    for offset in range(2, 2 * radius + 2):
        inside += padded[..., offset : offset + width]
    outside = padded[..., :width] + padded[..., 2 * radius + 2 :]
    return ((inside * inner + outside * outer + (1 << 23)) >> 24).to(torch.uint8)


_APPLY: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    Operation.BRIGHTNESS: _brightness,
    Operation.CONTRAST: _contrast,
    Operation.SATURATION: _saturation,
    Operation.HUE: _hue,
    Operation.POSTERIZE: _posterize,
    Operation.SHARPNESS: _sharpness,
    Operation.SOLARIZE: _solarize,
    Operation.AUTOCONTRAST: _autocontrast,
    Operation.EQUALIZE: _equalize,
    Operation.GRAYSCALE: _grayscale,
    Operation.BLUR: _blur,
    Operation.FLIP: _flip,
}
