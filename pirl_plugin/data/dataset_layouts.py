"""What a published dataset must look like on disk, and the message for a folder that does not."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pirl_plugin.data.scanning import listing

_ARCHIVES = (".tar", ".tgz", ".gz", ".zip", ".bz2")

log = logging.getLogger(__name__)


class WrongLayoutError(ValueError):
    """A folder that is not laid out as the dataset is: says what was expected, what was found, and the source."""


@dataclass(frozen=True)
class Official:
    """A published dataset as its authors give it out.

    Attributes:
        name: under which it is registered.
        title: for people.
        layouts: accepted layouts of the root, one line each.
        source: where it is given out.
        images: number of images of each split.
        classes: number of classes.
    """

    name: str
    title: str
    layouts: Sequence[str]
    source: str
    images: Mapping[str, int]
    classes: int

    def wrong(self, root: Path, problem: str, hint: str = "") -> WrongLayoutError:
        """The error for a root that is laid out otherwise.

        Args:
            root: the folder that the user named.
            problem: what is wrong with it, one sentence.
            hint: what to do, where that is known.
        """
        lines = [
            problem,
            f"Expected in {root}:",
            *(f"  {layout}" for layout in self.layouts),
            f"Found there: {contents(root)}.",
            *([hint] if hint else self._hints(root)),
            f"Official source of {self.title}: {self.source}",
        ]
        return WrongLayoutError("\n".join(lines))

    def is_whole(self, split: str, images: int, classes: int) -> bool:
        """Whether a split has as many images and classes as it officially has."""
        return (images, classes) == (self.images[split], self.classes)

    def record_name(self, split: str, images: int, classes: int) -> str:
        """Name for result records: ``name``, or ``name-partial`` where images or classes are missing or added."""
        return self.name if self.is_whole(split, images, classes) else f"{self.name}-partial"

    def warn_if_partial(self, split: str, images: int, classes: int) -> None:
        """Says that results will not compare with published ones, where images or classes are missing or added."""
        if not self.is_whole(split, images, classes):
            log.warning(
                "%s, %s: found %s images of %s classes, officially it has %s of %s: "
                "results on it do not compare with published ones.",
                *(self.title, split, f"{images:,}", f"{classes:,}", f"{self.images[split]:,}", f"{self.classes:,}"),
            )

    def _hints(self, root: Path) -> list[str]:
        """What was probably done wrong: archives not unpacked, a root that is one folder too deep."""
        if root.name in self.images:
            return [f"{root} seems to be one split alone: set root to {root.parent}."]
        packed = archives(root)
        return [f"Unpack the archives first: {listing(packed, 3)}."] if packed else []


def contents(folder: Path) -> str:
    """What lies in a folder, in words: its folders, and how many files with an example."""
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            (folders if entry.is_dir() else files).append(entry.name)
    said = [f"the folder{'s' if len(folders) > 1 else ''} {listing(sorted(folders))}"] if folders else []
    if files:
        said.append(f"{len(files):,} file{'s' if len(files) > 1 else ''}, e.g. {min(files)}")
    return " and ".join(said) or "nothing"


def archives(folder: Path) -> list[str]:
    """Names of the archives in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.name.endswith(_ARCHIVES))
