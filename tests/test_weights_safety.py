"""Files of unknown origin: nothing in them runs, and whatever is wrong with them is said in one line."""

from __future__ import annotations

import argparse
import collections
import json
import os
import pathlib
import pickle
import random
import struct
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save, save_file

from pirl_plugin.models import ResNetTrunk
from pirl_plugin.weights import files, find_trunk
from pirl_plugin.weights.stand_ins import DICTIONARIES, OBJECTS, STAND_INS, StandIn


class Call:
    """Unpickling it calls ``function`` with ``arguments``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def touch(name: str) -> None:
    Path(name).write_text("harm")


HARM = {
    "os.system": lambda: Call(os.system, "echo harm > harm.txt"),
    "exec": lambda: Call(exec, "open('harm.txt', 'w').write('harm')"),
    "eval": lambda: Call(eval, "open('harm.txt', 'w')"),
    "subprocess": lambda: Call(subprocess.check_call, ["touch", "harm.txt"]),
    "a function of ours": lambda: Call(touch, "harm.txt"),
    "inside a harmless object": lambda: argparse.Namespace(lr=Call(touch, "harm.txt")),
    "inside a configuration": lambda: collections.defaultdict(int, lr=Call(touch, "harm.txt")),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("harm", HARM)
def test_no_code_in_a_pickle_runs(tmp_path, monkeypatch, harm, zipped):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": ResNetTrunk(18, width=0.0625).state_dict(), "args": HARM[harm]()}
    torch.save(content, "bad.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"refused to read 'bad.pt'.*it refers to [\w.]+\)") as caught:
        files.read_weights("bad.pt")
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert "add_safe_globals" not in str(caught.value)
    assert not Path("harm.txt").exists()

    torch.load("bad.pt", weights_only=False)
    assert Path("harm.txt").exists(), "the file was harmless, so this test shows nothing"


def test_a_stand_in_is_called_in_place_of_the_class_it_stands_for(tmp_path, monkeypatch):
    """Even ``argparse.Namespace`` and ``pathlib.PosixPath`` themselves are not touched."""
    built = []
    monkeypatch.setattr(argparse.Namespace, "__init__", lambda self, **more: built.append(more))
    torch.save({"args": Call(argparse.Namespace), "path": pathlib.PosixPath("x")}, tmp_path / "a.pt")
    content = files.read_weights(tmp_path / "a.pt")
    assert built == []
    assert isinstance(content["args"], StandIn)
    assert isinstance(content["path"], StandIn)


# -- what lies beside weights in the checkpoints of older programs ---------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "beside",
    [
        argparse.Namespace(lr=0.03, schedule=[120, 160], nested=argparse.Namespace(a=1)),
        OmegaConf.create({"a": 1, "b": [1, 2.0, "x", True, None], "c": {"d": "${a}"}}),
        np.float64(0.5),
        np.int64(3),
        np.arange(4, dtype=np.int32),
        np.array([argparse.Namespace(a=1)], dtype=object),
        np.dtype("float32"),
        pathlib.Path("a/b"),
        collections.defaultdict(dict, a={"b": 1}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_harmless_objects_are_read_as_stand_ins(tmp_path, beside, zipped):
    state = ResNetTrunk(18, width=0.0625).state_dict()
    content = {"epoch": 3, "state_dict": state, "args": beside, "best": {"deep": [beside]}}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    before = set(torch.serialization.get_safe_globals())
    read = files.read_weights(tmp_path / "a.pt")
    assert set(torch.serialization.get_safe_globals()) == before, "the list of safe names is as it was"
    assert read["epoch"] == 3
    found = find_trunk(read)
    assert all(torch.equal(found.state[name], state[name]) for name in state)
    assert isinstance(read["args"], StandIn | dict)
    assert type(read["args"]).__module__ in ("pirl_plugin.weights.stand_ins", "collections")


@pytest.mark.parametrize("name", [name for name in DICTIONARIES if name != "collections.defaultdict"])
def test_dictionaries_of_libraries_that_are_not_installed(tmp_path, monkeypatch, name):
    module_name, _, class_name = name.rpartition(".")
    settings = type(class_name, (dict,), {"__module__": module_name})
    parts = module_name.split(".")
    modules = {".".join(parts[: n + 1]): types.ModuleType(part) for n, part in enumerate(parts)}
    modules[module_name].__dict__[class_name] = settings
    with monkeypatch.context() as patch:
        for parent, module in modules.items():
            patch.setitem(sys.modules, parent, module)
        torch.save({"config": settings(lr=0.1, deep=settings(a=1))}, tmp_path / "a.pt")
    before = set(sys.modules)
    assert files.read_weights(tmp_path / "a.pt")["config"] == {"lr": 0.1, "deep": {"a": 1}}
    assert set(sys.modules) == before


def test_stand_ins_are_ours_and_take_anything():
    assert len(STAND_INS) == len({name for _, name in STAND_INS}) == len(OBJECTS) + len(DICTIONARIES)
    for stand_in, name in STAND_INS:
        assert stand_in.__module__ == "pirl_plugin.weights.stand_ins", name
        made = stand_in(1, [2])
        if name in OBJECTS:
            made.__setstate__({"a": 1})
            assert vars(made) == {}
            assert "not read" in repr(made)


# -- damage and attacks on memory ------------------------------------------------------------------------------------


def refused(path: Path, match: str) -> str:
    with pytest.raises(ValueError, match=match) as caught:
        files.read_weights(path)
    assert "\n" not in str(caught.value)
    assert path.name in str(caught.value)
    return str(caught.value)


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for entry in good.infolist():
            content = bytes(50_000_000) if "data/0" in entry.filename else good.read(entry)
            bomb.writestr(entry.filename, content, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    refused(tmp_path / "bomb.pt", "compressed or overlap")


def test_a_tensor_larger_than_its_values_is_not_used(tmp_path):
    """A few bytes can stand for any number of values, all the same; copying them would fill the memory."""
    state = ResNetTrunk(18, width=0.0625).state_dict()
    state["conv1.weight"] = torch.zeros(1).expand(10**6, 3, 7, 7)
    torch.save(state, tmp_path / "a.pt")
    content = files.read_weights(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"'conv1.weight' claims \(1000000, 3, 7, 7\) values, the file holds fewer"):
        find_trunk(content)


def test_containers_that_hold_each_other_come_to_an_end(tmp_path):
    tree: dict = {"x": torch.zeros(1)}
    for _ in range(60):  # 2**60 ways through
        tree = {"left": tree, "right": tree}
    with pytest.raises(ValueError, match="no trunk found"):
        find_trunk(tree)
    tree["self"] = tree
    torch.save(tree, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="no trunk found"):
        find_trunk(files.read_weights(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("text", "a str, not a tensor"),
        ([1.0, 2.0], "a list, not a tensor"),
        (np.zeros(4, dtype=np.float32), "a ndarray, not a tensor"),
        (torch.zeros(4).to_sparse(), "no dense tensor"),
        (torch.zeros(4, device="meta"), "no dense tensor"),
    ],
)
def test_entries_that_are_no_tensors_are_named(wrong, message):
    state = {**ResNetTrunk(18, width=0.0625).state_dict(), "layer2.0.bn1.weight": wrong}
    with pytest.raises(ValueError, match=f"entry 'module.layer2.0.bn1.weight' is {message}"):
        find_trunk({"state_dict": {f"module.{name}": value for name, value in state.items()}})


def test_every_kind_of_damage_is_one_line(tmp_path):
    """A file with some of its bytes changed, or cut off, is read or refused, and nothing else."""
    torch.save({"state_dict": {"a": torch.arange(20.0)}, "epoch": 3}, tmp_path / "zip.pt")
    torch.save({"a": torch.arange(20.0)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file({"a": torch.arange(20.0)}, tmp_path / "new.safetensors")
    generator, refusals = random.Random(0), 0
    for name in ("zip.pt", "old.pt", "new.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(120):
            damaged = bytearray(whole[: generator.randrange(len(whole))] if generator.random() < 0.3 else whole)
            for _ in range(generator.randrange(1, 6)):
                if damaged:
                    damaged[generator.randrange(len(damaged))] = generator.randrange(256)
            (tmp_path / f"damaged-{name}").write_bytes(damaged)
            message = message_of(tmp_path / f"damaged-{name}")
            assert message is None or ("\n" not in message and f"damaged-{name}" in message)
            refusals += message is not None
    assert refusals > 100


def message_of(path: Path) -> str | None:
    try:
        assert isinstance(files.read_weights(path), dict)
    except ValueError as error:
        return str(error)
    return None


def test_programs_are_not_weights(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "program.pt")
    assert "weights_only" not in refused(tmp_path / "program.pt", "TorchScript program.*state_dict")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    refused(tmp_path / "module.pt", r"refers to torch.nn.modules.linear.Linear.*save the model's state_dict\(\)")


def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "r50.pkl").write_bytes(pickle.dumps({"model": {"stem.conv1.weight": np.zeros(3)}}, protocol=2))
    assert "r50.pkl" in refused(tmp_path / "r50.pkl", "r50.pkl")


# -- safetensors -----------------------------------------------------------------------------------------------------


def test_safetensors_under_another_name_and_with_metadata(tmp_path):
    (tmp_path / "model.bin").write_bytes(save({"a": torch.ones(2)}, {"format": "pt", "trunk": '{"name": "x"}'}))
    content = files.read_weights(tmp_path / "model.bin")
    assert torch.equal(content["a"], torch.ones(2))
    assert content[files.METADATA] == {"format": "pt", "trunk": '{"name": "x"}'}
    assert files.trunk_config(content) == {"name": "x"}


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_spoilt_metadata(text):
    with pytest.raises(ValueError, match="metadata 'trunk' of the weights is no JSON"):
        files.trunk_config({files.METADATA: {"trunk": text}})


def test_a_safetensors_header_that_lies(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    assert "cannot read" in refused(tmp_path / "a.safetensors", "cannot read")
