"""Every command and program in README.md and docs/ is run, in a tiny form; what is only checked says so there.

A block is run as it stands but for the replacements below. ``<!-- long run -->`` before a block: its commands are
composed and checked only. ``<!-- output -->`` before a console block: what it shows under a command must come out so.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_command import Outcome, run

from pirl_plugin.benchmarks.runner import problems_of
from pirl_plugin.commands import bench, benchmark, compare, convert, published, show_curves, show_views, sweep, train
from pirl_plugin.commands import list as list_command
from pirl_plugin.config import groups, load
from pirl_plugin.hooks.checkpoint import checkpoints

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

MAINS = {
    "tools/train.py": train.main,
    "tools/benchmark.py": benchmark.main,
    "tools/bench.py": bench.main,
    "tools/convert.py": convert.main,
    "tools/compare.py": compare.main,
    "tools/list.py": list_command.main,
    "tools/published.py": published.main,
    "tools/sweep.py": sweep.main,
    "tools/show_views.py": show_views.main,
    "tools/show_curves.py": show_curves.main,
}
# said once more at the end of a command, where it makes the run tiny: the last one counts
TINY = {
    "tools/train.py": ["num_epochs=1", "batch_size=4", "device=cpu", "trunk.width=0.125", "loss.num_negatives=4"],
    "tools/benchmark.py": ["device=cpu"],
    "tools/bench.py": ["negatives", "--repeats=1"],
    "tools/show_views.py": [],
}
TINY_RANDOM = ["trunk.width=0.125"]  # a checkpoint says itself how wide it is
TINY_SCENES = ["dataset.num_images=16"]
# names that stand for something of the reader's: each becomes a tiny one
PLACEHOLDERS = {"DIR": "photos", "LABELLED_DIR": "labelled"}  # CHECKPOINT: the last run's, see in_tiny
PACKAGES = {"pirl_plugin", "."}


@dataclass(frozen=True)
class Block:
    """A fenced block of a document, with the comment right before it."""

    place: str
    language: str
    text: str
    comment: str

    def commands(self) -> list[str]:
        """Commands without prompts and remarks, continued lines joined."""
        joined = self.text.replace("\\\n", " ")
        lines = [line for line in joined.splitlines() if self.language != "console" or line.startswith("$ ")]
        found = [re.sub(r"(^|\s)#.*$", "", line.removeprefix("$ ")).strip() for line in lines]
        return [command for command in found if command]


def blocks() -> list[Block]:
    pattern = re.compile(
        r"(?:<!--\s*(?P<comment>[^>]*?)\s*-->\n+)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.S | re.M
    )
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in pattern.finditer(text):
            place = f"{document.name}, line {text.count(chr(10), 0, match.start('language')) + 1}"
            found.append(Block(place, match["language"], match["text"], match["comment"] or ""))
    return found


SHELL = [block for block in blocks() if block.language in ("bash", "console")]
PROGRAMS = [block for block in blocks() if block.language == "python"]


def images_in(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.random.default_rng([index, len(folder.name)]).integers(0, 256, (48, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the reader works in: photos, labelled photos, and a run of their own."""
    folder = tmp_path_factory.mktemp("reader")
    images_in(folder / "photos", 8)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            images_in(folder / "labelled" / split / name, 4)
    tiny = ["dataset=image_folder", f"dataset.root={folder / 'photos'}", *TINY["tools/train.py"]]
    assert run(train.main, ["method=pirl_32", "trunk=resnet18_narrow", *tiny, f"run_dir={folder / 'run'}"]).code == 0
    return folder


def in_tiny(command: str, reader: Path, last_run: str = "run") -> tuple[str, list[str]]:
    """The tool and its arguments, with placeholders filled in and sizes cut; a checkpoint is the last run's."""
    words = shlex.split(command)
    if words[0] == "torchrun":  # the same run in one process; that two give the same is tested with the task
        assert all(
            re.fullmatch(r"--(nproc_per_node|nnodes|standalone)(=\d+)?", word) for word in words[1:-1] if word[0] == "-"
        )
        words = [
            "python",
            *[word for word in words[1:] if not word.startswith(("--nproc", "--nnodes", "--standalone"))],
        ]
    assert words[0] == "python", f"unknown command: {command}"
    words = words[1:] if words[1] != "-m" else words[2:]
    tool, arguments = words[0], words[1:]
    assert tool in MAINS, f"unknown command: {command}"
    checkpoint = checkpoints(reader / last_run)[-1]
    filled = []
    for argument in arguments:
        key, equals, value = argument.rpartition("=")
        if value in PLACEHOLDERS:
            value = str(reader / PLACEHOLDERS[value])
        elif argument == "CHECKPOINT" or (key == "weights" and value != "random" and not (reader / value).is_file()):
            value = str(checkpoint)
        filled.append(f"{key}{equals}{value}")
    if tool not in TINY or "--help" in filled:
        return tool, filled
    own_images = any(argument.startswith("dataset=") and "scenes" not in argument for argument in filled)
    if not own_images and tool != "tools/bench.py":
        filled += TINY_SCENES
    return tool, [*filled, *TINY[tool], *(TINY_RANDOM if "weights=random" in filled else [])]


def known_without_running(command: str, root: Path) -> bool:
    """Whether the command sets something up: then its parts are held against the files, and it is not run."""
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (root / "Makefile").read_text(), re.M)
        assert all(word in targets or "=" in word for word in words[1:]), f"no such target: {command}"
        return True
    if words[:2] == ["git", "clone"] or words[0] == "cd":
        return True
    if words[:2] == ["pip", "install"] or words[:4] == ["python", "-m", "pip", "install"]:
        named = [word for word in words[words.index("install") + 1 :] if not word.startswith("-")]
        assert all(re.sub(r"\[.*\]", "", word) in PACKAGES for word in named), f"unknown package: {command}"
        return True
    return False


def assert_output(block: Block, command: str, outcome: Outcome) -> None:
    """What the block shows under a command appears, line by line; ``...`` stands for anything."""
    shown: list[str] = []
    inside = False
    for line in block.text.splitlines():
        if line.startswith("$ "):
            inside = line.removeprefix("$ ").strip() == command
        elif inside and line.strip():
            shown.append(line)
    for line in shown:
        pattern = ".*".join(re.escape(part.rstrip()) for part in line.split("..."))
        assert re.search(pattern, outcome.out + outcome.err), f"not said: {line!r} in {outcome.out + outcome.err}"


@pytest.mark.filterwarnings("ignore:num_negatives")
@pytest.mark.parametrize("block", SHELL, ids=[block.place for block in SHELL])
def test_the_commands_of_a_block(
    block: Block, reader: Path, monkeypatch: pytest.MonkeyPatch, repository_root: Path
) -> None:
    monkeypatch.chdir(reader)
    last_run = "run"
    for command in block.commands():
        if known_without_running(command, repository_root):
            continue
        if "\nerror:" in block.text:  # the mistake as it stands
            tool, arguments, code = shlex.split(command)[1], shlex.split(command)[2:], 2
        else:
            tool, arguments, code = *in_tiny(command, reader, last_run), 0
        if "long run" in block.comment:
            only_check(tool, arguments)
            continue
        outcome = run(MAINS[tool], arguments)
        assert outcome.code == code, f"{command}\n{outcome.err}"
        assert "Traceback" not in outcome.err
        if code or "output" in block.comment:
            assert_output(block, command, outcome)
        if tool == "tools/train.py" and not code:
            last_run = next((word.partition("=")[2] for word in arguments if word.startswith("run_dir=")), last_run)


def only_check(tool: str, arguments: list[str]) -> None:
    known = ("tools/train.py", "tools/benchmark.py", "tools/sweep.py")
    assert tool in known, "only these have a configuration to check"
    if tool == "tools/train.py":
        assert load("train", arguments)
    elif tool == "tools/sweep.py":
        assert load("sweep", arguments, sweep.problems_of)
    else:
        assert load("benchmark", arguments, problems_of)


@pytest.mark.parametrize("block", PROGRAMS, ids=[block.place for block in PROGRAMS])
def test_a_program_of_the_readme(
    block: Block, reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = block.text.replace("CHECKPOINT", str(checkpoints(reader / "run")[-1]))
    exec(compile(text, block.place, "exec"), {"__name__": "__main__"})
    wanted = "[64, 128]" if text == block.text else "[8, 64]) torch.Size([8, 32, 16, 16]"  # a trunk an eighth as wide
    assert f"torch.Size({wanted})" in capsys.readouterr().out


@pytest.mark.parametrize("tool", ["tools/train.py", "tools/benchmark.py", "tools/sweep.py"])
def test_the_examples_of_help(tool: str, reader: Path) -> None:
    text = run(MAINS[tool], ["--help"]).out.replace("\\\n", " ")
    found = [line for line in text.splitlines() if tool in line and "=" in line]
    assert len(found) > 2
    for line in found:
        command = re.split(r"\s{3,}(?=[A-Za-z])", line.strip())[0]  # what it does stands behind it
        named, arguments = in_tiny(command, reader)
        only_check(named, [argument for argument in arguments if not argument.startswith("--")])


def test_there_are_commands_to_test() -> None:
    assert any("tools/train.py" in command for block in SHELL for command in block.commands())
    assert PROGRAMS


def test_a_command_that_nobody_knows_fails(reader: Path, repository_root: Path) -> None:
    for command in ("python tools/trian.py method=pirl", "curl http://example.org", "python -m nothing"):
        assert not known_without_running(command, repository_root)
        with pytest.raises(AssertionError, match="unknown command"):
            in_tiny(command, reader)
    with pytest.raises(AssertionError, match="no such target"):
        known_without_running("make coffee", repository_root)
    with pytest.raises(AssertionError, match="unknown package"):
        known_without_running("pip install something-else", repository_root)


def test_options_of_tables_exist() -> None:
    """What a document names in the form ``group=option`` exists."""
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    pattern = r"\b(method|trunk|benchmark|loss|optimizer|sweep|launcher)=(\w+)"
    from_text = set(re.findall(pattern, text)) - {("trunk", "resnt18")}
    assert from_text
    wrong = [found for found in sorted(from_text) if found[1] not in (*groups()[found[0]], "my_method")]
    assert wrong == []
