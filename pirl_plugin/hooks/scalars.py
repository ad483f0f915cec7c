"""The values that every logger writes, collected once for a logged step, and the base class of the loggers."""

from __future__ import annotations

import resource
import sys
import time
import weakref
from abc import abstractmethod
from typing import Any

import torch
from classy_vision.hooks import ClassyHook
from classy_vision.tasks import ClassyTask
from torch import Tensor

from pirl_plugin.distributed import all_reduce_mean, is_primary
from pirl_plugin.registry import Configurable


def collect_scalars(task: ClassyTask) -> dict[str, float]:
    """Everything worth a curve, as plain numbers; collective, and the one place where a logger waits for the device.

    Asked again at the same step it gives the same dictionary, so several loggers cost as much as one.

    Returns:
        ``step`` (optimiser steps), ``epoch`` (from 0), ``images_seen``, ``loss`` (mean over the steps since the last
        collected ones and over processes), ``lr``, ``images_per_second`` (all processes), ``seconds`` (of training,
        pieces before a resume included), ``peak_memory_mib`` (of the GPU if the task is on one, else of this process),
        what the loss keeps in ``last_statistics``, ``normalizer`` where there is one, and ``task.health``.
    """
    return _meter(task).collect(task)


def step_of(task: ClassyTask) -> int:
    """Optimiser steps so far; images over the batch size for the host's own tasks."""
    if hasattr(task, "step_idx"):
        return int(task.step_idx)
    return images_seen(task) // max(1, task.get_global_batchsize() * getattr(task, "optimizer_period", 1))


def images_seen(task: ClassyTask) -> int:
    """Images that gradients have been computed for, by all processes."""
    return int(getattr(task, "images_seen", getattr(task, "num_updates", 0)))


def is_update_step(task: ClassyTask) -> bool:
    """Whether the last batch ended in an optimiser step, which micro-batches of an accumulated one do not."""
    return bool(getattr(task, "is_update_step", True))


def is_log_step(task: ClassyTask) -> bool:
    """Whether values are logged, so that waiting for the device is allowed."""
    return is_update_step(task) and step_of(task) % int(getattr(task, "log_every", 50)) == 0


class ScalarHook(Configurable, ClassyHook):
    """Base of the loggers: calls ``write`` on rank 0 every ``task.log_every`` steps and at the end of an epoch."""

    on_phase_start = ClassyHook._noop

    def __init__(self) -> None:
        super().__init__()
        self.state.seconds = 0.0  # saved with the run, so that a resumed one goes on counting
        self.state.collected_at = 0  # images: a resumed run's next mean is over all steps since then
        self._logged_step = -1

    def open(self, task: ClassyTask) -> None:
        """Called on rank 0 before training."""

    @abstractmethod
    def write(self, task: ClassyTask, values: dict[str, float]) -> None:
        """Called on rank 0 with the values of a logged step."""

    def close(self) -> None:
        """Called on rank 0 after training."""

    def on_start(self, task: ClassyTask) -> None:
        self._logged_step = step_of(task)
        _meter(task).start(task, self.state.seconds, self.state.collected_at)
        if is_primary():
            self.open(task)

    def on_step(self, task: ClassyTask) -> None:
        if not task.train:
            return
        meter = _meter(task)
        meter.observe(task)
        self.state.seconds = meter.seconds()
        if is_log_step(task):
            self._log(task)
        self.state.collected_at = meter.collected_at

    def on_phase_end(self, task: ClassyTask) -> None:
        if task.train:
            self._log(task)
            self.state.collected_at = _meter(task).collected_at

    def on_end(self, task: ClassyTask) -> None:
        if is_primary():
            self.close()

    def _log(self, task: ClassyTask) -> None:
        if step_of(task) == self._logged_step:
            return  # an epoch that ends on a logged step has nothing to add
        self._logged_step = step_of(task)
        values = collect_scalars(task)  # on every rank: it averages over them
        if is_primary():
            self.write(task, values)


class _Meter:
    """What happened in a task since its scalars were last collected. Losses stay on the device until then."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.values: dict[str, float] = {}
        self.observed_at = self.collected_at = self.rate_from = self.earlier_losses = 0
        self.started = self.collected_time = time.perf_counter()
        self.earlier_seconds = 0.0

    def start(self, task: ClassyTask, earlier_seconds: float, collected_at: int) -> None:
        """Begins to count; every hook calls it before the first step."""
        self.losses, self.values = [], {}
        self.observed_at = self.rate_from = images_seen(task)
        self.collected_at = collected_at
        missed = self.observed_at - collected_at
        # only our own tasks save the losses of an epoch that was interrupted
        self.earlier_losses = missed // task.get_global_batchsize() if hasattr(task, "losses_so_far") else 0
        self.started = self.collected_time = time.perf_counter()
        self.earlier_seconds = max(self.earlier_seconds, earlier_seconds)

    def seconds(self) -> float:
        """Seconds of training, pieces before a resume included."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def observe(self, task: ClassyTask) -> None:
        """Takes note of the last batch, once, however many hooks ask for it."""
        if images_seen(task) != self.observed_at and task.last_batch is not None:
            self.observed_at = images_seen(task)
            if self.earlier_losses:  # of the piece before a resume, which the checkpoint hook has handed back by now
                self.losses = [torch.as_tensor(loss) for loss in task.losses[-1 - self.earlier_losses : -1]]
                self.earlier_losses = 0
            self.losses.append(torch.as_tensor(task.last_batch.loss).detach())

    def collect(self, task: ClassyTask) -> dict[str, float]:
        """See :func:`collect_scalars`."""
        self.observe(task)
        if self.losses or not self.values:
            self.values = self._collect(task)
        return self.values

    def _collect(self, task: ClassyTask) -> dict[str, float]:
        seen, now = images_seen(task), time.perf_counter()
        values = {
            "step": step_of(task),
            "epoch": int(getattr(task, "epoch", getattr(task, "train_phase_idx", 0))),
            "images_seen": seen,
            **self._device_values(task),
            "lr": float(task.optimizer.options_view.lr),
            "images_per_second": (seen - self.rate_from) / max(now - self.collected_time, 1e-9),
            "seconds": self.seconds(),
            "peak_memory_mib": _peak_memory_mib(bool(getattr(task, "use_gpu", False))),
            **getattr(task, "health", {}),
        }
        self.losses, self.collected_at, self.rate_from, self.collected_time = [], seen, seen, now
        return values

    def _device_values(self, task: ClassyTask) -> dict[str, float]:
        """Means over processes, brought over in one piece."""
        loss = task.base_loss
        tensors: dict[str, Tensor] = {}
        if self.losses:
            tensors["loss"] = torch.stack(self.losses).float().mean()
        tensors |= getattr(loss, "last_statistics", {})
        if not tensors:
            return {}
        device = next(iter(tensors.values())).device
        stacked = torch.stack([value.detach().to(device, torch.float32) for value in tensors.values()])
        values = dict(zip(tensors, all_reduce_mean(stacked).tolist(), strict=True))
        normalizer = getattr(loss, "normalizer", None)
        if normalizer:  # 0 where the estimator has none
            values["normalizer"] = float(normalizer)
        return values


_METERS: weakref.WeakKeyDictionary[Any, _Meter] = weakref.WeakKeyDictionary()


def _meter(task: ClassyTask) -> _Meter:
    return _METERS.setdefault(task, _Meter())


def _peak_memory_mib(on_gpu: bool) -> float:
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # getrusage counts bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
