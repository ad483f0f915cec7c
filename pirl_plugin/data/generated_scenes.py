"""The embedded default dataset: scenes with simple objects, drawn by this package. No files, no download."""

from __future__ import annotations

import functools
import hashlib
from typing import Annotated, Literal

import numpy as np
from annotated_types import Interval
from classy_vision.dataset import register_dataset
from PIL import Image

from pirl_plugin.data.datasets import ImageDataset
from pirl_plugin.data.decoded import DecodedImage
from pirl_plugin.data.scenes_drawing import SceneObject, paint_scene, plan_scene
from pirl_plugin.data.scenes_shapes import SHAPES
from pirl_plugin.schema import Fraction, NonNegativeInt, PositiveInt, checked

_VERSION = 2  # raise it with any change to what is drawn: results before and after are not comparable
_SPLITS = ("train", "test", "val")
_LABEL_STREAM = (1,)  # spawn key that keeps the order of labels apart from the scenes' own random numbers


@register_dataset("generated_scenes")
@checked
class GeneratedScenes(ImageDataset):
    """Drawn scenes: one large object of a class, up to two small ones; with class labels, multi-labels and boxes.

    An image is a pure function of (seed, split, image id, size, num_classes, typicality); the splits are independent
    draws. Colour, light, place, size and pose do not depend on the class. Classes are balanced: each block of
    ``num_classes`` ids holds every class once.

    Args:
        num_images: number of images.
        size: side in pixels.
        split: train, test or val; None means train.
        seed: other seeds give other scenes.
        num_classes: how many of the classes disc, ring, square, triangle, star, cross, crescent, arrow, heart,
            hourglass, horseshoe, drop.
        typicality: probability that an object, or a background, has the texture typical of its class, as much of nature
            has; at 0 only outlines tell the classes apart, which short pretraining does not learn.
        cache_in_memory: keep drawn images (3 * size * size bytes each, in every worker process).
    """

    def __init__(
        self,
        num_images: PositiveInt = 2000,
        size: Annotated[int, Interval(ge=32, le=512)] = 64,
        split: Literal["train", "test", "val"] | None = None,
        seed: NonNegativeInt = 0,
        num_classes: Annotated[int, Interval(ge=2, le=len(SHAPES))] = 8,
        typicality: Fraction = 0.7,
        cache_in_memory: bool = True,
    ) -> None:
        super().__init__(cache_in_memory)
        self.num_images, self.size, self.split, self.seed = num_images, size, split or "train", seed
        self.class_names = list(SHAPES)[:num_classes]
        self.typicality = typicality

    def __len__(self) -> int:
        return self.num_images

    def read(self, image_id: int) -> Image.Image:
        """See ``ImageDataset.read``; a drawn image is always readable."""
        objects, rng = self._scene(image_id)
        return DecodedImage(paint_scene(rng, objects, self.size, self.typicality))

    def file_name(self, image_id: int) -> str:
        """See ``ImageDataset.file_name``."""
        return f"{self.split}/{self._label(image_id)}_{image_id}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 over all arguments that determine the images, and the version of the drawing."""
        what = (_VERSION, self.num_images, self.size, self.split, self.seed, len(self.class_names), self.typicality)
        return hashlib.sha256(f"{type(self).__name__}{what}".encode()).hexdigest()

    @functools.cached_property
    def labels(self) -> np.ndarray:  # type: ignore[override]
        """Class of each image's main object, ``(N,)`` int64."""
        classes = len(self.class_names)
        blocks = [self._order(block) for block in range(-(-self.num_images // classes))]
        return np.concatenate(blocks)[: self.num_images].astype(np.int64)

    @functools.cached_property
    def multi_labels(self) -> np.ndarray:  # type: ignore[override]
        """``(N, C)`` int8: 1 present, 0 present only as objects that the frame cuts off, -1 absent."""
        labels = np.full((self.num_images, len(self.class_names)), -1, dtype=np.int8)
        for image_id in range(self.num_images):
            for item in self._scene(image_id)[0]:
                labels[image_id, item.label] = max(labels[image_id, item.label], 0 if item.difficult else 1)
        return labels

    def boxes(self, image_id: int) -> dict[str, np.ndarray]:
        """See ``ImageDataset.boxes``; the main object comes first."""
        objects, _ = self._scene(image_id)
        return {
            "boxes": (np.stack([item.box for item in objects]) * self.size).astype(np.float32),
            "labels": np.array([item.label for item in objects], dtype=np.int64),
            "difficult": np.array([item.difficult for item in objects], dtype=bool),
        }

    def _scene(self, image_id: int) -> tuple[list[SceneObject], np.random.Generator]:
        """The objects of a scene, and the generator to paint them with."""
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, _SPLITS.index(self.split), image_id]))
        shapes = [SHAPES[name] for name in self.class_names]
        return plan_scene(rng, self._label(image_id), shapes), rng

    def _label(self, image_id: int) -> int:
        block, place = divmod(image_id, len(self.class_names))
        return int(self._order(block)[place])

    def _order(self, block: int) -> np.ndarray:
        """The classes of one block of ids."""
        entropy = [self.seed, _SPLITS.index(self.split), block]
        rng = np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=_LABEL_STREAM))
        return rng.permutation(len(self.class_names))
