"""Runs as jobs: submitit's local jobs for real, and what SLURM would be told, without a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pirl_plugin.registry import build
from pirl_plugin.sweep import submitit_launcher
from pirl_plugin.sweep.jobs import Job
from pirl_plugin.sweep.plan import Run
from pirl_plugin.sweep.run import Execution
from pirl_plugin.sweep.state import FAILED, FINISHED, SKIPPED, Outcome, read_outcome, write_outcome
from pirl_plugin.sweep.submitit_launcher import SubmititLauncher, Submitted, SubmittedRun

submitit = pytest.importorskip("submitit")

TRAINED = Run("a", "train", ("method=a",), "a", "a", "", 0)
MEASURED = Run("a1", "benchmark", ("benchmark=a1",), "a/a1", "a", "", 0, "a1", "a")


def entry(arguments: Sequence[str]) -> int:
    """A command that needs no libraries: it fails, waits or leaves a checkpoint as its folder says."""
    settings = dict(argument.split("=", 1) for argument in arguments)
    folder = Path(settings["run_dir"])
    with (folder / "starts.txt").open("a") as file:
        file.write("x")
    while (folder / "wait").exists():
        time.sleep(0.02)
    if (folder / "fail").exists():
        print("error: it is broken")
        return 1
    if "method" in settings:
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "checkpoints" / "step_000000007.pt").touch()
    return 0


@pytest.fixture(autouse=True)
def _jobs_find_this_module(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)]))


def execution(folder: Path, launcher: SubmititLauncher, runs: Sequence[Run] = (TRAINED, MEASURED)) -> Execution:
    return Execution(runs, folder, launcher, {"train": entry, "benchmark": entry})


def until(condition: Callable[[], Any], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# -- local jobs --------------------------------------------------------------------------------------------------------


def test_a_failed_local_job_says_why_and_its_dependant_is_skipped(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "fail").touch()
    made = execution(tmp_path, SubmititLauncher(cluster="local"))
    made.run()
    assert made.states == {"a": FAILED, "a1": SKIPPED}
    assert made.outcome(TRAINED).reason == "it is broken"


def test_a_sweep_started_again_takes_up_the_job_that_goes_on_and_then_measures(tmp_path):
    """Each job is a process that imports everything: one test for all that a pretraining and its benchmark show."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "wait").touch()
    job = Job(TRAINED, tmp_path / "a")
    SubmititLauncher(cluster="local").start(job, entry)  # and then this sweep is killed
    until((tmp_path / "a" / "starts.txt").exists)
    made = execution(tmp_path, SubmititLauncher(cluster="local"))
    made.run(lambda states: (tmp_path / "a" / "wait").unlink(missing_ok=True))
    assert made.states == {"a": FINISHED, "a1": FINISHED}
    assert (tmp_path / "a" / "starts.txt").read_text() == "x"
    assert "weights=" in made.outcome(MEASURED).command
    assert json.loads((tmp_path / "a" / "submitted.json").read_text())["run"] == "a"


def test_a_preempted_job_is_queued_again_and_an_interrupted_one_ends(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "wait").touch()
    starts = tmp_path / "a" / "starts.txt"
    handle = SubmititLauncher(cluster="local").start(Job(TRAINED, tmp_path / "a"), entry)
    assert isinstance(handle, Submitted)
    until(starts.exists)
    # what a cluster does: to the job itself, not to submitit's controller above it
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", handle.job_id], capture_output=True, text=True, check=True)
    os.kill(int(found.stdout), signal.SIGUSR2)
    until(lambda: starts.read_text() == "xx")
    assert not handle.is_over()
    assert handle.interrupt()
    until(handle.is_over)
    assert read_outcome(tmp_path / "a", "a") is None


# -- SLURM -------------------------------------------------------------------------------------------------------------


def sbatch_of(launcher: SubmititLauncher, folder: Path, waits_for: str | None) -> str:
    """The file that sbatch would be given."""
    executor = submitit.SlurmExecutor.__new__(submitit.SlurmExecutor)
    submitit.core.core.PicklingExecutor.__init__(executor, folder)
    executor.python = "python"
    told = launcher.parameters_of(Job(MEASURED, folder), waits_for)
    executor.update_parameters(**executor._convert_parameters(told))
    return str(executor._make_submission_file_text("python job.py", "uid"))


def test_what_sbatch_is_told(tmp_path):
    settings = {"name": "submitit", "cluster": "slurm", "timeout_min": 90, "partition": "gpu", "gpus_per_node": 8}
    more = {"mem_gb": 64, "account": "lab", "setup": ["module load cuda"], "additional_parameters": {"nice": 5}}
    text = sbatch_of(build("launcher", {**settings, **more}), tmp_path, "4711")
    for line in (
        "#SBATCH --dependency=afterok:4711,singleton",
        "#SBATCH --kill-on-invalid-dep=yes",
        "#SBATCH --job-name=pirl-a1",
        "#SBATCH --time=90",
        "#SBATCH --partition=gpu",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --mem=64GB",
        "#SBATCH --account=lab",
        "#SBATCH --nice=5",
        "#SBATCH --signal=USR2@120",
        "module load cuda",
    ):
        assert line in text.splitlines(), text
    assert "#SBATCH --dependency=singleton" in sbatch_of(SubmititLauncher(), tmp_path, None).splitlines()


class FakeJob:
    """A job of a cluster whose state the test sets."""

    states: dict[str, str] = {}

    def __init__(self, folder: Path, job_id: str) -> None:
        self.job_id, self._process = job_id, None
        self.watcher = SimpleNamespace(get_state=lambda job_id, mode: self.states.get(job_id, "UNKNOWN"))

    def done(self) -> bool:
        return self.states.get(self.job_id) in ("COMPLETED", "FAILED", "CANCELLED")


class FakeExecutor:
    """sbatch: numbers the jobs from 1."""

    submitted: list[tuple[SubmittedRun, dict[str, Any]]] = []

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder

    def _convert_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        return parameters

    def update_parameters(self, **parameters: Any) -> None:
        self.parameters = parameters

    def submit(self, function: SubmittedRun) -> FakeJob:
        self.submitted.append((function, self.parameters))
        number = str(len(self.submitted))
        FakeJob.states[number] = "PENDING"
        function.job.folder.mkdir(parents=True, exist_ok=True)
        return FakeJob(self.folder, number)


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setattr(FakeJob, "states", {})
    monkeypatch.setattr(FakeExecutor, "submitted", [])
    monkeypatch.setattr(submitit_launcher.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(submitit_launcher, "_LATE", 0.0)
    launcher = SubmititLauncher()
    names = {"SlurmExecutor": FakeExecutor, "SlurmJob": FakeJob, "core": submitit.core, "helpers": submitit.helpers}
    launcher.submitit = SimpleNamespace(**names)
    return launcher


def test_a_benchmark_is_queued_behind_its_pretraining(tmp_path, cluster):
    def watch(states: Any) -> None:
        if len(FakeExecutor.submitted) == 2:
            for function, _ in FakeExecutor.submitted:
                function()

    made = execution(tmp_path, cluster)
    made.run(watch, every=0)
    assert set(made.states.values()) == {FINISHED}
    assert [parameters["dependency"] for _, parameters in FakeExecutor.submitted] == [
        "singleton",
        "afterok:1,singleton",
    ]


def test_jobs_in_the_queue_are_not_submitted_twice_and_gone_ones_are(tmp_path, cluster):
    first = cluster.start(Job(TRAINED, tmp_path / "a"), entry)
    assert cluster.start(Job(TRAINED, tmp_path / "a"), entry).job_id == first.job_id
    FakeJob.states["1"] = "CANCELLED"
    assert cluster.start(Job(TRAINED, tmp_path / "a"), entry).job_id == "2"
    changed = Run("b", "train", (), "a", "a", "", 0)  # another run in this folder
    assert cluster.start(Job(changed, tmp_path / "a"), entry).job_id == "3"


def test_ctrl_c_leaves_a_clusters_jobs_in_the_queue(tmp_path, cluster, caplog):
    caplog.set_level("INFO")

    def watch(states: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execution(tmp_path, cluster).run(watch)
    assert FakeJob.states == {"1": "PENDING", "2": "PENDING"}
    assert "scancel 1" in caplog.text


def test_a_pretraining_that_fails_on_the_cluster_skips_what_waits_for_it(tmp_path, cluster):
    def watch(states: Any) -> None:
        write_outcome(tmp_path / "a", Outcome("a", FAILED, "out of memory"))
        FakeJob.states.update({"1": "FAILED", "2": "CANCELLED"})  # kill-on-invalid-dep

    made = execution(tmp_path, cluster)
    made.run(watch, every=0)
    assert made.states == {"a": FAILED, "a1": SKIPPED}
    assert made.outcome(MEASURED).reason == "a, seed 0 failed"


def test_a_failed_run_fails_its_job(tmp_path):
    (tmp_path / "fail").touch()
    with pytest.raises(RuntimeError, match="it is broken"):
        SubmittedRun(Job(TRAINED, tmp_path), entry, 1)()


def test_without_a_cluster_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(submitit_launcher.shutil, "which", lambda name: None)
    with pytest.raises(OSError, match="there is no sbatch here"):
        SubmititLauncher().start(Job(TRAINED, tmp_path), entry)


def test_without_submitit_one_line_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with pytest.raises(ImportError, match=r"pip install 'pirl-plugin\[slurm\]'"):
        SubmititLauncher()
