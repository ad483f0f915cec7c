"""Where the runs of a sweep are made."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from pirl_plugin.registry import Configurable, register_launcher
from pirl_plugin.schema import PositiveInt, checked
from pirl_plugin.signals import children_of, told_to_stop
from pirl_plugin.sweep import torchrun
from pirl_plugin.sweep.jobs import INTERRUPTED, PREEMPTED, Entry, Job, Preempted, perform
from pirl_plugin.sweep.plan import TRAIN
from pirl_plugin.sweep.state import FAILED, Outcome, write_outcome

_MODULES = {"train": "pirl_plugin.commands.train", "benchmark": "pirl_plugin.commands.benchmark"}
_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
_TORCHRUNS: list[subprocess.Popen[bytes]] = []  # of this process; torchrun's own processes are in sessions of their own
_TORCHRUNS_PATIENCE = 30.0  # seconds that torchrun has to end its processes


class Handle(Protocol):
    """A job on its way."""

    def is_over(self) -> bool:
        """Whether it has ended, in whatever way; its outcome lies in its folder, or it died."""

    def interrupt(self) -> bool:
        """Asks it to end, a training once it has saved its state; False: it goes on, without the sweep too."""

    def stop(self) -> None:
        """Ends it by force, where it has not ended."""


class Launcher(Configurable, ABC):
    """Starts jobs.

    Attributes:
        capacity: jobs at once.
        knows_dependencies: whether it takes a job before the one that it needs is finished, and makes it wait.
        knows_its_jobs: whether it finds the job of an earlier sweep again that makes a run already.
    """

    capacity: int = 1
    knows_dependencies: bool = False
    knows_its_jobs: bool = False

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

    def interrupt(self) -> bool:
        return True

    def stop(self) -> None:
        pass


@register_launcher("inline")
@checked
class InlineLauncher(Launcher):
    """One run after the other in this process."""

    def start(self, job: Job, entry: Entry, needs: Handle | None = None) -> Handle:
        """See ``Launcher.start``; returns when the job is done."""
        with _logging_as_before():
            perform(job, entry)
        return _Over()


@contextlib.contextmanager
def _logging_as_before() -> Iterator[None]:
    """A command takes the logging over: what the sweep says after it would go into the command's console, closed."""
    root, ours = logging.getLogger(), logging.getLogger("pirl_plugin")
    handlers, levels = list(root.handlers), (root.level, ours.level)
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])


@register_launcher("local")
@checked
class LocalLauncher(Launcher):
    """Several processes of this machine, one run each.

    Args:
        jobs: runs at once; null: as many as there are cores for, where ``threads`` is given, else one for each GPU, or
            for every two cores.
        threads: of each run; null shares the cores out.
    """

    def __init__(self, jobs: PositiveInt | None = None, threads: PositiveInt | None = None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.gpus = torch.cuda.device_count()
        self.capacity = jobs or max(1, cores // threads if threads else self.gpus or cores // 2)
        self.threads = threads or max(1, cores // self.capacity)
        # the server imports everything once; each job then starts in no time, in a process of its own
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(_MODULES.values()))
        self._running: list[tuple[int, Any]] = []
        # nobody writes into it: that its writing end is closed tells the jobs that this process is gone, killed or not
        self._sweep_lives, self._writer = self.context.Pipe(duplex=False)

    def start(self, job: Job, entry: Entry, needs: Handle | None = None) -> Handle:
        """See ``Launcher.start``; jobs share the GPUs out."""
        self._running = [(gpu, process) for gpu, process in self._running if process.is_alive()]
        busy = [gpu for gpu, _ in self._running]
        gpu = min(range(self.gpus), key=busy.count) if self.gpus else -1
        name = gpu_name(gpu, os.environ.get(_VISIBLE_GPUS)) if self.gpus else ""
        what = (job, entry, self.threads, name, self._sweep_lives)
        process = self.context.Process(target=_perform_alone, args=what, daemon=False)
        process.start()
        self._running.append((gpu, process))
        return _Process(process, signal.SIGTERM if job.run.command == TRAIN else signal.SIGINT)


@register_launcher("torchrun")
@checked
class TorchrunLauncher(LocalLauncher):
    """Each run on several processes of this machine, one after the other.

    Args:
        nproc_per_node: processes of one run; benchmarks that run in one process only take one.
        threads: of each process; null shares the cores out.
    """

    def __init__(self, nproc_per_node: PositiveInt = 2, threads: PositiveInt | None = None) -> None:
        super().__init__(jobs=1, threads=threads)
        self.nproc_per_node = nproc_per_node
        self.threads = threads or max(1, self.threads // nproc_per_node)
        self.gpus = 0  # torchrun's processes choose their own

    def start(self, job: Job, entry: Entry, needs: Handle | None = None) -> Handle:
        """See ``Launcher.start``."""
        several = partial(run_under_torchrun, job.run.command, self.nproc_per_node, self.threads)
        return super().start(job, several if job.run.multi_process else entry, needs)


def run_under_torchrun(command: str, processes: int, threads: int, arguments: Sequence[str]) -> int:
    """A command on several processes, its output where this process's output goes.

    A signal that asks a run to stop is handed on to them: the exit code is then that of one that has saved its state.
    """
    # by its path: as a module it would import the whole package first
    launcher = [sys.executable, torchrun.__file__, "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    call = [*launcher, "-m", _MODULES[command], *arguments]
    process = subprocess.Popen(call, env=environment, stdout=sys.stdout, stderr=sys.stderr)
    _TORCHRUNS.append(process)
    told: list[int] = []

    def hand_on(name: str) -> None:
        """To the processes themselves: torchrun would give them half a minute."""
        told.append(signal.Signals[name])
        children = children_of(process.pid)
        if not children:  # not yet, or not any more
            process.terminate()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, told[-1])

    try:
        with told_to_stop(hand_on):
            code = process.wait()
    finally:
        _end_torchrun(process)
        _TORCHRUNS.remove(process)
    # processes that were not listening yet had nothing to save
    unheard = (-signal.SIGTERM, *(128 + number for number in told))
    return PREEMPTED if told and code in unheard else code


def _end_torchrun(process: subprocess.Popen[bytes]) -> None:
    """Asks torchrun to end its processes; killed at once it would leave them behind."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=_TORCHRUNS_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _Process:
    """A job in a process that leads a group of its own; ``asks`` is the signal that it ends at in good order."""

    def __init__(self, process: Any, asks: signal.Signals) -> None:
        self.process, self.asks = process, asks

    def is_over(self) -> bool:
        return not self.process.is_alive()

    def interrupt(self) -> bool:
        """To the job alone, which ends what it has started itself: loaders, torchrun."""
        if self.process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, self.asks)
        return True

    def stop(self) -> None:
        """With its whole group, torchrun included, or alone where it has just started and leads none yet."""
        if self.process.is_alive():
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


def _perform_alone(job: Job, entry: Entry, threads: int, gpu: str, sweep_lives: Any) -> None:
    """The body of a job's own process."""
    os.setsid()  # the terminal's Ctrl-C is for the sweep, which hands it on
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Thread(target=_end_with_the_sweep, args=(sweep_lives,), daemon=True).start()
    try:
        if gpu:
            os.environ[_VISIBLE_GPUS] = gpu
        torch.set_num_threads(threads)
        perform(job, entry)
    except KeyboardInterrupt as interruption:  # the run has said so in its console
        sys.exit(PREEMPTED if isinstance(interruption, Preempted) else INTERRUPTED)
    except Exception as error:  # before or after the command: no folder, a full disk
        write_outcome(job.folder, Outcome(job.run.id, FAILED, f"{type(error).__name__}: {error}"))
        raise


def gpu_name(index: int, visible: str | None) -> str:
    """The name that CUDA knows a GPU by, of those that the sweep sees.

    Args:
        index: of the GPU among them.
        visible: ``CUDA_VISIBLE_DEVICES`` of the sweep, numbers or names of GPUs and parts of them; None shows all.
    """
    return visible.split(",")[index].strip() if visible else str(index)


def _end_with_the_sweep(sweep_lives: Any) -> None:
    """Without it, runs of a sweep that was killed would go on, beside those of the sweep started again.

    The parent's death would not tell: the fork server lives on as long as one of its children does.
    """
    with contextlib.suppress(OSError, EOFError):
        sweep_lives.poll(None)
    for process in list(_TORCHRUNS):
        _end_torchrun(process)
    os.killpg(0, signal.SIGKILL)
