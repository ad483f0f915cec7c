"""Which part of a training set keeps its labels: drawn at random, class by class, or named in a list."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pirl_plugin.atomic import write_text

Ids = npt.NDArray[np.int64]
_EXAMPLES = 3

log = logging.getLogger(__name__)


def random_ids(total: int, fraction: float, seed: int) -> Ids:
    """A fraction of the ids ``0 .. total - 1``, whatever their classes, at least one; ascending.

    A larger fraction of the same seed contains the smaller one.
    """
    return np.sort(_generator(seed, total).permutation(total)[: _number(total, fraction)])


def balanced_ids(labels: npt.NDArray[np.int64], fraction: float, seed: int) -> Ids:
    """A fraction of the images, the same number of every class; ascending.

    The numbers of two classes differ by one where they must, and by more only where a class has no more images. Every
    class has at least one image, even if that makes more than the fraction. A larger fraction of the same seed contains
    the smaller one.

    Args:
        labels: class of each image, ``(N,)``.
        fraction: of N.
        seed: which images, and which classes have one more.
    """
    total = len(labels)
    rng = _generator(seed, total)
    order = rng.permutation(total)
    # the place of each image among its class's, in random order
    by_class = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = np.arange(total) - starts
    first = np.lexsort((rng.permutation(total), place))  # all classes' first images, then all second ones, ...
    number = max(_number(total, fraction), int((sizes > 0).sum()))
    return np.sort(by_class[first[:number]])


def listed_ids(file: str | Path, names: Sequence[str]) -> tuple[Ids, list[str]]:
    """Ids of the images that a text file names, one a line, such as SimCLR's ``1percent.txt``.

    A name and a path mean the same file where the shorter of them is the end of the other: ``n01440764_18.JPEG`` is
    ``n01440764/n01440764_18.JPEG``, and so is ``train/n01440764/n01440764_18.JPEG``. What follows a tab is ignored.

    Args:
        file: the list, UTF-8.
        names: of the dataset's images, in the order of ids.

    Returns:
        The ids, ascending, each once; and the lines that name no image.

    Raises:
        FileNotFoundError: no such list.
        ValueError: an empty list, nothing in it that the dataset has, or a name that several images have.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"no list {str(path)!r}: expected a text file with one image name per line.")
    text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    entries = [line.partition("\t")[0].strip() for line in text.splitlines()]
    entries = [entry for entry in entries if entry]
    if not entries:
        raise ValueError(f"{str(path)!r} lists no images: expected one name per line.")
    ids_of: dict[str, list[int]] = defaultdict(list)
    for image_id, name in enumerate(names):
        ids_of[_parts(name)[-1]].append(image_id)
    found: set[int] = set()
    unknown = []
    for entry in entries:
        same = [image_id for image_id in ids_of[_parts(entry)[-1]] if _same_file(entry, names[image_id])]
        if len(same) > 1:
            raise ValueError(
                f"{str(path)!r}: {entry!r} may be {names[same[0]]!r} or {names[same[1]]!r}: list paths, not names."
            )
        found.update(same)
        if not same:
            unknown.append(entry)
    if not found:
        raise ValueError(
            f"none of the {len(entries)} names in {str(path)!r} is an image of the training split. The list has for "
            f"example {_some(entries)}; the split has {_some(names)}."
        )
    if unknown:
        log.warning("%d names in %s are no images of the training split, such as %s.", len(unknown), path, unknown[0])
    return np.array(sorted(found), dtype=np.int64), unknown


def write_names(dataset: Any, ids: Ids, path: Path) -> None:
    """Writes the names of some images, one a line: a list that ``listed_ids`` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text("".join(f"{dataset.file_name(int(image_id))}\n" for image_id in ids), path)


def _generator(seed: int, total: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, total]))


def _number(total: int, fraction: float) -> int:
    return max(1, round(fraction * total))


def _parts(name: str) -> list[str]:
    return name.replace("\\", "/").strip("/").split("/")


def _same_file(one: str, other: str) -> bool:
    ours, theirs = _parts(one), _parts(other)
    common = min(len(ours), len(theirs))
    return ours[-common:] == theirs[-common:]


def _some(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:_EXAMPLES])
