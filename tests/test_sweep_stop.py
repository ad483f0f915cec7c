"""A sweep that is told to stop: its jobs end in good order, trainings with their state saved, and it says so."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from run_command import signalled

from pirl_plugin.commands.running import PREEMPTED, Preempted
from pirl_plugin.commands.sweep import _stopping_in_order
from pirl_plugin.signals import told_to_stop
from pirl_plugin.sweep import run as sweep_run
from pirl_plugin.sweep.launchers import LocalLauncher
from pirl_plugin.sweep.plan import Run
from pirl_plugin.sweep.run import Execution
from pirl_plugin.sweep.state import read_outcome
from pirl_plugin.weights.files import read_weights

TRAINING = Run("a", "train", ("method=a",), "a", "a", "", 0)
MEASURING = Run("b", "benchmark", ("benchmark=b",), "b", "b", "", 0, "b")
LONG = 240.0


def folder_of(arguments: Sequence[str]) -> Path:
    return Path(dict(argument.split("=", 1) for argument in arguments)["run_dir"])


def orderly(arguments: Sequence[str]) -> int:
    """As the commands do: a training saves at SIGTERM, a benchmark ends at Ctrl-C; half a second later, each."""
    folder = folder_of(arguments)
    told: list[str] = []
    try:
        with told_to_stop(told.append):
            (folder / "started").touch()
            end = time.monotonic() + LONG
            while not told and time.monotonic() < end:
                time.sleep(0.01)
    except KeyboardInterrupt:
        told.append("SIGINT")
    time.sleep(0.5)
    (folder / "saved").write_text(told[0])
    return PREEMPTED if told[0] == "SIGTERM" else 130


def stubborn(arguments: Sequence[str]) -> int:
    """Takes no notice."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    (folder_of(arguments) / "started").touch()
    time.sleep(LONG)
    return 0


def interrupt_when_all_run(folder: Path, entry: Callable[[Sequence[str]], int]) -> Execution:
    launcher = LocalLauncher(jobs=2, threads=1)
    made = Execution([TRAINING, MEASURING], folder, launcher, {"train": entry, "benchmark": entry})

    def watch(states: object) -> None:
        if all((folder / name / "started").exists() for name in ("a", "b")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made.run(watch)
    assert not any(process.is_alive() for _, process in launcher._running)
    return made


def test_jobs_end_in_good_order_and_are_neither_finished_nor_failed(tmp_path, capfd):
    interrupt_when_all_run(tmp_path, orderly)
    assert [(tmp_path / name / "saved").read_text() for name in ("a", "b")] == ["SIGTERM", "SIGINT"]
    assert [read_outcome(tmp_path / name, name) for name in ("a", "b")] == [None, None]
    assert "Traceback" not in capfd.readouterr().err


def test_one_that_takes_no_notice_is_ended_by_force(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_run, "_PATIENCE", 0.2)
    interrupt_when_all_run(tmp_path, stubborn)
    assert read_outcome(tmp_path / "a", "a") is None


def test_interrupted_once_more_it_does_not_wait(tmp_path, monkeypatch):
    def impatient(self: Execution) -> None:
        monkeypatch.setattr(sweep_run.time, "sleep", once_more)
        end(self)

    def once_more(seconds: float) -> None:
        raise KeyboardInterrupt

    end = Execution._end
    monkeypatch.setattr(Execution, "_end", impatient)
    start = time.monotonic()
    interrupt_when_all_run(tmp_path, stubborn)
    assert time.monotonic() - start < LONG / 4


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [(signal.SIGTERM, Preempted, "SIGTERM: the same"), (signal.SIGINT, KeyboardInterrupt, ": the same")],
)
def test_a_run_in_this_process_cannot_take_the_end_for_its_own_failure(number, kind, words):
    def swallow() -> None:
        with contextlib.suppress(Exception):
            signal.raise_signal(number)
        pytest.fail("went on")

    with pytest.raises(kind, match=f"^{words} command goes on$"), _stopping_in_order():
        swallow()


SWEEP = ["sweep=demo", "methods=[npid_32]", "benchmarks=[knn]", "train.dataset.num_images=32", "train.batch_size=16"]
SWEEP += ["train.trunk.width=0.125", "train.loss.num_negatives=8", "train.num_workers=0", "train.num_epochs=100000"]
SWEEP += ["measure.dataset.num_images=80"]


@pytest.mark.parametrize("launcher", ["inline", "local"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_the_command_ends_with_one_line_and_a_checkpoint_of_what_was_running(
    launcher: str, number: signal.Signals, code: int, tmp_path: Path, repository_root: Path
) -> None:
    store = tmp_path / "store"
    chosen = [*SWEEP, f"launcher={launcher}", f"store={store}", f"run_dir={tmp_path / 'sweep'}"]
    tool = repository_root / "tools" / "sweep.py"
    outcome = signalled(tool, chosen, number, lambda: list(store.glob("*/metrics.jsonl")))
    assert outcome.code == code, outcome.err
    assert outcome.err.splitlines()[-1].endswith("the same command goes on")
    assert "Traceback" not in outcome.err
    assert list(store.glob("*/outcome.json")) == []
    (saved,) = store.glob("*/checkpoints/*.pt")
    assert read_weights(saved)["classy_state_dict"]["num_updates"] > 0
