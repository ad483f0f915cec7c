"""Checkpoints: harmful, damaged and foreign files, whole writes, and trunks that do or do not fit."""

from __future__ import annotations

import hashlib
import os
import pickle

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from pirl_plugin.atomic import replacing
from pirl_plugin.hooks.checkpoint_files import remove_left_overs
from pirl_plugin.models import ResNetTrunk, SSLModel
from pirl_plugin.weights import files

TRUNK = {"name": "resnet_trunk", "depth": 18, "width": 0.125}


class Harmful:
    def __reduce__(self):
        return (open, ("harm.txt", "w"))


def interrupted_write(path) -> None:
    with replacing(path) as file:
        file.write(b"half of")
        raise KeyboardInterrupt


def checkpoint() -> dict:
    model = SSLModel(trunk=TRUNK, heads={"image": {"name": "linear", "dim": 4}})
    return {
        "input_args": {"config": {"trunk": TRUNK, "method": "pirl"}},
        "classy_state_dict": {"base_model": model.get_classy_state()},
    }


@pytest.mark.parametrize("modern", [True, False])
def test_a_pickle_that_runs_code_is_refused_in_one_line(tmp_path, monkeypatch, modern):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pt"
    if modern:
        torch.save({"weights": Harmful()}, path)
    else:
        path.write_bytes(pickle.dumps({"weights": Harmful()}))
    with pytest.raises(ValueError, match="refused to read .*bad.pt.*more than plain data") as caught:
        files.read_weights(path)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value), "no advice to switch the check off"
    assert not (tmp_path / "harm.txt").exists()


def test_damaged_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights file"):
        files.read_weights(tmp_path / "none.pt")
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.zeros(1000)}, whole)
    content = whole.read_bytes()
    damaged = {
        "half.pt": content[: len(content) // 2],
        "empty.pt": b"",
        "text.pt": b"hello",
        "half.safetensors": b"\x00\x01",
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name) as caught:
            files.read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        files.read_weights(tmp_path / "list.pt")


def test_round_trips(tmp_path):
    state = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    files.write_atomically(state, tmp_path / "new" / "a.pt")
    save_file(state, tmp_path / "a.safetensors")
    for path in (tmp_path / "new" / "a.pt", tmp_path / "a.safetensors"):
        found = files.read_weights(path)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.pt"
    files.write_atomically({"a": 1}, path)
    before = path.read_bytes()
    with pytest.raises((AttributeError, pickle.PicklingError)):
        files.write_atomically({"a": torch.zeros(10), "b": lambda: None}, path)
    with pytest.raises(KeyboardInterrupt):
        interrupted_write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_sha256(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"pirl" * 1_000_000)
    assert files.sha256_of_file(path) == hashlib.sha256(b"pirl" * 1_000_000).hexdigest()


def test_our_own_checkpoint(tmp_path):
    files.write_atomically(checkpoint(), tmp_path / "c.pt")
    content = files.read_weights(tmp_path / "c.pt")
    found = files.find_trunk(content)
    assert found.format == "pirl_plugin checkpoint"
    assert files.trunk_config(content) == TRUNK
    trunk = ResNetTrunk(18, width=0.125)
    report = files.load_trunk(trunk, found.state)
    assert report.missing == []
    assert torch.equal(trunk.conv1.weight, content["classy_state_dict"]["base_model"]["model"]["trunk"]["conv1.weight"])


def test_torchvision_state_dict_loses_its_classifier_and_says_so():
    found = files.find_trunk(torchvision.models.resnet18().state_dict())
    assert found.format == "torchvision state dict"
    assert found.dropped == ["fc.weight", "fc.bias"]
    assert files.described_trunk(found.state) is None
    assert files.trunk_config(found.state) == {"name": "resnet_trunk", "depth": 18, "width": 1.0, "stem": "imagenet"}
    trunk = ResNetTrunk(18)
    assert len(files.load_trunk(trunk, found.state).matched) == len(trunk.state_dict())


def test_unknown_content_lists_what_there_is():
    with pytest.raises(
        ValueError, match=r"its keys are epoch, optimizer. Formats: pirl_plugin checkpoint, torchvision"
    ):
        files.find_trunk({"epoch": 3, "optimizer": {}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "bn1.weight"}, "missing: bn1.weight"),
        (lambda s: {**s, "layer1.2.conv1.weight": s["conv1.weight"]}, "not in the trunk: layer1.2.conv1.weight"),
        (lambda s: {**s, "bn1.bias": torch.zeros(9)}, r"other shapes: bn1.bias \(9,\) instead of \(8,\)"),
        (lambda s: {f"module.{k}": v for k, v in s.items()}, "none of the trunk's"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(change, message):
    trunk, other = ResNetTrunk(18, width=0.125), ResNetTrunk(18, width=0.125)
    before = trunk.conv1.weight.clone()
    with pytest.raises(ValueError, match=message):
        files.load_trunk(trunk, change(other.state_dict()))
    assert torch.equal(trunk.conv1.weight, before)


def test_a_deeper_network_is_not_taken_for_a_shallow_one():
    deep = torchvision.models.resnet34().state_dict()
    with pytest.raises(ValueError, match="not in the trunk.*another depth"):
        files.load_trunk(ResNetTrunk(18), files.trunk_state(deep))


def test_old_files_without_batch_counters_load():
    trunk = ResNetTrunk(18, width=0.125)
    state = {k: v for k, v in ResNetTrunk(18, width=0.125).state_dict().items() if "num_batches" not in k}
    report = files.load_trunk(trunk, state)
    assert all(key.endswith("num_batches_tracked") for key in report.missing)
    assert torch.equal(trunk.conv1.weight, state["conv1.weight"])


def test_writers_of_one_process_number_on_two_machines_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 123)
    path = tmp_path / "result.json"
    with replacing(path) as first:
        first.write(b"first")
        with replacing(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_s_temporary_checkpoint_is_known_as_one(tmp_path):
    path = tmp_path / "checkpoints" / "step_000000009.pt"
    path.parent.mkdir()
    with replacing(path):
        (left_over,) = path.parent.iterdir()
        remove_left_overs(tmp_path)
        assert not left_over.exists()
        left_over.touch()
