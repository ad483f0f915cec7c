"""A detection protocol as detectron2's options, key by key. Pure data: nothing here imports detectron2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pirl_plugin.benchmarks.detection.presets import DetectionProtocol
from pirl_plugin.registry import completed

NORM_CLASSES = {
    "FrozenBN": "FrozenBatchNorm2d",
    "SyncBN": "SyncBatchNorm",
    "BN": "BatchNorm2d",
    "naiveSyncBN": "NaiveSyncBatchNorm",
}
"""detectron2's names of norms and the classes that it makes of them."""

_STAGE_CHANNELS = 64  # of res2's bottlenecks at width 1, and of the stem
_EXPANSION = 4

# What all protocols share and no preset names. Most of it is detectron2's default, said aloud, as defaults may change.
_SHARED: dict[str, Any] = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.MASK_ON": False,
    "MODEL.WEIGHTS": "",  # the trunk is loaded by us, entry by entry
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res4"],
    "MODEL.RESNETS.NUM_GROUPS": 1,
    "MODEL.RESNETS.RES5_DILATION": 1,
    "MODEL.RPN.IN_FEATURES": ["res4"],
    "MODEL.RPN.IOU_THRESHOLDS": [0.3, 0.7],
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 256,
    "MODEL.RPN.NMS_THRESH": 0.7,
    "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.5],
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.25,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.05,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.5,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 14,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 0,
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "choice",
    "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
    "SOLVER.NESTEROV": False,
    "TEST.DETECTIONS_PER_IMAGE": 100,
}


def trunk_shape(trunk_config: Mapping[str, Any]) -> tuple[int, int]:
    """Depth and stem channels of a trunk that detectron2's ResNet can be.

    Any depth with the ImageNet stem; other widths only where the blocks are bottlenecks (depth 50 and more), as in the
    ResNet-50w2 of the PIRL paper: detectron2's basic blocks have one width.

    Raises:
        ValueError: another trunk; says that torchvision's engine takes it.
    """
    instead = "use engine=torchvision"
    if trunk_config.get("name") != "resnet_trunk":
        raise ValueError(f"detectron2's engine takes a resnet_trunk, got {trunk_config.get('name')!r}: {instead}.")
    trunk = completed("model", trunk_config)
    depth, channels = int(trunk["depth"]), int(_STAGE_CHANNELS * trunk["width"])
    if trunk["stem"] != "imagenet":
        raise ValueError(
            f"detectron2's ResNet has the stem 'imagenet' (7x7, stride 2, max pooling), this trunk's is "
            f"{trunk['stem']!r}: {instead}."
        )
    if depth < 50 and channels != _STAGE_CHANNELS:
        raise ValueError(f"detectron2's ResNet-{depth} has width 1 only, this trunk's is {trunk['width']}: {instead}.")
    return depth, channels


def norm_name(settings: DetectionProtocol, device: str, processes: int) -> str:
    """detectron2's name of the norm that the protocol asks for, as far as the device allows.

    torch's synchronised batch norm runs on GPUs only. On the CPU a single process has plain batch norm, which over the
    whole batch computes the same, and several have detectron2's ``NaiveSyncBatchNorm``.
    """
    if settings.batch_norm == "frozen":
        return "FrozenBN"
    if not device.startswith("cpu"):
        return "SyncBN"
    return "BN" if processes == 1 else "naiveSyncBN"


def norm_note(norm: str) -> str | None:
    """For the record: what stands for synchronised batch norm where it is something else."""
    return {
        "BN": "one process on the CPU: plain batch norm over the whole batch instead of synchronised batch norm",
        "naiveSyncBN": "CPU: detectron2's NaiveSyncBatchNorm instead of torch's synchronised batch norm",
    }.get(norm)


def head_name(settings: DetectionProtocol) -> str:
    """The box head: res5 of any depth (detectron2's own has bottlenecks only), with or without a norm after it."""
    return "Res5ROIHeadsExtraNorm" if settings.extra_norm else "Res5ROIHeadsAnyDepth"


def options(
    settings: DetectionProtocol, trunk_config: Mapping[str, Any], num_classes: int, norm: str
) -> dict[str, Any]:
    """Every option that makes detectron2's defaults into the protocol, ``{dotted key: value}``.

    Args:
        settings: the protocol.
        trunk_config: of the trunk, see ``trunk_shape``.
        num_classes: without the background.
        norm: see ``norm_name``.

    Raises:
        ValueError: a trunk that detectron2's ResNet cannot be.
    """
    depth, channels = trunk_shape(trunk_config)
    return {
        **_SHARED,
        "MODEL.PIXEL_MEAN": list(settings.pixel_mean),
        "MODEL.PIXEL_STD": list(settings.pixel_std),
        "MODEL.BACKBONE.FREEZE_AT": settings.freeze_at,
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.NORM": norm,
        "MODEL.RESNETS.STRIDE_IN_1X1": settings.stride_in_1x1,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": channels,
        "MODEL.RESNETS.WIDTH_PER_GROUP": channels,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": channels * (1 if depth < 50 else _EXPANSION),
        "MODEL.ANCHOR_GENERATOR.SIZES": [list(settings.anchor_sizes)],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [list(settings.anchor_ratios)],
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": settings.rpn_pre_nms_train,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": settings.rpn_post_nms_train,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": settings.rpn_pre_nms_test,
        "MODEL.RPN.POST_NMS_TOPK_TEST": settings.rpn_post_nms_test,
        "MODEL.ROI_HEADS.NAME": head_name(settings),
        "MODEL.ROI_HEADS.NUM_CLASSES": num_classes,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": settings.rois_per_image,
        "INPUT.FORMAT": settings.input_format,
        "INPUT.MIN_SIZE_TRAIN": list(settings.train_min_sizes),
        "INPUT.MAX_SIZE_TRAIN": settings.train_max_size,
        "INPUT.MIN_SIZE_TEST": settings.test_min_size,
        "INPUT.MAX_SIZE_TEST": settings.test_max_size,
        "SOLVER.IMS_PER_BATCH": settings.batch_size,
        "SOLVER.BASE_LR": settings.lr,
        "SOLVER.MOMENTUM": settings.momentum,
        "SOLVER.WEIGHT_DECAY": settings.weight_decay,
        "SOLVER.WEIGHT_DECAY_NORM": settings.weight_decay_norm,
        "SOLVER.GAMMA": settings.gamma,
        "SOLVER.MAX_ITER": settings.iterations,
        "SOLVER.STEPS": [drop for drop in settings.drops if drop < settings.iterations],
        "SOLVER.WARMUP_METHOD": settings.warmup_method,
        "SOLVER.WARMUP_FACTOR": settings.warmup_factor,
        "SOLVER.WARMUP_ITERS": settings.warmup_iterations,
    }
