"""Batches for the detector: an endless, seeded order of augmented training images; and the test images one by one.

What step t gets is a pure function of the seed and t, so that a training can go on anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from pirl_plugin.benchmarks.detection.presets import DetectionProtocol
from pirl_plugin.benchmarks.detection.voc import Examples
from pirl_plugin.data.loading import make_loader

_AUGMENTATION = (1,)  # spawn key: apart from the order's random numbers
Target = dict[str, Tensor]


@dataclass(frozen=True)
class TrainingSample:
    """One augmented training image.

    Attributes:
        image: uint8 ``(3, H, W)``.
        target: ``boxes`` float32 ``(n, 4)`` in its pixels, ``labels`` int64 ``(n,)``, where 0 is the background.
        unreadable: the asked image could not be read, another one stands here.
    """

    image: Tensor
    target: Target
    unreadable: bool


@dataclass(frozen=True)
class EvaluationSample:
    """One test image as the network sees it.

    Attributes:
        index: of the example.
        image: uint8 ``(3, H, W)``, or None where it could not be read.
        size: width and height of the original, pixels.
    """

    index: int
    image: Tensor | None
    size: tuple[int, int]


class TrainingImages:
    """Augmented training images by place in the endless order: shorter side drawn from the protocol's, flipped or not.

    Each pass over the images (those with objects) is a new permutation. Objects that a place shows are cut at the
    image's edges; difficult ones are included.

    Args:
        examples: images and objects.
        settings: sizes and probability of a flip.
        seed: of order and augmentation.

    Raises:
        ValueError: no image with an object.
    """

    def __init__(self, examples: Examples, settings: DetectionProtocol, seed: int) -> None:
        self.examples, self.settings, self.seed = examples, settings, seed
        self.indices = np.array(examples.with_objects(), dtype=np.int64)
        if len(self.indices) == 0:
            raise ValueError(f"none of the {len(examples)} training images has an object to learn from.")

    def __getitem__(self, place: int) -> TrainingSample:
        turn, position = divmod(place, len(self.indices))
        order = np.random.default_rng(np.random.SeedSequence([self.seed, turn])).permutation(len(self.indices))
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, place], spawn_key=_AUGMENTATION))
        asked = int(self.indices[order[position]])
        image, index = self.examples.image(asked)
        small = int(rng.choice(self.settings.train_min_sizes))
        flip = bool(rng.random() < self.settings.flip)
        size = resized_size(image.size, small, self.settings.train_max_size)
        boxes = scaled_boxes(self.examples[index].boxes, image.size, size)
        solid = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # what lay outside of the image has no area left
        labels = self.examples[index].labels[solid] + 1
        pixels = np.array(image.resize(size, Image.Resampling.BILINEAR))
        boxes = boxes[solid]
        if flip:
            pixels = pixels[:, ::-1]
            boxes = np.stack([size[0] - boxes[:, 2], boxes[:, 1], size[0] - boxes[:, 0], boxes[:, 3]], axis=1)
        target = {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}
        return TrainingSample(_channels_first(pixels), target, index != asked)


class EvaluationImages:
    """Test images by index, resized to the protocol's size."""

    def __init__(self, examples: Examples, settings: DetectionProtocol) -> None:
        self.examples, self.settings = examples, settings

    def __getitem__(self, index: int) -> EvaluationSample:
        image, found = self.examples.image(index)
        if found != index:
            return EvaluationSample(index, None, image.size)
        size = resized_size(image.size, self.settings.test_min_size, self.settings.test_max_size)
        return EvaluationSample(
            index, _channels_first(np.array(image.resize(size, Image.Resampling.BILINEAR))), image.size
        )


def loader(images: Any, batches: Sequence[Sequence[int]], num_workers: int) -> DataLoader[Any]:
    """Lists of samples ``images[place]``, one list for each of ``batches``; the images of a list differ in size."""
    return make_loader(images, batches, _as_list, num_workers)  # type: ignore[arg-type]


def resized_size(size: tuple[int, int], small: int, large: int) -> tuple[int, int]:
    """Width and height after resizing to a shorter side of ``small``, or less, so that the longer is at most ``large``.

    500 x 375 at 800 and 1333 becomes 1067 x 800; 1000 x 200 becomes 1333 x 267.
    """
    scale = min(small / min(size), large / max(size))
    width, height = (max(1, int(side * scale + 0.5)) for side in size)
    return width, height


def scaled_boxes(boxes: npt.NDArray[np.float32], size: tuple[int, int], to: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Boxes of an image of one size (width, height) in the pixels of another size, cut at its edges."""
    ends = np.array([*to, *to], dtype=np.float32)
    return np.clip(boxes * (ends / np.array([*size, *size], dtype=np.float32)), 0, ends).astype(np.float32)


def _as_list(samples: Sequence[Any]) -> list[Any]:
    return list(samples)


def _channels_first(pixels: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
