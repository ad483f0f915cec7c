"""Names of a trunk's entries in torchvision and in detectron2, without detectron2."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import resnet

from pirl_plugin.models.trunks import ResNetTrunk
from pirl_plugin.weights import find_trunk
from pirl_plugin.weights.detectron2_names import Layout, detectron2_name, to_detectron2

# written down by hand from detectron2's ResNet: torchvision's name, plain, in a C4 detector
PAIRS = [
    ("conv1.weight", "stem.conv1.weight", "backbone.stem.conv1.weight"),
    ("bn1.running_var", "stem.conv1.norm.running_var", "backbone.stem.conv1.norm.running_var"),
    ("layer1.0.conv2.weight", "res2.0.conv2.weight", "backbone.res2.0.conv2.weight"),
    ("layer2.3.bn3.bias", "res3.3.conv3.norm.bias", "backbone.res3.3.conv3.norm.bias"),
    ("layer3.22.bn1.weight", "res4.22.conv1.norm.weight", "backbone.res4.22.conv1.norm.weight"),
    ("layer3.0.downsample.0.weight", "res4.0.shortcut.weight", "backbone.res4.0.shortcut.weight"),
    (
        "layer4.0.downsample.1.num_batches_tracked",
        "res5.0.shortcut.norm.num_batches_tracked",
        "roi_heads.res5.0.shortcut.norm.num_batches_tracked",
    ),
    ("layer4.1.conv1.weight", "res5.1.conv1.weight", "roi_heads.res5.1.conv1.weight"),
]


@pytest.mark.parametrize(("torchvision", "plain", "c4"), PAIRS)
def test_names_by_hand(torchvision: str, plain: str, c4: str) -> None:
    assert detectron2_name(torchvision) == plain
    assert detectron2_name(torchvision, "c4") == c4


@pytest.mark.parametrize(
    "name",
    [
        *("fc.weight", "layer5.0.conv1.weight", "layer1.0.conv4.weight", "conv2.weight", "bn2.bias"),
        *(
            "layer1.conv1.weight",
            "layer1.0.conv1.bias",
            "downsample.0.weight",
            "xlayer1.0.conv1.weight",
            "bn1.weight.x",
        ),
    ],
)
def test_what_is_no_trunks_entry_under_torchvisions_names(name: str) -> None:
    assert detectron2_name(name) is None


@pytest.mark.parametrize("layout", ["plain", "c4"])
@pytest.mark.parametrize("depth", [18, 50])
def test_there_and_back_is_exact(depth: int, layout: Layout) -> None:
    state = ResNetTrunk(depth=depth).state_dict()  # type: ignore[arg-type]
    there = to_detectron2(state, layout)
    assert len(there) == len(state)
    back = find_trunk({"model": there}).state
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_a_detector_s_other_parts_are_left_out() -> None:
    state = ResNetTrunk(width=0.125).state_dict()
    others = ["proposal_generator.rpn_head.conv.weight", "roi_heads.box_predictor.cls_score.weight", "linear.weight"]
    found = find_trunk({**to_detectron2(state, "c4"), **{name: torch.zeros(1) for name in others}})
    assert found.state.keys() == state.keys()
    assert sorted(found.dropped) == sorted(others)


def test_the_prefix_of_a_feature_pyramids_backbone_is_known() -> None:
    state = ResNetTrunk(width=0.125).state_dict()
    there = {f"backbone.bottom_up.{name}": value for name, value in to_detectron2(state).items()}
    found = find_trunk({"model": {**there, "backbone.fpn_lateral2.weight": torch.zeros(1)}})
    assert found.state.keys() == state.keys()
    assert found.dropped == ["backbone.fpn_lateral2.weight"]


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_entry_of_torchvisions_resnets_has_a_name(depth: int) -> None:
    with torch.device("meta"):
        state = getattr(resnet, f"resnet{depth}")().state_dict()
    without = [name for name in state if detectron2_name(name) is None]
    assert without == ["fc.weight", "fc.bias"]


def test_a_classifier_is_refused_and_named() -> None:
    state = {"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"no entries of a ResNet trunk under torchvision's names: fc\.weight"):
        to_detectron2(state)


def test_a_long_list_of_strangers_is_cut() -> None:
    with pytest.raises(ValueError, match=r"torchvision's names: x0, x1, x2, x3 and 2 more"):
        to_detectron2({f"x{i}": torch.zeros(1) for i in range(6)})
