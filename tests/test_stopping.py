"""Signals, locks and processes that watch each other."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from classy_vision.hooks import ClassyHook
from run_command import locked_elsewhere, run
from small_task import build
from test_checkpoint_resume import COMMAND, metrics, settings
from test_numerics import spoil

from pirl_plugin import distributed, signals
from pirl_plugin.commands import running, train
from pirl_plugin.commands.running import INTERRUPTED, PREEMPTED
from pirl_plugin.commands.train import main
from pirl_plugin.heartbeat import BETWEEN_EPOCHS, COMPUTING, DATA, HOOKS, LOST, Heartbeat
from pirl_plugin.hooks.background import BackgroundWriter
from pirl_plugin.hooks.checkpoint import checkpoints
from pirl_plugin.hooks.metrics import MetricsJsonlHook
from pirl_plugin.run_lock import NAME, FolderInUseError, locked
from pirl_plugin.signals import STOPPING, told_to_stop
from pirl_plugin.sweep import launchers
from pirl_plugin.sweep.jobs import Job, Preempted, perform
from pirl_plugin.sweep.plan import Run
from pirl_plugin.sweep.submitit_launcher import _Preemption
from pirl_plugin.tasks import guarded
from pirl_plugin.tasks.trainer import Trainer

# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "step", "code", "words"),
    [
        (signal.SIGTERM, 2, PREEMPTED, "stopped by SIGTERM"),
        (signal.SIGUSR1, 3, PREEMPTED, "stopped by SIGUSR1"),
        (signal.SIGINT, 2, INTERRUPTED, "interrupted"),
    ],
)
def test_a_signal_ends_the_run_with_a_checkpoint_and_its_own_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, step: int, code: int, words: str
) -> None:
    """In the middle of an epoch of 3 steps, and at its end; no periodic checkpoint would be there."""
    folder, before = tmp_path / "run", signal.getsignal(number)
    quiet = [*COMMAND, f"run_dir={folder}", "checkpoint.every_epochs=null"]
    write = MetricsJsonlHook.write

    def tell(hook: Any, task: Any, values: dict[str, float]) -> None:
        write(hook, task, values)
        if values["step"] == step - 1:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsJsonlHook, "write", tell)
        outcome = run(main, quiet)
    assert (outcome.code, PREEMPTED, INTERRUPTED) == (code, 75, 130)
    saved = folder / "checkpoints" / f"step_{step:09d}.pt"
    assert outcome.err.splitlines()[-1] == (f"{words} after step {step}: the same command goes on from {saved}")
    assert checkpoints(folder) == [saved]
    assert signal.getsignal(number) is before
    again = run(main, quiet)
    assert again.code == 0, again.err
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4, 5, 6]


def test_handlers_are_put_back_and_other_threads_take_no_signals() -> None:
    heard: list[str] = []
    before = [signal.getsignal(number) for number in STOPPING]
    with told_to_stop(heard.append):
        for number in STOPPING:
            signal.raise_signal(number)
    assert heard == ["SIGTERM", "SIGUSR1"]
    assert [signal.getsignal(number) for number in STOPPING] == before

    def elsewhere() -> None:
        with told_to_stop(heard.append):
            heard.append("in a thread")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert heard[-1] == "in a thread"


def test_ctrl_c_is_noted_once_and_raises_when_it_is_pressed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sends it a second time at once: that is the same one."""
    now, heard = [100.0], list[str]()
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGINT)
    with told_to_stop(heard.append, ctrl_c=True):
        for now[0] in (100.0, 100.1, 101.9):
            signal.raise_signal(signal.SIGINT)
        assert heard == ["SIGINT"]
        now[0] = 102.1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_stays_ignored_where_it_is() -> None:
    heard: list[str] = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with told_to_stop(heard.append, ctrl_c=True):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == []


def test_a_preempted_run_of_a_sweep_has_no_outcome(tmp_path: Path) -> None:
    job = Job(Run("a", "train", (), "a", "a", "", 0), tmp_path / "a")
    with pytest.raises(Preempted):
        perform(job, lambda arguments: PREEMPTED)
    assert not (tmp_path / "a" / "outcome.json").exists()


def test_submitit_s_signal_lets_a_training_save_before_the_job_is_queued_again() -> None:
    queued, told = [], []
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2)}
    signal.signal(signal.SIGUSR2, lambda number, frame: queued.append(number))
    try:
        early = _Preemption()
        signal.raise_signal(signal.SIGUSR2)
        assert len(queued) == 1  # at once: nothing is to be saved yet
        queued.clear()
        with told_to_stop(told.append):
            signal.raise_signal(signal.SIGUSR2)
        assert (told, queued) == (["SIGUSR1"], [])
        early.queue_again()
        assert queued == [signal.SIGUSR2]
        signal.signal(signal.SIGUSR2, early.handler)
        cancelled = _Preemption()
        with told_to_stop(told.append):
            signal.raise_signal(signal.SIGTERM)
        cancelled.queue_again()
        assert queued == [signal.SIGUSR2]  # a job that was cancelled stays so
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_OBEDIENT = """
import os, pathlib, signal, sys, time
def leave(number, frame):
    time.sleep(float(os.environ["RANK"]))  # one ends before the other
    sys.exit(75)
if sys.argv[1] == "listens":
    signal.signal(signal.SIGUSR1, leave)
pathlib.Path(sys.argv[2], os.environ["RANK"]).touch()
time.sleep(120)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["listens", "starts"])
def test_a_signal_reaches_the_processes_of_torchrun_and_their_exit_code_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    (tmp_path / "obedient.py").write_text(_OBEDIENT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(launchers._MODULES, "train", "obedient")

    def tell() -> None:
        limit = time.monotonic() + 100
        while not all((tmp_path / str(rank)).exists() for rank in (0, 1)) and time.monotonic() < limit:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=tell).start()
    with open(tmp_path / "console.txt", "w") as console, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", console)
        patch.setattr(sys, "stderr", console)
        assert launchers.run_under_torchrun("train", 2, 1, [how, str(tmp_path)]) == PREEMPTED
    assert "Traceback" not in (tmp_path / "console.txt").read_text()


def test_a_run_that_was_told_to_stop_is_not_started_again_by_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(signals.os, "kill", lambda pid, number: sent.append((pid, number)))
    monkeypatch.setattr(signals.time, "sleep", lambda seconds: None)
    for name, value in {"LOCAL_RANK": "0", "MAX_RESTARTS": "2", "RESTART_COUNT": "2"}.items():
        monkeypatch.setenv(name if name == "LOCAL_RANK" else f"TORCHELASTIC_{name}", value)
    signals.keep_torchrun_from_restarting()
    assert sent == []  # it has none left
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    signals.keep_torchrun_from_restarting()
    assert sent == [(os.getppid(), signal.SIGTERM)]
    monkeypatch.setenv("LOCAL_RANK", "1")
    signals.keep_torchrun_from_restarting()
    assert len(sent) == 1


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGTERM, PREEMPTED, "stopped by SIGTERM before the first step: the same command starts it again"),
        (signal.SIGINT, INTERRUPTED, "interrupted"),
    ],
)
def test_a_signal_before_training_ends_the_command_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int, words: str
) -> None:
    def slow(task: Any) -> bool:
        with contextlib.suppress(Exception):  # as the reader of an image does, whatever a decoder raises
            signal.raise_signal(number)
        return False

    monkeypatch.setattr(train, "_resume", slow)
    outcome = run(main, [*COMMAND, f"run_dir={tmp_path}"])
    assert (outcome.code, outcome.err.splitlines()[-1]) == (code, words)


def test_one_process_of_several_says_what_ended_them_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told() -> None:
        raise running.Preempted("SIGTERM")

    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert running.exit_code(told) == PREEMPTED
    assert capsys.readouterr().err == "stopped by SIGTERM\n"


# -- the lock ----------------------------------------------------------------------------------------------------------


def test_two_runs_do_not_share_a_folder_and_a_dead_one_is_no_hindrance(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with locked_elsewhere(tmp_path):
        said = r"is in use by process 4711 on elsewhere \(since today\): wait for it or end it, or set run_dir"
        with pytest.raises(FolderInUseError, match=said), locked(tmp_path):
            pass
        outcome = run(main, [*COMMAND, f"run_dir={tmp_path}"])
        assert outcome.code == 1
        assert "is in use by process 4711 on elsewhere" in outcome.err
        assert [path.name for path in tmp_path.iterdir()] == [NAME]  # nothing was touched
    caplog.set_level("INFO")
    with locked(tmp_path):
        assert "The run of process 4711 on elsewhere (since today) has ended without finishing" in caplog.text
        content = json.loads((tmp_path / NAME).read_text())
        assert content["pid"] == os.getpid()
    assert (tmp_path / NAME).read_text() == ""
    caplog.clear()
    with locked(tmp_path):
        assert caplog.text == ""


def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*arguments: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with locked(tmp_path):
        assert "this file system has no locks" in caplog.text


# -- processes that watch each other -----------------------------------------------------------------------------------


class Store:
    """What torch's store does, for threads of one process."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.content[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.content[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.content for key in keys)


class Group:
    """Heartbeats of some ranks in one process, and what they said when they ended."""

    def __init__(self, ranks: int, patience: float = 4.0) -> None:
        self.store, self.ended, self.said = Store(), dict[int, int](), dict[int, str]()
        self.all = [self.heartbeat(rank, ranks, patience) for rank in range(ranks)]

    def heartbeat(self, rank: int, ranks: int, patience: float) -> Heartbeat:
        def end(code: int) -> None:
            self.ended[rank] = code

        def lost(message: str) -> None:
            self.said[rank] = message

        beat = Heartbeat(self.store, rank, ranks, patience, patience, lost, end)
        for step in range(3):  # past the first, slow steps
            for doing in (DATA, COMPUTING, HOOKS):
                beat.mark(step + (doing == HOOKS), doing)
        beat.start()
        return beat

    def until_ended(self, ranks: int) -> None:
        limit = time.monotonic() + 60
        while len(self.ended) < ranks and time.monotonic() < limit:
            time.sleep(0.1)


def test_a_rank_that_makes_no_progress_is_named_by_all_others() -> None:
    """Rank 2 hangs in its hooks, the others wait for it in the next step."""
    group = Group(3)
    for rank in (0, 1):
        group.all[rank].mark(3, COMPUTING)
    group.until_ended(3)
    assert group.ended == {0: LOST, 1: LOST, 2: LOST}
    for rank in (0, 1):
        assert "rank 2 (process" in group.said[rank]
        assert "has made no progress for" in group.said[rank]
        assert "after 3 batches, where it is in the hooks" in group.said[rank]
        assert f"rank {rank} ends, after 3 batches, where it computes" in group.said[rank]


def test_ranks_that_wait_for_each_other_at_the_same_place_end() -> None:
    """Of collectives that do not fit together, say. Who all wait for slow data are left alone."""
    group = Group(2)
    for beat in group.all:
        beat.mark(3, COMPUTING)
    group.until_ended(2)
    assert group.ended == {0: LOST, 1: LOST}
    assert "like this process, after 3 batches, where it computes" in group.said[0]
    beat = Heartbeat(Store(), 0, 2, patience=1.0)
    beat._marked_steps = 3
    beat.mark(3, DATA)
    beat._since -= 100
    slow = {"position": (3, DATA, 0), "stalled": 100.0, "allowed": 1.0, "host": "", "pid": 0}
    assert beat._problem(slow, 0.0) == ""
    assert "has made no progress for 100 s, after 2" in beat._problem({**slow, "position": (2, HOOKS, 0)}, 0.0)


def test_a_silent_rank_is_named() -> None:
    group = Group(2)
    group.all[1]._exchange = lambda count, neighbour: None  # type: ignore[method-assign]
    group.all[1]._over.set()  # its thread ends and leaves no last word
    group.until_ended(1)
    assert "rank 1" in group.said[0]
    assert "no sign of life" in group.said[0]


def test_a_rank_that_fails_tells_the_others() -> None:
    group = Group(2)
    leave = group.store.set

    def slow(key: str, value: str) -> None:
        leave(key, value)
        time.sleep(2.5 * (key == "verdict"))  # time enough for its own watch to take the message for another's

    group.store.set = slow  # type: ignore[method-assign]
    group.all[1].stop("ValueError: the dog ate it")
    group.until_ended(1)
    assert group.ended == {0: LOST}
    assert "rank 1 failed, after 3 batches, where it is in the hooks: ValueError: the dog ate it" in group.said[0]


def test_ranks_that_finish_leave_the_others_alone() -> None:
    group = Group(2, patience=2.0)
    group.all[1].stop()
    time.sleep(5)
    assert group.ended == {}
    group.all[0].stop()


def test_slow_steps_and_long_pauses_between_epochs_are_no_hang() -> None:
    beat = Heartbeat(Store(), 0, 2, patience=5.0)
    assert beat._allowed(COMPUTING) > 1000  # the first step compiles
    beat._marked_steps = 3
    beat._latest_steps.extend([2.0, 2.0, 300.0])  # one that waited for a disk does not count
    assert beat._allowed(COMPUTING) == 20
    beat._latest_steps.extend([0.1] * 10)
    assert beat._allowed(COMPUTING) == 5
    assert beat._allowed(BETWEEN_EPOCHS) > 1000


@pytest.mark.parametrize("what", ["a checkpoint", "a roll-back"])
def test_a_slow_disk_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Two minutes for a checkpoint, or to go back to one, while another process waits in its next step."""
    store, said, at_barriers, after = Store(), list[str](), list[int](), list[int]()
    beat, other = (Heartbeat(store, rank, 2, patience=40.0) for rank in range(2))
    beat._marked_steps = other._marked_steps = 3
    other.mark(10**6, COMPUTING)

    def slow(work: Any) -> Any:
        def slowed(*arguments: Any) -> Any:
            beat._since -= 120
            beat._exchange(1, 1)
            said.append(other._problem(json.loads(store.get("beat/0")), 0.0))
            return work(*arguments)

        return slowed

    class After(ClassyHook):
        on_start = on_phase_start = on_phase_end = on_end = ClassyHook._noop

        def on_step(self, task: Any) -> None:
            after.append(beat._position[1])

    going_back = what == "a roll-back"
    task = build(After(), **settings(tmp_path, checkpoint={"every_steps": 1}, num_epochs=1, on_nonfinite="roll_back"))
    task.heartbeat = beat
    if going_back:
        spoil(task, (2,))
    owner, name = (guarded, "newest_usable") if going_back else (BackgroundWriter, "wait")
    monkeypatch.setattr(owner, name, slow(getattr(owner, name)))
    monkeypatch.setattr(distributed, "barrier", lambda: at_barriers.append(beat._position[1]))
    Trainer().train(task)
    assert set(said) == {""}
    assert task.excluded_steps == [2] * going_back
    assert set(after) == {HOOKS}  # who hangs in a later hook is found as soon as ever
    # after each of the 3 checkpoints, and before and after going back
    assert at_barriers == [BETWEEN_EPOCHS] * (3 + 2 * going_back)


def test_hooks_that_come_back_from_a_pause_are_no_step() -> None:
    beat = Heartbeat(Store(), 0, 2)
    for step in range(2):
        for doing in (DATA, COMPUTING, HOOKS, BETWEEN_EPOCHS, HOOKS):
            beat.mark(step, doing)
    assert beat._marked_steps == 2
    assert len(beat._latest_steps) == 2
