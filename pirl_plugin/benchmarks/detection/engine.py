"""What every detection engine does: one function from a trunk, examples and a protocol to detections."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import nn

from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.benchmarks.detection.detectron2_config import trunk_shape
from pirl_plugin.benchmarks.detection.presets import DetectionProtocol
from pirl_plugin.benchmarks.detection.voc import Examples

log = logging.getLogger(__name__)

EngineName = Literal["detectron2", "torchvision"]


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image.

    Attributes:
        boxes: float32 ``(n, 4)``, x0 y0 x1 y1 in the image's own pixels, from its corner, as in ``Example``.
        scores: float32 ``(n,)`` in [0, 1].
        labels: int64 ``(n,)``, indices into the examples' ``class_names``; there is no background.
    """

    boxes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


class TrainAndDetect(Protocol):
    """An engine, such as ``torchvision_engine.train_and_detect`` and ``detectron2_engine.train_and_detect``."""

    def __call__(
        self,
        trunk: nn.Module,
        trunk_config: Mapping[str, Any],
        train: Examples,
        test: Examples,
        settings: DetectionProtocol,
        context: BenchmarkContext,
    ) -> tuple[list[Detections | None], dict[str, Any]]:
        """Trains a Faster R-CNN C4 on top of a trunk and runs it over the test images.

        Args:
            trunk: the pretrained ``ResNetTrunk``, frozen, on ``context.device``: not to be changed. conv1 to res4
                become the backbone, res5 the box head.
            trunk_config: ``{"name": "resnet_trunk", "depth": ..., "width": ..., "stem": ...}``.
            train: to train on: those of ``train.with_objects()``, difficult objects included.
            test: to detect in, all of them.
            settings: every number, as it is to be run (``schedule.learning_rate`` gives the learning rate); what an
                engine cannot do as it says there, it writes into its notes.
            context: device, ``num_workers``, ``seed``, ``progress`` and ``run_dir``, where checkpoints go. The
                ``batch_size`` is ``settings``'.

        Returns:
            One ``Detections`` for each test example, in order, or None where the image could not be read; and notes for
            the record (plain values that JSON can hold).
        """
        ...


def resolve(name: str, trunk_config: Mapping[str, Any] | None = None) -> EngineName:
    """The engine that ``auto`` stands for: detectron2 where it is installed and can be the trunk, else torchvision.

    Args:
        name: ``auto``, or an engine.
        trunk_config: of the trunk; nothing: any.

    Raises:
        ValueError: detectron2 was asked for and is not installed.
    """
    installed = importlib.util.find_spec("detectron2") is not None
    if name == "auto" and installed and trunk_config:
        try:
            trunk_shape(trunk_config)
        except ValueError as reason:
            log.info("engine=auto: torchvision, because %s", reason)
            return "torchvision"
    if name == "detectron2" and not installed:
        raise ValueError(
            "engine=detectron2 was asked for, but detectron2 is not installed; it is on no package index: follow "
            "https://detectron2.readthedocs.io/en/latest/tutorials/install.html, or use engine=torchvision."
        )
    return "detectron2" if installed and name != "torchvision" else "torchvision"
