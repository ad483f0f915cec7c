"""Faster R-CNN in the C4 layout on a pretrained trunk, from torchvision's parts.

conv1 to res4 are the backbone: one feature map, of stride 16 for the ImageNet stem. Proposals are cut out of it at
14 x 14 (RoIAlign, aligned), pass res5 and average pooling, and a linear layer each for classes and boxes. Matching,
sampling, NMS and losses are torchvision's. What differs from detectron2's is in ``DIFFERENCES``, for the record.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, roi_align

from pirl_plugin.benchmarks.detection.presets import DetectionProtocol
from pirl_plugin.models.trunks import ResNetTrunk

DIFFERENCES = (
    "box losses are smooth L1 with beta 1/9 (detectron2: L1)",
    "images of a batch are not grouped by orientation",
)
_POOLED = 14
_STAGES = ("conv1", "layer1", "layer2", "layer3")  # detectron2's stem, res2, res3, res4


class C4Backbone(nn.Module):
    """conv1 to res4 of a trunk: float ``(B, 3, H, W)`` to ``(B, out_channels, H / stride, W / stride)``.

    Args:
        trunk: a ``ResNetTrunk`` that this module may keep and change.

    Attributes:
        out_channels: channels of res4.
        stride: image pixels between neighbours on the map.
    """

    def __init__(self, trunk: ResNetTrunk) -> None:
        super().__init__()
        self.out_channels, self.stride = trunk.channels["res4"], stride_of(trunk)
        self.trunk = trunk
        self.trunk.layer4 = nn.Identity()  # res5 is the head's; ``features`` computes nothing deeper than asked for

    def forward(self, x: Tensor) -> Tensor:
        """The res4 features."""
        return self.trunk.features(x, ("res4",))["res4"]


class Res5Head(nn.Module):
    """res5 on each proposal, then its mean: ``(R, C4, 14, 14)`` to ``(R, C5)``; optionally a batch norm between."""

    def __init__(self, res5: nn.Module, channels: int, extra_norm: bool) -> None:
        super().__init__()
        self.res5 = res5
        self.norm: nn.Module = nn.BatchNorm2d(channels) if extra_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """One feature vector a proposal."""
        return self.norm(self.res5(x)).mean(dim=(2, 3))


class AlignedPool(MultiScaleRoIAlign):
    """RoIAlign on one map without the half-pixel shift, as detectron2's ``ROIAlignV2``."""

    def __init__(self, stride: int) -> None:
        super().__init__(["0"], _POOLED, sampling_ratio=0)
        self.stride = stride

    def forward(self, x: Mapping[str, Tensor], boxes: list[Tensor], image_shapes: Any) -> Tensor:
        """``(R, C, 14, 14)`` for R proposals in pixels of the images that the network sees."""
        (of_images,) = x.values()
        return roi_align(of_images, boxes, _POOLED, 1 / self.stride, sampling_ratio=0, aligned=True)


class NormalizeAndPad(GeneralizedRCNNTransform):
    """torchvision's normalisation and padding of a batch; its images come resized, by Pillow, as detectron2's do."""

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        """The same image."""
        return image, target


class ExactAnchors(AnchorGenerator):
    """torchvision's anchors, not rounded to whole pixels: small images need anchors of a few pixels."""

    def generate_anchors(  # type: ignore[override]
        self,
        scales: Any,
        aspect_ratios: Any,
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008  (the base class's own signature)
    ) -> Tensor:
        """Zero-centred anchors ``(ratios * scales, 4)`` of area ``scale ** 2`` and height / width ``ratio``."""
        sizes, roots = torch.tensor(scales, dtype=dtype), torch.tensor(aspect_ratios, dtype=dtype).sqrt()
        heights, widths = (roots[:, None] * sizes).flatten(), (sizes / roots[:, None]).flatten()
        return (torch.stack([-widths, -heights, widths, heights], dim=1) / 2).to(device)


def build_detector(trunk: nn.Module, num_classes: int, settings: DetectionProtocol) -> FasterRCNN:
    """The detector, with the trunk's weights in a copy of its own and everything frozen that the protocol freezes.

    Layers that start at random draw from torch's global generator. Images go in as lists of float ``(3, H, W)`` in
    [0, 1], already resized; label 0 is the background.

    Args:
        trunk: a ``ResNetTrunk``; it is not changed.
        num_classes: classes, without the background.
        settings: the protocol.

    Raises:
        TypeError: the trunk is no ``ResNetTrunk``.
    """
    if not isinstance(trunk, ResNetTrunk):
        raise TypeError(f"detection needs a resnet_trunk with res4 and res5, got a {type(trunk).__name__}.")
    own = copy.deepcopy(trunk).requires_grad_(True)
    head = Res5Head(own.layer4, own.channels["res5"], settings.extra_norm)
    backbone = C4Backbone(own)
    freeze(backbone, head, settings)
    predictor = FastRCNNPredictor(own.channels["res5"], num_classes + 1)
    for layer, spread in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):  # as detectron2 starts them
        nn.init.normal_(layer.weight, std=spread)
        nn.init.zeros_(layer.bias)
    detector = FasterRCNN(
        backbone,
        rpn_anchor_generator=ExactAnchors((settings.anchor_sizes,), (settings.anchor_ratios,)),
        rpn_pre_nms_top_n_train=settings.rpn_pre_nms_train,
        rpn_pre_nms_top_n_test=settings.rpn_pre_nms_test,
        rpn_post_nms_top_n_train=settings.rpn_post_nms_train,
        rpn_post_nms_top_n_test=settings.rpn_post_nms_test,
        box_roi_pool=AlignedPool(backbone.stride),
        box_head=head,
        box_predictor=predictor,
        box_batch_size_per_image=settings.rois_per_image,
    )
    mean, std = [v / 255 for v in settings.pixel_mean], [v / 255 for v in settings.pixel_std]
    # the anchors' stride is taken from the sizes of the padded image and of the map: their quotient must be whole
    detector.transform = NormalizeAndPad(0, 0, mean, std, size_divisible=backbone.stride)
    return detector


def freeze(backbone: C4Backbone, head: Res5Head, settings: DetectionProtocol) -> None:
    """Fixes what the protocol fixes: the first stages, and batch norm everywhere or in these stages alone."""
    if settings.batch_norm == "frozen":
        freeze_batch_norms(backbone)
        freeze_batch_norms(head)
    for stage in _STAGES[: settings.freeze_at]:
        getattr(backbone.trunk, stage).requires_grad_(False)
        freeze_batch_norms(getattr(backbone.trunk, stage))
    if settings.freeze_at > 0 and isinstance(backbone.trunk.bn1, nn.BatchNorm2d):
        backbone.trunk.bn1 = frozen(backbone.trunk.bn1)


def freeze_batch_norms(module: nn.Module) -> None:
    """Replaces every batch norm inside a module by a fixed scale and shift, those of its evaluation mode."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, frozen(child))
        else:
            freeze_batch_norms(child)


def frozen(norm: nn.BatchNorm2d) -> FrozenBatchNorm2d:
    """A batch norm whose statistics, scale and shift are constants."""
    fixed = FrozenBatchNorm2d(norm.num_features, norm.eps).to(norm.weight.device)
    fixed.load_state_dict({key: value for key, value in norm.state_dict().items() if key != "num_batches_tracked"})
    return fixed


def stride_of(trunk: ResNetTrunk) -> int:
    """Image pixels between neighbours on the res4 map: 16 for the imagenet stem, 8 for medium, 4 for small."""
    pooling = trunk.maxpool.stride if isinstance(trunk.maxpool, nn.MaxPool2d) else 1
    return int(trunk.conv1.stride[0]) * int(pooling) * 4  # type: ignore[arg-type]  # res3 and res4 halve the map


def parameter_groups(detector: nn.Module, settings: DetectionProtocol) -> list[dict[str, Any]]:
    """What is trained, in two groups for SGD: norms' scales and shifts, and everything else."""
    norms = {id(p) for module in detector.modules() if isinstance(module, nn.BatchNorm2d) for p in module.parameters()}

    def trained(is_norm: bool) -> Iterator[nn.Parameter]:
        return (p for p in detector.parameters() if p.requires_grad and (id(p) in norms) == is_norm)

    groups = [
        {"params": list(trained(False)), "weight_decay": settings.weight_decay},
        {"params": list(trained(True)), "weight_decay": settings.weight_decay_norm},
    ]
    return [group for group in groups if group["params"]]
