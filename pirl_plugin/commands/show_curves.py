"""``python tools/show_curves.py``: probe accuracy against images seen, as a picture and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pirl_plugin.commands.parser import Parser
from pirl_plugin.commands.running import exit_code
from pirl_plugin.report.curves import Curves, Point, probe_curves, run_records
from pirl_plugin.report.curves_figure import draw_curves


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0, or 1 where there are no results to show."""
    parser = Parser(
        "show_curves.py",
        "Show what benchmarks measured at a run's checkpoints, beside its signs of health.",
        "example: python tools/show_curves.py runs/pirl runs/npid runs/random --out curves.png",
    )
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="folders of runs with benchmarks")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="picture to write (default: %(default)s)")
    parser.add_argument("--metric", default="top1", help="metric to show (default: %(default)s)")
    parser.add_argument("--title", default="", help="a line above the picture")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    return exit_code(
        lambda: show_curves(arguments.run_dirs, arguments.out, arguments.metric, arguments.title), arguments.debug
    )


def show_curves(run_dirs: Sequence[Path], out: Path, metric: str, title: str = "") -> None:
    """Draws the picture and prints the table of its points."""
    every = run_records(run_dirs)
    metrics = sorted({record.metric for record in every if record.status == "ok" and record.metric})
    if not metrics:
        raise ValueError(
            f"No benchmark below {', '.join(map(str, run_dirs))} has measured anything: run tools/benchmark.py on the "
            "run's checkpoints first."
        )
    if metric not in metrics:
        raise ValueError(f"No result has the metric {metric!r}; there are: {', '.join(metrics)}.")
    curves = probe_curves(every, metric)
    if not curves:
        raise ValueError("It is not known of any of these weights how many images they have seen: nothing to draw.")
    folders = {record.method: run for run in run_dirs for record in run_records([run])}
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_curves(curves, folders, out, title)
    print(table(curves))
    print(f"\nPicture: {out}")


def table(curves: Sequence[Curves]) -> str:
    """The curves as a Markdown table: one row for each number of images seen."""
    lines = []
    for probe in curves:
        methods = probe.lines
        seen = sorted({point.images_seen for points in methods.values() for point in points})
        title = f"{probe.title}{f', in {probe.unit}' if probe.unit else ''}"
        lines += [title, "", f"| images seen | {' | '.join(methods)} |"]
        lines.append("|---:|" + "---:|" * len(methods))
        for images in seen:
            found = [next((p for p in points if p.images_seen == images), None) for points in methods.values()]
            lines.append(f"| {images:,} | {' | '.join(_cell(point) for point in found)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _cell(point: Point | None) -> str:
    if point is None:
        return "–"
    return f"{point.mean:.1f} ± {point.std:.1f}" if point.count > 1 else f"{point.mean:.1f}"
