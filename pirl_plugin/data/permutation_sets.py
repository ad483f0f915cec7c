"""The jigsaw pretext's permutation sets, kept on disk once they have been built."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from pirl_plugin.atomic import replacing
from pirl_plugin.functional.permutations import Permutations, Rule, greedy_permutations

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where what takes long to build is kept: ``$PIRL_PLUGIN_CACHE``, else the user's cache folder."""
    own, shared = os.environ.get("PIRL_PLUGIN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "pirl_plugin"


def permutation_set(
    num_patches: int, size: int, rule: Rule = "max_avg", seed: int = 0, folder: Path | None = None
) -> Permutations:
    """``greedy_permutations``, read from the cache where it holds them; a damaged file is built anew.

    Args:
        num_patches: see ``greedy_permutations``.
        size: see there.
        rule: see there.
        seed: see there.
        folder: of the cache; default: ``cache_folder()``. One that cannot be written to is done without.
    """
    path = (folder or cache_folder()) / f"permutations_{num_patches}_{size}_{rule}_seed{seed}.npy"
    kept = _read(path, num_patches, size)
    if kept is not None:
        return kept
    built = greedy_permutations(num_patches, size, rule, seed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.save(file, built)
    except OSError as error:
        log.info("Permutations are not kept: %s.", error)
    return built


def _read(path: Path, num_patches: int, size: int) -> Permutations | None:
    """The file's permutations; None where there is no such file or it does not hold them."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    is_whole = found.shape == (size, num_patches) and found.dtype == np.uint8
    return found if is_whole and (np.sort(found, axis=1) == np.arange(num_patches)).all() else None
