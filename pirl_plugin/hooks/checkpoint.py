"""Saves a run so that the same command, started again, goes on where it stopped."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from classy_vision.generic.util import get_checkpoint_dict
from classy_vision.hooks import ClassyHook, register_hook
from classy_vision.tasks import ClassyTask

from pirl_plugin import distributed
from pirl_plugin.heartbeat import BETWEEN_EPOCHS, HOOKS
from pirl_plugin.hooks.background import BackgroundWriter, HostCopies
from pirl_plugin.hooks.checkpoint_files import (
    PARTS_FOLDER,
    checkpoint_folder,
    checkpoint_path,
    checkpoints,
    describe_parts,
    parts_path,
    remove_checkpoint,
    remove_left_overs,
    step_of,
)
from pirl_plugin.hooks.random_state import get_random_state, set_random_state
from pirl_plugin.registry import Configurable
from pirl_plugin.schema import PositiveInt, checked
from pirl_plugin.weights.sealed import write_sealed

__all__ = ["RunCheckpointHook", "checkpoint_folder", "checkpoints", "get_random_state", "set_random_state", "step_of"]

log = logging.getLogger(__name__)


@register_hook("run_checkpoint")
@checked
class RunCheckpointHook(Configurable, ClassyHook):
    """Writes ``run_dir/checkpoints/step_N.pt``: model, optimiser, loss with its bank, counters, state of every rank.

    A rank's own state are its random generators and the losses of an epoch that is not at its end yet. Rank 0 writes
    one file for the job: the state is copied to the host, and a thread writes the copy while the training goes on. What
    goes wrong there is raised in the run. A file carries its checksum, is flushed and only then gets its name. A loss
    or a memory bank with ``save_parts(folder)`` and ``load_parts(folder)`` writes on all ranks into a folder of the
    checkpoint's own. A checkpoint is also written when training ends, and when the run is told to stop.

    Args:
        every_epochs: epochs between checkpoints; null: none by epochs.
        every_steps: optimiser steps between checkpoints; null: none by steps.
        keep: number of latest checkpoints to keep.
        keep_every_epochs: epochs between checkpoints that are kept for good, for curves; null: none.
        keep_best: also keep the one with the best value at an epoch's end: ``loss``, the epoch's mean, or a value of
            the hooks ``rankme`` and ``health``, such as ``retrieval/image``; null: none.
        best_is: whether a low or a high value is the best.
        bank_every: checkpoints between those that hold the memory bank; a run goes on from those alone, the others are
            weights for benchmarks. ``keep`` counts the former. The last one of a run always holds it.
        background: write in a thread; false makes the training wait, as the ranks' parts of a split bank always do:
            they are not copied first.
    """

    def __init__(
        self,
        every_epochs: PositiveInt | None = 1,
        every_steps: PositiveInt | None = None,
        keep: PositiveInt = 2,
        keep_every_epochs: PositiveInt | None = None,
        keep_best: str | None = None,
        best_is: Literal["lowest", "highest"] = "lowest",
        bank_every: PositiveInt = 1,
        background: bool = True,
    ) -> None:
        super().__init__()
        self.every_epochs, self.every_steps = every_epochs, every_steps
        self.keep, self.keep_every_epochs = keep, keep_every_epochs
        self.keep_best, self.best_is = keep_best, best_is
        self.bank_every, self.background = bank_every, background
        self.state.last_saved_step = -1
        self.state.saved = 0
        self.state.kept_steps = []
        self.state.without_bank = []
        self.state.best = None
        self._losses: list[float] = []
        self._writer, self._copies = BackgroundWriter(), HostCopies()

    def on_start(self, task: ClassyTask) -> None:
        """Takes up the states of the ranks from the checkpoint that was restored, if one was."""
        if task.run_dir is None:
            raise ValueError("checkpoint needs a folder: set run_dir, or set checkpoint to null.")
        if task.checkpoint_dict is not None:
            self.restore_ranks(task, task.checkpoint_dict)
            task.checkpoint_dict = None  # the restored tensors live in the task now; this copy would double the bank
        if distributed.is_primary():
            remove_left_overs(task.run_dir)

    def restore_ranks(self, task: ClassyTask, saved: dict[str, Any]) -> None:
        """This rank's own state; with another number of ranks than before, what can be had of it."""
        rank, states = distributed.rank(), saved.get("random_states", [])
        if rank < len(states):  # more ranks than before: the new ones keep their own seeds
            set_random_state(states[rank])
        losses = list(saved.get("losses", {}).values())
        if len(states) == distributed.world_size():
            self._losses = saved.get("losses", {}).get(rank, [])
        else:  # every rank gets the mean of all, so that the epoch's mean is that of all
            self._losses = [sum(step) / len(step) for step in zip(*losses, strict=True)]
        every = saved.get("rank_states", {})
        for hook in task.hooks:
            if hasattr(hook, "set_rank_states") and hook.name() in every:
                hook.set_rank_states(every[hook.name()])

    def on_phase_start(self, task: ClassyTask) -> None:
        """Hands back the losses of an epoch that was interrupted, so that its mean is that of all of it."""
        if self._losses:
            task.losses_so_far, self._losses = self._losses, []

    def on_step(self, task: ClassyTask) -> None:
        """Saves every ``every_steps`` optimiser steps, and when the run is to stop; an epoch's last step at its end."""
        self._writer.raise_error()
        if not (task.train and task.is_update_step) or _epoch_is_over(task):
            return
        stops = getattr(task, "stop_requested", None) is not None
        if stops or (self.every_steps and task.step_idx % self.every_steps == 0):
            self._save(task, stops)
            _mark(task, HOOKS)

    def on_phase_end(self, task: ClassyTask) -> None:
        """Saves every ``every_epochs`` epochs."""
        if not task.train:
            return
        stops = getattr(task, "stop_requested", None) is not None
        keeps = bool(self.keep_every_epochs) and (task.epoch + 1) % (self.keep_every_epochs or 1) == 0
        if keeps:
            self.state.kept_steps.append(task.step_idx)
        by_epochs = self.every_epochs and (task.epoch + 1) % self.every_epochs == 0
        by_steps = self.every_steps and task.step_idx % self.every_steps == 0
        best = self._is_best(task)
        if keeps or by_epochs or by_steps or best or stops:
            self._save(task, stops)

    def on_end(self, task: ClassyTask) -> None:
        """Saves the end of the run, and waits until it is written."""
        self._save(task, last=True)
        self.finish()

    def finish(self, seconds: float | None = None) -> None:
        """Waits until what is being written is written.

        Raises:
            OSError: it cannot be.
        """
        self._writer.wait(seconds)

    def _save(self, task: ClassyTask, last: bool = False) -> None:
        step = task.step_idx
        written = self.state.last_saved_step == step
        if written and not (last and step in self.state.without_bank):
            return
        _mark(task, BETWEEN_EPOCHS)  # a slow disk is no hang
        getattr(task, "check_numbers", lambda: None)()  # nothing is saved that is not known to be finite
        whole = last or self.state.saved % self.bank_every == 0
        self.state.last_saved_step = step
        self.state.saved += not written
        self.state.without_bank = [s for s in self.state.without_bank if s != step] + ([] if whole else [step])
        content = self._content(task, whole)
        path = checkpoint_path(task.run_dir, step)
        parts = self._save_parts(task, path) if whole else None
        if distributed.is_primary():
            keeps = partial(self._superfluous, task.run_dir, {*self.state.kept_steps, *self._best_step()})
            self._writer.wait()  # until the copy before is no longer read
            work = partial(_write, self._copies.copy(content), path, parts, keeps)
            self._writer.start(work)
            if not self.background:
                self._writer.wait()
        distributed.barrier()  # the others would wait in their next step anyway, but there not for long

    def _content(self, task: ClassyTask, whole: bool) -> dict[str, Any]:
        """All that goes into the file; collective."""
        states = distributed.gather_objects(get_random_state())
        pending = [] if _epoch_is_over(task) else task.losses_so_far
        losses = dict(enumerate(distributed.gather_objects(pending)))
        ranked = [hook for hook in task.hooks if hasattr(hook, "get_rank_state")]
        rank_states = {hook.name(): distributed.gather_objects(hook.get_rank_state()) for hook in ranked}
        if not distributed.is_primary():
            return {}
        content = get_checkpoint_dict(task, {"config": task.config})
        if not whole:
            content["classy_state_dict"]["loss"] = {}
        ranks = {"random_states": states, "losses": losses, "rank_states": rank_states}
        return {**content, **ranks, "complete": whole, "dataset": dataset_facts(task)}

    def _save_parts(self, task: ClassyTask, path: Path) -> Path | None:
        """The folder of the ranks' parts, whole, beside the file that is to be; None where there are none.

        The training waits for it, ``background`` or not: the rows go on changing, so that writing beside it would take
        a copy of each rank's whole shard on the host, where this takes one piece of 67 MB at a time; and a bank is
        split because it is too large to have twice. ``bank_every`` makes the pauses rare.
        """
        owner = owner_of_parts(task)
        if owner is None:
            return None
        folder = parts_path(path)
        temporary = folder.with_name(f".{folder.name}.tmp")
        if distributed.is_primary():
            remove_checkpoint(path)  # of an earlier try to pass this step
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        distributed.barrier()
        _on_all_ranks(lambda: owner.save_parts(temporary))
        if distributed.is_primary():
            os.replace(temporary, folder)
        return folder

    def _is_best(self, task: ClassyTask) -> bool:
        """Whether this epoch's value is the best so far; on every rank the same answer."""
        if self.keep_best is None:
            return False
        mean = sum(task.losses) / max(1, len(task.losses))
        values = distributed.gather_objects({**task.health, "loss": mean})[0]
        if self.keep_best not in values:
            raise ValueError(f"checkpoint.keep_best: no value {self.keep_best!r}; there are {', '.join(values)}.")
        value, best = values[self.keep_best], self.state.best
        better = best is None or (value < best[1] if self.best_is == "lowest" else value > best[1])
        if better:
            self.state.best = [task.step_idx, value]
        return better

    def _best_step(self) -> list[int]:
        return [] if self.state.best is None else [self.state.best[0]]

    def _superfluous(self, run_dir: Path, keeps: set[int]) -> list[Path]:
        """Checkpoints to remove: neither kept for good nor among the last whole ones or newer than those."""
        without_bank = set(self.state.without_bank)
        whole = [path for path in checkpoints(run_dir) if step_of(path) not in without_bank]
        oldest = step_of(whole[-self.keep :][0]) if whole else 0
        return [path for path in checkpoints(run_dir) if step_of(path) < oldest and step_of(path) not in keeps]


def owner_of_parts(task: ClassyTask) -> Any:
    """The loss or its memory bank, if it saves parts of its own on every rank; else None."""
    loss = task.base_loss
    return next((part for part in (loss, getattr(loss, "memory_bank", None)) if hasattr(part, "save_parts")), None)


def load_parts(task: ClassyTask, checkpoint: dict[str, Any]) -> None:
    """Gives the parts of a checkpoint back to whom they are of; collective.

    Raises:
        ValueError: the checkpoint has parts and nobody wants them, or the other way round.
    """
    owner, folder = owner_of_parts(task), checkpoint.get(PARTS_FOLDER)
    if (owner is None) != (folder is None):
        raise ValueError("the checkpoint is of a run with another kind of memory bank")
    if owner is not None and folder is not None:
        _on_all_ranks(lambda: owner.load_parts(Path(folder)))


def dataset_facts(task: ClassyTask) -> dict[str, Any]:
    """What tells whether an image id still means the same image: the number of images and their fingerprint."""
    dataset = getattr(task.datasets["train"], "dataset", None)
    if dataset is None or not hasattr(dataset, "fingerprint"):
        return {}
    return {"num_images": len(dataset), "fingerprint": dataset.fingerprint}


def _mark(task: ClassyTask, doing: int) -> None:
    getattr(task, "mark", lambda doing: None)(doing)


def _epoch_is_over(task: ClassyTask) -> bool:
    return bool(task.images_seen % task.images_per_epoch == 0)


def _on_all_ranks(action: Callable[[], None]) -> None:
    """Does it, and raises on every rank what went wrong on one, so that none is left waiting."""
    problem = ""
    try:
        action()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    problems = [f"rank {rank}: {said}" for rank, said in enumerate(distributed.gather_objects(problem)) if said]
    if problems:
        raise OSError("; ".join(problems))


def _write(content: dict[str, Any], path: Path, parts: Path | None, superfluous: Callable[[], list[Path]]) -> None:
    """What the thread does."""
    try:
        if parts is not None:
            content["parts"] = describe_parts(parts)
        write_sealed(content, path)
    except OSError as error:
        good = [other for other in checkpoints(path.parent.parent) if other != path]
        last = f"the last good one is {good[-1]}" if good else "there is none before it"
        raise OSError(f"cannot write the checkpoint {path}: {error.strerror or error}; {last}.") from error
    log.info("Checkpoint written: %s", path)
    for old in superfluous():
        remove_checkpoint(old)
