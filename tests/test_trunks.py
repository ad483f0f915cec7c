"""ResNet trunks against torchvision's own."""

from __future__ import annotations

import gc

import pytest
import torch
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

from pirl_plugin.models.trunks import LAYERS, ResNetTrunk, bfloat16_hazards
from pirl_plugin.registry import build, check


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_torchvision_weights_load_strictly(depth):
    with torch.device("meta"):
        theirs, ours = getattr(torchvision.models, f"resnet{depth}")(), ResNetTrunk(depth)
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    assert list(ours.state_dict()) == list(state)
    ours.load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize("depth", [18, 50])
def test_same_output_and_features_as_torchvision(depth):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, f"resnet{depth}")()
    ours = ResNetTrunk(depth)
    ours.load_state_dict({key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")})
    x = torch.randn(2, 3, 64, 64)
    names = {"relu": "conv1", "layer1": "res2", "layer2": "res3", "layer3": "res4", "layer4": "res5"}
    expected = create_feature_extractor(theirs.eval(), names)(x)
    found = ours.eval().features(x, LAYERS)
    for layer in LAYERS:
        torch.testing.assert_close(found[layer], expected[layer])
        assert found[layer].shape[1] == ours.channels[layer]
    theirs.fc = torch.nn.Identity()
    torch.testing.assert_close(ours(x), theirs(x))


def test_conv1_of_a_224_image_is_the_map_before_pooling():
    """Goyal et al. pool a 112 x 112 map: after the max pooling it would be 56 x 56."""
    trunk = ResNetTrunk(18, width=0.125).eval()
    feature = trunk.features(torch.randn(1, 3, 224, 224), ["conv1"])["conv1"]
    assert feature.shape == (1, 8, 112, 112)
    assert feature.min() == 0, "after the ReLU"


def test_nothing_deeper_than_asked_is_run():
    trunk = ResNetTrunk(18, width=0.125, stem="small").eval()
    calls = []
    for name in ("layer1", "layer2", "layer3", "layer4"):
        getattr(trunk, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    found = trunk.features(torch.randn(1, 3, 16, 16), ["res3", "conv1"])
    assert list(found) == ["res3", "conv1"]
    assert calls == ["layer1", "layer2"]


def test_width_multiplies_every_channel_stem_included():
    with torch.device("meta"):
        one, two = ResNetTrunk(50), ResNetTrunk(50, width=2.0)
    for (name, small), (_, large) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        if small.ndim == 4:
            assert large.shape[0] == 2 * small.shape[0], name
            assert large.shape[1] == (3 if name == "conv1.weight" else 2 * small.shape[1]), name
    assert two.channels == {"conv1": 128, "res2": 512, "res3": 1024, "res4": 2048, "res5": 4096}
    assert sum(p.numel() for p in two.parameters()) == pytest.approx(94e6, rel=0.01), (
        "98M in the paper, with the classifier"
    )


def test_fractional_width_must_leave_whole_channels():
    assert ResNetTrunk(18, width=0.25).channels["res5"] == 128
    with pytest.raises(ValueError, match="whole number of channels, got width 0.3"):
        ResNetTrunk(18, width=0.3)


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 2), ("medium", 4), ("small", 8)])
def test_stems(stem, side):
    trunk = ResNetTrunk(18, width=0.125, stem=stem).eval()
    assert trunk.features(torch.randn(1, 3, 64, 64), ["res5"])["res5"].shape[-1] == side
    assert ("maxpool" in [n for n, m in trunk.named_modules() if isinstance(m, torch.nn.MaxPool2d)]) == (
        stem == "imagenet"
    )


def test_initialisation():
    torch.manual_seed(0)
    trunk = ResNetTrunk(18, zero_init_residual=True)
    weight = trunk.layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx((2 / (512 * 9)) ** 0.5, rel=0.01), "He, fan-out"
    assert trunk.layer1[0].bn2.weight.abs().max() == 0
    assert trunk.layer1[0].bn1.weight.min() == 1
    assert ResNetTrunk(18, width=0.125).layer1[0].bn2.weight.min() == 1


def test_unknown_layers_and_arguments_are_refused():
    trunk = ResNetTrunk(18, width=0.125)
    with pytest.raises(
        ValueError, match="Unknown layer 'res6'. Layers: conv1, res2, res3, res4, res5. Did you mean 'res"
    ):
        trunk.features(torch.randn(1, 3, 32, 32), ["res6"])
    with pytest.raises(ValueError, match="no layer"):
        trunk.features(torch.randn(1, 3, 32, 32), [])
    problems = check("model", {"name": "resnet_trunk", "depth": 20, "widht": 2.0}, "trunk")
    assert [problem.path for problem in problems] == ["trunk.widht", "trunk.depth"]
    assert build("model", {"name": "resnet_trunk", "depth": 18, "width": 1}).channels["res5"] == 512


@pytest.mark.parametrize(
    ("stem", "size", "expected"),
    [
        ("imagenet", 17, []),  # 17 -> 9 -> 5 -> 3 -> 2: layer4 sees 2 x 2
        ("imagenet", 16, ["layer4.0.conv1"]),  # 16 -> 8 -> 4 -> 2 -> 1
        ("imagenet", 8, ["layer3.0.conv1", "layer4.0.conv1"]),
        ("medium", 8, ["layer4.0.conv1"]),
        ("medium", 9, []),
        ("small", 5, []),
        ("small", 4, ["layer4.0.conv1"]),
        ("imagenet", 1, ["conv1", "layer2.0.conv1", "layer3.0.conv1", "layer4.0.conv1"]),
    ],
)
def test_bfloat16_hazards_by_hand(stem, size, expected):
    assert bfloat16_hazards(ResNetTrunk(18, width=0.125, stem=stem), size, size) == expected


@pytest.mark.parametrize("size", [(16, 16), (24, 24), (8, 20), (33, 16), (3, 3)])
@pytest.mark.parametrize("stem", ["imagenet", "medium", "small"])
def test_bfloat16_hazards_agree_with_what_the_convolutions_see(stem, size):
    trunk = ResNetTrunk(50, width=0.125, stem=stem).eval()
    seen = []
    for name, module in trunk.named_modules():
        if isinstance(module, torch.nn.Conv2d) and module.stride[0] > 1 and module.kernel_size[0] > 1:
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.append(name) if inputs[0].shape[2:] == (1, 1) else None
            )
    trunk(torch.randn(1, 3, *size))
    assert bfloat16_hazards(trunk, *size) == seen


def test_gradients_where_no_hazard_is_reported_agree_with_float32():
    """The smallest safe patch, in CPU bfloat16 with a dirty heap: weight gradients are float32's but for rounding."""
    size = 17
    torch.manual_seed(0)
    trunk = ResNetTrunk(18, width=0.25).eval()  # fixed statistics: batch ones amplify the rounding
    assert bfloat16_hazards(trunk, size, size) == []
    x = torch.randn(16, 3, size, size)

    def gradient(dtype):
        heap = [torch.full((2**k,), float("nan")) for k in range(6, 20)]
        del heap
        gc.collect()
        trunk.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            loss = trunk(x).float().square().sum()
        loss.backward()
        return torch.cat([layer[0].conv1.weight.grad.flatten() for layer in (trunk.layer2, trunk.layer3, trunk.layer4)])

    exact, rounded = gradient(torch.float32), gradient(torch.bfloat16)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.98
