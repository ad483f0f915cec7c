"""Files from outside that mean harm: refused or escaped, in one line, and without a fill of memory or disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pirl_plugin.atomic import write_text
from pirl_plugin.commands.train import _recorded_identity
from pirl_plugin.data.datasets import ImageFolder
from pirl_plugin.data.scanning import find_images
from pirl_plugin.hooks.checkpoint_files import UnusableCheckpointError, _verify_parts
from pirl_plugin.plain_yaml import read_plain_yaml
from pirl_plugin.records import read_records
from pirl_plugin.text import printable

LAUGHS = "a: &a [ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12)
)


def test_a_billion_laughs_are_not_unfolded(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(LAUGHS)
    assert len(yaml.safe_load(LAUGHS)) == 13  # well-formed: only its meaning is too large
    with pytest.raises(ValueError, match="it has anchors, which no configuration needs") as caught:
        read_plain_yaml(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)
    assert _recorded_identity(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("!!python/object/apply:os.system ['touch harm.txt']", "could not determine a constructor"),
        ("[1, 2]", "holds a list, not a mapping"),
        ("a: [", "cannot read"),
        ("[" * 100_000, "cannot read"),
        ("a: " + "x" * (1 << 21), "too large"),
        ("a: \x00", "cannot read"),
    ],
)
def test_other_yaml_that_is_no_configuration(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_plain_yaml(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ValueError, match="cannot read"):
        read_plain_yaml(tmp_path / "a.yaml")


def test_plain_yaml_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: 1\nb: {c: [x, 'R&D']}\n")
    assert read_plain_yaml(tmp_path / "a.yaml") == {"a": 1, "b": {"c": ["x", "R&D"]}}


@pytest.mark.parametrize("name", ["../outside.pt", "a/../../outside.pt", "/etc/hostname"])
def test_parts_of_a_checkpoint_do_not_climb_out_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "outside.pt").write_bytes(b"x")
    with pytest.raises(UnusableCheckpointError, match="would lie outside parts"):
        _verify_parts({name: {"bytes": 1, "sha256": "0"}}, tmp_path / "parts")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000, b"{}", b"[1]", b'{"method": '])
def test_records_that_are_none_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "result.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"result\.json' is not a result record"):
        read_records(tmp_path)


def test_names_that_no_terminal_takes_are_escaped_and_files_with_them_are_read(tmp_path: Path) -> None:
    """A line break, an escape sequence, letters of other scripts, and bytes that are no UTF-8."""
    names = [b"new\nline.png", b"\x1b[31mred.png", "ümläut 图.png".encode(), b"latin-\xe9.png"]
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            Image.fromarray(np.zeros((4, 4, 3), dtype=np.uint8)).save(file, "PNG")
    dataset = ImageFolder(str(tmp_path))
    assert len(dataset) == 4
    assert [dataset[image_id][1] for image_id in range(4)] == [0, 1, 2, 3]
    assert len(dataset.fingerprint) == 64
    shown = {printable(dataset.file_name(image_id)) for image_id in range(4)}
    assert shown == {"new\\nline.png", "\\x1b[31mred.png", "ümläut 图.png", "latin-\\udce9.png"}
    write_text("".join(f"{name}\n" for name in shown), tmp_path / "list.txt")
    write_text(dataset.file_name(2) + dataset.file_name(1), tmp_path / "raw.txt")  # their own bytes


def test_a_folder_that_cannot_be_read_is_left_out_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tests may run as root, whom no permission stops."""
    for folder in ("a", "secret"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(b"")
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert find_images(tmp_path) == (["a/x.png"], 0)
    assert "The folder secret cannot be read: Permission denied. It is left out." in caplog.text
    monkeypatch.setattr(os, "scandir", lambda path: refuse("secret"))
    with pytest.raises(PermissionError):
        find_images(tmp_path)
