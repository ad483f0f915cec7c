"""Faster R-CNN on PASCAL VOC, or on any images with boxes, from a pretrained trunk."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, cast

import numpy as np
from annotated_types import Len

from pirl_plugin.benchmarks.changes import noted
from pirl_plugin.benchmarks.context import Benchmark, BenchmarkContext, Result
from pirl_plugin.benchmarks.detection.engine import Detections, EngineName, TrainAndDetect, resolve
from pirl_plugin.benchmarks.detection.evaluation import (
    IOU_THRESHOLDS,
    Floats,
    coco_average_precision,
    voc_average_precision,
)
from pirl_plugin.benchmarks.detection.presets import DetectionProtocol, ProtocolName, TrainSet, published
from pirl_plugin.benchmarks.detection.schedule import changed_numbers, with_overrides
from pirl_plugin.benchmarks.detection.voc import Examples, same_classes
from pirl_plugin.data.voc_datasets import VOC0712
from pirl_plugin.registry import register_benchmark
from pirl_plugin.schema import PositiveFloat, PositiveInt, checked

log = logging.getLogger(__name__)


@register_benchmark("detection_voc")
@checked
class DetectionVOC(Benchmark):
    """Fine-tunes Faster R-CNN (C4) on VOC and measures AP, AP50 and AP75 in percent; the headline is AP50.

    AP by the 11-point rule of VOC2007 (as detectron2's evaluator has it), by the area under the curve, and by COCO's
    rules (``coco/AP``, ...). Protocols, each with its own numbers for VOC07 and for VOC07+12 (``dataset=voc0712``):

    * ``paper``: PIRL; learning rate 0.003, batch norm fixed, 12,500 / 25,000 iterations of 16 images;
    * ``vissl``: its files for PIRL and NPID; 0.002; on VOC07 batch norm is tuned, with one more after res5;
    * ``moco``: 0.02, batch norm tuned, one more after res5, 9,000 / 24,000 iterations;
    * ``paper_supervised``, ``vissl_supervised``: the learning rate 0.02 of both for supervised and Jigsaw trunks.

    A null setting is the protocol's. Any other value is marked by a ``*`` after the protocol's name, and listed.

    Args:
        engine: detectron2 (what published numbers were made with; not on the package index), torchvision (same layout,
            schedule and AP), or auto: detectron2 where it is installed and can be the trunk. Records name the engine.
        protocol: see above.
        train_set: whose numbers to take; null: by the dataset.
        batch_size: images of a step over all processes; the learning rate is multiplied by batch_size / 16 and the
            schedule divided by it, so that as many images are seen.
        iterations: steps, with drops and warm-up in proportion.
        lr: learning rate after the warm-up, whatever the batch.
        min_size: shorter side of a test image, pixels; training sizes and anchors in proportion to 800.
        anchor_sizes: sides of the square anchors at that size, pixels.
        rois_per_image: proposals of an image that the second stage learns from (512).
        proposals: of an image at test (1,000); those in training and before NMS in proportion.
        num_gpus: processes that detectron2's launcher starts, one a GPU; torchvision's engine has one.
    """

    def __init__(
        self,
        engine: Literal["auto", "detectron2", "torchvision"] = "auto",
        protocol: ProtocolName = "paper",
        train_set: TrainSet | None = None,
        batch_size: PositiveInt | None = None,
        iterations: PositiveInt | None = None,
        lr: PositiveFloat | None = None,
        min_size: PositiveInt | None = None,
        anchor_sizes: Annotated[Sequence[PositiveFloat], Len(1)] | None = None,
        rois_per_image: PositiveInt | None = None,
        proposals: PositiveInt | None = None,
        num_gpus: PositiveInt = 1,
    ) -> None:
        self.engine, self.protocol, self.train_set, self.num_gpus = engine, protocol, train_set, num_gpus
        self.overrides: dict[str, Any] = {
            "batch_size": batch_size,
            "iterations": iterations,
            "lr": lr,
            "min_size": min_size,
            "anchor_sizes": anchor_sizes,
            "rois_per_image": rois_per_image,
            "proposals": proposals,
        }

    def settings(self, train_set: TrainSet) -> DetectionProtocol:
        """Every number, as it will be run."""
        return with_overrides(published(self.protocol, self.train_set or train_set), **self.overrides)

    def run(self, context: BenchmarkContext) -> Iterator[Result]:
        """Trains, detects, and yields AP, AP50 and AP75 by each rule.

        Raises:
            ValueError: a dataset without boxes, classes that differ between the splits, an engine that is not there.
        """
        engine = resolve(self.engine, context.trunk_config)
        same_classes((context.train, context.test))
        train, test = Examples(context.train), Examples(context.test)
        settings = self.settings("voc07+12" if isinstance(context.train, VOC0712) else "voc07")
        _announce(engine, settings, train, test)
        if context.precision != "float32":
            log.warning(
                "Detection trains in float32, as its protocols do: precision=%s has no effect.", context.precision
            )
        run = self._engine(engine)
        found, notes = run(context.trunk, context.trunk_config, train, test, settings, context)
        extra = {
            "engine": engine,
            **noted(changed_numbers(settings)),
            **_counts(train, test, found),
            **notes,
            "numbers": asdict(settings),
        }
        yield from results(engine, settings, test, found, extra)

    def _engine(self, engine: EngineName) -> TrainAndDetect:
        if engine == "torchvision" and self.num_gpus > 1:
            raise ValueError(f"num_gpus={self.num_gpus} needs engine=detectron2: torchvision's trains in one process.")
        function = importlib.import_module(f"pirl_plugin.benchmarks.detection.{engine}_engine").train_and_detect
        return cast(
            TrainAndDetect,
            functools.partial(function, num_gpus=self.num_gpus) if self.num_gpus > 1 else function,
        )


def results(
    engine: EngineName,
    settings: DetectionProtocol,
    test: Examples,
    found: Sequence[Detections | None],
    extra: Mapping[str, Any],
) -> Iterator[Result]:
    """Every number from an engine's detections.

    Raises:
        ValueError: there is no object to be found.
    """
    classes = test.class_names
    setting = {"engine": engine, "train_set": settings.train_set}
    for rule in ("eleven_point", "interpolated"):
        ap = 100 * voc_average_precision(list(test), found, len(classes), rule)  # type: ignore[arg-type]
        if np.isnan(ap).all():
            raise ValueError("the test images hold no object that counts: there is nothing to measure.")
        for metric, rows in (("AP50", ap[:1]), ("AP", ap), ("AP75", ap[IOU_THRESHOLDS.searchsorted(0.7499)][None])):
            yield Result(
                {**setting, "rule": rule},
                metric,
                float(np.nanmean(rows)),
                settings.name,
                headline=metric == "AP50" and rule == "eleven_point",
                extra={**extra, "per_class": _by_class(rows, classes)},
            )
    for metric, value in coco_average_precision(list(test), found, len(classes)).items():
        yield Result({**setting, "rule": "coco"}, f"coco/{metric}", 100 * value, settings.name, extra=dict(extra))


def _by_class(ap: Floats, classes: Sequence[str]) -> dict[str, float | None]:
    """Mean over the thresholds; None for a class without an object in the test images."""
    means = ap.mean(axis=0)
    return {
        name: None if np.isnan(value) else round(float(value), 3) for name, value in zip(classes, means, strict=True)
    }


def _counts(train: Examples, test: Examples, found: Sequence[Detections | None]) -> dict[str, Any]:
    return {
        "num_train": len(train.with_objects()),
        "num_test": len(test),
        "num_classes": len(train.class_names),
        "objects_train": sum(len(example.boxes) for example in train),
        "objects_test": sum(int((~example.difficult).sum()) for example in test),
        "difficult_test": sum(int(example.difficult.sum()) for example in test),
        "without_objects_train": len(train) - len(train.with_objects()),
        "empty_boxes_train": train.empty_boxes,
        "empty_boxes_test": test.empty_boxes,
        "unreadable_test": sum(detections is None for detections in found),
    }


def _announce(engine: str, settings: DetectionProtocol, train: Examples, test: Examples) -> None:
    images = len(train.with_objects())
    log.info(
        "Detection with %s, protocol %s (%s): %d iterations of %d images, %d classes, %d training and %d test images.",
        *(engine, settings.name, settings.train_set, settings.iterations, settings.batch_size),
        *(len(train.class_names), images, len(test)),
    )
    for what, count in (("training", train.empty_boxes), ("test", test.empty_boxes)):
        if count:
            log.warning("%d boxes of the %s images have no area and are left out.", count, what)
