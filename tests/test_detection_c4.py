"""The C4 layout: where the trunk's weights go, what is frozen, anchors and pooling by hand."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from detection_worlds import trunk
from torch import nn
from torchvision.models.detection.image_list import ImageList

from pirl_plugin.benchmarks.detection.c4 import (
    AlignedPool,
    ExactAnchors,
    build_detector,
    parameter_groups,
    stride_of,
)
from pirl_plugin.benchmarks.detection.presets import DetectionProtocol, published
from pirl_plugin.benchmarks.detection.schedule import with_overrides

SMALL = {"min_size": 64, "rois_per_image": 16, "proposals": 20}
PAPER = with_overrides(published("paper", "voc07"), **SMALL)
MOCO = with_overrides(published("moco", "voc07"), **SMALL)


@pytest.mark.parametrize(("stem", "stride"), [("imagenet", 16), ("medium", 8), ("small", 4)])
def test_stride_of_the_feature_map(stem: str, stride: int) -> None:
    detector = build_detector(trunk(stem=stem), 3, PAPER)
    features = detector.backbone(torch.zeros(1, 3, 64, 96))
    assert features.shape == (1, 32, 64 // stride, 96 // stride)
    assert stride_of(trunk(stem=stem)) == detector.backbone.stride == stride
    assert detector.transform.size_divisible == stride
    assert detector.roi_heads.box_roi_pool.stride == stride


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("settings", [PAPER, MOCO], ids=["frozen", "tuned"])
def test_every_weight_of_the_trunk_arrives(depth: int, settings: DetectionProtocol) -> None:
    """res4 as the trunk computes it; res5, on what the pooling cuts out, too; no entry is lost or shared."""
    own = trunk(depth=depth)
    before = copy.deepcopy(own.state_dict())
    detector = build_detector(own, 3, settings).eval()
    x = torch.randn(2, 3, 32, 48)
    close = {"rtol": 1e-4, "atol": 1e-4}  # a fixed batch norm rounds in another order
    torch.testing.assert_close(detector.backbone(x), own.features(x, ["res4"])["res4"], **close)
    pooled = torch.randn(5, own.channels["res4"], 14, 14)
    theirs = own.layer4(pooled).mean(dim=(2, 3))
    norm = detector.roi_heads.box_head.norm  # starts as batch norm does: mean 0, variance 1, so nearly the identity
    ours = detector.roi_heads.box_head(pooled)
    torch.testing.assert_close(ours * (1 + norm.eps) ** 0.5 if settings.extra_norm else ours, theirs, **close)
    names = {name.removeprefix("trunk.") for name in detector.backbone.state_dict()}
    names |= {f"layer4.{name.removeprefix('res5.')}" for name in detector.roi_heads.box_head.res5.state_dict()}
    assert names >= {name for name in before if "num_batches_tracked" not in name}
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], value) for name, value in own.state_dict().items())
    assert not any(parameter.requires_grad for parameter in own.parameters())


def trained(settings: DetectionProtocol, steps: int = 2) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A detector after some steps, and its state before."""
    torch.manual_seed(0)
    detector = build_detector(trunk(), 2, settings).train()
    before = copy.deepcopy(detector.state_dict())
    optimizer = torch.optim.SGD(parameter_groups(detector, settings), lr=0.01)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    for _ in range(steps):
        loss = torch.stack(list(detector([torch.rand(3, 64, 64)], [target]).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return detector, before


def moved(settings: DetectionProtocol) -> dict[str, bool]:
    detector, before = trained(settings)
    return {name: not torch.equal(before[name], value) for name, value in detector.state_dict().items()}


def is_norm(name: str) -> bool:
    return ".bn" in name or "downsample.1" in name


def test_frozen_batch_norm_and_the_first_two_stages_do_not_move() -> None:
    """The paper's protocol: fixed are all batch norms, the stem and res2; the rest is trained."""
    for name, has_moved in moved(PAPER).items():
        frozen_stage = name.startswith(("backbone.trunk.conv1", "backbone.trunk.bn1", "backbone.trunk.layer1"))
        assert has_moved == (not frozen_stage and not is_norm(name)), name


@pytest.mark.parametrize("freeze_at", range(5))
def test_freeze_at_counts_stages(freeze_at: int) -> None:
    """With tuned batch norm: frozen stages keep their statistics, too; all others move."""
    stages = ["conv1", "layer1", "layer2", "layer3"][:freeze_at]
    still = tuple(f"backbone.trunk.{stage}." for stage in stages) + (("backbone.trunk.bn1.",) if freeze_at else ())
    for name, has_moved in moved(replace(MOCO, freeze_at=freeze_at)).items():
        assert has_moved != name.startswith(still or "-"), name


def test_in_evaluation_mode_nothing_is_tuned() -> None:
    detector, _ = trained(MOCO)
    before = copy.deepcopy(detector.state_dict())
    with torch.no_grad():
        detector.eval()([torch.rand(3, 64, 64)])
    assert all(torch.equal(before[name], value) for name, value in detector.state_dict().items())


def test_extra_norm_is_one_more_batch_norm_after_res5() -> None:
    assert isinstance(build_detector(trunk(), 2, MOCO).roi_heads.box_head.norm, nn.BatchNorm2d)
    assert isinstance(build_detector(trunk(), 2, PAPER).roi_heads.box_head.norm, nn.Identity)


def test_weight_decay_of_norms_is_their_own() -> None:
    detector = build_detector(trunk(), 2, MOCO)
    others, norms = parameter_groups(detector, replace(MOCO, weight_decay=0.5, weight_decay_norm=0.25))
    assert (others["weight_decay"], norms["weight_decay"]) == (0.5, 0.25)
    inside = {id(p) for m in detector.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert {id(p) for p in norms["params"]} == inside
    assert len(others["params"]) + len(norms["params"]) == len(list(detector.parameters()))
    (alone,) = parameter_groups(build_detector(trunk(), 2, PAPER), PAPER)
    assert alone["weight_decay"] == 1e-4


def test_anchors_by_hand() -> None:
    """Sizes 2.5 and 5, ratios 1 and 4 (height / width), at the corner of the map and one stride of 8 to the right."""
    anchors = ExactAnchors(((2.5, 5.0),), ((1.0, 4.0),))
    (found,) = anchors(ImageList(torch.zeros(1, 3, 8, 16), [(8, 16)]), [torch.zeros(1, 4, 1, 2)])
    corner = torch.tensor(
        [[-1.25, -1.25, 1.25, 1.25], [-2.5, -2.5, 2.5, 2.5], [-0.625, -2.5, 0.625, 2.5], [-1.25, -5, 1.25, 5]]
    )
    torch.testing.assert_close(found, torch.cat([corner, corner + torch.tensor([8.0, 0, 8, 0])]))


def test_pooling_is_aligned() -> None:
    """On a map that holds its own column, a box is pooled to its columns / stride - 1/2: pixel centres are meant.

    The mean over a box from x = 32 to 64 at stride 4 is (8 + 16) / 2 - 0.5 = 11.5.
    """
    columns = torch.arange(40.0).expand(1, 1, 40, 40)
    (pooled,) = AlignedPool(4)({"0": columns}, [torch.tensor([[32.0, 32.0, 64.0, 64.0]])], [(160, 160)])
    assert pooled.shape == (1, 14, 14)
    assert pooled.mean().item() == pytest.approx(11.5)
    torch.testing.assert_close(pooled[0, 0], 8 - 0.5 + 8 / 14 * (torch.arange(14) + 0.5))


def test_the_images_are_normalised_with_the_protocols_constants() -> None:
    image = torch.full((3, 10, 12), 0.5)
    batch, _ = build_detector(trunk(), 2, PAPER).eval().transform([image])
    assert batch.image_sizes == [(10, 12)]
    assert batch.tensors.shape == (1, 3, 16, 16)
    expected = (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(batch.tensors[0, :, 3, 5], expected)
    assert batch.tensors[0, :, 12, 13].abs().sum() == 0  # padding comes after the normalisation


def test_the_numbers_of_the_protocol_are_the_detectors() -> None:
    detector = build_detector(trunk(), 20, published("paper", "voc07"))
    rpn, heads = detector.rpn, detector.roi_heads
    assert rpn._pre_nms_top_n == {"training": 12000, "testing": 6000}
    assert rpn._post_nms_top_n == {"training": 2000, "testing": 1000}
    assert (rpn.nms_thresh, heads.nms_thresh, heads.score_thresh, heads.detections_per_img) == (0.7, 0.5, 0.05, 100)
    assert (heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction) == (512, 0.25)
    assert (rpn.fg_bg_sampler.batch_size_per_image, rpn.fg_bg_sampler.positive_fraction) == (256, 0.5)
    assert (rpn.proposal_matcher.low_threshold, rpn.proposal_matcher.high_threshold) == (0.3, 0.7)
    assert heads.box_predictor.cls_score.out_features == 21
    assert heads.box_predictor.bbox_pred.out_features == 84
    assert rpn.head.cls_logits.out_channels == 15


def test_other_trunks_are_refused() -> None:
    with pytest.raises(TypeError, match="resnet_trunk"):
        build_detector(nn.Conv2d(3, 3, 1), 2, PAPER)
