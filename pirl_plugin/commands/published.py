"""``pirl-published``: published numbers of a benchmark, by protocol, each with its source."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence

from pirl_plugin.commands.parser import Parser
from pirl_plugin.published import BENCHMARKS, available, listed, results
from pirl_plugin.schema import ConfigError, Problem, did_you_mean

_KEYS = ("benchmark", "dataset", "method", "metric", "protocol")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        asked = _asked(options.choices)
    except ConfigError as error:
        print("\n".join(f"pirl-published: {problem}" for problem in error.problems), file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in results(**asked)], indent=2))
    elif "benchmark" not in asked:
        print(_overview(asked))
    else:
        print(listed(**asked))
    return 0


def _overview(asked: Mapping[str, str]) -> str:
    counts = available(**asked)
    if not counts:
        return "No published numbers for this choice."
    lines = [f"  benchmark={name} dataset={on}: {count}" for (name, on), count in counts.items()]
    return "\n".join(["Numbers by benchmark and dataset; choose with benchmark=... [dataset=...] [method=...]", *lines])


def _asked(choices: Sequence[str]) -> dict[str, str]:
    """The choices as a dictionary.

    Raises:
        ConfigError: a key, a benchmark or a dataset that there is not.
    """
    asked, problems = {}, []
    for choice in choices:
        key, equals, value = choice.partition("=")
        if not equals or key not in _KEYS:
            problems.append(Problem(key, f"unknown key.{did_you_mean(key, _KEYS)} Valid keys: {', '.join(_KEYS)}."))
        asked[key] = value
    for place, key in enumerate(("benchmark", "dataset")):
        known = sorted({names[place] for names in BENCHMARKS})
        if key in asked and asked[key] not in known:
            text = f"nothing is published for {asked[key]!r} here.{did_you_mean(asked[key], known)}"
            problems.append(Problem(key, f"{text} Available: {', '.join(known)}."))
    if problems:
        raise ConfigError(problems)
    return asked


def _parser() -> Parser:
    parser = Parser(
        "published.py",
        "Published numbers of a benchmark, each with its source, by the protocol they were made under.",
        "example: python tools/published.py benchmark=linear dataset=imagenet method=PIRL",
    )
    keys = "benchmark, dataset, method (part of its name), metric, protocol"
    parser.add_argument("choices", nargs="*", metavar="key=value", help=f"what to show; keys: {keys}")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    return parser


if __name__ == "__main__":
    sys.exit(main())
