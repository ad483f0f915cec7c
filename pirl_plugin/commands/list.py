"""``pirl-list``: every registered name with its one-line description and parameters."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Sequence

import pirl_plugin  # noqa: F401  (registers all components)
from pirl_plugin.listing import as_text, components
from pirl_plugin.registry import REGISTRIES
from pirl_plugin.schema import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        for module in options.plugins:
            importlib.import_module(module)
        found = components(options.kind, host=options.host)
    except (ConfigError, ImportError) as error:
        print(f"pirl-list: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([dataclasses.asdict(info) for info in found], indent=2))
    else:
        print(as_text(found, with_parameters=not options.brief))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pirl-list",
        description="Lists every registered component: its name, what it is, and its parameters with their defaults.",
        epilog="example: python tools/list.py loss memory_bank",
    )
    parser.add_argument("kind", nargs="*", help=f"only these kinds; there are: {', '.join(REGISTRIES)}")
    parser.add_argument("--brief", action="store_true", help="leave the parameters out")
    parser.add_argument("--host", action="store_true", help="also list what comes with classy-vision itself")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--plugins", nargs="+", default=[], metavar="MODULE", help="modules to import first")
    return parser


if __name__ == "__main__":
    sys.exit(main())
