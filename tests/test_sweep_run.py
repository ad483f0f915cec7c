"""Making a plan: order, capacity, failures, what is skipped, and starting again; then real processes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import runpy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from run_command import locked_elsewhere

from pirl_plugin.commands.running import log_to
from pirl_plugin.sweep import jobs, launchers
from pirl_plugin.sweep.jobs import CONSOLE, Job, newest_checkpoint, perform
from pirl_plugin.sweep.launchers import Handle, InlineLauncher, Launcher, LocalLauncher
from pirl_plugin.sweep.plan import Run
from pirl_plugin.sweep.progress import Progress
from pirl_plugin.sweep.run import Execution
from pirl_plugin.sweep.state import (
    FAILED,
    FINISHED,
    SKIPPED,
    WAITING,
    Outcome,
    is_finished,
    read_outcome,
    write_outcome,
)


def pretraining(name: str) -> Run:
    return Run(name, "train", (f"method={name}",), name, name, "", 0)


def measuring(name: str, needs: str) -> Run:
    return Run(name, "benchmark", (f"benchmark={name}",), f"{needs}/{name}", needs, "", 0, name, needs)


PLAN = [pretraining("a"), measuring("a1", "a"), measuring("a2", "a"), pretraining("b"), measuring("b1", "b")]


class Recorder:
    """The two commands: notes its arguments, leaves a checkpoint; fails for the methods it is told."""

    def __init__(self, *failing: str) -> None:
        self.calls: list[list[str]] = []
        self.failing = failing

    def __call__(self, arguments: Sequence[str]) -> int:
        self.calls.append(list(arguments))
        settings = dict(argument.split("=", 1) for argument in arguments)
        if set(settings.values()) & set(self.failing):
            print("error: it is broken\n  loss.lam: too large")
            return 1
        folder = Path(settings["run_dir"])
        if "method" in settings:
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "step_000000007.pt").touch()
        return 0


def execution(folder: Path, entry: Callable[[Sequence[str]], int], launcher: Launcher | None = None) -> Execution:
    return Execution(PLAN, folder, launcher or InlineLauncher(), {"train": entry, "benchmark": entry})


def test_everything_is_made_in_order_with_the_newest_weights(tmp_path):
    entry = Recorder()
    made = execution(tmp_path, entry)
    made.run()
    assert set(made.states.values()) == {FINISHED}
    assert [call[0] for call in entry.calls] == ["method=a", "benchmark=a1", "benchmark=a2", "method=b", "benchmark=b1"]
    assert entry.calls[1][1:] == [
        f"run_dir={tmp_path}/a/a1",
        f"weights={tmp_path}/a/checkpoints/step_000000007.pt",
    ]
    assert made.outcome(PLAN[1]).command.startswith("python tools/benchmark.py benchmark=a1")


def test_what_is_finished_is_not_made_again(tmp_path):
    execution(tmp_path, Recorder()).run()
    write_outcome(tmp_path / "b" / "b1", Outcome("another id", FINISHED))  # the folder is of a run since changed
    again = Recorder()
    execution(tmp_path, again).run()
    assert [call[0] for call in again.calls] == ["benchmark=b1"]


def test_a_failure_skips_what_needs_it_and_nothing_else(tmp_path):
    made = execution(tmp_path, Recorder("a"))
    made.run()
    assert made.states == {"a": FAILED, "a1": SKIPPED, "a2": SKIPPED, "b": FINISHED, "b1": FINISHED}
    assert made.outcome(PLAN[0]).reason == "it is broken; loss.lam: too large"
    assert made.outcome(PLAN[1]).reason == "a, seed 0 failed"


def finish_elsewhere(folder: Path, run: str) -> None:
    (folder / run / "checkpoints").mkdir(parents=True)
    (folder / run / "checkpoints" / "step_000000007.pt").touch()
    write_outcome(folder / run, Outcome(run, FINISHED, command="another sweep's"))


def test_what_another_sweep_has_finished_since_is_not_made_again(tmp_path):
    entry = Recorder()
    made = execution(tmp_path, entry)
    finish_elsewhere(tmp_path, "a")
    made.run()
    assert set(made.states.values()) == {FINISHED}
    assert "method=a" not in [call[0] for call in entry.calls]
    assert made.outcome(PLAN[0]).command == "another sweep's"


@pytest.mark.parametrize("lock", [".lock", ".job.lock"])
def test_a_run_that_is_made_elsewhere_is_waited_for(lock, tmp_path, caplog):
    caplog.set_level("INFO")
    entry, elsewhere = Recorder(), contextlib.ExitStack()
    made = execution(tmp_path, entry)
    elsewhere.enter_context(locked_elsewhere(tmp_path / "a", lock))
    (tmp_path / "a" / CONSOLE).write_text("of the other one")

    def watch(states: Mapping[str, str]) -> None:
        if states["b1"] == FINISHED and states["a"] == WAITING:  # others have not waited
            finish_elsewhere(tmp_path, "a")
            elsewhere.close()

    made.run(watch, every=0.01)
    assert set(made.states.values()) == {FINISHED}
    assert [call[0] for call in entry.calls] == ["method=b", "benchmark=b1", "benchmark=a1", "benchmark=a2"]
    assert (tmp_path / "a" / CONSOLE).read_text() == "of the other one"
    assert caplog.text.count("made elsewhere already, waiting for it: a, seed 0") == 1


@pytest.mark.parametrize("finishes", [True, False])
def test_of_two_jobs_that_start_together_one_waits(finishes, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_AGAIN", 0.01)
    entry, job = Recorder(), Job(PLAN[0], tmp_path / "a")
    with contextlib.ExitStack() as elsewhere:
        elsewhere.enter_context(locked_elsewhere(job.folder, ".job.lock"))

        def end(seconds: float) -> None:
            if finishes:
                finish_elsewhere(tmp_path, "a")
            elsewhere.close()

        monkeypatch.setattr(jobs.time, "sleep", end)
        assert perform(job, entry).state == FINISHED
    assert len(entry.calls) == (0 if finishes else 1)


def test_failed_and_skipped_runs_are_tried_again(tmp_path):
    execution(tmp_path, Recorder("a")).run()
    again = Recorder()
    made = execution(tmp_path, again)
    made.run()
    assert set(made.states.values()) == {FINISHED}
    assert [call[0] for call in again.calls] == ["method=a", "benchmark=a1", "benchmark=a2"]


def test_what_a_component_raises_is_that_runs_failure(tmp_path):
    def broken(arguments: Sequence[str]) -> int:
        raise RuntimeError("boom")

    outcome = perform(Job(PLAN[0], tmp_path / "a"), broken)
    assert (outcome.state, outcome.reason) == (FAILED, "RuntimeError: boom")
    assert (tmp_path / "a" / CONSOLE).read_text().startswith("$ python tools/train.py method=a")


def test_an_interrupted_run_is_neither_finished_nor_failed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        perform(Job(PLAN[0], tmp_path / "a"), lambda arguments: 130)
    assert read_outcome(tmp_path / "a", "a") is None


def test_a_command_in_this_process_leaves_the_logging_as_it_was(tmp_path):
    """Commands set the logging up for themselves, to a console that is closed after them."""
    root = logging.getLogger()
    before = list(root.handlers), root.level

    def entry(arguments: Sequence[str]) -> int:
        log_to(tmp_path / "logs")
        logging.getLogger("pirl_plugin.x").info("said inside")
        return Recorder()(arguments)

    InlineLauncher().start(Job(PLAN[0], tmp_path / "a"), entry)
    assert (list(root.handlers), root.level) == before
    assert "said inside" in (tmp_path / "a" / CONSOLE).read_text()


def test_no_weights_is_a_failure_that_says_so(tmp_path):
    outcome = perform(Job(PLAN[1], tmp_path / "a1", weights_from=tmp_path), lambda arguments: 0)
    assert outcome.state == FAILED
    assert "holds no checkpoint" in outcome.reason


def test_the_newest_checkpoint_is_that_of_the_most_steps(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("step_000000900.pt", "step_000001000.pt", "best.pt", "step_1.pt.tmp"):
        (tmp_path / "checkpoints" / name).touch()
    assert newest_checkpoint(tmp_path).name == "step_000001000.pt"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": "a"}', '{"id": "a", "state": "finished", "x": 1}'])
def test_a_damaged_outcome_is_none(tmp_path, content):
    (tmp_path / "outcome.json").write_text(content)
    assert not is_finished(tmp_path, "a")


class Slow(Launcher):
    """Jobs take three looks; notes how many were on their way together."""

    capacity = 2

    def __init__(self) -> None:
        self.most = 0
        self.running: list[SlowJob] = []
        self.stopped = 0

    def start(self, job: Job, entry: Callable[[Sequence[str]], int], needs: Handle | None = None) -> Handle:
        self.running = [other for other in self.running if not other.over]
        self.running.append(SlowJob(self, job, entry))
        self.most = max(self.most, len(self.running))
        return self.running[-1]


class SlowJob:
    def __init__(self, launcher: Slow, job: Job, entry: Callable[[Sequence[str]], int]) -> None:
        self.launcher, self.job, self.entry, self.looks, self.over = launcher, job, entry, 0, False

    def is_over(self) -> bool:
        self.looks += 1
        if self.looks == 3:
            self.over = True
            perform(self.job, self.entry)
        return self.over

    def interrupt(self) -> bool:
        return True

    def stop(self) -> None:
        self.launcher.stopped += 1


def test_as_many_at_once_as_the_launcher_takes(tmp_path):
    launcher = Slow()
    made = execution(tmp_path, Recorder(), launcher)
    made.run(every=0)
    assert launcher.most == 2
    assert set(made.states.values()) == {FINISHED}


def test_an_interruption_stops_what_is_running(tmp_path):
    launcher = Slow()

    def watch(states: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execution(tmp_path, Recorder(), launcher).run(watch)
    assert launcher.stopped == 2


class Gone:
    """A process that was killed: over, and no outcome in its folder."""

    def is_over(self) -> bool:
        return True

    def interrupt(self) -> bool:
        return True

    def stop(self) -> None:
        pass


def test_a_job_that_dies_without_a_word_has_failed(tmp_path):
    class Dying(InlineLauncher):
        def start(self, job: Job, entry: Callable[[Sequence[str]], int], needs: Handle | None = None) -> Handle:
            return Gone() if job.run.id == "a" else super().start(job, entry)

    made = execution(tmp_path, Recorder(), Dying())
    made.run(every=0)
    assert made.states["a"] == FAILED
    assert "without a word" in made.outcome(PLAN[0]).reason
    assert made.states["b1"] == FINISHED


def test_progress_without_a_terminal_is_a_line_for_each_change(tmp_path, caplog):
    caplog.set_level("INFO")
    made = execution(tmp_path, Recorder("b"))
    with Progress(made) as progress:
        made.run(progress)
    lines = [record.message for record in caplog.records]
    assert lines[0] == "5 runs, 0 of them finished already."
    assert "finished: a, seed 0: a1" in lines
    assert "failed: b, seed 0" in lines
    assert lines[-1] == "3 finished, 1 failed, 1 skipped"


# -- real processes ----------------------------------------------------------------------------------------------------


def leave_a_checkpoint(arguments: Sequence[str]) -> int:
    return Recorder()(arguments)


def test_as_many_local_processes_as_there_are_cores_for(monkeypatch):
    monkeypatch.setattr(launchers.os, "sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.setattr(launchers.torch.cuda, "device_count", lambda: 0)
    settings = [{}, {"threads": 1}, {"threads": 4}, {"threads": 9}, {"jobs": 2}, {"jobs": 2, "threads": 1}]
    made = [LocalLauncher(**setting) for setting in settings]
    shapes = [(launcher.capacity, launcher.threads) for launcher in made]
    assert shapes == [(3, 2), (6, 1), (1, 4), (1, 9), (2, 3), (2, 1)]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("module", launchers._MODULES.values())
def test_torchrun_can_start_the_commands(module, monkeypatch, capsys):
    """As ``torchrun -m MODULE``: a module that only defines its functions would do nothing, with exit code 0."""
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 0
    assert "key=value" in capsys.readouterr().out


def test_local_processes(tmp_path):
    made = execution(tmp_path, leave_a_checkpoint, LocalLauncher(jobs=2))
    made.run()
    assert set(made.states.values()) == {FINISHED}
    assert json.loads((tmp_path / "a" / "outcome.json").read_text())["id"] == "a"


def note_the_gpu(arguments: Sequence[str]) -> int:
    settings = dict(argument.split("=", 1) for argument in arguments)
    (Path(settings["run_dir"]) / "gpu").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    time.sleep(0.3)  # so that the next job starts beside this one
    return leave_a_checkpoint(arguments)


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, ["0", "1"]), ("2,3", ["2", "3"]), ("MIG-a5, GPU-7f", ["MIG-a5", "GPU-7f"])]
)
def test_jobs_share_out_the_gpus_that_the_sweep_may_use(visible, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    plan = [pretraining("a"), pretraining("b")]
    Execution(plan, tmp_path, LocalLauncher(jobs=2), {"train": note_the_gpu}).run()
    assert [(tmp_path / name / "gpu").read_text() for name in "ab"] == expected
