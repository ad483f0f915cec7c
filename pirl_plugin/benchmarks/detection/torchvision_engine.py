"""Detection with torchvision: runs wherever torch does, one process, one device."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.benchmarks.detection.batches import EvaluationImages, EvaluationSample, loader, scaled_boxes
from pirl_plugin.benchmarks.detection.c4 import DIFFERENCES, build_detector
from pirl_plugin.benchmarks.detection.engine import Detections
from pirl_plugin.benchmarks.detection.presets import DetectionProtocol
from pirl_plugin.benchmarks.detection.training import Training, in_words
from pirl_plugin.benchmarks.detection.voc import Examples

log = logging.getLogger(__name__)


def train_and_detect(
    trunk: nn.Module,
    trunk_config: Mapping[str, Any],
    train: Examples,
    test: Examples,
    settings: DetectionProtocol,
    context: BenchmarkContext,
) -> tuple[list[Detections | None], dict[str, Any]]:
    """Trains torchvision's Faster R-CNN in the C4 layout and detects; see ``engine.TrainAndDetect``.

    The training is checkpointed into ``context.run_dir`` about once a minute and at its end, and goes on from there
    when the same is asked for again: on the CPU exactly as if it had not been interrupted. Trains in float32.

    Raises:
        ValueError: no training image with an object, or a loss that is not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        detector = build_detector(trunk, len(train.class_names), settings).to(context.device)
    training = Training(detector, train, settings, context, identity(trunk, train, settings, context.seed))
    training.run()
    notes = {
        "differences_from_detectron2": [*DIFFERENCES, *_batch_norm_note(settings)],
        "training_seconds": round(training.progress.seconds, 1),
        "losses": training.progress.losses,
        "unreadable_train": training.progress.unreadable,
    }
    return detect(detector, test, settings, context), notes


@torch.no_grad()
def detect(
    detector: nn.Module, test: Examples, settings: DetectionProtocol, context: BenchmarkContext
) -> list[Detections | None]:
    """Runs a detector over all test images: one ``Detections`` each, None for an image that could not be read."""
    detector.eval()
    found: list[Detections | None] = [None] * len(test)
    images = EvaluationImages(test, settings)
    batches = loader(images, [[index] for index in range(len(test))], context.num_workers)
    start, every = time.monotonic(), max(1, len(test) // 4)
    samples: Iterator[list[EvaluationSample]] = iter(context.progress(batches, len(test), "detections"))  # type: ignore[call-overload]
    for done, (sample,) in enumerate(samples, start=1):
        if sample.image is not None:
            image = sample.image.to(context.device).float() / 255
            found[sample.index] = _detections(detector([image])[0], image, sample.size)
        if done % every == 0:
            left = (time.monotonic() - start) / done * (len(test) - done)
            log.info("detections %d/%d, %s left", done, len(test), in_words(left))
    return found


def identity(trunk: nn.Module, train: Examples, settings: DetectionProtocol, seed: int) -> str:
    """SHA-256 of all that determines a training: trunk weights, images, objects, every setting, the seed."""
    digest = hashlib.sha256(json.dumps([asdict(settings), seed, len(train), train.class_names]).encode())
    for dataset in train.datasets:
        digest.update(dataset.fingerprint.encode())
    for example in train:
        digest.update(example.boxes.tobytes() + example.labels.tobytes())
    for name, value in sorted(trunk.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _detections(output: Mapping[str, Tensor], image: Tensor, size: tuple[int, int]) -> Detections:
    """Torchvision's output, boxes in the original image's pixels, without the background among the labels."""
    boxes = output["boxes"].float().cpu().numpy()
    seen = (image.shape[-1], image.shape[-2])
    return Detections(
        scaled_boxes(boxes, seen, size),
        output["scores"].float().cpu().numpy(),
        output["labels"].cpu().numpy().astype(np.int64) - 1,
    )


def _batch_norm_note(settings: DetectionProtocol) -> list[str]:
    if settings.batch_norm == "frozen":
        return []
    return ["one process: batch norm over its whole batch, which is what synchronised batch norm computes over all"]
