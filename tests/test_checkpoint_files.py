"""Checkpoints that cannot be used are found, named and passed over: cut off, changed, swapped, or of another run."""

from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from classy_vision.hooks import ClassyHook
from classy_vision.trainer import LocalTrainer
from run_command import run
from small_task import build, train
from test_checkpoint_resume import COMMAND, resume, settings

from pirl_plugin.atomic import replacing
from pirl_plugin.commands.train import main
from pirl_plugin.hooks import checkpoint as checkpoint_module
from pirl_plugin.hooks.background import BackgroundWriter, HostCopies
from pirl_plugin.hooks.checkpoint import checkpoint_folder, checkpoints
from pirl_plugin.hooks.checkpoint_files import (
    SET_ASIDE,
    UnusableCheckpointError,
    newest_usable,
    read_checkpoint,
    remove_left_overs,
)
from pirl_plugin.weights.files import read_weights
from pirl_plugin.weights.sealed import is_sealed, verify_seal, write_sealed


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 epochs of 3 steps with its checkpoints of steps 3 and 6, made by the command."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    outcome = run(main, [*COMMAND, f"run_dir={folder}"])
    assert outcome.code == 0, outcome.err
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


# -- the seal ----------------------------------------------------------------------------------------------------------


def test_a_sealed_file_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    content = {"a": torch.arange(5.0), "b": [1, (2, "x")]}
    checksum = write_sealed(content, tmp_path / "new" / "a.pt")
    assert verify_seal(tmp_path / "new" / "a.pt") == checksum
    for read in (read_weights(tmp_path / "new" / "a.pt"), torch.load(tmp_path / "new" / "a.pt", weights_only=True)):
        assert torch.equal(read["a"], content["a"])
        assert read["b"] == content["b"]
    torch.save(content, tmp_path / "plain.pt")
    assert (is_sealed(tmp_path / "new" / "a.pt"), is_sealed(tmp_path / "plain.pt")) == (True, False)
    with pytest.raises(ValueError, match="ends without a checksum"):
        verify_seal(tmp_path / "plain.pt")


def test_a_benchmark_does_not_read_a_damaged_one_either(tmp_path: Path) -> None:
    write_sealed({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*a\.pt' as weights: its checksum does not match its content"):
        read_weights(tmp_path / "a.pt")


def test_every_single_bit_counts(tmp_path: Path) -> None:
    """One bit in each of the bytes, and the file cut off after each of them."""
    write_sealed({"a": 1}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    generator = random.Random(0)
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << generator.randrange(8)
        for damaged in (bytes(changed), whole[:place]):
            (tmp_path / "b.pt").write_bytes(damaged)
            with pytest.raises(ValueError, match="checksum"):
                verify_seal(tmp_path / "b.pt")


# -- what resume takes -------------------------------------------------------------------------------------------------


def truncated(path: Path, generator: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: generator.randrange(path.stat().st_size)])


def flipped(path: Path, generator: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def zeroed(path: Path, generator: random.Random) -> None:
    """What a power cut leaves of blocks that were never written."""
    content = bytearray(path.read_bytes())
    start = generator.randrange(len(content))
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    path.write_bytes(content if any(content[start:]) or start else b"")


def swapped(path: Path, generator: random.Random) -> None:
    """Another step's content under this name."""
    shutil.copyfile(checkpoints(path.parent.parent)[0], path)


def another_file(path: Path, generator: random.Random) -> None:
    write_sealed({"state_dict": {"conv1.weight": torch.zeros(3)}}, path)


def a_list(path: Path, generator: random.Random) -> None:
    write_sealed([1, 2], path)


def pickled(path: Path, generator: random.Random) -> None:
    path.write_bytes(b"cos\nsystem\n(S'touch harm.txt'\ntR.")


DAMAGE = [truncated, flipped, zeroed, swapped, another_file, a_list, pickled]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_taken(
    copied: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in range(3):
        good, bad = checkpoints(copied)
        whole = bad.read_bytes()
        damage(bad, random.Random(seed))
        caplog.clear()
        path, content = newest_usable(copied)
        assert path == good
        assert content["classy_state_dict"]["num_updates"] == 24
        assert f"{bad} cannot be used" in caplog.text
        assert "\n" not in caplog.records[0].getMessage()
        assert not bad.exists()
        aside = bad.with_name(bad.name + SET_ASIDE)
        aside.unlink()
        bad.write_bytes(whole)
    assert newest_usable(copied)[0] == bad


def test_the_command_goes_on_from_the_previous_one(copied: Path, finished: Path) -> None:
    flipped(checkpoints(copied)[-1], random.Random(0))
    outcome = run(main, [*COMMAND, f"run_dir={copied}"])
    assert outcome.code == 0, outcome.err
    assert "step_000000006.pt cannot be used: its checksum does not match its content" in outcome.err
    assert f"Going on from {checkpoints(copied)[0]}" in outcome.err
    left, right = (read_weights(checkpoints(folder)[-1])["classy_state_dict"]["loss"] for folder in (copied, finished))
    assert torch.equal(left["memory_bank.rows"], right["memory_bank.rows"])


def test_where_all_are_damaged_nothing_is_begun_anew(copied: Path) -> None:
    for path in checkpoints(copied):
        flipped(path, random.Random(1))
    for _ in range(2):  # nor the second time
        outcome = run(main, [*COMMAND, f"run_dir={copied}"])
        assert outcome.code == 1
        assert "no checkpoint in" in outcome.err.splitlines()[-1]
        assert "step_000000003.pt: its checksum" in outcome.err.splitlines()[-1]
    assert len(checkpoints(copied)) == 2


def test_a_checkpoint_of_another_run_is_passed_over(copied: Path, tmp_path: Path) -> None:
    """The same step of a run with another seed, put into this folder."""
    other = tmp_path / "other"
    assert run(main, [*COMMAND, f"run_dir={other}", "seed=1"]).code == 0
    shutil.copyfile(checkpoints(other)[-1], checkpoints(copied)[-1])
    outcome = run(main, [*COMMAND, f"run_dir={copied}"])
    assert outcome.code == 0, outcome.err
    assert "it is of another run than this folder" in outcome.err
    assert "Going on from" in outcome.err


def test_images_that_changed_under_a_checkpoint_are_noticed(copied: Path) -> None:
    path = checkpoints(copied)[0]
    checkpoints(copied)[-1].unlink()
    content = read_checkpoint(path)
    content["dataset"]["fingerprint"] = "of other images"
    write_sealed(content, path)
    outcome = run(main, [*COMMAND, f"run_dir={copied}"])
    assert outcome.code == 1
    assert "The dataset has changed since the checkpoint was written (other names or sizes" in outcome.err


# -- writing -----------------------------------------------------------------------------------------------------------


def test_what_killed_processes_left_is_removed(copied: Path) -> None:
    folder = checkpoint_folder(copied)
    (folder / ".step_000000009.pt.123.tmp").write_bytes(b"half")
    (folder / "step_000000009.parts").mkdir()
    (folder / ".step_000000012.parts.tmp").mkdir()
    (folder / "step_000000006.parts").mkdir()  # of a checkpoint that is there
    remove_left_overs(copied)
    assert {path.name for path in folder.iterdir()} == {
        "step_000000003.pt",
        "step_000000006.pt",
        "step_000000006.parts",
    }


def test_a_writer_s_error_is_raised_in_the_run_and_the_last_good_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full from the second checkpoint on."""
    written: list[Path] = []

    def full(content: Any, path: Path) -> str:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        return write_sealed(content, path)

    monkeypatch.setattr(checkpoint_module, "write_sealed", full)
    with pytest.raises(OSError, match=r"cannot write .*step_000000002.pt: No space left on device; the last good one"):
        train(**settings(tmp_path, checkpoint={"every_steps": 1}))
    assert [path.name for path in checkpoints(tmp_path)] == ["step_000000001.pt"]
    assert newest_usable(tmp_path)[1]["classy_state_dict"]["num_updates"] == 8


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sealed({"a": 1}, tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    with open("/dev/full", "wb") as full, pytest.raises(OSError, match="No space left"):
        full.write(bytes(100_000))

    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.left = file, 500

        def write(self, content: bytes) -> int:
            self.left -= len(content)
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(content)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    def full_disk(path: Any) -> Any:
        class Context:
            def __enter__(self) -> Any:
                self.inner = replacing(path)
                return Full(self.inner.__enter__())

            def __exit__(self, *error: Any) -> Any:
                return self.inner.__exit__(*error)

        return Context()

    monkeypatch.setattr("pirl_plugin.weights.sealed.replacing", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_sealed({"a": torch.zeros(10_000)}, tmp_path / "a.pt")
    assert (tmp_path / "a.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_the_training_does_not_wait_for_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first file is held back until the run has made two more steps."""
    task = build(**settings(tmp_path, checkpoint={"every_steps": 1}, num_epochs=1))
    go_on, passed = threading.Event(), []

    def slow(content: Any, path: Path) -> str:
        if not passed:
            assert go_on.wait(60)
        passed.append((path.name, task.step_idx))
        return write_sealed(content, path)

    monkeypatch.setattr(checkpoint_module, "write_sealed", slow)
    train_step = task.train_step

    def step() -> None:
        train_step()
        if task.step_idx == 2:
            go_on.set()

    task.train_step = step  # type: ignore[method-assign]
    LocalTrainer().train(task)
    assert passed[0][0] == "step_000000001.pt"
    assert passed[0][1] >= 2


def test_a_copy_is_of_its_moment() -> None:
    live = {"a": torch.zeros(3), "b": [torch.ones(2), (1, "x")]}
    copy = HostCopies().copy(live)
    live["a"] += 1
    live["b"][0].zero_()
    assert torch.equal(copy["a"], torch.zeros(3))
    assert torch.equal(copy["b"][0], torch.ones(2))
    assert copy["b"][1] == (1, "x")


def test_the_next_copy_takes_the_memory_of_the_one_before() -> None:
    copies = HostCopies()
    first = copies.copy({"a": torch.zeros(3), "b": [torch.zeros(2)]})
    second = copies.copy({"a": torch.ones(3), "b": [torch.ones(4)]})  # b has grown
    assert second["a"].data_ptr() == first["a"].data_ptr()
    assert torch.equal(second["a"], torch.ones(3))
    assert torch.equal(second["b"][0], torch.ones(4))
    assert torch.equal(first["b"][0], torch.zeros(2))


def test_the_background_writer_raises_once() -> None:
    writer = BackgroundWriter()

    def fail() -> None:
        raise OSError("broken")

    writer.start(fail)
    with pytest.raises(OSError, match="broken"):
        writer.wait()
    writer.wait()


# -- which are kept, and what is in them -------------------------------------------------------------------------------


def names(folder: Path) -> list[int]:
    return [int(path.stem.partition("_")[2]) for path in checkpoints(folder)]


def test_the_best_is_kept(tmp_path: Path) -> None:
    values = {0: 3.0, 1: 1.0, 2: 2.0, 3: 4.0}

    class Health(ClassyHook):
        on_start = on_phase_start = on_step = on_end = ClassyHook._noop

        def on_phase_end(self, task: Any) -> None:
            task.health["sign"] = values[task.epoch]

    saving = {"keep": 1, "keep_best": "sign", "every_epochs": 1}
    task = build(**settings(tmp_path, num_epochs=4, checkpoint=saving))
    task.hooks.insert(0, Health())
    LocalTrainer().train(task)
    assert names(tmp_path) == [6, 12]
    with pytest.raises(ValueError, match="no value 'nothing'; there are loss"):
        train(**settings(tmp_path / "b", checkpoint={"keep_best": "nothing"}))


def test_the_bank_in_every_second(tmp_path: Path) -> None:
    """Steps 3, 9, 15 with it, 6 and 12 without; a run goes on from those alone."""
    saving = {"bank_every": 2, "keep": 2}
    train(**settings(tmp_path, num_epochs=5, checkpoint=saving))
    assert names(tmp_path) == [9, 12, 15]
    assert [bool(read_weights(path)["classy_state_dict"]["loss"]) for path in checkpoints(tmp_path)] == [
        True,
        False,
        True,
    ]
    with pytest.raises(UnusableCheckpointError, match="without the memory bank"):
        read_checkpoint(checkpoints(tmp_path)[1])
    checkpoints(tmp_path)[-1].unlink()
    assert newest_usable(tmp_path)[0].name == "step_000000009.pt"


# -- parts of the ranks' own -------------------------------------------------------------------------------------------


class Parts:
    """A bank that keeps its rows in files of its own."""

    def __init__(self, bank: Any) -> None:
        self.bank = bank

    def save_parts(self, folder: Path) -> None:
        torch.save(self.bank.rows.clone(), folder / "rows_0.pt")

    def load_parts(self, folder: Path) -> None:
        self.bank.rows.copy_(torch.load(folder / "rows_0.pt", weights_only=True))


def with_parts(task: Any) -> Any:
    bank = task.base_loss.memory_bank
    parts = Parts(bank)
    task.base_loss.save_parts, task.base_loss.load_parts = parts.save_parts, parts.load_parts
    return task


def test_parts_are_written_verified_given_back_and_removed_with_their_checkpoint(tmp_path: Path) -> None:
    first = with_parts(build(**settings(tmp_path, checkpoint={"keep": 2})))
    LocalTrainer().train(first)
    folder = checkpoint_folder(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_000000006.parts",
        "step_000000006.pt",
        "step_000000009.parts",
        "step_000000009.pt",
    ]
    content = read_checkpoint(checkpoints(tmp_path)[-1])
    content["classy_state_dict"]["loss"]["memory_bank.rows"].zero_()  # only the parts can bring them back
    second = with_parts(build(**settings(tmp_path)))
    second._set_checkpoint_dict(content)
    second.prepare()
    assert torch.equal(second.base_loss.memory_bank.rows, first.base_loss.memory_bank.rows)

    plain = build(**settings(tmp_path))
    plain._set_checkpoint_dict(content)
    with pytest.raises(ValueError, match="of a run with another kind of memory bank"):
        plain.prepare()

    flipped(folder / "step_000000009.parts" / "rows_0.pt", random.Random(0))
    assert newest_usable(tmp_path)[0].name == "step_000000006.pt"
    (folder / "step_000000006.parts" / "rows_0.pt").unlink()
    with pytest.raises(UnusableCheckpointError, match=r"step_000000006.parts/rows_0.pt is missing"):
        read_checkpoint(checkpoints(tmp_path)[0])


def test_a_rank_that_cannot_write_its_part_ends_the_run(tmp_path: Path) -> None:
    task = with_parts(build(**settings(tmp_path)))

    def broken(folder: Path) -> None:
        raise OSError("no disk here")

    task.base_loss.save_parts = broken
    with pytest.raises(OSError, match="rank 0: OSError: no disk here"):
        LocalTrainer().train(task)
    assert checkpoints(tmp_path) == []


def test_a_checkpoint_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    train(**settings(tmp_path, num_epochs=1))
    with pytest.raises(ValueError, match="the checkpoint does not fit this run: .*size mismatch") as caught:
        resume(tmp_path, num_epochs=1, trunk={"name": "resnet_trunk", "depth": 18, "width": 0.25, "stem": "small"})
    assert "\n" not in str(caught.value)
