"""Images with their objects, from any dataset that has boxes: what the engines train on and what is evaluated."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pirl_plugin.data.datasets import ImageDataset

log = logging.getLogger(__name__)

_EXTENT = 1.0  # pixels: xmin = xmax in an annotation, whose ends are both inside, is one pixel wide


@dataclass(frozen=True)
class Example:
    """The objects of one image.

    Attributes:
        name: of the image, unique among the examples, for people and for files.
        boxes: float32 ``(n, 4)``, x0 y0 x1 y1 in the image's own pixels, from its corner; all have an area.
        labels: int64 ``(n,)``, indices into the examples' ``class_names``.
        difficult: bool ``(n,)``. Training uses these like any other (as detectron2 does); evaluation ignores them.
        empty_boxes: how many annotated boxes had no area and were left out.
    """

    name: str
    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    difficult: npt.NDArray[np.bool_]
    empty_boxes: int = 0


class Examples(Sequence[Example]):
    """The images of one dataset, or of several one after the other, with their objects; indices are those of a list.

    Indexing gives annotations alone, which are read once, at construction; ``image`` reads the pixels. Can be pickled,
    and so be sent to other processes.

    Args:
        *datasets: images with boxes, of the same classes.

    Attributes:
        class_names: the classes; a label is an index into them.

    Raises:
        ValueError: no boxes, no classes, different classes, or damaged annotations.
    """

    def __init__(self, *datasets: ImageDataset) -> None:
        self.class_names = same_classes(datasets)
        self.datasets = datasets
        self._origin = [(place, i) for place, dataset in enumerate(datasets) for i in range(len(dataset))]
        self._index = {origin: index for index, origin in enumerate(self._origin)}
        self._examples = [self._read_objects(place, image_id) for place, image_id in self._origin]

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:  # type: ignore[override]
        return self._examples[index]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    def image(self, index: int) -> tuple[Image.Image, int]:
        """The RGB image of an example, and the index of the example that it really shows.

        The second differs from ``index`` where that image cannot be read and another one takes its place: training then
        uses the other's objects, a test leaves the image out.
        """
        place, image_id = self._origin[index]
        image, found = self.datasets[place][image_id]
        return image, self._index[place, found]

    def with_objects(self) -> list[int]:
        """Indices of the images with at least one object: the others teach a detector nothing (as in detectron2)."""
        return [index for index, example in enumerate(self._examples) if len(example.boxes)]

    @property
    def empty_boxes(self) -> int:
        """Annotated boxes without an area, which were left out."""
        return sum(example.empty_boxes for example in self._examples)

    def _read_objects(self, place: int, image_id: int) -> Example:
        dataset = self.datasets[place]
        objects = dataset.boxes(image_id)
        boxes = np.maximum(np.asarray(objects["boxes"], dtype=np.float32).reshape(-1, 4), 0)
        solid = (boxes[:, 2:] - boxes[:, :2] > _EXTENT).all(axis=1)
        name = dataset.file_name(image_id)
        return Example(
            name=name if len(self.datasets) == 1 else f"{place}/{name}",
            boxes=boxes[solid],
            labels=np.asarray(objects["labels"], dtype=np.int64)[solid],
            difficult=np.asarray(objects["difficult"], dtype=bool)[solid],
            empty_boxes=int((~solid).sum()),
        )


def same_classes(datasets: Sequence[ImageDataset]) -> list[str]:
    """The classes that all datasets have, in the same order.

    Raises:
        ValueError: none, or different ones.
    """
    names = [list(getattr(dataset, "class_names", None) or []) for dataset in datasets]
    if not names or not all(names):
        raise ValueError("detection needs images with boxes and named classes: use dataset=voc or generated_scenes.")
    for other in names[1:]:
        if other != names[0]:
            different = sorted(set(names[0]) ^ set(other))[:5]
            how = f"for example {different}" if different else "in another order"
            raise ValueError(f"the datasets have different classes, {how}: use matching ones.")
    return names[0]
