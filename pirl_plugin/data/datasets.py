"""Sources of images with stable ids: a folder of images, or a text list of files."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from classy_vision.dataset import ClassyDataset, register_dataset
from PIL import Image

from pirl_plugin.data.decoded import DecodedImage, pixels_of
from pirl_plugin.data.reading import UnreadableImageError, read_image
from pirl_plugin.data.scanning import IMAGE_EXTENSIONS, existing_folder, find_images, split_folder
from pirl_plugin.registry import Configurable
from pirl_plugin.schema import checked

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}

log = logging.getLogger(__name__)


class ImageDataset(Configurable, ClassyDataset, ABC):
    """Images by id: ``dataset[image_id] -> (RGB image, image_id)``, ids ``0 .. len(dataset) - 1``.

    The returned id is that of the image returned. It differs from the asked one when that image was unreadable: the
    next readable image (wrapping) takes its place, under its own id, so that no memory row ever gets another image's
    embedding.

    Attributes:
        class_names: names of the classes; empty where nothing is labelled.
        labels: class of each image, ``(N,)`` int64, or None.
        multi_labels: ``(N, C)`` int8: 1 present, 0 present only in difficult cases, -1 absent; or None.
        unreadable: ids found unreadable in this process, with the reason.
    """

    class_names: list[str] = []
    labels: np.ndarray | None = None
    multi_labels: np.ndarray | None = None

    def __init__(self, cache_in_memory: bool = False) -> None:
        super().__init__(dataset=None, batchsize_per_replica=1, shuffle=False, transform=None, num_samples=None)
        self.cache_in_memory = cache_in_memory
        self.unreadable: dict[int, str] = {}
        self._cache: dict[int, np.ndarray] = {}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, image_id: int) -> Image.Image:
        """The RGB image of this very id.

        Raises:
            UnreadableImageError: it cannot be read.
        """

    @abstractmethod
    def file_name(self, image_id: int) -> str:
        """A name of the image for people: for files, the path relative to the root, with forward slashes."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 hex digest over all that determines which image an id means."""

    def boxes(self, image_id: int) -> dict[str, np.ndarray]:
        """Objects of an image, where they are known.

        Returns:
            ``boxes`` float32 ``(n, 4)``, x0 y0 x1 y1 in pixels from the image's corner; ``labels`` int64 ``(n,)``;
            ``difficult`` bool ``(n,)``.

        Raises:
            ValueError: this dataset has no boxes.
        """
        raise ValueError(f"{type(self).__name__} has no boxes: use a VOC dataset or generated_scenes.")

    def __getitem__(self, image_id: int) -> tuple[Image.Image, int]:
        total = len(self)
        if not 0 <= image_id < total:
            raise IndexError(f"Image id {image_id} is outside the dataset ({total} images, valid 0..{total - 1}).")
        for candidate in itertools.chain(range(image_id, total), range(image_id)):
            image = self._readable(candidate)
            if image is not None:
                return image, candidate
        example, reason = next(iter(self.unreadable.items()))
        raise ValueError(
            f"None of the {total} images of {type(self).__name__} can be read; "
            f"for example {self.file_name(example)}: {reason}. Check the files and the root."
        )

    def _readable(self, image_id: int) -> Image.Image | None:
        if image_id in self.unreadable:
            return None
        cached = self._cache.get(image_id)
        if cached is not None:
            return DecodedImage(cached)
        try:
            image = self.read(image_id)
        except UnreadableImageError as error:
            self.unreadable[image_id] = error.reason
            log.warning("%s; the next readable image takes its place.", error)
            return None
        if self.cache_in_memory:
            self._cache[image_id] = pixels_of(image)
        return image

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}  # each worker process fills its own


class FileDataset(ImageDataset):
    """Images that are files under one root folder, each id a relative path."""

    def __init__(self, root: Path, names: Sequence[str], cache_in_memory: bool = False) -> None:
        super().__init__(cache_in_memory)
        self.root = root
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def read(self, image_id: int) -> Image.Image:
        """See ``ImageDataset.read``."""
        return read_image(os.path.join(self.root, self.names[image_id]))

    def file_name(self, image_id: int) -> str:
        """See ``ImageDataset.file_name``."""
        return self.names[image_id]

    @functools.cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """SHA-256 over the dataset's class, the number of images, their relative names and sizes in bytes."""
        digest = hashlib.sha256(f"{type(self).__name__}\n{len(self)}\n".encode())
        for name in self.names:
            try:
                size = os.stat(os.path.join(self.root, name)).st_size
            except OSError:
                size = -1
            digest.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()


@register_dataset("image_folder")
@checked
class ImageFolder(FileDataset):
    """A folder of images, plain or with one sub-folder per class; ids follow the sorted relative paths.

    All images below ``root`` count (jpg jpeg png bmp webp tif tiff ppm gif, in any case); other files and hidden ones
    are ignored and counted in ``ignored_files``. Classes are the first-level folders, where every image lies in one.

    Args:
        root: the folder.
        split: name of a folder in ``root`` to use instead of ``root`` itself, such as train or test.
        cache_in_memory: keep decoded images (3 bytes a pixel, in every worker process): for small images.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no image in it, or ``root`` is a file.
    """

    def __init__(self, root: str, split: str | None = None, cache_in_memory: bool = False) -> None:
        folder = split_folder(existing_folder(root), split)
        names, self.ignored_files = find_images(folder)
        super().__init__(folder, names, cache_in_memory)
        self.class_names, self.labels = _folder_classes(names, folder)


@register_dataset("file_list")
@checked
class FileList(FileDataset):
    """Images listed in a text file: one path per line, optionally a tab and a class label.

    Args:
        path: the list (UTF-8); ``{split}`` in it stands for the split's name.
        root: folder that the paths are relative to; default: the folder of the list.
        split: see ``path``.
        cache_in_memory: keep decoded images (3 bytes a pixel, in every worker process): for small images.

    Raises:
        FileNotFoundError: no such list or root, or none of the first listed files exists.
        ValueError: an empty list, labels on some lines only, or a split without ``{split}`` in ``path``.
    """

    def __init__(
        self, path: str, root: str | None = None, split: str | None = None, cache_in_memory: bool = False
    ) -> None:
        if split is not None and "{split}" not in path:
            raise ValueError(f"file_list got split={split!r}, but path={path!r} has no '{{split}}' to put it in.")
        file = Path(path.replace("{split}", split or "{split}")).expanduser()
        if not file.is_file():
            raise FileNotFoundError(f"No list file {file}: expected a text file with one image path per line.")
        folder = existing_folder(root) if root is not None else file.parent
        names, labels = _read_list(file)
        if not any(os.path.exists(os.path.join(folder, name)) for name in names[:100]):
            raise FileNotFoundError(
                f"None of the first {len(names[:100])} images listed in {file} exists, for example "
                f"{os.path.join(folder, names[0])}: set root to the folder that the listed paths are relative to."
            )
        super().__init__(folder, names, cache_in_memory)
        if labels:
            self.class_names, self.labels = _encode(labels)


def _folder_classes(names: list[str], folder: Path) -> tuple[list[str], np.ndarray | None]:
    """Class names and labels from the first-level folders; from the second level if the first one holds splits."""
    parts = [name.split("/")[:-1] for name in names]
    if not all(parts):
        return [], None
    first = {part[0] for part in parts}
    if len(first) > 1 and {name.lower() for name in first} <= _SPLIT_NAMES:
        splits = ", ".join(sorted(first))
        log.warning("%s holds splits (%s) and all are used: name one with split= to use that alone.", folder, splits)
        parts = [part[1:] for part in parts]
        if not all(parts):
            return [], None
    return _encode(part[0] for part in parts)


def _read_list(file: Path) -> tuple[list[str], list[str]]:
    """Paths and labels (empty if there are none) of a list file."""
    names: list[str] = []
    labels: list[str] = []
    with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        for number, line in enumerate(lines, start=1):
            name, tab, label = line.rstrip("\r\n").rpartition("\t")
            if not tab:
                name, label = label, ""
            if not name.strip():
                continue
            names.append(name)
            if label.strip():
                labels.append(label.strip())
            if labels and len(labels) != len(names):
                raise ValueError(
                    f"{file}, line {number}: some lines have a label and some have none. "
                    "Write 'path<TAB>label' on every line, or on none."
                )
    if not names:
        raise ValueError(f"{file} lists no images: expected one path per line (one of {' '.join(IMAGE_EXTENSIONS)}).")
    if len(set(names)) < len(names):
        log.warning("%s lists %d paths more than once: each gets an id of its own.", file, len(names) - len(set(names)))
    return names, labels


def _encode(labels: Iterable[str]) -> tuple[list[str], np.ndarray]:
    """Sorted class names (by number if all are numbers) and ``(N,)`` int64 labels."""
    labels = list(labels)
    distinct = set(labels)
    numeric = all(name.isdecimal() for name in distinct)
    class_names = sorted(distinct, key=lambda name: (int(name) if numeric else 0, name))
    index = {name: position for position, name in enumerate(class_names)}
    return class_names, np.fromiter((index[label] for label in labels), dtype=np.int64, count=len(labels))
