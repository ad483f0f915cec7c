"""The pretexts that come next cost one file and one YAML each: nothing of the base is touched for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_method import assert_learns_and_resumes, run
from torch import Tensor, nn

from pirl_plugin import plugins
from pirl_plugin.benchmarks.weights_under_test import frozen_networks, read_trunk
from pirl_plugin.hooks.checkpoint import checkpoints
from pirl_plugin.models.ssl_model import SSLModel
from pirl_plugin.registry import REGISTRIES, build

PLUGIN = "next_pretexts"
SETTINGS: dict[str, list[str]] = {
    "colorization_32": [],
    "cpc_v2_32": [],
    "exemplar_32": ["optimizer.lr=0.5"],
    "self_labelling_32": ["optimizer.lr=0.5"],
}
TRUNK = {"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "small"}

_ADDED: dict[str, dict[str, type]] = {}


class AsItIs(nn.Module):
    takes_map = True

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture(autouse=True)
def pretexts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """They are registered during a test of this file and not after it."""
    monkeypatch.setattr(plugins, "_FOLDERS", [])
    before = {kind: set(registry) for kind, registry in REGISTRIES.items()}
    plugins.load(PLUGIN)
    for kind, registry in REGISTRIES.items():
        _ADDED.setdefault(kind, {}).update({name: registry[name] for name in set(registry) - before[kind]})
        registry.update(_ADDED[kind])
    yield
    for kind, registry in REGISTRIES.items():
        for name in _ADDED[kind]:
            registry.pop(name, None)


@pytest.mark.parametrize("method", SETTINGS)
def test_they_train_and_resume(method: str, tmp_path: Path) -> None:
    assert_learns_and_resumes(method, [f"plugins=[{PLUGIN}]", *SETTINGS[method]], tmp_path)


def test_a_head_that_takes_the_map() -> None:
    torch.manual_seed(0)
    heads = {"image": {"name": "colour_classes", "num_classes": 5}, "key": {"name": "linear", "dim": 3}}
    model = SSLModel(TRUNK, heads).eval()
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    output = model({"image": pixels, "key": pixels})
    assert output["image"].shape == (2, 4, 4, 5)
    head = model.heads["image"].scores
    map_ = model.trunk.features(model.normalize(pixels), ["res5"])["res5"]
    by_hand = torch.einsum("bchw,kc->bhwk", map_, head.weight[:, :, 0, 0]) + head.bias
    torch.testing.assert_close(output["image"], by_hand)
    torch.testing.assert_close(output["key"], model.heads["key"](map_.mean(dim=(2, 3))))
    model.heads["image"] = AsItIs()
    crops = model({"image": torch.stack([pixels, pixels.flip(0)], dim=1)})["image"]
    torch.testing.assert_close(crops, torch.stack([map_, map_.flip(0)], dim=1))


def test_the_colours_of_a_picture_of_two_halves() -> None:
    picture = Image.new("RGB", (64, 64), (255, 0, 0))
    picture.paste((0, 0, 255), (32, 0, 64, 64))
    plain = {"flip_probability": 0.0, "image_scale": [1.0, 1.0], "image_ratio": [1.0, 1.0]}
    off = {f"{name}_probability": 0.0 for name in ("jitter", "photometric", "grayscale")}
    transform = build("transform", {"name": "grey_and_colour", "image_size": 32, **plain, **off})
    views = transform(picture)
    red, blue = 1 * 4 + 3, 3 * 4 + 1  # differences of blue and red: -43 and 127.5, 127.5 and -21
    assert views["colour"].tolist() == [[red, red, blue, blue]] * 4
    assert views["image"][:, 0, 0].tolist() == [76] * 3
    assert views["image"][:, 0, -1].tolist() == [29] * 3


def test_benchmarks_measure_the_trunk_under_a_head_of_maps(tmp_path: Path) -> None:
    run("colorization_32", [f"plugins=[{PLUGIN}]", "num_epochs=1", "checkpoint.every_epochs=1"], tmp_path)
    weights = read_trunk(str(checkpoints(tmp_path)[-1]), None)
    trunk, model = frozen_networks(weights, seed=0)
    assert trunk.channels["res5"] == 64
    assert model is None
    del REGISTRIES["head"]["colour_classes"]
    with pytest.raises(ValueError, match=r"a head 'colour_classes', which nothing here .* plugins=\[next_pretexts\]"):
        frozen_networks(weights, seed=0)
