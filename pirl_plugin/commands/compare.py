"""``python tools/compare.py``: one table and one report from the results of any set of folders."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pirl_plugin.commands.parser import Parser
from pirl_plugin.commands.running import exit_code
from pirl_plugin.report.build import write_report
from pirl_plugin.report.plain import for_terminal
from pirl_plugin.report.sources import find


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0, or 1 where there are no results to compare."""
    parser = Parser(
        "compare.py",
        "Compare the results below some folders: report.html, report.md, report.csv, and a table here.",
        "example: python tools/compare.py runs/pirl runs/npid runs/from_the_cluster --out runs/comparison",
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="folders of runs, or of many runs")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/comparison"), help="folder of the report (default: %(default)s)"
    )
    parser.add_argument("--title", default="Comparison", help="of the report (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: compare(arguments.folders, arguments.out, arguments.title), arguments.debug)


def compare(folders: Sequence[Path], out: Path, title: str = "Comparison") -> None:
    """Writes the report and prints its headline."""
    sources = find(folders)
    print(f"{len(sources)} runs found; writing the report", file=sys.stderr)
    print(for_terminal(write_report(sources, out, title)))
    print(f"\nReport: {out / 'report.html'}")
