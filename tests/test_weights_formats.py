"""Where trunks are in the checkpoints of other programs: every known layout, and files with several networks."""

from __future__ import annotations

import logging
import re

import pytest
import torch
import torchvision
from classy_vision.models import build_model
from torch import nn

from pirl_plugin.models import ResNetTrunk
from pirl_plugin.weights import FORMATS, NAMINGS, detectron2_names, files, find_trunk
from pirl_plugin.weights.formats import PREFERENCE

BASIC, BOTTLENECK = (ResNetTrunk(depth, width=0.0625).state_dict() for depth in (18, 50))
OTHER = {name: value + 1 for name, value in BASIC.items()}  # another network of the same shape
HEAD = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}


def under(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def cut(state: dict, numbers: dict[str, str]) -> dict:
    """As the children of an ``nn.Sequential``."""
    return {re.sub(r"^\w+", lambda found: numbers[found[0]], name): value for name, value in state.items()}


NUMBERS = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
NUMBERS_SMALL = {"conv1": "0", "bn1": "1", "layer1": "2", "layer2": "3", "layer3": "4", "layer4": "5"}


def vissl(trunk: dict, **more) -> dict:
    heads = under("heads.0.clf.0.", HEAD)
    return {
        "phase_idx": 3,
        "loss": {},
        "classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": heads}}, "optimizer": {}},
        **more,
    }


# name, checkpoint with BASIC as its trunk, format, prefix, number of dropped entries
LAYOUTS = {
    "torchvision": ({**BASIC, **under("fc.", HEAD)}, "torchvision state dict", "", 2),
    "torchvision without fc, Barlow Twins, VICReg, DINO's trunk": (BASIC, "torchvision state dict", "", 0),
    "VISSL": (
        vissl(under("_feature_blocks.", BASIC)),
        "VISSL checkpoint",
        "classy_state_dict.base_model.model.trunk._feature_blocks.",
        0,
    ),
    "VISSL, evaluation of features": (
        vissl(under("base_model._feature_blocks.", BASIC)),
        "VISSL checkpoint",
        "classy_state_dict.base_model.model.trunk.base_model._feature_blocks.",
        0,
    ),
    "VISSL, converted from classy-vision or Caffe2": (
        {"model_state_dict": under("_feature_blocks.", BASIC)},
        "VISSL state dict",
        "model_state_dict._feature_blocks.",
        0,
    ),
    "MoCo": (
        {
            "epoch": 200,
            "arch": "resnet18",
            "state_dict": {
                **under("module.encoder_q.", {**BASIC, **under("fc.0.", HEAD)}),
                **under("module.encoder_k.", {**OTHER, **under("fc.0.", HEAD)}),
                "module.queue": torch.zeros(2, 8),
                "module.queue_ptr": torch.zeros(1, dtype=torch.long),
            },
            "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}},
        },
        "MoCo checkpoint",
        "state_dict.module.encoder_q.",
        2 + len(OTHER) + 2 + 2,
    ),
    "MoCo v3": (
        {"state_dict": {**under("module.momentum_encoder.", OTHER), **under("module.base_encoder.", BASIC)}},
        "MoCo v3 checkpoint",
        "state_dict.module.base_encoder.",
        len(OTHER),
    ),
    "SimSiam": (
        {"state_dict": {**under("module.encoder.", BASIC), **under("module.predictor.0.", HEAD)}},
        "encoder checkpoint",
        "state_dict.module.encoder.",
        2,
    ),
    "SimCLR (Spijkervet)": (
        {**under("encoder.", BASIC), **under("projector.0.", HEAD)},
        "encoder checkpoint",
        "encoder.",
        2,
    ),
    "SimCLR (sthalles)": (
        {"state_dict": under("backbone.", {**BASIC, **under("fc.0.", HEAD)}), "arch": "resnet18"},
        "backbone checkpoint",
        "state_dict.backbone.",
        2,
    ),
    "SwAV": (
        {
            **under("module.", BASIC),
            **under("module.projection_head.0.", HEAD),
            "module.prototypes.weight": HEAD["bias"],
        },
        "plain state dict",
        "module.",
        3,
    ),
    "SwAV, whole": (
        {"epoch": 1, "state_dict": {**under("module.", BASIC), **under("module.projection_head.0.", HEAD)}},
        "plain state dict",
        "state_dict.module.",
        2,
    ),
    "Barlow Twins, VICReg, whole": (
        {"epoch": 1, "model": {**under("module.backbone.", BASIC), **under("module.projector.0.", HEAD)}},
        "backbone checkpoint",
        "model.module.backbone.",
        2,
    ),
    "DINO": (
        {
            "student": {**under("module.backbone.", OTHER), **under("module.head.mlp.0.", HEAD)},
            "teacher": {**under("backbone.", BASIC), **under("head.mlp.0.", HEAD)},
        },
        "DINO checkpoint",
        "teacher.backbone.",
        2,
    ),
    "solo-learn": (
        {
            "state_dict": {
                **under("momentum_backbone.", OTHER),
                **under("backbone.", BASIC),
                **under("classifier.", HEAD),
            }
        },
        "backbone checkpoint",
        "state_dict.backbone.",
        len(OTHER) + 2,
    ),
    "lightly": (
        {"state_dict": {**under("backbone.", cut(BASIC, NUMBERS)), **under("projection_head.layers.0.", HEAD)}},
        "backbone cut into an nn.Sequential",
        "state_dict.backbone.",
        2,
    ),
    "lightly, BYOL": (
        {
            "state_dict": {
                f"{part}.{k}": v
                for part, s in (("backbone", BASIC), ("backbone_momentum", OTHER))
                for k, v in cut(s, NUMBERS).items()
            }
        },
        "backbone cut into an nn.Sequential",
        "state_dict.backbone.",
        len(OTHER),
    ),
    "lightly, its own ResNet for small images": (
        {
            "state_dict": under(
                "backbone.",
                {name.replace("downsample", "shortcut"): value for name, value in cut(BASIC, NUMBERS_SMALL).items()},
            )
        },
        "backbone cut into an nn.Sequential",
        "state_dict.backbone.",
        0,
    ),
    "lightly, DINO benchmark": (
        {"state_dict": {**under("backbone.", BASIC), **under("student_backbone.", OTHER)}},
        "backbone checkpoint",
        "state_dict.backbone.",
        len(OTHER),
    ),
    "timm, training": (
        {"state_dict": {**BASIC, **under("fc.", HEAD)}, "state_dict_ema": {**OTHER, **under("fc.", HEAD)}},
        "plain state dict",
        "state_dict.",
        2,
    ),
    "mmselfsup, the same network under two names": (
        {"state_dict": {**under("encoder_q.0.", BASIC), **under("backbone.", BASIC), **under("encoder_k.0.", OTHER)}},
        "backbone checkpoint",
        "state_dict.backbone.",
        len(BASIC) + len(OTHER),
    ),
    "detectron2": (
        {"model": detectron2_names.to_detectron2(BASIC), "matching_heuristics": True},
        "detectron2 state dict",
        "model.",
        0,
    ),
    "detectron2, detector": (
        {"model": {**detectron2_names.to_detectron2(BASIC, "c4"), **under("roi_heads.box_predictor.cls.", HEAD)}},
        "detectron2 state dict",
        "model.",
        2,
    ),
    "somebody's": (
        {"net": {"inner": under("features.resnet18.", BASIC)}},
        "state dict under 'net.inner.features.resnet18.'",
        "net.inner.features.resnet18.",
        0,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_trunk_is_found(layout):
    checkpoint, name, prefix, dropped = LAYOUTS[layout]
    found = find_trunk(checkpoint)
    assert (found.format, found.prefix, len(found.dropped)) == (name, prefix, dropped)
    assert found.state.keys() == BASIC.keys()
    assert all(torch.equal(found.state[key], BASIC[key]) for key in BASIC), "not another network of the file"
    assert files.load_trunk(ResNetTrunk(18, width=0.0625), found.state).missing == []


@pytest.mark.parametrize("layout", ["MoCo", "lightly", "detectron2", "detectron2, detector", "VISSL"])
def test_bottlenecks_too(layout):
    checkpoint = {
        "MoCo": {"state_dict": under("module.encoder_q.", BOTTLENECK)},
        "lightly": under("backbone.", cut(BOTTLENECK, NUMBERS)),
        "detectron2": detectron2_names.to_detectron2(BOTTLENECK),
        "detectron2, detector": detectron2_names.to_detectron2(BOTTLENECK, "c4"),
        "VISSL": vissl(under("_feature_blocks.", BOTTLENECK)),
    }[layout]
    state = find_trunk(checkpoint).state
    assert state.keys() == BOTTLENECK.keys()
    assert all(torch.equal(state[key], BOTTLENECK[key]) for key in BOTTLENECK)


def test_vissl_keeps_its_momentum_encoder_in_the_loss():
    loss = {**under("moco_encoder.trunk._feature_blocks.", OTHER), "moco_queue": torch.zeros(2)}
    found = find_trunk(vissl(under("_feature_blocks.", BASIC), loss=loss))
    assert found.format == "VISSL checkpoint"
    assert torch.equal(found.state["conv1.weight"], BASIC["conv1.weight"])
    assert found.elsewhere == {"loss": len(OTHER) + 1, "classy_state_dict.base_model.model.heads": 2}


@pytest.mark.parametrize("basic", [True, False])
def test_classy_visions_own_resnet_gives_the_same_features(basic):
    """Not only its names: block order, strides and the last batch norm are where ours are."""
    model = build_model({"name": "resnet", "num_blocks": [2, 2, 2, 2] if basic else [3, 4, 6, 3], "basic_layer": basic})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.weight.data.uniform_(0.5, 1.5)
    found = find_trunk({"classy_state_dict": {"base_model": model.get_classy_state()}})
    assert found.format == "classy-vision checkpoint"
    trunk = ResNetTrunk(18 if basic else 50)
    files.load_trunk(trunk, found.state)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        theirs = model.eval().extract_features(image)
        ours = trunk.eval().features(image, ["res5"])["res5"]
    torch.testing.assert_close(ours, theirs.view_as(ours), rtol=1e-4, atol=1e-4)


def test_our_reading_of_detectron2_agrees_with_the_names_we_write():
    plain = next(naming for naming in NAMINGS if naming.name == "detectron2")
    c4 = next(naming for naming in NAMINGS if naming.name == "detectron2, C4")
    for name in BOTTLENECK:
        assert plain.to_torchvision(detectron2_names.detectron2_name(name, "plain")) == name
        assert c4.to_torchvision(detectron2_names.detectron2_name(name, "c4")) == name


# -- several networks in one file --------------------------------------------------------------------------------------


def test_which_of_several_is_said(caplog):
    checkpoint = LAYOUTS["DINO"][0]
    with caplog.at_level(logging.INFO, "pirl_plugin"):
        found = find_trunk(checkpoint)
    assert found.note == (
        "took the trunk under 'teacher.backbone.' (the teacher, which DINO evaluates) "
        "out of 'student.module.backbone.', 'teacher.backbone.'"
    )
    assert found.note in caplog.text
    assert found.elsewhere == {"student": len(OTHER) + 2}


@pytest.mark.parametrize("prefix", ["student.module.backbone", "student.module.backbone."])
def test_another_one_can_be_asked_for(prefix):
    found = find_trunk(LAYOUTS["DINO"][0], prefix)
    assert torch.equal(found.state["conv1.weight"], OTHER["conv1.weight"])
    assert "as asked for" in found.note
    with pytest.raises(ValueError, match="no trunk under the prefix 'query'; there are trunks under: 'student.module"):
        find_trunk(LAYOUTS["DINO"][0], "query")


def test_two_that_no_rule_tells_apart_are_an_error():
    checkpoint = {**under("left.", BASIC), **under("right.", OTHER)}
    with pytest.raises(ValueError, match="several trunks, and no rule.*'left.', 'right.'.*--prefix"):
        find_trunk(checkpoint)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("encoder_q", "encoder_k"),
        ("base_encoder", "momentum_encoder"),
        ("backbone", "backbone_momentum"),
        ("backbone", "key_backbone"),
        ("backbone", "teacher_backbone"),
        ("online_encoder.net", "target_encoder.net"),
        ("model", "model_ema"),
        ("base_model", "ema_model"),
        ("teacher", "student"),
        ("student", "target"),
    ],
)
def test_preference(better, worse):
    for order in (1, -1):
        checkpoint = dict([(better, BASIC), (worse, OTHER)][::order])
        found = find_trunk(checkpoint)
        assert found.prefix == f"{better}."
        assert torch.equal(found.state["conv1.weight"], BASIC["conv1.weight"])


def test_the_same_words_in_a_heads_name_are_no_reason():
    """``k`` is a word of ``encoder_k``, not of ``networks``."""
    assert all(len(word) == 1 or word.islower() for _, words in PREFERENCE for word in words)
    found = find_trunk({"networks.key": 1, "networks.backbone": BASIC})
    assert found.note == ""


# -- what is inside the trunk but no ResNet's --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "entry", "name"),
    [
        ("torchvision", "layer1.0.se.fc1.weight", "layer1.0.se.fc1.weight"),
        ("MoCo", "module.encoder_q.conv1.bias", "conv1.bias"),
        ("detectron2", "res4.0.conv2_offset.weight", "layer3.0.conv2_offset.weight"),
    ],
)
def test_what_no_resnet_has_is_not_left_out(layout, entry, name):
    """Without squeeze-and-excitation it would be another network, and nobody would know."""
    checkpoint = LAYOUTS[layout][0]
    parts = {"torchvision": checkpoint, "MoCo": checkpoint.get("state_dict"), "detectron2": checkpoint.get("model")}
    state = {**parts[layout], entry: torch.zeros(2)}
    found = find_trunk(state)
    assert name in found.state
    with pytest.raises(ValueError, match=f"not in the trunk: {re.escape(name)}"):
        files.load_trunk(ResNetTrunk(18, width=0.0625), found.state)


def test_two_entries_of_one_name():
    state = {**under("backbone.", cut(BASIC, NUMBERS)), "backbone.layer1.0.conv1.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="are both 'layer1.0.conv1.weight'|several trunks"):
        find_trunk(state)


def test_no_trunk():
    vit = {"blocks.0.attn.qkv.weight": torch.zeros(2), "cls_token": torch.zeros(1)}
    with pytest.raises(
        ValueError, match="no trunk found.*its keys are blocks.0.attn.qkv.weight, cls_token. Formats: p"
    ):
        find_trunk(vit)
    with pytest.raises(ValueError, match="its keys are none"):
        find_trunk({})
    with pytest.raises(ValueError, match="its keys are int, tuple"):
        find_trunk({3: BASIC, (1, 2): BASIC})


def test_an_unusual_trunk_of_ours_comes_as_it_is():
    """A trunk that somebody registered may call its entries anything."""
    trunk = {"patch_embed.weight": torch.zeros(3), "blocks.0.weight": torch.ones(2)}
    content = vissl(trunk, input_args={"config": {"trunk": {"name": "mine"}}})
    found = find_trunk(content)
    assert (found.format, list(found.state), found.dropped) == ("pirl_plugin checkpoint", list(trunk), [])
    assert all(torch.equal(found.state[name], trunk[name]) for name in trunk)
    assert files.trunk_config(content) == {"name": "mine"}


def test_formats_can_be_added(monkeypatch):
    more = type(FORMATS[0])("my project's", r"nets\.eye\.")
    monkeypatch.setattr("pirl_plugin.weights.finding.FORMATS", [more, *FORMATS])
    assert find_trunk({"nets": under("eye.", BASIC)}).format == "my project's"


def test_a_real_torchvision_model_cut_into_children():
    resnet = torchvision.models.resnet18()
    backbone = nn.Sequential(*list(resnet.children())[:-1])
    found = find_trunk(under("backbone.", backbone.state_dict()))
    trunk = ResNetTrunk(18)
    files.load_trunk(trunk, found.state)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(trunk.eval()(image), backbone.eval()(image).flatten(1))
