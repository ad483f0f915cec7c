"""What a benchmark is given and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm


def progress_bar(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    """A progress bar with time left; quiet where the output is not a terminal."""
    return tqdm(items, total=total, desc=description, disable=None, leave=False)


@dataclass(frozen=True)
class BenchmarkContext:
    """Everything that a benchmark may use.

    Attributes:
        trunk: frozen, in evaluation mode, on the device.
        model: the whole pretraining model (trunk and image head), where the weights have one: for its embedding.
        train: labelled images to learn from.
        test: labelled images to measure on.
        transform: ``(PIL image, generator) -> {"image": (3, S, S) uint8}``, the same for both.
        device: where the trunk is.
        batch_size: images of one forward pass.
        num_workers: processes that read images.
        seed: of everything random in the benchmark.
        precision: ``float32`` or ``bf16`` (autocast of the trunk).
        run_dir: folder of the run, or None.
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
