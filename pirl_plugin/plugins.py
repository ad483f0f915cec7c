"""The door for other packages: what they register, and where their YAMLs lie.

A package says by an entry point which of its modules is to be imported, and importing that module registers its
components, as importing this package registers ours::

    [options.entry_points]
    pirl_plugin.plugins =
        my_package = my_package

Without an installation ``plugins=[my_package.my_method]`` on a command line does the same. A folder
``benchmark_configs`` beside the module's file holds the plugin's YAMLs, in groups as ours: ``method/my_method.yaml``.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from importlib import metadata
from pathlib import Path

from pirl_plugin.distributed import is_launched_primary

GROUP = "pirl_plugin.plugins"
FOLDER = "benchmark_configs"

log = logging.getLogger(__name__)

_FOLDERS: list[Path] = []


@functools.cache
def load_installed() -> None:
    """Imports the modules that installed packages name in the entry point group, in the order of their names; once.

    One that cannot be imported is left out with one line of warning: the others, and we, go on.
    """
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            load(entry.module)
        except Exception as error:  # somebody else's module: whatever goes wrong in it
            if is_launched_primary():
                package = f" of {entry.dist.name} {entry.dist.version}" if entry.dist is not None else ""
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                log.warning("The plugin %r%s is left out: importing %s: %s", entry.name, package, entry.module, reason)


def load(module: str) -> None:
    """Imports a module, which registers its components, and notes its folder of YAMLs, if it has one.

    Raises:
        Exception: whatever the module raises.
    """
    importlib.import_module(module)
    file = getattr(sys.modules[module], "__file__", None)
    if file is not None:
        folder = Path(file).resolve().parent / FOLDER
        if folder.is_dir() and folder not in _FOLDERS:
            _FOLDERS.append(folder)


def folders() -> tuple[Path, ...]:
    """Folders of YAMLs of all plugins that have been imported, in that order."""
    return tuple(_FOLDERS)
