"""The datasets of the standard benchmark, each with its official splits and found by its root alone."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from classy_vision.dataset import register_dataset

from pirl_plugin.data.dataset_layouts import Official, archives, contents
from pirl_plugin.data.dataset_names import PackedNames
from pirl_plugin.data.datasets import FileDataset
from pirl_plugin.data.scanning import existing_folder, find_images, folders_in, listing
from pirl_plugin.schema import checked

_SAMPLED = 1000  # files that are looked at themselves, where looking at millions would take minutes

PLACES205 = Official(
    name="places205",
    title="Places205",
    layouts=(
        "data/vision/torralba/deeplearning/images256/a/abbey/*.jpg (or images256/a/abbey/*.jpg)",
        "  with trainvalsplit_places205/train_places205.csv and val_places205.csv, as downloaded",
        "or train/CLASS/*.jpg and val/CLASS/*.jpg",
    ),
    source="http://places.csail.mit.edu/downloadData.html",
    images={"train": 2_448_873, "val": 20_500},
    classes=205,
)
INATURALIST2018 = Official(
    name="inaturalist2018",
    title="iNaturalist 2018",
    layouts=(
        "train_val2018/SUPER_CATEGORY/CATEGORY/*.jpg with train2018.json and val2018.json, as downloaded",
        "or train/CLASS/*.jpg and val/CLASS/*.jpg",
    ),
    source="https://github.com/visipedia/inat_comp/tree/master/2018",
    images={"train": 437_513, "val": 24_426},
    classes=8_142,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labelled:
    """Images of one split: names relative to ``folder``, with their classes."""

    folder: Path
    names: Sequence[str]
    class_names: list[str]
    labels: np.ndarray


class OfficialDataset(FileDataset):
    """A published dataset for classification: what was found of one of its splits.

    Attributes:
        official: the dataset as its authors give it out.
        benchmark_splits: the splits that benchmarks learn from and measure on.
        record_name: name for result records; ends in ``-partial`` where images or classes are missing.
    """

    official: ClassVar[Official]
    benchmark_splits: ClassVar[tuple[str, str]] = ("train", "val")

    def __init__(self, split: str, found: Labelled, cache_in_memory: bool) -> None:
        super().__init__(found.folder, PackedNames(found.names), cache_in_memory)
        self.split, self.class_names, self.labels = split, found.class_names, found.labels
        counts = split, len(self), len(self.class_names)
        self.record_name = self.official.record_name(*counts)
        self.official.warn_if_partial(*counts)

    @functools.cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """SHA-256 over the dataset's name, all relative names, and the sizes in bytes of evenly spaced files.

        A look at each of a million files takes minutes on a network disk; a thousand tell a resized copy as well.
        """
        digest = hashlib.sha256(f"{self.official.name}\n{len(self)}\n".encode())
        digest.update(self.names.packed if isinstance(self.names, PackedNames) else b"")
        for image_id in evenly_spaced(len(self), _SAMPLED):
            digest.update(f"{_size(self.root, self.names[image_id])}\n".encode())
        return digest.hexdigest()


@register_dataset("places205")
@checked
class Places205(OfficialDataset):
    """Places205 (Zhou et al. 2014): 205 kinds of scenes, 2.4 million training images.

    Args:
        root: the folder with the downloaded images and lists, or with ``train`` and ``val`` folders of class folders.
        split: train or val; null means train.
        cache_in_memory: keep decoded images (3 bytes a pixel, in every worker process): for small images.

    Raises:
        FileNotFoundError: no such folder.
        WrongLayoutError: it does not hold Places205.
    """

    official = PLACES205

    def __init__(self, root: str, split: Literal["train", "val"] | None = None, cache_in_memory: bool = False) -> None:
        folder, split = existing_folder(root), split or "train"
        found = _places_lists(folder, split) or _split_folder(self.official, folder, split)
        if all(len(name) == 1 for name in found.class_names):
            hint = "Its classes lie one level deeper: use the downloaded folder images256 with the lists beside it."
            raise self.official.wrong(folder, f"The folders in {found.folder} are letters, not classes.", hint)
        super().__init__(split, found, cache_in_memory)


@register_dataset("inaturalist2018")
@checked
class INaturalist2018(OfficialDataset):
    """iNaturalist 2018 (Van Horn et al. 2018): 8,142 species, 437,513 training images.

    Args:
        root: the folder with ``train_val2018`` and the annotation files, or with ``train`` and ``val`` folders of class
            folders.
        split: train or val; null means train.
        cache_in_memory: keep decoded images (3 bytes a pixel, in every worker process): for small images.

    Raises:
        FileNotFoundError: no such folder.
        WrongLayoutError: it does not hold iNaturalist 2018.
        ValueError: a damaged annotation file.
    """

    official = INATURALIST2018

    def __init__(self, root: str, split: Literal["train", "val"] | None = None, cache_in_memory: bool = False) -> None:
        folder, split = existing_folder(root), split or "train"
        hint = ""
        if (folder / "train_val2018").is_dir():
            hint = f"The images are there, but not the list of this split: download and unpack {split}2018.json."
        found = _inaturalist_annotations(folder, split) or _split_folder(self.official, folder, split, hint)
        super().__init__(split, found, cache_in_memory)


def class_folders(official: Official, root: Path, folder: Path, train: Path | None) -> Labelled:
    """Images of one split in class folders.

    Args:
        official: the dataset.
        root: what the user named, for messages.
        folder: of the split.
        train: of the training split, if there is one. Its folders are the classes, so that all splits count them alike.

    Raises:
        WrongLayoutError: no images, images outside class folders, or classes that the training split does not have.
    """
    try:
        names, _ = find_images(folder)
    except ValueError:
        hint = f"In {folder}: {contents(folder)}."
        if archives(folder):
            hint += " Unpack each archive into a folder of its own name."
        raise official.wrong(root, f"{folder} holds no images.", hint) from None
    loose = [name for name in names if "/" not in name]
    if loose:
        problem = f"{folder} holds {len(loose):,} images outside class folders, e.g. {loose[0]}."
        raise official.wrong(root, problem, "Sort them into one folder per class.")
    class_names = class_folder_names(train or folder)
    foreign = sorted({name.partition("/")[0] for name in names} - set(class_names))
    if foreign:
        problem = f"{folder} has {len(foreign):,} class folders that {train} does not have: {listing(foreign, 3)}."
        raise official.wrong(root, problem, "Both splits need the same class folders.")
    return Labelled(folder, names, class_names, encode((name.partition("/")[0] for name in names), class_names))


def class_folder_names(folder: Path) -> list[str]:
    """The folders in a folder, sorted, without hidden ones."""
    return [name for name in folders_in(folder) if not name.startswith(".")]


def encode(classes: Iterable[str], class_names: Sequence[str]) -> np.ndarray:
    """Place of each image's class among the names, ``(N,)`` int64."""
    index = {name: label for label, name in enumerate(class_names)}
    return np.fromiter((index[name] for name in classes), dtype=np.int64)


def evenly_spaced(total: int, count: int) -> list[int]:
    """At most ``count`` ids from 0 to ``total - 1``, both ends among them."""
    return np.unique(np.linspace(0, total - 1, min(total, count)).round().astype(np.int64)).tolist() if total else []


def check_listed(official: Official, root: Path, folder: Path, names: Sequence[str], source: Path) -> None:
    """Looks whether listed images are there, at evenly spaced ones of them; warns of a few that are missing.

    Raises:
        WrongLayoutError: none of them is there.
    """
    looked_at = [names[image_id] for image_id in evenly_spaced(len(names), _SAMPLED)]
    missing = [name for name in looked_at if not os.path.isfile(folder / name)]
    if len(missing) == len(looked_at):
        problem = f"None of {len(looked_at):,} images listed in {source} that were looked for is there."
        raise official.wrong(root, problem, f"For example {folder / missing[0]} is missing.")
    if missing:
        log.warning(
            "%s of %s images listed in %s that were looked for are missing, e.g. %s: others take their places.",
            *(f"{len(missing):,}", f"{len(looked_at):,}", source, folder / missing[0]),
        )


def _split_folder(official: Official, root: Path, split: str, hint: str = "") -> Labelled:
    """Images of ``root/split/CLASS/...``; the end of the search for a layout that fits."""
    if not (root / split).is_dir():
        raise official.wrong(root, f"{root} does not hold the {split} split of {official.title}.", hint)
    train = root / "train"
    return class_folders(official, root, root / split, train if train.is_dir() else None)


def _places_lists(root: Path, split: str) -> Labelled | None:
    """The split as the official list has it; None where there is no list or no folder of images."""
    lists = [root / folder / f"{split}_places205.csv" for folder in ("trainvalsplit_places205", "")]
    folders = [root / name for name in ("data/vision/torralba/deeplearning/images256", "images256")]
    file = next((path for path in lists if path.is_file()), None)
    folder = next((path for path in folders if path.is_dir()), None)
    if file is None or folder is None:
        return None
    names: list[str] = []
    labels: list[int] = []
    class_of: dict[int, str] = {}
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            name, _, label = line.strip().replace(",", " ").rpartition(" ")
            if not name and not label:
                continue
            if not name or not label.isdecimal():
                raise ValueError(f"{file}, line {number}: expected 'a/abbey/NAME.jpg LABEL', got {line.strip()!r}.")
            names.append(name.strip().lstrip("/"))
            labels.append(int(label))
            if labels[-1] not in class_of:
                class_of[labels[-1]] = os.path.dirname(names[-1]).partition("/")[2]
    if not names:
        raise ValueError(f"{file} is empty: expected 'a/abbey/NAME.jpg LABEL' on each line.")
    check_listed(PLACES205, root, folder, names, file)
    class_names = [class_of.get(label, f"class {label}") for label in range(max(class_of) + 1)]
    return Labelled(folder, names, class_names, np.array(labels, dtype=np.int64))


def _inaturalist_annotations(root: Path, split: str) -> Labelled | None:
    """The split as its annotation file has it; None where there is no such file."""
    file = root / f"{split}2018.json"
    if not file.is_file():
        return None
    try:
        with open(file, encoding="utf-8") as stream:
            content = json.load(stream)
        categories = sorted((int(item["id"]), str(item.get("name", ""))) for item in content["categories"])
        label_of = {number: label for label, (number, _) in enumerate(categories)}
        category_of = {item["image_id"]: item["category_id"] for item in content["annotations"]}
        names = [str(item["file_name"]) for item in content["images"]]
        labels = [label_of[category_of[item["id"]]] for item in content["images"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"{file} is damaged: {reason}. It must be JSON with images, annotations and categories, as given out at "
            f"{INATURALIST2018.source}."
        ) from error
    if not names:
        raise ValueError(f"{file} lists no images.")
    check_listed(INATURALIST2018, root, root, names, file)
    distinct = len({name for _, name in categories}) == len(categories)
    class_names = [name if distinct else str(number) for number, name in categories]
    return Labelled(root, names, class_names, np.array(labels, dtype=np.int64))


def _size(folder: Path, name: str) -> int:
    try:
        return os.stat(os.path.join(folder, name)).st_size
    except OSError:
        return -1
