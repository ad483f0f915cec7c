"""Conversions lose nothing, name everything, and other libraries load their results."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from fvcore.common.checkpoint import Checkpointer
from safetensors import safe_open

from pirl_plugin.models import ResNetTrunk, SSLModel
from pirl_plugin.weights import detectron2_names, files, find_trunk
from pirl_plugin.weights.convert import TARGETS, convert, grouped, to_detectron2, to_timm, to_torchvision
from pirl_plugin.weights.finding import FoundTrunk
from pirl_plugin.weights.writing import metadata_of, write_weights

TRUNK = {"name": "resnet_trunk", "depth": 18, "width": 0.0625, "stem": "small"}


def trained(trunk: torch.nn.Module) -> torch.nn.Module:
    """Every entry with values of its own, so that none can take another's place unseen; the counters too."""
    generator = torch.Generator().manual_seed(0)
    for number, value in enumerate(trunk.state_dict().values()):
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        else:
            value.fill_(number)
    return trunk


def checkpoint() -> dict:
    model = trained(SSLModel(trunk=TRUNK, heads={"image": {"name": "linear", "dim": 4}}))
    config = {"trunk": TRUNK, "method": "pirl", "transform": {"image_size": 32}, "dataset": {"root": "/secret/place"}}
    return {"input_args": {"config": config}, "classy_state_dict": {"base_model": model.get_classy_state()}}


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        assert one[name].numpy().tobytes() == other[name].numpy().tobytes(), name


ROUND_TRIPS = [(target, suffix) for target in TARGETS for suffix in TARGETS[target].suffixes if suffix != ".pkl"]


@pytest.mark.parametrize(("target", "suffix"), ROUND_TRIPS)
def test_there_and_back_is_the_same_bit_for_bit(tmp_path, target, suffix):
    before = find_trunk(checkpoint())
    state, report = convert(before, target, TRUNK)
    write_weights(state, tmp_path / f"a{suffix}", target, metadata_of(report, {}, "0"))
    after = find_trunk(files.read_weights(tmp_path / f"a{suffix}"))
    assert_same(after.state, before.state)
    assert after.dropped == []
    again = ResNetTrunk(18, width=0.0625, stem="small")
    loaded = files.load_trunk(again, after.state)
    assert loaded.missing == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_stay(tmp_path, dtype):
    state = {
        k: v.to(dtype) if v.is_floating_point() else v for k, v in ResNetTrunk(18, width=0.0625).state_dict().items()
    }
    write_weights(state, tmp_path / "a.safetensors", "safetensors", {})
    write_weights(state, tmp_path / "a.pth", "torchvision", {})
    for name in ("a.safetensors", "a.pth"):
        found = files.read_weights(tmp_path / name)
        assert all(found[key].dtype == state[key].dtype and torch.equal(found[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_loads_all_but_its_classifier(tmp_path, name):
    trunk = trained(ResNetTrunk(int(name[6:])))
    state, _ = convert(FoundTrunk(trunk.state_dict(), "x"), "torchvision")
    write_weights(state, tmp_path / "a.pth", "torchvision", {})
    model = getattr(torchvision.models, name)()
    result = model.load_state_dict(torch.load(tmp_path / "a.pth", weights_only=True), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    model.fc = torch.nn.Identity()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(image), trunk.eval()(image))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_timm_loads_it_strictly(tmp_path, name, suffix):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    trunk = trained(ResNetTrunk(int(name[6:])))
    write_weights(to_timm(trunk.state_dict()), tmp_path / f"a{suffix}", "timm", {"format": "pt"})
    model = timm.create_model(name, num_classes=0, checkpoint_path=str(tmp_path / f"a{suffix}")).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(image), trunk.eval()(image))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_detectron2_files(tmp_path, suffix):
    """What detectron2's checkpointer wants of a file: model, author, and that names are matched by their ends."""
    trunk = trained(ResNetTrunk(50, width=0.0625)).state_dict()
    path = tmp_path / f"a{suffix}"
    write_weights(to_detectron2(trunk), path, "detectron2", {})
    if suffix == ".pkl":
        content = pickle.loads(path.read_bytes(), encoding="latin1")
        assert all(isinstance(value, np.ndarray) for value in content["model"].values())
    else:
        content = Checkpointer(torch.nn.Linear(1, 1))._load_file(str(path))  # torch's own reader, weights only
    assert content["__author__"] == "pirl_plugin"
    assert content["matching_heuristics"] is True
    entries = content["model"]
    Checkpointer(torch.nn.Linear(1, 1))._convert_ndarray_to_tensor(entries)
    assert_same(find_trunk({"model": entries}).state, trunk)

    detector = detectron2_names.to_detectron2(trunk, "c4")  # each name there ends in exactly one name of the file
    for name, value in detector.items():
        ends = [entry for entry in entries if name == entry or name.endswith(f".{entry}")]
        assert len(ends) == 1
        assert torch.equal(entries[ends[0]], value)


def test_a_pickle_cannot_hold_bfloat16(tmp_path):
    with pytest.raises(ValueError, match="numpy has no bfloat16: write a .pth"):
        write_weights({"a": torch.zeros(1, dtype=torch.bfloat16)}, tmp_path / "a.pkl", "detectron2", {})
    assert list(tmp_path.iterdir()) == []


def test_views_and_memory_formats_are_written_as_values_alone(tmp_path):
    """A view of a large tensor would take all of it into the file; safetensors refuses shared memory."""
    large = torch.arange(100_000.0)
    state = {"a": large[:4], "b": large[:4], "c": torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    for name in ("a.pth", "a.safetensors"):
        write_weights(state, tmp_path / name, "torchvision", {})
        assert (tmp_path / name).stat().st_size < 5_000
        found = files.read_weights(tmp_path / name)
        assert all(torch.equal(found[key], state[key]) for key in state)


# -- reports --------------------------------------------------------------------------------------------------------


def test_the_report_counts_every_tensor_of_the_file():
    content = checkpoint()
    found = find_trunk(content)
    _, report = convert(found, "detectron2", TRUNK)
    state = content["classy_state_dict"]["base_model"]["model"]["trunk"]
    assert len(report.matched) == len(state)
    assert report.matched["layer1.0.bn1.weight"] == "res2.0.conv1.norm.weight"
    assert report.elsewhere == {"classy_state_dict.base_model.model.heads.image": 2}
    assert report.notes == [
        "detectron2 has no model by name for a ResNet-18, width 0.0625, 3x3 stem: only the entries' names are its own"
    ]
    text = report.as_text()
    assert f"matched   {len(state)} entries under 'classy_state_dict.base_model.model.trunk.'" in text
    assert "elsewhere 2 tensors: classy_state_dict.base_model.model.heads.image (2)" in text
    assert "res2.0.conv1.norm.weight" not in text
    assert "layer1.0.bn1.weight                        ->  res2.0.conv1.norm.weight" in report.as_text(every_entry=True)


def test_what_is_dropped_and_what_is_missing_is_named():
    trunk = ResNetTrunk(18, width=0.0625).state_dict()
    content = {f"module.encoder_q.{k}": v for k, v in trunk.items() if "num_batches" not in k}
    content |= {f"module.encoder_k.{k}": v + 1 for k, v in trunk.items()} | {"module.queue": torch.zeros(2)}
    _, report = convert(find_trunk({"state_dict": content}), "torchvision")
    assert len(report.matched) == 100
    assert len(report.dropped) == len(trunk) + 1
    assert report.missing[:2] == ["bn1.num_batches_tracked", "layer1.0.bn1.num_batches_tracked"]
    text = report.as_text()
    assert "found     MoCo checkpoint: ResNet-18" in text
    assert "dropped   121: module.encoder_k.* (120), module.queue" in text
    assert "missing   20: bn1.num_batches_tracked, layer1.* (4), layer2.* (5), layer3.* (5), layer4.* (5)" in text
    assert "note      took the trunk under 'state_dict.module.encoder_q.'" in text
    assert len(report.as_text(every_entry=True).splitlines()) > 100


def test_grouped():
    assert grouped([]) == []
    assert grouped(["b", "a"]) == ["b", "a"]
    assert grouped([f"x.{i}.{j}" for i in range(3) for j in range(5)] + ["y.z"]) == [
        "x.0.* (5)",
        "x.1.* (5)",
        "x.2.* (5)",
        "y.z",
    ]
    assert grouped([f"name{i}" for i in range(20)]) == ["name0 and 19 more"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "bn1.weight"}, r"missing: bn1.weight \(1\)"),
        (lambda s: {**s, "layer1.0.se.fc.weight": torch.zeros(1)}, "no entries of a ResNet: layer1.0.se.fc.weight"),
        (lambda s: {}, "no ResNet"),
    ],
)
def test_half_a_trunk_is_not_converted(target, change, message):
    state = change(ResNetTrunk(18, width=0.0625).state_dict())
    with pytest.raises(ValueError, match=message):
        convert(FoundTrunk(state, "x"), target)


def test_unknown_targets():
    with pytest.raises(ValueError, match="unknown target 'caffe'. Available: torchvision, timm, detectron2, safetens"):
        convert(FoundTrunk({}, "x"), "caffe")


def test_names_only_are_changed():
    trunk = ResNetTrunk(18, width=0.0625).state_dict()
    for renamed in (to_torchvision(trunk), to_timm(trunk), to_detectron2(trunk)):
        assert [value.data_ptr() for value in renamed.values()] == [value.data_ptr() for value in trunk.values()]


def test_wide_networks_can_be_renamed_though_we_cannot_build_them():
    with torch.device("meta"):
        model = torchvision.models.wide_resnet50_2()
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("fc.")}
    converted, report = convert(FoundTrunk(state, "torchvision state dict"), "detectron2")
    assert len(converted) == len(state)
    assert report.trunk is None


# -- metadata -------------------------------------------------------------------------------------------------------


def test_a_safetensors_file_says_what_it_is(tmp_path):
    content = checkpoint()
    state, report = convert(find_trunk(content), "safetensors", files.trunk_config(content))
    write_weights(
        state, tmp_path / "a.safetensors", "safetensors", metadata_of(report, files.training_config(content), "ab")
    )
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert {key: metadata[key] for key in ("format", "method", "source_format", "source_sha256")} == {
        "format": "pt",
        "method": "pirl",
        "source_format": "pirl_plugin checkpoint",
        "source_sha256": "ab",
    }
    assert json.loads(metadata["trunk"]) == TRUNK
    assert "secret" not in Path(tmp_path / "a.safetensors").read_bytes()[:4000].decode(errors="ignore")
    read = files.read_weights(tmp_path / "a.safetensors")
    assert files.trunk_config(read) == TRUNK, "the stem too, which the weights alone leave open"
    assert files.training_config(read) == {"method": "pirl", "trunk": TRUNK, "transform": {"image_size": 32}}


def test_what_is_not_known_is_not_said():
    state = ResNetTrunk(18, width=0.0625, stem="small").state_dict()
    _, report = convert(find_trunk(state), "safetensors")
    assert report.trunk is None
    assert "do not say the stride" in report.notes[0]
    assert metadata_of(report, {}, "0").keys() == {"format", "producer", "source_format", "source_sha256"}
