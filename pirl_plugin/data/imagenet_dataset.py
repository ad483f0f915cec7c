"""ImageNet-1k, in class folders as it should be, or with the validation images in one folder as they come."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from classy_vision.dataset import register_dataset

from pirl_plugin.data.benchmark_datasets import (
    Labelled,
    OfficialDataset,
    class_folder_names,
    class_folders,
    encode,
)
from pirl_plugin.data.dataset_layouts import Official
from pirl_plugin.data.scanning import IMAGE_EXTENSIONS, existing_folder, find_images, listing
from pirl_plugin.schema import checked

IMAGENET = Official(
    name="imagenet",
    title="ImageNet-1k (ILSVRC2012)",
    layouts=(
        "train/n01440764/*.JPEG and val/n01440764/*.JPEG, one folder per class, named by its WordNet id",
        "or the same in ILSVRC/Data/CLS-LOC (Kaggle's copy)",
    ),
    source="https://image-net.org/download.php",
    images={"train": 1_281_167, "val": 50_000},
    classes=1_000,
)

_BASES = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC")
_FOLDERS = {"train": ("train", "ILSVRC2012_img_train"), "val": ("val", "ILSVRC2012_img_val")}
_SOLUTION = "LOC_val_solution.csv"
_DEVKIT = "ILSVRC2012_devkit_t12/data"
_FLAT_HINT = (
    f"Their classes are known from the ground truth: put the devkit ({_DEVKIT}/) or Kaggle's {_SOLUTION} into the "
    "root and they are read as they lie, or sort them into class folders (val/n01440764/ILSVRC2012_val_00000293.JPEG)."
)


@register_dataset("imagenet")
@checked
class ImageNet(OfficialDataset):
    """ImageNet-1k (ILSVRC2012, Russakovsky et al. 2015): 1,000 classes in the order of their WordNet ids.

    Validation images that lie in one folder, as they are given out, are read with the ground truth of the devkit or of
    Kaggle's copy where one is in the root.

    Args:
        root: the folder with ``train`` and ``val``.
        split: train or val; null means train.
        cache_in_memory: keep decoded images (3 bytes a pixel, in every worker process): for small images.

    Raises:
        FileNotFoundError: no such folder.
        WrongLayoutError: it does not hold ImageNet in class folders.
    """

    official = IMAGENET

    def __init__(self, root: str, split: Literal["train", "val"] | None = None, cache_in_memory: bool = False) -> None:
        top, split = existing_folder(root), split or "train"
        folder = _split_folder(top, split)
        if folder is None:
            raise IMAGENET.wrong(top, f"{top} does not hold the {split} split of ImageNet.")
        train = _split_folder(top, "train")
        found = _flat(top, folder, train) if _has_images(folder) else class_folders(IMAGENET, top, folder, train)
        strange = [name for name in found.class_names if not re.fullmatch(r"n\d{8}", name)]
        if strange:
            problem = f"{folder} has class folders that are no WordNet ids: {listing(strange, 3)}."
            raise IMAGENET.wrong(top, problem, "For images sorted otherwise use dataset=image_folder.")
        super().__init__(split, found, cache_in_memory)


def _split_folder(root: Path, split: str) -> Path | None:
    folders = [root / base / name for base in _BASES for name in _FOLDERS[split]]
    return next((folder for folder in folders if folder.is_dir()), None)


def _has_images(folder: Path) -> bool:
    """Whether images lie in the folder itself."""
    with os.scandir(folder) as entries:
        return any(entry.name.lower().endswith(IMAGE_EXTENSIONS) for entry in entries)


def _flat(root: Path, folder: Path, train: Path | None) -> Labelled:
    """Images that lie in one folder, with their classes from the ground truth.

    Raises:
        WrongLayoutError: no ground truth, or one that does not fit.
    """
    names, _ = find_images(folder)
    problem = f"{folder} holds {len(names):,} images, not in class folders: what they show is not known from it."
    if folder == train:
        raise IMAGENET.wrong(root, problem, "Unpack each class's archive (n01440764.tar) into a folder of its own.")
    truth = _ground_truth([root, folder.parent])
    if truth is None:
        raise IMAGENET.wrong(root, problem, _FLAT_HINT)
    unknown = [name for name in names if Path(name).stem not in truth]
    if unknown:
        more = f"The ground truth knows {len(truth):,} images, {len(unknown):,} are not among them, e.g. {unknown[0]}."
        raise IMAGENET.wrong(root, problem, more)
    classes = [truth[Path(name).stem] for name in names]
    class_names = class_folder_names(train) if train else sorted(set(truth.values()))
    foreign = sorted(set(classes) - set(class_names))
    if foreign:
        more = f"They show {len(foreign):,} classes that {train} does not have: {listing(foreign, 3)}."
        raise IMAGENET.wrong(root, problem, f"{more} Keep the images of its classes only, in class folders.")
    return Labelled(folder, names, class_names, encode(classes, class_names))


def _ground_truth(places: Sequence[Path]) -> Mapping[str, str] | None:
    """WordNet id by the image's name without extension, from the first file there is; None where there is none."""
    for place in places:
        if (place / _SOLUTION).is_file():
            return _from_solution(place / _SOLUTION)
        if (place / _DEVKIT / "meta.mat").is_file():
            return _from_devkit(place / _DEVKIT)
    return None


def _from_solution(file: Path) -> dict[str, str]:
    """Kaggle's list: a header, then ``ILSVRC2012_val_00048981,n03995372 85 1 499 272``."""
    with open(file, encoding="utf-8", newline="") as lines:
        return {row[0]: row[1].split()[0] for row in csv.reader(lines) if len(row) == 2 and row[1].startswith("n")}


def _from_devkit(folder: Path) -> dict[str, str]:
    """The devkit's: line i is the number of the class of validation image i; ``meta.mat`` says which class it is."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ValueError(f"{folder / 'meta.mat'} can only be read with scipy: pip install scipy.") from error
    synsets = loadmat(str(folder / "meta.mat"), squeeze_me=True)["synsets"]
    wnid = {int(number): str(name) for number, name in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    numbers = (folder / "ILSVRC2012_validation_ground_truth.txt").read_text(encoding="utf-8").split()
    return {f"ILSVRC2012_val_{place:08d}": wnid[int(number)] for place, number in enumerate(numbers, start=1)}
