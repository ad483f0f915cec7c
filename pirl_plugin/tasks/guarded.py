"""A task that notices what goes wrong in a long run: numbers, signals, checkpoints that are half written."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from pirl_plugin import distributed
from pirl_plugin.heartbeat import BETWEEN_EPOCHS, Heartbeat
from pirl_plugin.hooks.checkpoint import load_parts
from pirl_plugin.hooks.checkpoint_files import newest_usable
from pirl_plugin.tasks.counting import CountingTask
from pirl_plugin.tasks.numerics import MOST_IN_A_ROW, Numerics, Snapshot, StepRecord, gradients_are_finite
from pirl_plugin.tasks.step_flags import Flags, StepFlags
from pirl_plugin.tasks.stopping import RollBack, StopRequested

log = logging.getLogger(__name__)

_MOST_ROLL_BACKS = 10


class GuardedTask(CountingTask):
    """Base of our tasks: restores and rolls back, guards each step's numbers, ends in order when told to.

    Attributes:
        run_dir: folder of the run; None writes nothing.
        on_nonfinite: what a loss or gradient that is not finite does: ``stop``, ``skip`` or ``roll_back``.
        told_to_stop: name of the signal that this process got.
        stop_requested: the same, once all processes know of it: set in the same step everywhere.
        excluded_steps: optimiser steps (from 1) whose update is left out, since they were bad before a roll-back.
        heartbeat: told of all progress, if there is one.
    """

    run_dir: Path | None
    on_nonfinite: str
    _flags: StepFlags
    _numerics: Numerics
    _snapshot: Snapshot | None
    _to_restore: dict[str, Any] | None

    def _begin(self) -> None:
        """What changes while the task runs."""
        self.health: dict[str, float] = {}
        self.config: dict[str, Any] = {}
        self.told_to_stop: str | None = None  # by a signal, to this process
        self.stop_requested: str | None = None  # known to all processes
        self.excluded_steps: list[int] = []
        self.heartbeat: Heartbeat | None = None
        self.checkpoint_dict: dict[str, Any] | None = None

    def init_distributed_data_parallel_model(self) -> None:
        """Restores the checkpoint, if there is one, before the processes' copies are tied together."""
        if self._to_restore is not None:
            self.restore(self._to_restore)
            self._to_restore = None
        super().init_distributed_data_parallel_model()

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Takes up a checkpoint's state, but for what the checkpoint hook keeps of each rank; collective.

        Raises:
            ValueError: it does not fit this task.
        """
        try:
            self.set_classy_state(checkpoint["classy_state_dict"])
            load_parts(self, checkpoint)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"the checkpoint does not fit this run: {reason or type(error).__name__}") from error

    def step(self) -> None:
        """One batch and its hooks."""
        with self._nothing_half_written():
            super().step()
        if self.stop_requested is not None and self.images_seen % self.images_per_epoch:
            self._stop(self.stop_requested)  # at an epoch's end once that is done with

    def _stop(self, reason: str) -> NoReturn:
        """Ends the run once its checkpoint is written, on all processes together.

        Where one ends early with an exit code that is not 0, torchrun gives the others half a minute.

        Raises:
            StopRequested: always.
        """
        self.mark(BETWEEN_EPOCHS)  # a large checkpoint takes its time
        for hook in self.hooks:
            getattr(hook, "finish", lambda: None)()
        distributed.barrier()
        raise StopRequested(reason)

    @contextlib.contextmanager
    def _nothing_half_written(self) -> Iterator[None]:
        """Whatever ends the run, a checkpoint that is being written is finished first."""
        try:
            yield
        except StopIteration:
            raise
        except BaseException:
            self.finish_writing()
            raise

    def finish_writing(self, seconds: float | None = None) -> None:
        """Waits for what hooks write in the background, for at most some seconds; what goes wrong is logged."""
        for hook in self.hooks:
            try:
                getattr(hook, "finish", lambda seconds: None)(seconds)
            except OSError as error:
                log.error("%s", error)

    def run_optimizer(self, loss: Tensor) -> None:
        """The backward pass and, with the last batch of a step, the optimiser; bad steps do not reach the weights."""
        period, last = self.optimizer_period, self._should_do_step()
        if self.is_update_step:
            self.optimizer.zero_grad()
        loss.backward()
        if not last:
            return
        parameters = [p for group in self.optimizer.optimizer.param_groups for p in group["params"]]
        if period != 1:
            self._rescale_gradients(1 / period)
        good = gradients_are_finite(parameters).to(self.device)
        if self.clip_grad_norm is not None:
            self._clip_gradients(self.clip_grad_norm)
        bad = self._flags.push(self._numerics.bad_loss(), ~good, self.told_to_stop is not None)
        excluded = self._next_step in self.excluded_steps
        self._numerics.close_step()
        self._look_at(self._flags.pop())
        self.optimizer.step(where=self.where)
        if self._snapshot is not None and self._snapshot_wanted():
            self._snapshot.restore_where(bad | excluded)

    @property
    def _next_step(self) -> int:
        """Number of the optimiser step being made, from 1."""
        return self.step_idx + 1

    def _new_record(self) -> StepRecord:
        lr, step = float(self.optimizer.options_view.lr), self._next_step
        return StepRecord(step, self.epoch, lr, step in self.excluded_steps)

    def _snapshot_wanted(self) -> bool:
        return self.on_nonfinite == "skip" or self._next_step in self.excluded_steps

    def _take_snapshot(self) -> None:
        if self._snapshot is None:
            self._snapshot = Snapshot((self.base_model, self.base_loss), self.optimizer.optimizer)
        self._snapshot.take()

    def check_numbers(self) -> None:
        """Looks at the flags of all steps made; waits for the device. Before anything is saved, and after an epoch.

        Raises:
            FloatingPointError: a step's loss or gradient was not finite (``on_nonfinite: stop``).
            RollBack: the same, with ``roll_back``.
        """
        self._look_at(self._flags.pop(all_of_them=True))

    def _look_at(self, flags: list[Flags]) -> None:
        for known in flags:
            if known.stop:
                self.stop_requested = self.told_to_stop or "another process's signal"
            bad = self._numerics.report(known)
            if bad is None:
                continue
            record, text = bad
            if self.on_nonfinite == "roll_back":
                raise RollBack(record.step, text)
            if self.on_nonfinite == "stop" or self._numerics.in_a_row > MOST_IN_A_ROW:
                raise FloatingPointError(f"{text} Lower optimizer.lr, warm up longer, or see on_nonfinite.")
            log.warning("%s The step is skipped.", text)

    def roll_back(self, bad: RollBack) -> None:
        """Goes back to the last checkpoint, from where the run goes on without the step that was bad; collective.

        Raises:
            FloatingPointError: there is no checkpoint, or this has happened too often.
        """
        self.mark(BETWEEN_EPOCHS)  # large files are written to their end, read and checked
        for hook in self.hooks:
            getattr(hook, "finish", lambda: None)()
        distributed.barrier()
        found = newest_usable(self.run_dir) if self.run_dir is not None else None
        if found is None or len(self.excluded_steps) >= _MOST_ROLL_BACKS:
            why = "there is no checkpoint to go back to" if found is None else "it has gone back often enough"
            raise FloatingPointError(f"{bad.report} The run stops: {why}.")
        log.warning("%s The run goes back to %s and leaves that step out.", bad.report, found[0])
        self.excluded_steps.append(bad.step)
        self._flags, self._snapshot = StepFlags(self.device), None
        self._numerics.forget()
        self.restore(found[1])
        self.checkpoint_dict = found[1]
        for hook in self.hooks:
            if distributed.is_primary():
                getattr(hook, "close", lambda: None)()
            hook.on_start(self)
        distributed.barrier()  # in a step nobody would wait long for the last one

    def mark(self, doing: int) -> None:
        """Tells the other processes' watch what this one does from now on, see ``heartbeat``."""
        if self.heartbeat is not None:
            self.heartbeat.mark(self.images_seen // self.get_global_batchsize(), doing)

    def on_phase_end(self) -> None:
        """End of an epoch.

        Raises:
            StopRequested: the run was told to stop, and its checkpoint is written.
        """
        self.check_numbers()
        self.mark(BETWEEN_EPOCHS)
        with self._nothing_half_written():
            super().on_phase_end()
        if self.stop_requested is not None:
            self._stop(self.stop_requested)
