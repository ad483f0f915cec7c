"""The picture of a run: probe accuracy against images seen, and the signs of health under it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pirl_plugin.report.curves import Curves, Point, metric_curve

# colours that can be told apart without seeing red and green (Okabe & Ito 2008)
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_REFERENCE = "#68707c"
_HEALTH = (
    ("retrieval/image", "own image found, f(I)"),
    ("retrieval/patches", "own image found, g(Iᵗ)"),
    ("rankme", "RankMe"),
    ("loss", "loss, nats"),
)


def draw_curves(
    curves: Sequence[Curves],
    run_dirs: Mapping[str, Path],
    path: str | Path,
    title: str = "",
) -> None:
    """Writes a picture: above a panel for each probe, below one for each sign of health.

    Args:
        curves: from :func:`pirl_plugin.report.curves.probe_curves`; a method measured only without pretraining is
            drawn as a horizontal line.
        run_dirs: folder of each method's run, for its ``metrics.jsonl``.
        path: of the picture; the suffix decides the format.
        title: a line above all.

    Raises:
        ValueError: nothing to draw.
    """
    if not curves:
        raise ValueError("draw_curves needs at least one probe.")
    health = [(key, name) for key, name in _HEALTH if any(metric_curve(run, key) for run in run_dirs.values())]
    columns = max(len(curves), len(health))
    figure = Figure(figsize=(3.4 * columns, 3.1 * (1 + bool(health))), layout="constrained")
    FigureCanvasAgg(figure)
    names = dict.fromkeys([*run_dirs, *(name for probe in curves for name in probe.lines)])
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    for index, probe in enumerate(curves):
        axes = figure.add_subplot(1 + bool(health), columns, index + 1)
        _draw_probe(axes, probe.lines, colours)
        axes.set_title("\n".join(textwrap.wrap(probe.title, width=38)), fontsize=9)
        axes.set_ylabel(", ".join(part for part in (probe.metric, probe.unit) if part), fontsize=8)
        if index == 0:
            axes.legend(fontsize=8, frameon=False)
    for index, (key, name) in enumerate(health):
        axes = figure.add_subplot(2, columns, columns + index + 1)
        for method, run in run_dirs.items():
            points = metric_curve(run, key)
            if points:
                axes.plot(*zip(*points, strict=True), color=colours[method], lw=1.2)
        axes.set_title(name, fontsize=9)
    for axes in figure.axes:
        _tidy(axes)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def _draw_probe(axes: Axes, methods: Mapping[str, Sequence[Point]], colours: Mapping[str, str]) -> None:
    for method, points in methods.items():
        if [point.images_seen for point in points] == [0]:
            axes.axhline(points[0].mean, color=_REFERENCE, ls="--", lw=1.2, label=method)
            continue
        x, y = [point.images_seen for point in points], [point.mean for point in points]
        colour = colours.get(method, _REFERENCE)
        axes.errorbar(x, y, [point.std for point in points], color=colour, marker="o", ms=3, lw=1.4, label=method)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, lw=0.6)
    axes.set_xlim(left=0)
    axes.set_xlabel("images seen", fontsize=8)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k"))
