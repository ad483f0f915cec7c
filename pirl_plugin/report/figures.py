"""The report's figures: drawn by matplotlib, inlined as SVG whose ink is that of the page, and kept as files."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

_INK = "#22272e"
# colours that can be told apart without seeing red and green (Okabe & Ito 2008), on white and on black
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES = ("-", "--", ":", "-.")
Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Picture:
    """A figure in the report.

    Attributes:
        name: of its files.
        caption: below it.
        alt: what it shows, for those who do not see it.
        svg: markup to inline.
        panels: side by side in it; decides how small it may become.
    """

    name: str
    caption: str
    alt: str
    svg: str
    panels: int = 1


def curves(
    panels: Mapping[str, Mapping[str, Sequence[Curve]]], name: str, caption: str, folder: Path, xlabel: str
) -> Picture:
    """Curves against images seen, a panel for each quantity.

    Args:
        panels: ``{quantity: {method: one curve for each seed}}``.
        name: of the picture's files.
        caption: below it.
        folder: where the files go.
        xlabel: of the horizontal axis.
    """
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    methods = list(dict.fromkeys(method for by_method in panels.values() for method in by_method))
    handles = {}
    with matplotlib.rc_context({"text.parse_math": False}):
        for index, (quantity, by_method) in enumerate(panels.items()):
            axes = figure.add_subplot(1, len(panels), index + 1)
            for method, found in by_method.items():
                place = methods.index(method)
                colour = _COLOURS[place % len(_COLOURS)]
                line = _LINES[place // len(_COLOURS) % len(_LINES)]
                for curve in found:
                    marker = "o" if len(curve) < 12 else ""
                    style: dict[str, Any] = {"color": colour, "ls": line, "lw": 1.4, "marker": marker, "ms": 3}
                    (handles[method],) = axes.plot(*zip(*curve, strict=True), **style)
            axes.set_title(quantity, fontsize=10, color=_INK, loc="left")
            _tidy(axes, xlabel)
        columns = max(1, min(len(methods), 2 * len(panels)))
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=columns,
            fontsize=8,
            frameon=False,
            labelcolor=_INK,
        )
        what = f"Line chart of {', '.join(panels)} against {xlabel} for {', '.join(methods)}."
        return saved(figure, name, caption, f"{what} Last values: {_last_values(panels)}.", folder, len(panels))


def saved(figure: Figure, name: str, caption: str, alt: str, folder: Path, panels: int = 1) -> Picture:
    """Writes ``NAME.svg`` and ``NAME.png`` and gives back the picture to inline."""
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "text.parse_math": False}):
        figure.savefig(folder / f"{name}.png", dpi=150, facecolor="white")
        figure.savefig(folder / f"{name}.svg", facecolor="white", metadata={"Date": None})
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return Picture(name, caption, alt, inline(text.getvalue(), name), panels)


def inline(svg: str, name: str) -> str:
    """SVG of matplotlib as it can stand in a page: no header, ids of its own, ink of the page, width of its place."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    body = body.replace(_INK, "currentColor")
    return re.sub(r"<svg ", '<svg aria-hidden="true" focusable="false" ', body, count=1)


def _last_values(panels: Mapping[str, Mapping[str, Sequence[Curve]]]) -> str:
    return "; ".join(
        f"{quantity}: " + ", ".join(f"{method} {found[0][-1][1]:.3g}" for method, found in by_method.items())
        for quantity, by_method in panels.items()
    )


def _tidy(axes: Axes, xlabel: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.grid(alpha=0.25, lw=0.6)
    axes.set_xlabel(xlabel, fontsize=8, color=_INK)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(_short))


def _short(x: float, _: int) -> str:
    if x >= 1e6:
        return f"{x / 1e6:g}M"
    return f"{x / 1e3:g}k" if x >= 1e3 else f"{x:g}"
