"""A PASCAL VOC devkit (Everingham et al. 2010): images, which classes each shows, and boxes."""

from __future__ import annotations

import functools
import logging
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import ClassVar

import numpy as np
from classy_vision.dataset import register_dataset

from pirl_plugin.data.datasets import FileDataset
from pirl_plugin.data.scanning import existing_folder, find_images, folders_in, listing
from pirl_plugin.schema import checked, did_you_mean

VOC_CLASSES = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable"]
VOC_CLASSES += ["dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"]

_DEVKIT_DEPTH = 3  # root / DIR / VOCdevkit / VOC2007

log = logging.getLogger(__name__)


@register_dataset("voc")
@checked
class VOC(FileDataset):
    """A VOC devkit's images, with multi-labels and boxes.

    Classes are VOC's twenty, or those found in the annotations if there are others. Multi-labels come from the devkit's
    lists ``ImageSets/Main/<class>_<split>.txt``, or else from the annotations: 1 present, 0 present only as objects
    marked difficult, -1 absent.

    Args:
        root: the folder that holds JPEGImages, Annotations and ImageSets, or one above it.
        split: train, val, trainval or test, as listed in ``ImageSets/Main``; None: all images.
        cache_in_memory: keep decoded images (3 bytes a pixel, in every worker process): for small images.

    Raises:
        FileNotFoundError: no such folder or split.
        ValueError: several devkits in ``root``, an empty split, a split without its images, or damaged lists.
    """

    benchmark_splits: ClassVar[tuple[str, str]] = ("trainval", "test")

    def __init__(self, root: str, split: str | None = None, cache_in_memory: bool = False) -> None:
        devkit = self.find_devkit(existing_folder(root), split)
        found, _ = find_images(devkit / "JPEGImages")
        names = {os.path.splitext(name)[0]: f"JPEGImages/{name}" for name in found}
        self.split = split
        self.keys = sorted(names) if split is None else _read_split(devkit, split)
        _check_images(devkit, split, self.keys, names)
        super().__init__(devkit, [names.get(key, f"JPEGImages/{key}.jpg") for key in self.keys], cache_in_memory)

    def find_devkit(self, root: Path, split: str | None) -> Path:
        """The folder of the devkit in ``root`` that holds the split.

        Raises:
            FileNotFoundError: no devkit.
            ValueError: several.
        """
        found = devkits(root)
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"{root} holds several VOC datasets: set root to one of {listing([str(folder) for folder in found])}, "
                "or use dataset=voc2007, voc2012 or voc0712."
            )
        raise FileNotFoundError(
            f"No VOC dataset in {root}: expected JPEGImages, Annotations and ImageSets there or in a folder such as "
            f"VOCdevkit/VOC2007 below it. Folders in {root}: {listing(folders_in(root))}."
        )

    @functools.cached_property
    def class_names(self) -> list[str]:  # type: ignore[override]
        """VOC's twenty classes, or the sorted names in all annotations if one of them is not among the twenty."""
        if self._class_lists(VOC_CLASSES):
            return list(VOC_CLASSES)
        found = set()
        for file in sorted((self.root / "Annotations").glob("*.xml")):
            found |= {_text(item, "name", file) for item in _parse(file).findall("object")}
        return list(VOC_CLASSES) if found <= set(VOC_CLASSES) else sorted(found)

    @functools.cached_property
    def multi_labels(self) -> np.ndarray:  # type: ignore[override]
        """``(N, C)`` int8: 1 present, 0 present only as objects marked difficult, -1 absent."""
        lists = self._class_lists(self.class_names)
        if lists:
            return np.stack([_read_class_list(file, self.keys) for file in lists], axis=1)
        labels = np.full((len(self), len(self.class_names)), -1, dtype=np.int8)
        for image_id in range(len(self)):
            objects = self.boxes(image_id)
            for label, difficult in zip(objects["labels"], objects["difficult"], strict=True):
                labels[image_id, label] = max(labels[image_id, label], 0 if difficult else 1)
        return labels

    def boxes(self, image_id: int) -> dict[str, np.ndarray]:
        """See ``ImageDataset.boxes``. VOC counts pixels from 1, both ends inside: xmin=1, xmax=W is 0..W here.

        An annotation with xmin = xmax is thus one pixel wide, no empty box.

        Raises:
            ValueError: the image has no annotation, or a damaged one.
        """
        file = self.root / "Annotations" / f"{self.keys[image_id]}.xml"
        objects = _parse(file).findall("object")
        index = {name: label for label, name in enumerate(self.class_names)}
        sides = ("bndbox/xmin", "bndbox/ymin", "bndbox/xmax", "bndbox/ymax")
        corners = [[_number(item, side, file) for side in sides] for item in objects]
        names = [_text(item, "name", file) for item in objects]
        boxes = np.array(corners, dtype=np.float32).reshape(-1, 4)
        boxes[:, :2] -= 1
        flawed = [box for box, (x0, y0, x1, y1) in zip(corners, boxes.tolist(), strict=True) if x1 <= x0 or y1 <= y0]
        if flawed:
            raise ValueError(f"Annotation {file}: a box ends before it begins, xmin ymin xmax ymax = {flawed[0]}.")
        unknown = sorted(set(names) - set(index))
        if unknown:
            raise ValueError(f"Annotation {file}: class {unknown[0]!r} is none of {listing(list(index), len(index))}.")
        return {
            "boxes": boxes,
            "labels": np.array([index[name] for name in names], dtype=np.int64),
            "difficult": np.array([item.findtext("difficult", "0").strip() == "1" for item in objects], dtype=bool),
        }

    def _class_lists(self, classes: list[str]) -> list[Path]:
        """The split's list file of each class, in order; empty unless all are there."""
        files = [self.root / "ImageSets" / "Main" / f"{name}_{self.split}.txt" for name in classes]
        return files if self.split is not None and all(file.is_file() for file in files) else []


def devkits(root: Path, name: str | None = None) -> list[Path]:
    """Folders with JPEGImages (of that name, if one is given), nearest to ``root``: itself, or up to three below."""
    level = [root]
    for _ in range(1 + _DEVKIT_DEPTH):
        found = [folder for folder in level if (folder / "JPEGImages").is_dir()]
        found = [folder for folder in found if name is None or name in (folder.name, folder.resolve().name)]
        if found:
            return found
        level = [folder / below for folder in level for below in folders_in(folder)]
    return []


def _read_split(devkit: Path, split: str) -> list[str]:
    lists = devkit / "ImageSets" / "Main"
    file = lists / f"{split}.txt"
    if not file.is_file():
        found = sorted(entry.stem for entry in lists.glob("*.txt") if "_" not in entry.stem)
        raise FileNotFoundError(
            f"No split {split!r}: expected {file}, a text file of image names. "
            f"Splits in {lists}: {listing(found)}.{did_you_mean(split, found)}"
        )
    keys = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    if not keys:
        raise ValueError(f"The split file {file} is empty: expected one image name per line.")
    return keys


def _check_images(devkit: Path, split: str | None, keys: list[str], names: dict[str, str]) -> None:
    """Images of the split that are not there: all of them is an error, some a warning."""
    missing = [key for key in keys if key not in names]
    if not missing:
        return
    said = f"{len(missing)} of the {len(keys)} images of split {split} are not in {devkit / 'JPEGImages'}"
    if len(missing) == len(keys):
        raise ValueError(f"{said}, e.g. {missing[0]}: their archive was not unpacked, or into another folder.")
    log.warning("%s, e.g. %s: other images take their places.", said, missing[0])


def _read_class_list(file: Path, keys: list[str]) -> np.ndarray:
    """Labels 1, 0, -1 of the images ``keys`` from a devkit's ``<class>_<split>.txt``, ``(N,)`` int8."""
    labels = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        fields = line.split()
        if fields and (len(fields) != 2 or fields[1] not in ("1", "0", "-1")):
            raise ValueError(f"{file}, line {number}: expected 'NAME LABEL' with label 1, 0 or -1, got {line!r}.")
        if fields:
            labels[fields[0]] = int(fields[1])
    missing = [key for key in keys if key not in labels]
    if missing:
        raise ValueError(f"{file} has no label for {len(missing)} images of the split, e.g. {missing[0]}.")
    return np.array([labels[key] for key in keys], dtype=np.int8)


def _parse(file: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(file).getroot()
    except FileNotFoundError:
        raise ValueError(f"No annotation {file}: boxes and multi-labels need one for every image.") from None
    except ElementTree.ParseError as error:
        raise ValueError(f"Damaged annotation {file}: {error}.") from None


def _text(item: ElementTree.Element, path: str, file: Path) -> str:
    text = item.findtext(path)
    if text is None or not text.strip():
        raise ValueError(f"Annotation {file}: an object has no <{path}>.")
    return text.strip()


def _number(item: ElementTree.Element, path: str, file: Path) -> float:
    text = _text(item, path, file)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"Annotation {file}: <{path}> must be a number, got {text!r}.") from None
