"""Pictures whose features are their pixels, with labels of every kind: for the tests of the SVM benchmarks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from pirl_plugin.benchmarks import BenchmarkContext
from pirl_plugin.data.squashed_view import SquashedView

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
CLASSES = ["red", "green", "blue"]


class Pictures:
    """4 x 4 pictures; each shows some of three colours, a label says which: 1, 0 (difficult) or -1."""

    def __init__(self, count: int, seed: int, difficult: float = 0.1) -> None:
        rng = np.random.default_rng(seed)
        shown = rng.random((count, 3)) < 0.35
        colour = np.where(shown, 135, 115)[:, None, None, :] + rng.integers(-60, 60, (count, 4, 4, 3))
        self.pixels = np.clip(colour, 0, 255).astype(np.uint8)
        self.multi_labels = np.where(shown, 1, -1).astype(np.int8)
        self.multi_labels[rng.random((count, 3)) < difficult] = 0
        self.class_names = list(CLASSES)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, image_id: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[image_id]), image_id

    def features(self) -> np.ndarray:
        """What the benchmark should see of each picture, worked out here: ``(N, 48)`` float64 of unit length."""
        normal = (self.pixels.astype(np.float32) / np.float32(255) - MEAN.astype(np.float32)) / STD.astype(np.float32)
        flat = normal.transpose(0, 3, 1, 2).reshape(len(self), -1).astype(np.float64)
        return flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-5)


class Pixels(torch.nn.Module):
    """A trunk whose layers are the picture itself."""

    def features(self, images: torch.Tensor, layers: list[str]) -> dict[str, torch.Tensor]:
        return {layer: images for layer in layers}


def context(train: Any = None, test: Any = None, **changes: Any) -> BenchmarkContext:
    given = {"image_size": 4, "num_workers": 0, "batch_size": 16, **changes}
    return BenchmarkContext(
        trunk=Pixels(),
        train=train or Pictures(60, seed=0),
        test=test or Pictures(40, seed=1),
        transform=SquashedView(size=4, resize=None),
        **given,
    )
