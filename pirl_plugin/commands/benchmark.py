"""``python tools/benchmark.py``: one benchmark of one file of weights."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pirl_plugin import config as configs
from pirl_plugin import distributed, published
from pirl_plugin.benchmarks.runner import dataset_name, problems_of, run_benchmark
from pirl_plugin.benchmarks.weights_under_test import RANDOM
from pirl_plugin.commands.parser import Parser
from pirl_plugin.commands.running import exit_code, log_to
from pirl_plugin.hooks.checkpoint import checkpoints
from pirl_plugin.records import Record
from pirl_plugin.run_lock import locked
from pirl_plugin.schema import Problem
from pirl_plugin.sweep.plan import identity
from pirl_plugin.text import aligned

log = logging.getLogger(__name__)

_EPILOG = """\
examples:
  python tools/benchmark.py benchmark=linear weights=runs/x/checkpoints/step_000001000.pt \\
                            dataset=image_folder dataset.root=DIR
  python tools/benchmark.py benchmark=linear weights=random trunk=resnet18_medium image_size=64
  python tools/benchmark.py benchmark=knn weights=resnet50.pth trunk=resnet50 \\
                            dataset=imagenet dataset.root=DIR
  torchrun --nproc_per_node=8 tools/benchmark.py benchmark=linear_imagenet weights=resnet50.pth \\
                            dataset=imagenet dataset.root=DIR

--published sets numbers from papers beside the measured ones: under the same protocol, and apart from them.
groups: benchmark, dataset, trunk. Names and parameters: python tools/list.py benchmark
An image_folder holds train/ and test/ (others: train_split=, test_split=), each with one folder a class.
Writes result.json (the headline), results.jsonl (every number), config.yaml and environment.json to run_dir.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0 for a result, 2 for a mistake in the command, 1 for a benchmark that failed."""
    parser = Parser(
        "benchmark.py",
        "Run one benchmark on frozen weights.",
        _EPILOG,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="choices and settings, in Hydra's syntax")
    parser.add_argument("--print-config", action="store_true", help="print the composed configuration and stop")
    parser.add_argument("--published", action="store_true", help="print published numbers beside the measured ones")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    return exit_code(
        lambda: benchmark(arguments.overrides, arguments.print_config, beside_published=arguments.published),
        arguments.debug,
    )


def benchmark(
    overrides: Sequence[str], print_config: bool = False, quiet: bool = False, beside_published: bool = False
) -> list[Record]:
    """Composes, checks, runs, and prints the table of results unless ``quiet``, published ones beside it if asked."""
    config = configs.load("benchmark", overrides, _problems)
    if print_config:
        print(configs.to_yaml(config), end="")
        return []
    run_dir = Path(config["run_dir"] or default_run_dir(config, _option(overrides)))
    primary = distributed.is_launched_primary()
    with locked(run_dir) if primary else contextlib.nullcontext():
        log_to(run_dir if primary else None)
        found = _measured(config, run_dir)
    if primary and not quiet:
        print(table(found))
        if beside_published:
            print(f"\n{published.beside(found)}")
        log.info("Results: %s", run_dir)
    return found


def _measured(config: dict[str, Any], run_dir: Path) -> list[Record]:
    what, start = f"{config['benchmark']['name']} of {config['weights']}", time.perf_counter()
    log.info("%s on %s ...", what, dataset_name(config))
    found = run_benchmark({**config, "run_dir": str(run_dir)})
    best = found[0]
    log.info("%s: %s %.2f %s in %.0f s", what, best.metric, best.value, best.unit, time.perf_counter() - start)
    return found


def _problems(config: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the configuration of a benchmark, and with the file that it names."""
    problems = problems_of(config)
    weights = config.get("weights")
    if not isinstance(weights, str):
        return problems if weights is None else [*problems, Problem("weights", f"must be a file, got {weights!r}.")]
    path = Path(weights)
    if path.is_dir():
        newest = "".join(f" Its newest checkpoint: {found}." for found in checkpoints(path)[-1:])
        problems.append(Problem("weights", f"must be a file, but {weights} is a folder.{newest}"))
    elif weights != RANDOM and not path.is_file():
        problems.append(Problem("weights", f"no such file: {weights}. It is a file of weights, or {RANDOM!r}."))
    return problems


def default_run_dir(config: dict[str, Any], option: str = "") -> Path:
    """Beside the checkpoint that is measured, or under ``runs/`` for weights from elsewhere.

    The same configuration has the same folder, so that a benchmark can go on there; any other has another one, by a
    hash at the end of the name.

    Args:
        config: of the benchmark, complete.
        option: name of its YAML, for people; empty: the component's name.
    """
    what = f"{option or config['benchmark']['name']}-{dataset_name(config)}-seed{config['seed']}"
    weights = Path(config["weights"])
    if config["weights"] == RANDOM:
        trunk = "-".join(str(value) for key, value in config["trunk"].items() if key != "name")
        return Path("runs") / f"{RANDOM}-{trunk}-{what}-{_short_hash(config, RANDOM)}"
    if weights.parent.name == "checkpoints":  # a run's folder may be moved: its name within is enough
        folder = weights.parent.parent / "benchmarks"
        return folder / f"{what}-{weights.stem}-{_short_hash(config, weights.name)}"
    return Path("runs") / f"{weights.stem}-{what}-{_short_hash(config, str(weights.resolve()))}"


def _short_hash(config: Mapping[str, Any], weights: str) -> str:
    return identity({**config, "weights": weights})[:8]


def _option(overrides: Sequence[str]) -> str:
    """The option of the group ``benchmark`` that a command names; empty where it names none."""
    named = [value for key, _, value in (override.partition("=") for override in overrides) if key == "benchmark"]
    return re.sub(r"[^\w.-]", "", named[-1]) if named else ""


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
    return aligned([("method", "benchmark", "dataset", "setting", "metric", "value"), *rows])


if __name__ == "__main__":  # torchrun -m
    sys.exit(main())
