"""The argument parser that every command has."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Goes by the name that it was called by, ``train.py`` or ``pirl-train``, and leaves the lines of texts alone.

    Args:
        tool: name of the file in ``tools/``.
        description: what the command does.
        epilog: examples.
    """

    def __init__(self, tool: str, description: str, epilog: str) -> None:
        called = Path(sys.argv[0]).name
        installed = f"pirl-{tool.removesuffix('.py')}"
        super().__init__(
            prog=installed if called == installed else tool,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Ends with exit code 2; ``--method pirl_32`` is told how settings are written."""
        unknown = re.fullmatch(r"unrecognized arguments: --([a-z_.]+)( .*)?", message)
        if unknown and any(action.dest == "overrides" for action in self._actions):
            message += f"; settings are key=value, without dashes: {unknown[1]}=..."
        super().error(message)
