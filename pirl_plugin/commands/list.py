"""``python tools/list.py``: every registered name with its one-line description and parameters."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence

import pirl_plugin  # noqa: F401  (registers all components)
from pirl_plugin import plugins
from pirl_plugin.commands.parser import Parser
from pirl_plugin.commands.running import exit_code
from pirl_plugin.config import import_plugins
from pirl_plugin.listing import ComponentInfo, MethodInfo, as_text, components, methods, methods_as_text
from pirl_plugin.registry import REGISTRIES
from pirl_plugin.schema import ConfigError

METHOD = ("method", "methods")  # not registered: YAMLs


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0, or 2 for a kind or a module that is not there."""
    options = _parser().parse_args(argv)
    return exit_code(lambda: show(options.kind, options.plugins, options.host, options.json, not options.brief))


def show(kinds: Sequence[str], modules: Sequence[str], host: bool, as_json: bool, with_parameters: bool) -> None:
    """Prints the table of the kinds asked for, or of all.

    Raises:
        ConfigError: there is no such kind, or no such module to import.
    """
    plugins.load_installed()
    problems = import_plugins(modules)
    if problems:
        raise ConfigError(problems)
    registered = [kind for kind in kinds if kind not in METHOD]
    listed = methods() if len(registered) < len(kinds) or not kinds else []
    found = components(registered, host=host) if registered or not kinds else []
    if as_json:
        infos: list[MethodInfo | ComponentInfo] = [*listed, *found]
        print(json.dumps([dataclasses.asdict(info) for info in infos], indent=2))
        return
    parts = [methods_as_text(listed)] if listed else []
    parts += [as_text(found, with_parameters=with_parameters)] if found else []
    print("\n\n".join(parts))


def _parser() -> Parser:
    parser = Parser(
        "list.py",
        "List the methods, and every registered component: its name, what it is, its parameters and their defaults.",
        "examples: python tools/list.py methods; python tools/list.py loss memory_bank",
    )
    parser.add_argument("kind", nargs="*", help=f"only these kinds; there are: methods, {', '.join(REGISTRIES)}")
    parser.add_argument("--brief", action="store_true", help="leave the parameters out")
    parser.add_argument("--host", action="store_true", help="also list what comes with classy-vision itself")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--plugins", nargs="+", default=[], metavar="MODULE", help="modules to import first")
    return parser


if __name__ == "__main__":
    sys.exit(main())
