"""Geometry of the jigsaw pretext: where the patches lie, in which order they come. No pixels are changed here.

Noroozi & Favaro 2016, as PIRL uses it (Misra & van der Maaten 2020): a square crop of ``jigsaw_size`` pixels is
divided into ``grid x grid`` cells, and each cell gives one patch from a random place inside it, so that patches do not
overlap and their borders can hardly be matched.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]


def largest_offset(jigsaw_size: int, grid: int, patch_size: int) -> int:
    """The largest distance in pixels of a patch from the top (left) of its cell; 21 for 255, 3, 64.

    Raises:
        ValueError: the patch does not fit into a cell.
    """
    if jigsaw_size < 1 or grid < 1 or patch_size < 1:
        raise ValueError(f"jigsaw_size, grid and patch_size must be >= 1, got {jigsaw_size}, {grid}, {patch_size}.")
    cell = jigsaw_size // grid
    if patch_size > cell:
        raise ValueError(f"patch_size must be <= jigsaw_size // grid = {cell}, got {patch_size}.")
    return cell - patch_size


def draw_offsets(jigsaw_size: int, grid: int, patch_size: int, rng: np.random.Generator) -> IntArray:
    """Uniform offsets of the patches inside their cells, both ends included.

    The released implementation (VISSL) draws 0..20 of the 0..21 possible pixels for 255/3/64; here both ends are
    reached.

    Returns:
        ``(grid * grid, 2)`` pixels: y, x.
    """
    largest = largest_offset(jigsaw_size, grid, patch_size)
    return rng.integers(0, largest + 1, size=(grid * grid, 2))


def patch_boxes(jigsaw_size: int, grid: int, patch_size: int, offsets: npt.ArrayLike) -> IntArray:
    """Boxes of the patches in the crop.

    Args:
        jigsaw_size: side of the square crop, pixels; what ``grid`` does not divide is left at the right and bottom.
        grid: cells per side.
        patch_size: side of a patch, pixels.
        offsets: ``(grid * grid, 2)`` y, x of each patch inside its cell, pixels.

    Returns:
        ``(grid * grid, 4)``: left, top, right, bottom in pixels, right and bottom exclusive, cells row by row.

    Raises:
        ValueError: patches larger than a cell, or offsets that leave it.
    """
    largest = largest_offset(jigsaw_size, grid, patch_size)
    offsets = np.asarray(offsets, dtype=np.int64)
    if offsets.shape != (grid * grid, 2):
        raise ValueError(f"offsets must have the shape ({grid * grid}, 2), got {offsets.shape}.")
    if offsets.min() < 0 or offsets.max() > largest:
        raise ValueError(f"offsets must be in 0..{largest}, got {offsets.min()}..{offsets.max()}.")
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    corner = np.stack([columns, rows], axis=1) * (jigsaw_size // grid) + offsets[:, ::-1]
    return np.concatenate([corner, corner + patch_size], axis=1)


def draw_permutation(num_patches: int, rng: np.random.Generator) -> IntArray:
    """A uniformly random order, one of ``num_patches!``: place ``i`` is taken by patch ``permutation[i]``."""
    return rng.permutation(num_patches)


def cut_patches(image: ByteArray, boxes: IntArray) -> ByteArray:
    """Copies the boxes out of an image.

    Args:
        image: ``(3, H, W)`` uint8.
        boxes: ``(P, 4)`` left, top, right, bottom, all of one size.

    Returns:
        ``(P, 3, s, s)`` uint8, contiguous.
    """
    left, top, right, bottom = boxes[0].tolist()
    patches = np.empty((len(boxes), len(image), bottom - top, right - left), dtype=image.dtype)
    for patch, (left, top, right, bottom) in zip(patches, boxes.tolist(), strict=True):
        patch[:] = image[:, top:bottom, left:right]
    return patches
