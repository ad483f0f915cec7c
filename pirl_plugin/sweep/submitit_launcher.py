"""The runs of a sweep as jobs of a SLURM cluster, or of submitit's stand-in for one on this machine.

submitit itself rather than Hydra's launcher on top of it: that one maps one command over a list of overrides, and knows
neither the dependencies between pretraining and benchmarks nor jobs that are in the queue already.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pirl_plugin.atomic import write_text
from pirl_plugin.optional import optional
from pirl_plugin.registry import register_launcher
from pirl_plugin.schema import NonNegativeInt, PositiveFloat, PositiveInt, checked
from pirl_plugin.signals import children_of
from pirl_plugin.sweep.jobs import Entry, Job, Preempted, perform
from pirl_plugin.sweep.launchers import Handle, Launcher, run_under_torchrun
from pirl_plugin.sweep.state import FINISHED, is_finished, read_outcome

log = logging.getLogger(__name__)

SUBMITTED = "submitted.json"
_LATE = 30.0  # seconds that a shared file system may take to show what another machine wrote
_YOUNG = 300.0  # seconds in which the accounting may not know a job yet


@register_launcher("submitit")
@checked
class SubmititLauncher(Launcher):
    """One job of a cluster for each run; settings are named as in Hydra's submitit launcher.

    A benchmark is queued at once and waits for its pretraining. A job that is preempted or runs out of its time is
    queued again and goes on from its last checkpoint, which a pretraining writes right then. Ctrl-C
    leaves the jobs of a cluster where they are: the same sweep, started again, finds them.

    Args:
        cluster: ``slurm``, or ``local``: submitit's processes on this machine, to try a sweep out.
        timeout_min: of one job, minutes; a run that takes longer is queued again, see ``max_num_timeout``.
        max_num_timeout: how often a job that ran out of its time is queued again.
        array_parallelism: jobs in the queue at once.
        gpus_per_node: of one job; with more than one, runs that can use several processes are started by torchrun.
        cpus_per_task: of one job.
        mem_gb: memory of one job, GB; null: the partition's default.
        partition: of the cluster, here and below; null: the cluster's default.
        account: that is charged.
        qos: quality of service.
        constraint: features that a node must have.
        exclude: nodes not to be used.
        comment: kept with the job.
        signal_delay_s: how long before its time runs out a job is told, seconds; a checkpoint must have been written
            by then, see ``checkpoint.every_steps``.
        setup: shell commands before each job: modules, environments.
        additional_parameters: of sbatch, by their long names.
        max_pickle_size_gb: submitit's limit on what it writes for a job.
    """

    knows_its_jobs = True

    def __init__(
        self,
        cluster: Literal["slurm", "local"] = "slurm",
        timeout_min: PositiveInt = 1440,
        max_num_timeout: NonNegativeInt = 100,
        array_parallelism: PositiveInt = 16,
        gpus_per_node: NonNegativeInt = 0,
        cpus_per_task: PositiveInt = 1,
        mem_gb: PositiveFloat | None = None,
        partition: str | None = None,
        account: str | None = None,
        qos: str | None = None,
        constraint: str | None = None,
        exclude: str | None = None,
        comment: str | None = None,
        signal_delay_s: PositiveInt = 120,
        setup: list[str] | None = None,
        additional_parameters: dict[str, Any] | None = None,
        max_pickle_size_gb: PositiveFloat = 1.0,
    ) -> None:
        self.submitit = optional("submitit", "slurm", "the launcher submitit")
        self.cluster, self.capacity, self.knows_dependencies = cluster, array_parallelism, cluster == "slurm"
        self.gpus_per_node, self.cpus_per_task = gpus_per_node, cpus_per_task
        self.executor_settings = {"max_num_timeout": max_num_timeout, "max_pickle_size_gb": max_pickle_size_gb}
        shared = {"timeout_min": timeout_min, "gpus_per_node": gpus_per_node, "setup": setup}
        slurm = {"cpus_per_task": cpus_per_task, "mem_gb": mem_gb, "partition": partition, "account": account}
        slurm |= {"qos": qos, "constraint": constraint, "exclude": exclude, "comment": comment}
        chosen = shared | {"signal_delay_s": signal_delay_s} | (slurm if cluster == "slurm" else {})
        self.parameters = {key: value for key, value in chosen.items() if value is not None}
        self.additional_parameters = dict(additional_parameters or {})

    def start(self, job: Job, entry: Entry, needs: Handle | None = None) -> Handle:
        """See ``Launcher.start``; a job of this run that is on its way already is taken up again.

        Raises:
            OSError: this machine cannot submit, or the cluster refuses.
        """
        found = self._on_its_way(job)
        if found is not None:
            log.info("on its way already, as job %s: %s", found.job_id, job.run.label)
            return found
        executor = self._executor(job.folder)
        waits_for = needs.job_id if isinstance(needs, Submitted) else None
        executor.update_parameters(**executor._convert_parameters(self.parameters_of(job, waits_for)))
        try:
            submitted = executor.submit(SubmittedRun(job, self._entry(job, entry), self.cpus_per_task))
        except (RuntimeError, self.submitit.core.utils.FailedJobError) as error:
            raise OSError(f"{job.run.label} cannot be submitted: {error}") from error
        content = {"run": job.run.id, "cluster": self.cluster, "job": submitted.job_id, "time": time.time()}
        write_text(json.dumps(content) + "\n", job.folder / SUBMITTED)
        return Submitted(submitted, job, self.cluster)

    def parameters_of(self, job: Job, waits_for: str | None) -> dict[str, Any]:
        """What the executor is told about one job."""
        if self.cluster != "slurm":
            return dict(self.parameters)
        # singleton: never two of one name at once, should this process die between sbatch and noting the job's id
        dependency = f"afterok:{waits_for},singleton" if waits_for else "singleton"
        more = {"kill-on-invalid-dep": "yes", **self.additional_parameters}
        name = {"job_name": f"pirl-{job.run.id}", "dependency": dependency, "additional_parameters": more}
        return {**self.parameters, **name}

    def _executor(self, folder: Path) -> Any:
        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise OSError("there is no sbatch here: start the sweep on the cluster, or with launcher=local.")
        kind = self.submitit.SlurmExecutor if self.cluster == "slurm" else self.submitit.LocalExecutor
        return kind(folder=(folder / "submitit").absolute(), **self.executor_settings)

    def _entry(self, job: Job, entry: Entry) -> Entry:
        if self.gpus_per_node > 1 and job.run.multi_process:
            return partial(run_under_torchrun, job.run.command, self.gpus_per_node, self.cpus_per_task)
        return entry

    def _on_its_way(self, job: Job) -> Submitted | None:
        """The job that an earlier sweep left in the queue for this run."""
        try:
            content = json.loads((job.folder / SUBMITTED).read_text(encoding="utf-8"))
            run, cluster, number, since = (content[key] for key in ("run", "cluster", "job", "time"))
        except (OSError, ValueError, TypeError, KeyError):
            return None
        if (run, cluster) != (job.run.id, self.cluster):
            return None
        kind = self.submitit.SlurmJob if cluster == "slurm" else self.submitit.LocalJob
        handle = Submitted(kind((job.folder / "submitit").absolute(), str(number)), job, cluster)
        return handle if handle.is_known(time.time() - since < _YOUNG) and not handle.is_over() else None


class SubmittedRun:
    """What a job does; submitit keeps it in a file and calls it on the job's machine."""

    def __init__(self, job: Job, entry: Entry, threads: int) -> None:
        self.job, self.entry, self.threads = job, entry, threads

    def __call__(self) -> str:
        """Makes the run.

        Raises:
            RuntimeError: it failed; so that the job fails, and what depends on it is not started.
        """
        if is_finished(self.job.folder, self.job.run.id):
            return FINISHED
        os.environ.setdefault("OMP_NUM_THREADS", str(self.threads))
        # loading processes are told of a preemption, too, and would queue the job again, each once more
        os.register_at_fork(after_in_child=_leave_preemption_to_the_parent)
        preemption = _Preemption() if self.job.run.command == "train" else None
        try:
            outcome = perform(self.job, self.entry)
        except Preempted:
            if preemption is not None:
                preemption.queue_again()
            raise
        if outcome.state != FINISHED:
            raise RuntimeError(outcome.reason)
        return outcome.state

    def checkpoint(self) -> Any:
        """The same again, when the job is preempted or out of time: a run goes on from its own checkpoints."""
        return optional("submitit", "slurm", "the launcher submitit").helpers.DelayedSubmission(self)


class Submitted:
    """A job in the queue, or running: see ``Handle``."""

    def __init__(self, submitted: Any, job: Job, cluster: str) -> None:
        self.submitted, self.job, self.cluster = submitted, job, cluster
        self._over_since: float | None = None

    @property
    def job_id(self) -> str:
        """The cluster's number of it."""
        return str(self.submitted.job_id)

    def is_known(self, young: bool) -> bool:
        """Whether there is such a job; accounting may need a moment to know a ``young`` one."""
        if self.cluster == "local":
            return _is_controller(self.job_id)
        return young or str(self.submitted.watcher.get_state(self.job_id, mode="force")) != "UNKNOWN"

    def is_over(self) -> bool:
        """Whether its outcome is there, or the cluster says that it ended without one."""
        if self.cluster == "local":  # the controller ends last, after it has queued again what is to be
            return not self._is_running_here()
        if read_outcome(self.job.folder, self.job.run.id) is not None:
            return True
        if not self.submitted.done():
            self._over_since = None
            return False
        self._over_since = self._over_since or time.monotonic()
        return time.monotonic() - self._over_since > _LATE

    def interrupt(self) -> bool:
        """Ends a job on this machine; a cluster's stays."""
        if self.cluster == "slurm":
            log.info("job %s goes on (scancel %s ends it): %s", self.job_id, self.job_id, self.job.run.label)
            return False
        if self._is_running_here():
            os.kill(int(self.job_id), signal.SIGINT)
        return True

    def stop(self) -> None:
        """Ends a job on this machine by force, where it has not ended."""
        if self.cluster == "local" and self._is_running_here():
            for pid in [*children_of(int(self.job_id)), int(self.job_id)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if self.submitted._process is not None:
                self.submitted._process.wait()

    def _is_running_here(self) -> bool:
        if self.submitted._process is not None:  # ours: it must be waited for, or it stays as a zombie
            return self.submitted._process.poll() is None
        return _is_controller(self.job_id)


class _Preemption:
    """Has submitit's signal end a training as SIGUSR1 does, after a checkpoint, before the job is queued again."""

    def __init__(self) -> None:
        self.told, self.handler = False, signal.getsignal(signal.SIGUSR2)
        if callable(self.handler):
            signal.signal(signal.SIGUSR1, self.handler)  # before the training listens there is nothing to save
            signal.signal(signal.SIGUSR2, self._tell)

    def _tell(self, number: int, frame: Any) -> None:
        self.told = True
        signal.raise_signal(signal.SIGUSR1)

    def queue_again(self) -> None:
        """What submitit does at its signal, which ends the process; nothing where another signal ended the training.

        After SIGTERM the job is cancelled, or SLURM itself queues it again.
        """
        if self.told and callable(self.handler):
            self.handler(signal.SIGUSR2, None)


def _leave_preemption_to_the_parent() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _is_controller(pid: str) -> bool:
    """Whether a process of this machine is submitit's; numbers are used again."""
    try:
        return b"submitit.local._local" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
