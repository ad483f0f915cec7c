"""A picture of what the networks see: per image a row with the original and each of its views."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

_INK, _FAINT_INK = "#22272e", "#68707c"
_PAPER = (238, 240, 243)  # light grey, so that the ends of white patches can be seen
_CELL_INCHES = 2.3
_DPI = 150
PICTURE, WORDS = "views.png", "views.json"  # in a pretraining's folder


def patch_mosaic(patches: npt.NDArray[np.uint8], gap: float = 0.08) -> npt.NDArray[np.uint8]:
    """Lays patches out row by row in the smallest square grid, with gaps.

    Args:
        patches: ``(P, 3, s, s)`` uint8.
        gap: width of a gap as a fraction of ``s``.

    Returns:
        ``(H, W, 3)`` uint8.
    """
    count, _, size, _ = patches.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    step = size + max(1, round(gap * size))
    mosaic = np.full((rows * step - step + size, columns * step - step + size, 3), _PAPER, dtype=np.uint8)
    for index, patch in enumerate(patches):
        top, left = (index // columns) * step, (index % columns) * step
        mosaic[top : top + size, left : left + size] = patch.transpose(1, 2, 0)
    return mosaic


def draw_views(
    samples: Sequence[Mapping[str, Any]],
    originals: Sequence[Image.Image],
    path: str | Path,
    title: str = "",
    dpi: int = _DPI,
) -> None:
    """Writes a picture with one row per image: the original, then each of its views.

    Args:
        samples: per image its views, uint8 tensors or arrays: ``(3, H, W)`` is drawn as an image, ``(P, 3, s, s)`` as a
            grid of patches in the order in which the network gets them. All samples have the same views.
        originals: the images that the views were made from.
        path: of the picture; the suffix decides the format.
        title: a line above all.
        dpi: pixels an inch; a view is 2.3 inches wide.

    Raises:
        ValueError: no samples, or not as many originals.
    """
    if not samples or len(samples) != len(originals):
        raise ValueError(
            f"draw_views needs samples and one original for each, got {len(samples)} and {len(originals)}."
        )
    rows = [_row(original, views) for original, views in zip(originals, samples, strict=True)]
    num_columns = len(rows[0])
    header = 1.0 if title else 0.6
    width, height = num_columns * _CELL_INCHES + 0.3, len(rows) * _CELL_INCHES + header
    figure = Figure(figsize=(width, height), facecolor="#" + bytes(_PAPER).hex())
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), num_columns, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, (_, _, pixels) in zip(line, row, strict=True):
            small = max(pixels.shape[:2]) < _CELL_INCHES * dpi / 2
            axis.imshow(pixels, interpolation="nearest" if small else "antialiased")
            axis.set_axis_off()
    figure.subplots_adjust(0.15 / width, 0.15 / height, 1 - 0.15 / width, 1 - header / height, wspace=0.06, hspace=0.06)
    for axis, (name, note, _) in zip(axes[0], rows[0], strict=True):
        place = axis.get_subplotspec().get_position(figure)  # the axes shrink to their picture, the cells do not
        middle = (place.x0 + place.x1) / 2
        figure.text(middle, place.y1 + 0.25 / height, name, ha="center", fontsize=10.5, color=_INK, fontweight="bold")
        figure.text(middle, place.y1 + 0.09 / height, note, ha="center", fontsize=8.5, color=_FAINT_INK)
    if title:
        figure.text(0.5, 1 - 0.34 / height, title, ha="center", fontsize=13, color=_INK)
    figure.savefig(path, dpi=dpi)


def in_words(sample: Mapping[str, Any], original: Image.Image) -> list[str]:
    """Name and size of the original and of each view: ``patches, 9 of 64 × 64 pixels``."""
    return [f"{name}, {note}" for name, note, _ in _row(original, sample)]


def _row(original: Image.Image, views: Mapping[str, Any]) -> list[tuple[str, str, npt.NDArray[np.uint8]]]:
    """Name, note and pixels of each picture in one image's row."""
    row = [("original", "as it is stored", np.asarray(original.convert("RGB")))]
    for name, view in views.items():
        pixels = np.asarray(view)
        if pixels.ndim == 4:
            count, _, _, size = pixels.shape
            row.append((name, f"{count} of {size} × {size} pixels", patch_mosaic(pixels)))
        elif pixels.ndim == 3:
            row.append((name, f"{pixels.shape[2]} × {pixels.shape[1]} pixels", pixels.transpose(1, 2, 0)))
    return row
