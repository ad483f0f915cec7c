"""Finding image files in folders, with errors that say what was expected, what was found and what to do."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from pirl_plugin.schema import did_you_mean
from pirl_plugin.text import printable

log = logging.getLogger(__name__)

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")


def existing_folder(root: str) -> Path:
    """``root`` as a path.

    Raises:
        FileNotFoundError: it does not exist; suggests a near name.
        ValueError: it is a file.
    """
    path = Path(root).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"root must be a folder of images, but {path} is a file: give its folder.")
    parent = next(folder for folder in (path.absolute().parents) if folder.is_dir())
    missing = path.absolute().relative_to(parent).parts[0]
    hint = did_you_mean(missing, folders_in(parent)) or f" In {parent} there are: {listing(folders_in(parent))}."
    raise FileNotFoundError(f"No folder {path}: {parent} has no {missing!r}.{hint}")


def split_folder(root: Path, split: str | None) -> Path:
    """The folder of a split: ``root/split``, or ``root`` when ``split`` is None.

    Raises:
        FileNotFoundError: no such folder; lists those there are.
    """
    if split is None or (root / split).is_dir():
        return root / (split or "")
    folders = folders_in(root)
    hint = did_you_mean(split, folders)
    if not hint and (root.parent / split).is_dir():
        hint = f" {root.parent} has one: set root to that."
    raise FileNotFoundError(
        f"No split {split!r}: expected a folder {root / split}. Folders in {root}: {listing(folders)}.{hint}"
    )


def find_images(root: Path) -> tuple[list[str], int]:
    """Relative POSIX paths of all images below ``root``, sorted, and the number of other files.

    Links to folders are followed, each real folder is read once: a loop of links ends, and no image comes twice.
    Hidden folders are left out, hidden files are counted as others.

    Raises:
        ValueError: no image.
    """
    images: list[str] = []
    others: list[str] = []
    seen: set[tuple[int, int]] = set()
    real, linked = [""], list[str]()
    while real or linked:
        if not real:  # links last and sorted: which name a folder gets must not depend on the disk's order
            linked.sort(reverse=True)
        relative = real.pop() if real else linked.pop()
        try:
            status = os.stat(os.path.join(root, relative))
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = list(os.scandir(os.path.join(root, relative)))
        except OSError as error:
            if not relative:
                raise
            log.warning("The folder %s cannot be read: %s. It is left out.", printable(relative), error.strerror)
            continue
        for entry in entries:
            name = f"{relative}/{entry.name}" if relative else entry.name
            if entry.is_dir():
                if not entry.name.startswith("."):
                    (linked if entry.is_symlink() else real).append(name)
            elif entry.name.lower().endswith(IMAGE_EXTENSIONS) and not entry.name.startswith(".") and entry.is_file():
                images.append(name)
            else:
                others.append(name)
    if not images:
        example = f", e.g. {min(others)}" if others else ""
        expected = " ".join(extension[1:] for extension in IMAGE_EXTENSIONS)
        raise ValueError(
            f"No images under {root}: found 0 files of type {expected} ({len(others)} other files{example}); "
            "expected a folder of images, or one with a sub-folder per class. Check root (and split)."
        )
    return sorted(images), len(others)


def folders_in(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def listing(names: list[str], limit: int = 10) -> str:
    """Names with commas, the first ``limit`` of them; ``none`` for an empty list."""
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more if names else "none"
