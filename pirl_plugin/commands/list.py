"""``pirl-list``: every registered name with its one-line description and parameters."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

import pirl_plugin  # noqa: F401  (registers all components)
from pirl_plugin import plugins
from pirl_plugin.listing import ComponentInfo, MethodInfo, as_text, components, methods, methods_as_text
from pirl_plugin.registry import REGISTRIES
from pirl_plugin.schema import ConfigError

METHOD = ("method", "methods")  # not registered: YAMLs


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit code."""
    options = _parser().parse_args(argv)
    try:
        plugins.load_installed()
        for module in options.plugins:
            plugins.load(module)
        kinds = [kind for kind in options.kind if kind not in METHOD]
        listed = methods() if len(kinds) < len(options.kind) or not options.kind else []
        found = components(kinds, host=options.host) if kinds or not options.kind else []
    except (ConfigError, ImportError) as error:
        print(f"pirl-list: {error}", file=sys.stderr)
        return 2
    if options.json:
        infos: list[MethodInfo | ComponentInfo] = [*listed, *found]
        print(json.dumps([dataclasses.asdict(info) for info in infos], indent=2))
    else:
        parts = [methods_as_text(listed)] if listed else []
        parts += [as_text(found, with_parameters=not options.brief)] if found else []
        print("\n\n".join(parts))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pirl-list",
        description="Lists the methods, and every registered component: its name, what it is, and its parameters with "
        "their defaults.",
        epilog="examples: python tools/list.py methods; python tools/list.py loss memory_bank",
    )
    parser.add_argument("kind", nargs="*", help=f"only these kinds; there are: methods, {', '.join(REGISTRIES)}")
    parser.add_argument("--brief", action="store_true", help="leave the parameters out")
    parser.add_argument("--host", action="store_true", help="also list what comes with classy-vision itself")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--plugins", nargs="+", default=[], metavar="MODULE", help="modules to import first")
    return parser


if __name__ == "__main__":
    sys.exit(main())
