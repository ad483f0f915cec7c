"""What detectron2's engine does around detectron2: what the processes are told, where they keep their files."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pirl_plugin.atomic import write_text
from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.benchmarks.detection.engine import Detections
from pirl_plugin.benchmarks.detection.presets import DetectionProtocol
from pirl_plugin.benchmarks.detection.voc import Examples

log = logging.getLogger(__name__)

FOLDER = "detectron2"
_IDENTITY = "identity.txt"
_STALE = ("last_checkpoint", "metrics.json")

Found = list[dict[str, Tensor] | None]
"""For each image ``boxes``, ``scores`` and ``labels`` as in ``Detections``, or None where it could not be read."""

Batch = list[dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """Everything that a process needs to know; can be pickled.

    Attributes:
        trunk: the pretrained trunk.
        trunk_config: of it.
        train: to train on.
        test: to detect in.
        settings: the protocol.
        device: ``cpu``, ``cuda`` or ``cuda:N``; of several processes each takes its own GPU.
        processes: how many there are.
        num_workers: of each data loader.
        seed: of everything random.
        folder: for checkpoints and detectron2's metrics.
        log_file: of the run, or None.
        progress: as in ``BenchmarkContext``.
    """

    trunk: nn.Module
    trunk_config: dict[str, Any]
    train: Examples
    test: Examples
    settings: DetectionProtocol
    device: str
    processes: int
    num_workers: int
    seed: int
    folder: Path
    log_file: Path | None
    progress: Callable[[Iterable[Any], int, str], Iterable[Any]]


class Batches:
    """A loader that is made when it is first asked for a batch, and counts the images that could not be read.

    Args:
        loader: ``(seed, num_workers) -> batches``.
        num_workers: processes that read.
        seed: of the order; may be set until the first batch.

    Attributes:
        unreadable: how many images had another one in their place.
    """

    def __init__(self, loader: Callable[[int, int], Iterable[Batch]], num_workers: int, seed: int = 0) -> None:
        self.loader, self.num_workers, self.seed, self.unreadable = loader, num_workers, seed, 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader(self.seed, self.num_workers):
            self.unreadable += sum(record["unreadable"] for record in batch)
            yield batch


def check_processes(processes: int, settings: DetectionProtocol, device: torch.device) -> None:
    """Whether so many processes can share the protocol's batch and the machine.

    Raises:
        ValueError: they cannot; says what to change.
    """
    if processes < 1 or settings.batch_size % processes:
        raise ValueError(
            f"num_gpus must be >= 1 and divide the batch of {settings.batch_size} images, got {processes}: "
            "change num_gpus or batch_size."
        )
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and processes > gpus:
        raise ValueError(f"num_gpus={processes} was asked for, but torch sees {gpus}.")
    if device.type == "cpu" and processes > 1 and gpus:
        raise ValueError("detectron2 starts several processes on GPUs where there are any: use device=cuda.")


@contextmanager
def folder_of(context: BenchmarkContext, identity: str) -> Iterator[Path]:
    """The folder for checkpoints, in the run's, or a temporary one without a run.

    What another training left there is not gone on with.

    Args:
        context: for the run's folder.
        identity: of the training.
    """
    if context.run_dir is None:
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    folder = Path(context.run_dir) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / _IDENTITY
    if marker.is_file() and marker.read_text() != identity:
        log.warning("%s is of other weights, data or settings: the training starts anew.", folder)
        for name in _STALE:
            (folder / name).unlink(missing_ok=True)
    write_text(identity, marker)
    yield folder


def log_in_process(log_file: Path | None) -> None:
    """In a process that was started for the job: our messages to the terminal, all to the run's log file."""
    terminal = logging.StreamHandler()
    terminal.addFilter(logging.Filter("pirl_plugin"))
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[terminal])
    if log_file is not None:
        file = logging.FileHandler(log_file)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(file)


def last_line(error: BaseException) -> str:
    """Of a process's failure, which comes as a whole traceback, what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def as_detections(found: Found) -> list[Detections | None]:
    """In the form that all engines share."""
    return [
        None if image is None else Detections(**{name: value.numpy() for name, value in image.items()})
        for image in found
    ]
