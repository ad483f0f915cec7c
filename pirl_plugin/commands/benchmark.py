"""``python tools/benchmark.py``: one benchmark of one file of weights."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pirl_plugin import config as configs
from pirl_plugin.benchmarks.runner import RANDOM, dataset_name, problems_of, run_benchmark
from pirl_plugin.commands.running import exit_code, log_to
from pirl_plugin.hooks.checkpoint import step_of
from pirl_plugin.records import Record
from pirl_plugin.schema import ConfigError

log = logging.getLogger(__name__)

_EPILOG = """\
examples:
  python tools/benchmark.py benchmark=linear weights=runs/x/checkpoints/step_000001000.pt dataset=image_folder
  dataset.root=DIR python tools/benchmark.py benchmark=linear weights=random trunk=resnet18 dataset=generated_scenes
  python tools/benchmark.py benchmark=knn weights=resnet50.pth trunk=resnet50 dataset=imagenet dataset.root=DIR

DIR holds train/ and test/ (train_split= and test_split= name others), each with one folder a class.
Writes result.json (the headline), results.jsonl (every number), config.yaml and environment.json to run_dir.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0 for a result, 2 for a mistake in the command, 1 for a benchmark that failed."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py",
        description="Run one benchmark on frozen weights.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="choices and settings, in Hydra's syntax")
    parser.add_argument("--print-config", action="store_true", help="print the composed configuration and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: benchmark(arguments.overrides, arguments.print_config), arguments.debug)


def benchmark(overrides: Sequence[str], print_config: bool = False, quiet: bool = False) -> list[Record]:
    """Composes, checks, runs, and prints the table of results unless ``quiet``."""
    config = configs.load("benchmark", overrides)
    problems = configs.import_plugins(config.get("plugins") or [])
    problems += configs.unset(config)
    problems += [problem for problem in problems_of(config) if problem.path not in {known.path for known in problems}]
    if problems:
        raise ConfigError(problems)
    if print_config:
        print(configs.to_yaml(config), end="")
        return []
    run_dir = Path(config["run_dir"] or default_run_dir(config))
    log_to(run_dir)
    found = run_benchmark({**config, "run_dir": str(run_dir)})
    if not quiet:
        print(table(found))
        log.info("Results: %s", run_dir)
    return found


def default_run_dir(config: dict[str, Any]) -> Path:
    """Beside the checkpoint that is measured, or under ``runs/`` for weights from elsewhere."""
    what = f"{config['benchmark']['name']}-{dataset_name(config)}-seed{config['seed']}"
    weights = Path(config["weights"])
    if config["weights"] != RANDOM and weights.parent.name == "checkpoints":
        return weights.parent.parent / "benchmarks" / f"{what}-step{step_of(weights)}"
    return Path("runs") / f"{weights.stem}-{what}"


def table(found: Sequence[Record]) -> str:
    """The results as aligned text, one a line."""
    rows = [
        (
            record.method,
            record.benchmark,
            record.dataset,
            ", ".join(f"{key}={value}" for key, value in record.setting.items()),
            record.metric,
            f"{record.value:.2f} {record.unit}".strip(),
        )
        for record in found
    ]
    rows.insert(0, ("method", "benchmark", "dataset", "setting", "metric", "value"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
