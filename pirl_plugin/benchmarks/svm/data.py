"""What the SVM benchmarks learn from and measure on: labels of every class, and points of unit length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from pirl_plugin.benchmarks.average_precision import Rule, average_precisions
from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.benchmarks.features import Features, extract
from pirl_plugin.benchmarks.svm.problem import Floats, triangular

Labels = npt.NDArray[np.int8]


@dataclass(frozen=True)
class SVMData:
    """Both splits of a benchmark.

    Attributes:
        class_names: C names.
        train: labels of the readable training images, ``(N, C)``: 1 present, 0 present only in difficult cases, -1
            absent.
        test: labels of the readable test images, ``(M, C)``.
        features: of both splits.
        notes: what to say about them in the records.
    """

    class_names: list[str]
    train: Labels
    test: Labels
    features: tuple[Features, Features]
    notes: dict[str, Any]

    @classmethod
    def of(cls, context: BenchmarkContext, layers: Sequence[str], pooling: str) -> SVMData:
        """Extracts the features of both splits, or reads them where they are kept.

        Raises:
            ValueError: a split without labels, splits with different classes, a test split that shows none of them, or
                what ``extract`` refuses.
        """
        labels = multi_labels(context.train, "train"), multi_labels(context.test, "test")
        names = [list(getattr(split, "class_names", []) or []) for split in (context.train, context.test)]
        if names[0] != names[1] or labels[0].shape[1] != labels[1].shape[1]:
            different = sorted(set(names[0]) ^ set(names[1]))[:5]
            raise ValueError(f"the train and test splits have different classes, for example {different}.")
        if not (labels[1] == 1).any():
            raise ValueError("no test image shows any class, difficult objects left out: nothing can be measured.")
        train = extract(context, context.train, layers, pooling, "train")
        test = extract(context, context.test, layers, pooling, "test")
        notes = {
            "num_train": len(train.ids),
            "num_test": len(test.ids),
            "num_classes": labels[0].shape[1],
            "difficult_test_labels": int((labels[1][test.ids] == 0).sum()),
            "unreadable_train": train.unreadable,
            "unreadable_test": test.unreadable,
            "pooling": pooling,
        }
        found = names[0] or [str(index) for index in range(labels[0].shape[1])]
        return cls(found, labels[0][train.ids], labels[1][test.ids], (train, test), notes)

    def points(self, layer: str) -> tuple[Floats, Floats]:
        """Normalised features of both splits, in no more dimensions than there are training images."""
        train, test = (normalized(split.of[layer]) for split in self.features)
        if train.shape[0] > train.shape[1]:
            return train, test
        train, basis = triangular(train)
        return train, test @ basis

    def dims(self, layer: str) -> int:
        """Numbers of a layer's features."""
        return int(self.features[0].of[layer].shape[1])


def multi_labels(dataset: Any, what: str) -> Labels:
    """Labels of every class, ``(N, C)`` int8: the dataset's own, or each class against the rest.

    Raises:
        ValueError: the dataset has neither.
    """
    found = getattr(dataset, "multi_labels", None)
    if found is not None:
        return np.asarray(found, dtype=np.int8)
    labels = getattr(dataset, "labels", None)
    if labels is None:
        raise ValueError(
            f"the {what} split has no labels, which this benchmark needs: use voc, generated_scenes or a folder with "
            "one sub-folder per class."
        )
    classes = max(int(np.max(labels)) + 1, len(getattr(dataset, "class_names", None) or []))
    return np.where(np.asarray(labels)[:, None] == np.arange(classes), 1, -1).astype(np.int8)


def normalized(features: Tensor) -> Floats:
    """``x / (|x| + 1e-5)`` of each row, in float64, as VISSL."""
    x = features.cpu().numpy().astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True) + 1e-5
    return x


def percent(scores: Floats, labels: Labels, rule: Rule) -> Floats:
    """Average precision of each class in percent, difficult images dropped; NaN for a class that the test lacks."""
    return 100 * average_precisions(scores, labels, rule)


def squashed_view(image_size: int, resize_first: bool) -> dict[str, Any]:
    """VISSL's view for the VOC07 SVMs: the whole image squashed into a square.

    Args:
        image_size: side of the square, pixels.
        resize_first: to 256 / 224 of that (to just that up to 128 pixels, as ``eval_view``) by the shorter side.
    """
    resize = image_size if image_size <= 128 else round(image_size * 256 / 224)
    return {"name": "squashed_view", "size": image_size, "resize": resize if resize_first else None}
