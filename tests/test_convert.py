"""``tools/convert.py`` as users run it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from run_command import Outcome, run

from pirl_plugin.commands.convert import default_out, main
from pirl_plugin.models import ResNetTrunk
from pirl_plugin.weights import files, find_trunk


@pytest.fixture
def moco(tmp_path: Path) -> Path:
    trunk = ResNetTrunk(18, width=0.0625).state_dict()
    state = {f"module.encoder_q.{name}": value for name, value in trunk.items()}
    state |= {f"module.encoder_k.{name}": value + 1 for name, value in trunk.items()}
    state |= {"module.encoder_q.fc.weight": torch.zeros(2, 2), "module.queue": torch.zeros(2)}
    torch.save({"epoch": 3, "arch": "resnet18", "state_dict": state}, tmp_path / "moco.pth.tar")
    return tmp_path / "moco.pth.tar"


def convert(*arguments: object) -> Outcome:
    return run(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("torchvision", "moco-torchvision.pth"),
        ("timm", "moco-timm.pth"),
        ("detectron2", "moco-detectron2.pth"),
        ("safetensors", "moco.safetensors"),
    ],
)
def test_a_file_is_written_beside_the_checkpoint(moco, target, name):
    outcome = convert(moco, "--to", target)
    assert (outcome.code, outcome.err) == (0, "")
    out = moco.with_name(name)
    assert f"wrote     {out}" in outcome.out
    before, after = (find_trunk(files.read_weights(path)) for path in (moco, out))
    assert after.dropped == []
    assert after.state.keys() == before.state.keys()
    assert all(torch.equal(after.state[key], before.state[key]) for key in before.state)
    for line in (
        "found     MoCo checkpoint: ResNet-18, width 0.0625, 7x7 stem",
        "matched   120 entries under 'state_dict.module.encoder_q.'",
        "dropped   122: module.encoder_k.* (120), module.encoder_q.fc.weight, module.queue",
        "missing   0",
        "note      took the trunk under 'state_dict.module.encoder_q.' (the network that training followed)",
    ):
        assert line in outcome.out


def test_names_of_files():
    assert default_out(Path("a/x.torch"), "timm") == Path("a/x-timm.pth")
    assert default_out(Path("x"), "safetensors") == Path("x.safetensors")
    assert default_out(Path("x.v2.pth.tar"), "detectron2") == Path("x.v2-detectron2.pth")


def test_whole_networks_are_told_how_to_load_the_file(tmp_path):
    torch.save(ResNetTrunk(18).state_dict(), tmp_path / "r18.pth")
    outcome = convert(tmp_path / "r18.pth", "--to", "detectron2", "--out", tmp_path / "new" / "d.pkl")
    assert outcome.code == 0
    assert (tmp_path / "new" / "d.pkl").is_file()
    assert "MODEL.RESNETS.STRIDE_IN_1X1 False INPUT.FORMAT RGB" in outcome.out
    outcome = convert(tmp_path / "r18.pth", "--to", "timm", "--out", tmp_path / "t.safetensors")
    assert f'timm.create_model("resnet18", num_classes=0, checkpoint_path="{tmp_path}/t.safetensors")' in outcome.out
    outcome = convert(tmp_path / "r18.pth", "--to", "torchvision", "--out", tmp_path / "t.pt")
    assert f"resnet18().load_state_dict(torch.load('{tmp_path}/t.pt'), strict=False)" in outcome.out


def test_a_report_alone_writes_nothing(moco):
    outcome = convert(moco, "--report")
    assert outcome.code == 0
    assert "module.encoder_q.layer1.0.conv1.weight" in outcome.out
    assert [path.name for path in moco.parent.iterdir()] == [moco.name]


def test_another_network_of_the_file(moco, tmp_path):
    out = tmp_path / "k.pth"
    assert convert(moco, "--to", "torchvision", "--out", out, "--prefix", "state_dict.module.encoder_k").code == 0
    other = files.read_weights(moco)["state_dict"]["module.encoder_k.conv1.weight"]
    assert torch.equal(files.read_weights(out)["conv1.weight"], other)
    outcome = convert(moco, "--to", "torchvision", "--force", "--prefix", "nets")
    assert outcome.code == 1
    assert outcome.err.startswith("error: no trunk under the prefix 'nets'; there are trunks under: 'state_dict.module")


def test_nothing_is_replaced_unless_told(moco, tmp_path):
    out = tmp_path / "a.pth"
    out.write_text("mine")
    outcome = convert(moco, "--to", "torchvision", "--out", out)
    assert outcome.code == 2
    assert "exists: give another --out, or --force" in outcome.err
    assert out.read_text() == "mine"
    assert convert(moco, "--to", "torchvision", "--out", out, "--force").code == 0
    assert "conv1.weight" in files.read_weights(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--to is missing: one of torchvision, timm, detectron2, safetensors (or --report alone"),
        (["--report", "--out", "x.pth"], "--to is missing"),
        (["--to", "caffe"], "invalid choice: 'caffe'"),
        (["--to", "timm", "--out", "x.pkl"], "--out must end in .pth or .pt or .safetensors for timm, got 'x.pkl'"),
        (["--to", "detectron2", "--out", "x.safetensors"], "--out must end in .pth or .pkl for detectron2"),
    ],
)
def test_mistakes_in_the_command(moco, monkeypatch, arguments, message):
    monkeypatch.chdir(moco.parent)
    outcome = convert(moco, *arguments)
    assert outcome.code == 2
    assert message in outcome.err.replace("\n", " ")
    assert [path.name for path in moco.parent.iterdir()] == [moco.name]


def test_the_checkpoint_itself_is_never_replaced(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(ResNetTrunk(18, width=0.0625).state_dict(), path)
    (tmp_path / "link.pth").symlink_to(path)
    for out in (path, tmp_path / "link.pth"):
        outcome = convert(path, "--to", "torchvision", "--out", out, "--force")
        assert outcome.code == 2
        assert "is the checkpoint itself" in outcome.err
    (tmp_path / "folder.pth").mkdir()
    assert "is a folder" in convert(path, "--to", "torchvision", "--out", tmp_path / "folder.pth").err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "no trunk found in the checkpoint: its keys are epoch"),
        ([1], "holds a list"),
        ({"layer1.0.conv1.weight": torch.zeros(1)}, "conv1.weight must be (channels, 3, k, k), it is missing"),
        ({**ResNetTrunk(18, width=0.0625).state_dict(), "bn1.bias": "x"}, "entry 'bn1.bias' is a str, not a tensor"),
    ],
)
def test_files_that_cannot_be_converted(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    outcome = convert(tmp_path / "a.pth", "--to", "timm")
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert len(outcome.err.splitlines()) == 1
    assert message in outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_missing_file(tmp_path):
    outcome = convert(tmp_path / "none.pth", "--to", "timm")
    assert outcome.code == 1
    assert "no weights file" in outcome.err
