"""``python tools/bench.py``: speed and memory of ours and of the plain way, as a table."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pirl_plugin.commands.parser import Parser
from pirl_plugin.commands.running import exit_code
from pirl_plugin.schema import did_you_mean
from pirl_plugin.speed.areas import AREAS
from pirl_plugin.speed.measuring import Row, Settings, Work
from pirl_plugin.speed.table import as_markdown, as_text, conditions, write_json

_EPILOG = """\
areas:
{areas}

examples:
  python tools/bench.py --quick                     everything, mostly at small sizes, in about two minutes
  python tools/bench.py loss --json loss.json       the loss at the sizes of ImageNet
  python tools/bench.py step --profile step.json    a trace of one step, for chrome://tracing or ui.perfetto.dev

Both sides of a row run in one process, under the same allocator and threads, in turns; times are medians. Memory is
what a call takes beyond what was held before it. Nothing else should run on the machine.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0, or 2 for a mistake in the command."""
    areas = "\n".join(f"  {name:<12} {area.about}" for name, area in AREAS.items())
    parser = Parser(
        "bench.py",
        "Measure speed and memory against the plain, published way, and against what the machine allows.",
        _EPILOG.format(areas=areas),
    )
    parser.add_argument("areas", nargs="*", metavar="AREA", help="what to measure (default: everything)")
    parser.add_argument("--quick", action="store_true", help="mostly small sizes: about two minutes for everything")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each side (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own choice)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="JPEG files for the views (default: generated ones)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number, machine and versions there")
    parser.add_argument("--markdown", action="store_true", help="print the table for a README")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="only write a trace of one area's work there")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    problem = _problem(arguments)
    if problem:
        parser.error(problem)
    return exit_code(lambda: bench(arguments), arguments.debug)


def _problem(arguments: argparse.Namespace) -> str:
    for name in arguments.areas:
        if name not in AREAS:
            return f"no area {name!r}; there are {', '.join(AREAS)}.{did_you_mean(name, AREAS)}"
    for option in ("repeats", "threads"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            return f"--{option} must be >= 1, got {value}"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch sees no GPU"
    if arguments.images is not None and not arguments.images.is_dir():
        return f"--images: no folder {str(arguments.images)!r}"
    if arguments.profile is not None:
        with_trace = [name for name, area in AREAS.items() if area.to_profile is not None]
        if len(arguments.areas) != 1 or arguments.areas[0] not in with_trace:
            return f"--profile takes one area, out of {', '.join(with_trace)}"
    return ""


def bench(arguments: argparse.Namespace) -> None:
    """Measures, or writes a trace."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    gpu = arguments.device != "cpu" and torch.cuda.is_available()
    settings = Settings(
        quick=arguments.quick,
        repeats=arguments.repeats,
        device=torch.device("cuda" if gpu else "cpu"),
        threads=torch.get_num_threads(),
        images=arguments.images,
    )
    names = list(dict.fromkeys(arguments.areas)) or list(AREAS)
    if arguments.profile is not None:
        area = AREAS[names[0]]
        assert area.to_profile is not None
        write_trace(area.to_profile(settings), arguments.profile)
        print(f"wrote {arguments.profile}", file=sys.stderr)
        return
    under = conditions(settings)
    measured = list(_measured(names, settings))
    print(f"{under['machine']}, {settings.threads} threads, {under['date']}{', --quick' if settings.quick else ''}")
    print(as_markdown(measured) if arguments.markdown else as_text(measured))
    if arguments.json is not None:
        write_json(measured, under, arguments.json)
        print(f"wrote {arguments.json}", file=sys.stderr)


def _measured(names: Sequence[str], settings: Settings) -> Iterator[tuple[str, Row]]:
    """Rows of all areas, each shown on standard error as soon as it is there."""
    for number, name in enumerate(names, 1):
        start = time.perf_counter()
        print(f"[{number}/{len(names)}] {name}: {AREAS[name].about} ...", file=sys.stderr, flush=True)
        for row in AREAS[name].rows(settings):
            print(f"      {row.what}: {row.ratio:.3g} x {row.against}", file=sys.stderr, flush=True)
            yield name, row
        print(f"      {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def write_trace(work: Work, path: Path) -> None:
    """A chrome trace of one call, after one that warms up."""
    work()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True) as profiler:
        work()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
