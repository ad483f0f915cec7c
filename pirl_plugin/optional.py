"""Packages that only some components need: imported when such a component is built, and missed in one clear line."""

from __future__ import annotations

import importlib
from typing import Any


def optional(module: str, extra: str, what: str) -> Any:
    """A module of an optional package.

    Args:
        module: its dotted name.
        extra: the extra of this package that installs it.
        what: the component that needs it, for the message.

    Raises:
        ImportError: it is not there, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{what} needs the package {package}, which cannot be imported ({error}): "
            f"pip install 'pirl-plugin[{extra}]'"
        ) from error
