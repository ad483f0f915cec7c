"""A sweep that is killed at random moments and started again ends as one that was left alone."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pirl_plugin.sweep import launchers
from pirl_plugin.sweep.launchers import LocalLauncher
from pirl_plugin.sweep.plan import Run
from pirl_plugin.sweep.run import Execution
from pirl_plugin.sweep.state import FINISHED

RUNS = [
    run
    for name in ("a", "b", "c")
    for run in (
        Run(name, "train", (f"method={name}",), name, name, "", 0),
        Run(f"{name}1", "benchmark", (f"benchmark={name}1",), f"{name}/1", name, "", 0, f"{name}1", name),
        Run(f"{name}2", "benchmark", (f"benchmark={name}2",), f"{name}/2", name, "", 0, f"{name}2", name),
    )
]
STEPS, KILLS = 25, 12


def command(arguments: Sequence[str]) -> int:
    """A pretraining counts its steps and goes on from where it was; a benchmark records what the weights hold."""
    settings = dict(argument.split("=", 1) for argument in arguments)
    folder = Path(settings["run_dir"])
    with (folder / "pids.txt").open("a") as file:
        file.write(f"{os.getpid()}\n")
    if "method" in settings:
        weights = folder / "checkpoints"
        weights.mkdir(exist_ok=True)
        for step in range(len(list(weights.glob("*.pt"))), STEPS):
            time.sleep(0.01)
            partial = folder / "partial"
            partial.write_text(f"{settings['method']} after {step + 1} steps")
            partial.rename(weights / f"step_{step + 1}.pt")
    else:
        time.sleep(0.1)
        (folder / "result.json").write_text(f"{settings['benchmark']} of {Path(settings['weights']).read_text()}")
    return 0


def sweep(store: Path) -> None:
    """A sweep's own process. Its jobs are forked, so that a start costs nothing; else they are what they always are."""
    launcher = LocalLauncher(jobs=2, threads=1)
    launcher.context = multiprocessing.get_context("fork")
    body = launchers._perform_alone

    def forked(*what: Any) -> None:
        launcher._writer.close()  # a fork has a copy, other jobs have not
        body(*what)

    launchers._perform_alone = forked
    Execution(RUNS, store, launcher, {"train": command, "benchmark": command}).run(every=0.01)


def records(store: Path) -> dict[str, str]:
    return {str(path.relative_to(store)): path.read_text() for path in sorted(store.rglob("result.json"))}


def alive(store: Path) -> list[int]:
    """Processes of runs that are still there, but for those that wait to be reaped by whoever has taken them over."""
    found = []
    for pid in {int(line) for path in store.rglob("pids.txt") for line in path.read_text().split()}:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        found += [pid] if state != "Z" else []
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_killed_at_random_moments_and_started_again_it_ends_as_if_left_alone(tmp_path):
    context: Any = multiprocessing.get_context("fork")
    left_alone, store, random_moment, kills = tmp_path / "once", tmp_path / "killed", random.Random(0), 0
    process = context.Process(target=sweep, args=(left_alone,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    for _ in range(200):
        process = context.Process(target=sweep, args=(store,))
        process.start()
        process.join(random_moment.uniform(0.05, 0.25) if kills < KILLS else 60)
        if process.exitcode is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        end = time.monotonic() + 10
        while alive(store):
            assert time.monotonic() < end, "runs have outlived their sweep"
            time.sleep(0.01)
    assert kills >= 10
    assert process.exitcode == 0
    assert len(records(left_alone)) == 6
    assert records(store) == records(left_alone)
    made = Execution(RUNS, store, LocalLauncher(jobs=1), {})
    assert set(made.states.values()) == {FINISHED}
    assert alive(store) == []
