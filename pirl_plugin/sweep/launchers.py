"""Where the runs of a sweep are made."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch

from pirl_plugin.registry import Configurable, register_launcher
from pirl_plugin.schema import NonNegativeInt, PositiveInt, checked
from pirl_plugin.sweep.jobs import Entry, Job, perform

_MODULES = {"train": "pirl_plugin.commands.train", "benchmark": "pirl_plugin.commands.benchmark"}


class Handle(Protocol):
    """A job on its way."""

    def is_over(self) -> bool:
        """Whether it has ended, in whatever way; its outcome lies in its folder, or it died."""

    def interrupt(self) -> None:
        """Asks it to end, as Ctrl-C does."""

    def stop(self) -> None:
        """Waits a moment for it to end, then ends it by force."""


class Launcher(Configurable, ABC):
    """Starts jobs.

    Attributes:
        capacity: jobs at once.
        knows_dependencies: whether it takes a job before the one that it needs is finished, and makes it wait.
    """

    capacity: int = 1
    knows_dependencies: bool = False

    @abstractmethod
    def start(self, job: Job, entry: Entry, needs: Handle | None = None) -> Handle:
        """Starts a job.

        Args:
            job: what to do.
            entry: the command's main function.
            needs: the job it needs, where that is still on its way (``knows_dependencies`` only).
        """


class _Over:
    """A job that is done."""

    def is_over(self) -> bool:
        return True

    def interrupt(self) -> None:
        pass

    def stop(self) -> None:
        pass


@register_launcher("inline")
@checked
class InlineLauncher(Launcher):
    """One run after the other in this process."""

    def start(self, job: Job, entry: Entry, needs: Handle | None = None) -> Handle:
        """See ``Launcher.start``; returns when the job is done."""
        perform(job, entry)
        return _Over()


@register_launcher("local")
@checked
class LocalLauncher(Launcher):
    """Several processes of this machine, one run each.

    Args:
        jobs: runs at once; null is one for each GPU, or for every two processor cores.
        threads: of each run; null shares the cores out.
    """

    def __init__(self, jobs: PositiveInt | None = None, threads: NonNegativeInt | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.gpus = torch.cuda.device_count()
        self.capacity = jobs or max(1, self.gpus or cores // 2)
        self.threads = threads or max(1, cores // self.capacity)
        # the server imports everything once; each job then starts in no time, in a process of its own
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(_MODULES.values()))
        self._running: list[tuple[int, Any]] = []

    def start(self, job: Job, entry: Entry, needs: Handle | None = None) -> Handle:
        """See ``Launcher.start``; jobs share the GPUs out."""
        self._running = [(gpu, process) for gpu, process in self._running if process.is_alive()]
        busy = [gpu for gpu, _ in self._running]
        gpu = min(range(self.gpus), key=busy.count) if self.gpus else -1
        process = self.context.Process(target=_perform_alone, args=(job, entry, self.threads, gpu), daemon=False)
        process.start()
        self._running.append((gpu, process))
        return _Process(process)


@register_launcher("torchrun")
@checked
class TorchrunLauncher(LocalLauncher):
    """Each run on several processes of this machine, one after the other.

    Args:
        nproc_per_node: processes of one run; benchmarks that run in one process only take one.
        threads: of each process; null shares the cores out.
    """

    def __init__(self, nproc_per_node: PositiveInt = 2, threads: NonNegativeInt | None = None) -> None:
        super().__init__(jobs=1, threads=threads)
        self.nproc_per_node = nproc_per_node
        self.threads = threads or max(1, self.threads // nproc_per_node)
        self.gpus = 0  # torchrun's processes choose their own

    def start(self, job: Job, entry: Entry, needs: Handle | None = None) -> Handle:
        """See ``Launcher.start``."""
        torchrun = partial(run_under_torchrun, job.run.command, self.nproc_per_node, self.threads)
        return super().start(job, torchrun if job.run.multi_process else entry, needs)


def run_under_torchrun(command: str, processes: int, threads: int, arguments: Sequence[str]) -> int:
    """A command on several processes, its output where this process's output goes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    call = [*launcher, "-m", _MODULES[command], *arguments]
    return subprocess.run(call, env=environment, stdout=sys.stdout, stderr=sys.stderr, check=False).returncode


class _Process:
    """A job in a process that leads a group of its own."""

    def __init__(self, process: Any) -> None:
        self.process = process

    def is_over(self) -> bool:
        return not self.process.is_alive()

    def interrupt(self) -> None:
        if self.process.is_alive():
            os.killpg(self.process.pid, signal.SIGINT)  # torchrun's processes too

    def stop(self) -> None:
        self.process.join(timeout=10)
        if self.process.is_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.join()


def _perform_alone(job: Job, entry: Entry, threads: int, gpu: int) -> None:
    """The body of a job's own process."""
    os.setsid()  # the terminal's Ctrl-C is for the sweep, which hands it on
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Thread(target=_end_with_the_sweep, args=(os.getppid(),), daemon=True).start()
    if gpu >= 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    torch.set_num_threads(threads)
    perform(job, entry)


def _end_with_the_sweep(parent: int) -> None:
    """Without it, runs of a sweep that was killed would go on, beside those of the sweep started again."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)
