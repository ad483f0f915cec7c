"""PASCAL VOC 2007 and 2012, and both together, each found by its root alone."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from classy_vision.dataset import register_dataset

from pirl_plugin.data.dataset_layouts import Official
from pirl_plugin.data.datasets import FileDataset
from pirl_plugin.data.scanning import existing_folder
from pirl_plugin.data.voc import VOC, VOC_CLASSES, devkits
from pirl_plugin.schema import checked

VOC2007_OFFICIAL = Official(
    name="voc2007",
    title="PASCAL VOC2007",
    layouts=("VOCdevkit/VOC2007/ with JPEGImages, Annotations and ImageSets/Main; trainval and test in one",),
    source="http://host.robots.ox.ac.uk/pascal/VOC/voc2007/",
    images={"train": 2_501, "val": 2_510, "trainval": 5_011, "test": 4_952},
    classes=20,
)
VOC2012_OFFICIAL = Official(
    name="voc2012",
    title="PASCAL VOC2012",
    layouts=("VOCdevkit/VOC2012/ with JPEGImages, Annotations and ImageSets/Main",),
    source="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
    images={"train": 5_717, "val": 5_823, "trainval": 11_540},
    classes=20,
)
VOC0712_OFFICIAL = Official(
    name="voc0712",
    title="PASCAL VOC2007 and VOC2012",
    layouts=("VOCdevkit/VOC2007/ and VOCdevkit/VOC2012/, each with JPEGImages, Annotations and ImageSets/Main",),
    source="http://host.robots.ox.ac.uk/pascal/VOC/",
    images={"trainval": 16_551, "test": 4_952},
    classes=20,
)


class _OfficialVOC(VOC):
    """One year's devkit, found by its name."""

    official: ClassVar[Official]
    class_names = list(VOC_CLASSES)  # type: ignore[assignment]

    def find_devkit(self, root: Path, split: str | None) -> Path:
        """The folder named after the year that holds the split's list.

        Raises:
            WrongLayoutError: none, or several.
        """
        year = self.official.name.upper()
        named = devkits(root, year)
        if not named:
            others = [folder.name for folder in devkits(root)]
            hint = f"There is {others[0]}: dataset=voc reads any devkit." if others else ""
            raise self.official.wrong(root, f"{root} has no folder {year} with JPEGImages.", hint)
        having = [folder for folder in named if (folder / "ImageSets" / "Main" / f"{split}.txt").is_file()]
        if not having:
            hint = f"No list ImageSets/Main/{split}.txt in {named[0]}: unpack the archive that holds this split, too."
            raise self.official.wrong(root, f"{root} does not hold the {split} split of {self.official.title}.", hint)
        if len(having) > 1:
            hint = f"Set root to one of {having[0]} and {having[1]}."
            raise self.official.wrong(root, f"{root} holds the {split} split {len(having)} times.", hint)
        return having[0]

    def __init__(self, root: str, split: str, cache_in_memory: bool) -> None:
        super().__init__(root, split, cache_in_memory)
        self.record_name = self.official.record_name(split, len(self), len(self.class_names))
        self.official.warn_if_partial(split, len(self), len(self.class_names))


@register_dataset("voc2007")
@checked
class VOC2007(_OfficialVOC):
    """PASCAL VOC2007 (Everingham et al. 2010): 20 classes, several an image, with boxes.

    Args:
        root: the folder that holds VOCdevkit or VOC2007; other devkits beside it do not matter.
        split: train, val, trainval or test; null means trainval.
        cache_in_memory: keep decoded images (3 bytes a pixel, in every worker process): for small images.

    Raises:
        FileNotFoundError: no such folder.
        WrongLayoutError: it does not hold VOC2007, or not this split.
    """

    official = VOC2007_OFFICIAL

    def __init__(
        self,
        root: str,
        split: Literal["train", "val", "trainval", "test"] | None = None,
        cache_in_memory: bool = False,
    ) -> None:
        super().__init__(root, split or "trainval", cache_in_memory)


@register_dataset("voc2012")
@checked
class VOC2012(_OfficialVOC):
    """PASCAL VOC2012 (Everingham et al. 2015): 20 classes, several an image, with boxes; its test set is not public.

    Args:
        root: the folder that holds VOCdevkit or VOC2012; other devkits beside it do not matter.
        split: train, val or trainval; null means trainval.
        cache_in_memory: keep decoded images (3 bytes a pixel, in every worker process): for small images.

    Raises:
        FileNotFoundError: no such folder.
        WrongLayoutError: it does not hold VOC2012, or not this split.
    """

    official = VOC2012_OFFICIAL
    benchmark_splits = ("train", "val")

    def __init__(
        self, root: str, split: Literal["train", "val", "trainval"] | None = None, cache_in_memory: bool = False
    ) -> None:
        super().__init__(root, split or "trainval", cache_in_memory)


@register_dataset("voc0712")
@checked
class VOC0712(FileDataset):
    """VOC2007 and VOC2012 together, as detection has them: both trainval sets to learn from, VOC2007's test set.

    Args:
        root: the folder that holds both VOC2007 and VOC2012, or a VOCdevkit with them.
        split: trainval (16,551 images), train or val of both years, or test (of 2007); null means trainval.
        cache_in_memory: keep decoded images (3 bytes a pixel, in every worker process): for small images.

    Raises:
        FileNotFoundError: no such folder.
        WrongLayoutError: it does not hold both, or not this split.
    """

    official = VOC0712_OFFICIAL
    benchmark_splits: ClassVar[tuple[str, str]] = ("trainval", "test")
    class_names = list(VOC_CLASSES)

    def __init__(
        self,
        root: str,
        split: Literal["train", "val", "trainval", "test"] | None = None,
        cache_in_memory: bool = False,
    ) -> None:
        folder, split = existing_folder(root), split or "trainval"
        self.split = split
        for year in ("VOC2007",) if split == "test" else ("VOC2007", "VOC2012"):
            if not devkits(folder, year):
                raise self.official.wrong(folder, f"{folder} has no folder {year} with JPEGImages.")
        self.parts: list[_OfficialVOC] = [VOC2007(root, split)]
        if split != "test":
            self.parts.append(VOC2012(root, split))
        names = [f"{part.root.relative_to(folder).as_posix()}/{name}" for part in self.parts for name in part.names]
        super().__init__(folder, [os.path.normpath(name) for name in names], cache_in_memory)
        self.keys = [key for part in self.parts for key in part.keys]
        whole = all(part.record_name == part.official.name for part in self.parts)
        self.record_name = self.official.name if whole else f"{self.official.name}-partial"

    @functools.cached_property
    def multi_labels(self) -> np.ndarray:  # type: ignore[override]
        """``(N, 20)`` int8: 1 present, 0 present only as objects marked difficult, -1 absent."""
        return np.concatenate([part.multi_labels for part in self.parts])

    def boxes(self, image_id: int) -> dict[str, np.ndarray]:
        """See ``VOC.boxes``."""
        for part in self.parts:
            if image_id < len(part):
                return part.boxes(image_id)
            image_id -= len(part)
        raise IndexError(f"Image id is outside the dataset ({len(self)} images).")
