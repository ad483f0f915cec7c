"""Published detection protocols as data: Faster R-CNN with a ResNet-50 C4 on PASCAL VOC.

Only numbers: the engines read them, ``schedule.py`` changes them (and then the name, too). Sources, named beside each
protocol: the PIRL paper (Misra & van der Maaten 2020), the configuration files of VISSL and those of MoCo. Where a
source is silent, detectron2's own default holds, which all of them build on; the same goes for what every protocol
shares and this table therefore leaves out: an IoU of 0.3 / 0.7 for anchors and 0.5 for proposals, NMS at 0.7 and 0.5,
256 anchors of an image in the loss, scores above 0.05 and at most 100 detections of an image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from pirl_plugin.models.normalize import IMAGENET_MEAN, IMAGENET_STD
from pirl_plugin.schema import did_you_mean

ProtocolName = Literal["paper", "paper_supervised", "vissl", "vissl_supervised", "moco"]
TrainSet = Literal["voc07", "voc07+12"]

_SCALES = tuple(range(480, 801, 32))


@dataclass(frozen=True)
class DetectionProtocol:
    """How a detector is trained and tested; lengths in pixels, iterations are optimiser steps.

    Attributes:
        name: of the published protocol; with ``*`` where a number is not the published one.
        train_set: ``voc07`` (trainval 2007) or ``voc07+12`` (both trainvals); both are tested on VOC07 test.
        iterations: optimiser steps.
        drops: iterations at which the learning rate is multiplied by ``gamma``.
        lr: learning rate after the warm-up.
        warmup_iterations: length of the warm-up.
        warmup_factor: the first iteration's learning rate as a fraction of the one that the warm-up ends in.
        batch_norm: ``frozen``: statistics, scale and shift stay as pretrained, in all stages; ``synchronised``: all are
            tuned, statistics over the global batch.
        extra_norm: one more batch norm after res5 (MoCo).
        precise_bn: after training, statistics are estimated anew over this many batches; 0: they are not.
        freeze_at: stages that stay as pretrained: 0 none, 1 the stem, 2 the stem and res2 (detectron2's count).
        batch_size: images of a step, over all processes.
        gamma: see ``drops``.
        warmup_method: the factor rises by the same amount each step.
        momentum: of SGD, not Nesterov's.
        weight_decay: of all weights and biases but those of norms.
        weight_decay_norm: of norms' scale and shift.
        train_min_sizes: the shorter side of a training image is drawn from these.
        train_max_size: bound on the longer side, which the shorter one then follows.
        test_min_size: shorter side of a test image.
        test_max_size: bound on its longer side.
        flip: probability of a horizontal flip.
        anchor_sizes: square root of the anchors' areas.
        anchor_ratios: their height / width.
        rpn_pre_nms_train: proposals of an image before NMS in training.
        rpn_post_nms_train: after it.
        rpn_pre_nms_test: before NMS at test.
        rpn_post_nms_test: after it.
        rois_per_image: proposals of an image in the second stage's loss; a quarter may be objects.
        stride_in_1x1: whether a bottleneck's stride is in its first convolution; torchvision's, and ours, never is.
        input_format: order of the channels that the trunk was trained with.
        pixel_mean: subtracted from pixels 0..255, in the order of ``input_format``.
        pixel_std: divided by.
    """

    name: str
    train_set: TrainSet
    iterations: int
    drops: tuple[int, ...]
    lr: float
    warmup_iterations: int
    warmup_factor: float
    batch_norm: Literal["frozen", "synchronised"]
    extra_norm: bool
    precise_bn: int
    freeze_at: int
    batch_size: int = 16
    gamma: float = 0.1
    warmup_method: Literal["linear"] = "linear"
    momentum: float = 0.9
    weight_decay: float = 1e-4
    weight_decay_norm: float = 0.0
    train_min_sizes: tuple[int, ...] = _SCALES
    train_max_size: int = 1333
    test_min_size: int = 800
    test_max_size: int = 1333
    flip: float = 0.5
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_pre_nms_train: int = 12000
    rpn_post_nms_train: int = 2000
    rpn_pre_nms_test: int = 6000
    rpn_post_nms_test: int = 1000
    rois_per_image: int = 512
    stride_in_1x1: bool = False
    input_format: Literal["RGB"] = "RGB"
    pixel_mean: tuple[float, ...] = tuple(round(255 * value, 3) for value in IMAGENET_MEAN)
    pixel_std: tuple[float, ...] = tuple(round(255 * value, 3) for value in IMAGENET_STD)


# The PIRL paper: batch norm fixed, 8 x 2 images, warm-up of slope 1/3. It names neither the image scales nor what is
# frozen besides: VISSL's scales and detectron2's default. NPID++ and PIRL were trained with this learning rate.
_PAPER_0712 = DetectionProtocol(
    name="paper",
    train_set="voc07+12",
    iterations=25_000,
    drops=(17_000,),
    lr=0.003,
    warmup_iterations=1000,
    warmup_factor=1 / 3,
    batch_norm="frozen",
    extra_norm=False,
    precise_bn=0,
    freeze_at=2,
)
_PAPER_07 = replace(_PAPER_0712, train_set="voc07", iterations=12_500, drops=(9_500,))
# VISSL's pirl_npid files: on VOC07+12 batch norm is frozen, on VOC07 it is tuned. Warm-up as detectron2's default.
_VISSL_0712 = replace(_PAPER_0712, name="vissl", lr=0.002, warmup_factor=1 / 1000)
_VISSL_07 = replace(
    _VISSL_0712,
    train_set="voc07",
    iterations=12_500,
    drops=(9_500,),
    batch_norm="synchronised",
    extra_norm=True,
    precise_bn=200,
    freeze_at=0,
)
# MoCo: on VOC07 9,000 iterations; where the learning rate drops there is not documented, so as on VOC07+12: at 3/4 and
# 11/12 of them.
_MOCO_0712 = DetectionProtocol(
    name="moco",
    train_set="voc07+12",
    iterations=24_000,
    drops=(18_000, 22_000),
    lr=0.02,
    warmup_iterations=100,
    warmup_factor=1 / 1000,
    batch_norm="synchronised",
    extra_norm=True,
    precise_bn=200,
    freeze_at=0,
)
_MOCO_07 = replace(_MOCO_0712, train_set="voc07", iterations=9_000, drops=(6_750, 8_250))


def _supervised(protocol: DetectionProtocol) -> DetectionProtocol:
    """The learning rate and warm-up that the source used for supervised and Jigsaw weights."""
    return replace(protocol, name=f"{protocol.name}_supervised", lr=0.02, warmup_iterations=100)


PROTOCOLS: dict[tuple[str, str], DetectionProtocol] = {
    (protocol.name, protocol.train_set): protocol
    for protocol in (
        *(_PAPER_07, _PAPER_0712, _supervised(_PAPER_07), _supervised(_PAPER_0712)),
        *(_VISSL_07, _VISSL_0712, _supervised(_VISSL_07), _supervised(_VISSL_0712)),
        *(_MOCO_07, _MOCO_0712),
    )
}


def published(name: str, train_set: str) -> DetectionProtocol:
    """The protocol of that name for that training set, exactly as published.

    Raises:
        ValueError: there is none.
    """
    if (name, train_set) not in PROTOCOLS:
        names, sets = get_args(ProtocolName), get_args(TrainSet)
        raise ValueError(
            f"no detection protocol {name!r} for {train_set!r}. Protocols: {', '.join(names)}; "
            f"training sets: {', '.join(sets)}.{did_you_mean(name, names)}"
        )
    return PROTOCOLS[name, train_set]
