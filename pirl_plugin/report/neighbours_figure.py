"""A picture of nearest neighbours: per query a row with the image and those that its features are nearest to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

# colours that can be told apart without seeing red and green (Okabe & Ito 2008)
_SAME, _OTHER = "#0072B2", "#D55E00"
_INK, _PAPER = "#22272e", "#eef0f3"
_CELL_INCHES, _DPI = 1.1, 100
FILE, PICTURE = "neighbours.json", "neighbours.png"


def read_neighbours(run_dir: str | Path) -> dict[str, Any]:
    """A run's ``neighbours.json``: ``queries``, each with its ``class`` and ``neighbours``.

    Raises:
        FileNotFoundError: the run has none.
    """
    path = Path(run_dir) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{str(run_dir)!r} has no {FILE}: run the benchmark neighbours first.")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def in_words(queries: Sequence[Mapping[str, Any]]) -> str:
    """What the picture shows, in words, as in ``disc: ring, disc. star: star, star`` for two queries."""
    return " ".join(f"{query['class']}: {', '.join(one['class'] for one in query['neighbours'])}." for query in queries)


def draw_neighbours(
    queries: Sequence[Mapping[str, Any]], pictures: Mapping[tuple[str, int], Image.Image], path: str | Path
) -> None:
    """Writes the picture; neighbours of the query's class have a solid frame, others a dashed one.

    Args:
        queries: with ``id``, ``class`` and ``neighbours``, each with ``id``, ``class`` and ``cosine``.
        pictures: of the queries by ``("test", id)``, of the neighbours by ``("train", id)``.
        path: of the picture; the suffix decides the format.

    Raises:
        ValueError: nothing to draw.
    """
    if not queries:
        raise ValueError("draw_neighbours needs at least one query.")
    columns = 1 + max(len(query["neighbours"]) for query in queries)
    height = (_CELL_INCHES + 0.22) * len(queries) + 0.3
    figure = Figure(figsize=((_CELL_INCHES + 0.1) * columns, height), facecolor=_PAPER, dpi=_DPI)
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(len(queries), columns, squeeze=False)
    for line, query in zip(all_axes, queries, strict=True):
        for axes in line:
            axes.set_axis_off()
        _draw(line[0], pictures["test", query["id"]], query["class"], _INK, "-")
        for axes, one in zip(line[1:], query["neighbours"], strict=False):
            same = one["class"] == query["class"]
            text = f"{one['class']}, {one['cosine']:.2f}"
            _draw(axes, pictures["train", one["id"]], text, _SAME if same else _OTHER, "-" if same else "--")
    for axes, head in zip(all_axes[0], ["query", "nearest"], strict=False):
        axes.set_title(head, fontsize=9, color=_INK, fontweight="bold", pad=5)
    figure.subplots_adjust(0.01, 0.2 / height, 0.99, 1 - 0.26 / height, wspace=0.08, hspace=0.26)
    figure.savefig(path)


def _draw(axes: Axes, picture: Image.Image, text: str, colour: str, line: str) -> None:
    pixels = np.asarray(picture.convert("RGB"))
    small = max(pixels.shape[:2]) < _CELL_INCHES * _DPI
    axes.imshow(pixels, interpolation="nearest" if small else "antialiased")
    axes.set_axis_on()
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=colour, linestyle=line, linewidth=2)
    shown = text if len(text) <= 20 else f"{text[:19]}…"
    axes.set_xlabel(shown, fontsize=7.5, color=_INK, labelpad=3, parse_math=False)
