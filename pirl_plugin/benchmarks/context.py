"""What a benchmark is, what it is given and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm import tqdm

from pirl_plugin.registry import Configurable


def progress_bar(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    """A progress bar with time left; quiet where the output is not a terminal."""
    return tqdm(items, total=total, desc=description, disable=None, leave=False)


@dataclass(frozen=True)
class BenchmarkContext:
    """Everything that a benchmark may use.

    Attributes:
        trunk: frozen, in evaluation mode, on the device. Who trains it takes a copy.
        model: the whole pretraining model, trunk and heads, where the weights have heads: for its embedding.
        train: labelled images to learn from.
        test: labelled images to measure on.
        transform: ``(PIL image, generator) -> {"image": (3, S, S) uint8}``, the same for both.
        view: configuration of ``transform``.
        image_size: side S of that view, pixels.
        trunk_config: configuration that the trunk was built from.
        pretraining: configuration of the run that made the weights; empty where it is not known.
        weights_sha256: of the weights file; None for random weights.
        device: where the trunk is.
        batch_size: images of one forward pass.
        num_workers: processes that read images.
        seed: of everything random in the benchmark.
        precision: ``float32`` or ``bf16`` (autocast of the trunk).
        run_dir: folder of the run, or None.
        cache_dir: folder where features are kept for the next benchmark of the same weights, or None.
        progress: ``(iterable, its length, description) -> iterable``, shows how far it is.
    """

    trunk: nn.Module
    train: Any
    test: Any
    transform: Callable[..., dict[str, torch.Tensor]]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    model: nn.Module | None = None
    batch_size: int = 256
    num_workers: int = 0
    seed: int = 0
    precision: str = "float32"
    run_dir: Path | None = None
    progress: Callable[[Iterable[Any], int, str], Iterable[Any]] = progress_bar
    view: Mapping[str, Any] = field(default_factory=dict)
    image_size: int = 224
    trunk_config: Mapping[str, Any] = field(default_factory=dict)
    pretraining: Mapping[str, Any] = field(default_factory=dict)
    weights_sha256: str | None = None
    cache_dir: Path | None = None


@dataclass(frozen=True)
class Result:
    """One number of a benchmark.

    Attributes:
        setting: what tells it from the benchmark's other numbers.
        metric: name of the metric.
        value: in ``unit``.
        protocol: named variant of the benchmark.
        unit: unit of the value.
        headline: the one number to show where there is room for one.
        extra: whatever else is worth keeping.
    """

    setting: dict[str, Any]
    metric: str
    value: float
    protocol: str
    unit: str = "%"
    headline: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


class Benchmark(Configurable, ABC):
    """Base of the benchmarks: a flat constructor, and ``run``.

    Attributes:
        multi_process: whether it can run under ``torchrun``. Every process runs it; the first one's results count.
    """

    multi_process: ClassVar[bool] = False

    @abstractmethod
    def run(self, context: BenchmarkContext) -> Iterator[Result]:
        """Measures, and yields its numbers, one of them marked as the headline."""

    def evaluation_view(self, image_size: int) -> dict[str, Any]:
        """Transform that shows an image to the frozen network, where the user names none.

        Images up to 128 pixels are resized to that size as a whole, larger ones to 256 / 224 of it and cropped.
        """
        resize = image_size if image_size <= 128 else round(image_size * 256 / 224)
        return {"name": "eval_view", "resize": resize, "crop": image_size}
