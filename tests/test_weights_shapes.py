"""What a trunk's weights tell of it: depth, width and stem, and whether it is whole."""

from __future__ import annotations

import logging

import pytest
import torch
import torchvision

from pirl_plugin.models import ResNetTrunk
from pirl_plugin.models.trunks import _BLOCKS
from pirl_plugin.registry import build
from pirl_plugin.weights import files, infer_trunk
from pirl_plugin.weights.resnet_shape import DEPTHS, check_whole, expected_shapes, resnet_shape

SMALL = ResNetTrunk(18, width=0.0625).state_dict()


def test_the_depths_are_those_of_the_trunk():
    assert {(block.expansion == 4, blocks): depth for depth, (block, blocks) in _BLOCKS.items()} == DEPTHS


@pytest.mark.parametrize("depth", sorted(DEPTHS.values()))
@pytest.mark.parametrize(("width", "stem"), [(0.0625, "imagenet"), (0.125, "small")])
def test_expected_entries_are_those_of_the_trunk(depth, width, stem):
    state = ResNetTrunk(depth, width=width, stem=stem).state_dict()
    shape = resnet_shape(state)
    assert shape.depth == depth
    assert expected_shapes(shape) == {name: tuple(value.shape) for name, value in state.items()}
    assert list(expected_shapes(shape)) == list(state), "in torchvision's order"


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_expected_entries_are_those_of_torchvision(name):
    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()
    trunk = {key: value for key, value in state.items() if not key.startswith("fc.")}
    assert expected_shapes(resnet_shape(trunk)) == {key: tuple(value.shape) for key, value in trunk.items()}


@pytest.mark.parametrize("depth", sorted(DEPTHS.values()))
@pytest.mark.parametrize("width", [0.0625, 0.25, 1, 2])
def test_the_trunk_that_is_inferred_is_the_one_it_was(depth, width):
    with torch.device("meta"):
        trunk = ResNetTrunk(depth, width=float(width))
        config = infer_trunk(trunk.state_dict())
        assert config == {"name": "resnet_trunk", "depth": depth, "width": width, "stem": "imagenet"}
        again = build("model", config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in trunk.state_dict().items()}


@pytest.mark.parametrize("stem", ["small", "medium"])
def test_a_stem_that_the_weights_leave_open_is_asked_for(stem):
    with pytest.raises(ValueError, match="do not say the stride.*trunk=resnet34 trunk.width=0.0625 trunk.stem=small"):
        infer_trunk(ResNetTrunk(34, width=0.0625, stem=stem).state_dict())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wide_resnet50_2", r"layer1.0.conv1.weight \(128, 64, 1, 1\) instead of \(64, 64, 1, 1\) \(ResNeXt and wide"),
        ("resnext50_32x4d", "ResNeXt and wide ResNets are not supported"),
    ],
)
def test_other_networks_with_the_same_names(name, message):
    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()
    with pytest.raises(ValueError, match=message):
        infer_trunk(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {**s, "conv1.weight": torch.zeros(4, 1, 7, 7)}, "its images have other than 3 channels"),
        (lambda s: {**s, "conv1.weight": torch.zeros(4, 3, 5, 5)}, "its stems are 7x7 and 3x3"),
        (lambda s: {**s, "conv1.weight": torch.zeros(4)}, r"it is \(4,\)"),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("conv1")}, "it is missing"),
        (
            lambda s: {("conv1.0.weight" if k == "conv1.weight" else k): v for k, v in s.items()},
            r"it is missing \(a stem of several convolutions\?\)",
        ),
        (lambda s: {k: v for k, v in s.items() if not k.startswith("layer4")}, r"no ResNet with four stages.*2, 0\)"),
        (lambda s: {**s, "layer1.7.conv1.weight": torch.zeros(1)}, "four stages of numbered blocks"),
        (lambda s: {**s, "layer1.999999999999.bn1.bias": torch.zeros(1)}, "four stages of numbered blocks"),
        (lambda s: {**s, "layer1.2.conv1.weight": torch.zeros(1)}, "no depth has these blocks|instead of"),
    ],
)
def test_weights_of_no_trunk_of_ours(change, message):
    with pytest.raises(ValueError, match=message):
        infer_trunk(change(SMALL))


def test_whole_or_not():
    assert check_whole(SMALL).name == "ResNet-18, width 0.0625, 7x7 stem"
    assert check_whole({k: v for k, v in SMALL.items() if "num_batches" not in k}).depth == 18
    with pytest.raises(ValueError, match=r"not whole: missing: layer2.0.downsample.1.bias \(1\)"):
        check_whole({k: v for k, v in SMALL.items() if k != "layer2.0.downsample.1.bias"})
    with pytest.raises(ValueError, match=r"no entries of a ResNet: layer1.0.se.fc.weight \(1\)"):
        check_whole({**SMALL, "layer1.0.se.fc.weight": torch.zeros(1)})


def test_unusual_depths_have_a_name_too():
    state = {k: v for k, v in ResNetTrunk(34, width=0.0625).state_dict().items() if not k.startswith("layer3.5")}
    assert resnet_shape(state).name == "ResNet of basic blocks 3-4-5-3, width 0.0625, 7x7 stem"
    with pytest.raises(ValueError, match="no depth has these blocks"):
        infer_trunk(state)


# -- the trunk's configuration, from whatever says it ----------------------------------------------------------------


def test_description_before_metadata_before_shapes(caplog):
    described = {"name": "resnet_trunk", "depth": 18, "stem": "small", "width": 0.0625}
    metadata = {files.METADATA: {"trunk": '{"name": "resnet_trunk", "depth": 34}'}}
    with caplog.at_level(logging.INFO, "pirl_plugin"):
        content = {**SMALL, "input_args": {"config": {"trunk": described}}}
        assert files.trunk_config({**content, **metadata}) == described
        assert files.trunk_config({**SMALL, **metadata}) == {"name": "resnet_trunk", "depth": 34}
        assert caplog.text == ""
        assert files.trunk_config(SMALL)["depth"] == 18
    assert "(torchvision state dict) are of a ResNet-18, width 0.0625, 7x7 stem: from their shapes" in caplog.text


def test_metadata_of_ours_says_how_it_was_trained():
    content = {files.METADATA: {"pretraining": '{"method": "pirl", "transform": {"image_size": 64}}'}}
    assert files.training_config(content) == {"method": "pirl", "transform": {"image_size": 64}}
    assert files.training_config({files.METADATA: {"format": "pt"}}) == {}
    assert files.training_config({files.METADATA: {"pretraining": "[1]"}}) == {}
