"""The picture of an invariance benchmark: how far the views of one image lie apart, and those of different images."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# colours that can be told apart without seeing red and green (Okabe & Ito 2008)
_SAME, _DIFFERENT = "#0072B2", "#D55E00"
_INK, _FAINT_INK = "#22272e", "#68707c"
_NAMES = {"embedding": "embedding: f(I) and g(Iᵗ)", "trunk": "pooled trunk features"}
_PANEL_INCHES = (4.4, 3.4)


def read_panels(run_dir: str | Path) -> list[dict[str, Any]]:
    """Panels of a run's ``invariance.json``.

    Raises:
        FileNotFoundError: the run has none.
    """
    path = Path(run_dir) / "invariance.json"
    if not path.is_file():
        raise FileNotFoundError(f"{str(run_dir)!r} has no invariance.json: run the benchmark invariance first.")
    return list(json.loads(path.read_text(encoding="utf-8"))["panels"])


def draw_invariance(panels: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> None:
    """Writes a picture with one panel for each kind of features, each with the two histograms.

    Args:
        panels: with ``edges``, ``same_histogram`` and ``different_histogram`` (fractions of the pairs in each bin),
            ``same_mean``, ``different_mean``, ``auc``, ``features``, ``view``, and, for panels of several runs, a
            ``title`` of their own.
        path: of the picture; the suffix decides the format.
        title: a line above all.

    Raises:
        ValueError: nothing to draw.
    """
    _figure(panels, title).savefig(path, dpi=150, metadata={"Date": None} if Path(path).suffix == ".svg" else None)


def invariance_svg(panels: Sequence[Mapping[str, Any]]) -> str:
    """The same without paper, all writing in one ink, for a page that may be dark."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "invariance"}):
        _figure(panels, "").savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue().replace(_FAINT_INK, _INK)


def _figure(panels: Sequence[Mapping[str, Any]], title: str) -> Figure:
    if not panels:
        raise ValueError("draw_invariance needs at least one panel.")
    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * len(panels), height + 0.3 * bool(title)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_panel(axes, panel)
    all_axes[0].set_ylabel("density of pairs", fontsize=9, color=_INK)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False, labelcolor=_INK)
    if title:
        figure.suptitle(title, fontsize=11, color=_INK)
    return figure


def _draw_panel(axes: Axes, panel: Mapping[str, Any]) -> None:
    edges = panel["edges"]
    width = edges[1] - edges[0]
    for name, colour, label, line in (
        ("same", _SAME, "views of the same image", "-"),
        ("different", _DIFFERENT, "views of different images", "--"),
    ):
        density = [fraction / width for fraction in panel[f"{name}_histogram"]]
        axes.stairs(density, edges, fill=True, color=colour, alpha=0.22)
        axes.stairs(density, edges, color=colour, lw=1.4, ls=line, label=label)
    name = panel.get("title") or _NAMES.get(panel["features"], panel["features"])
    axes.set_title(name, fontsize=10, color=_INK, loc="left", pad=20)
    numbers = f"AUC {100 * panel['auc']:.1f} %, mean {panel['same_mean']:.2f} against {panel['different_mean']:.2f}"
    axes.text(0, 1.03, numbers, transform=axes.transAxes, fontsize=8.5, color=_FAINT_INK)
    axes.set_xlabel("l2 distance of unit vectors", fontsize=9, color=_INK)
    axes.set_xlim(edges[0], _last_used(panel))
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.grid(axis="y", alpha=0.25, lw=0.6)


def _last_used(panel: Mapping[str, Any]) -> float:
    """Right end of the histograms' last bin that holds a pair, with a little room."""
    edges, same, different = panel["edges"], panel["same_histogram"], panel["different_histogram"]
    last = max(index for index, pair in enumerate(zip(same, different, strict=True)) if any(pair))
    return min(edges[-1], edges[last + 1] * 1.04)
