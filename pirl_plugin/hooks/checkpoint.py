"""Saves a run so that the same command, started again, goes on where it stopped."""

from __future__ import annotations

import logging
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from classy_vision.generic.util import get_checkpoint_dict
from classy_vision.hooks import ClassyHook, register_hook
from classy_vision.tasks import ClassyTask

from pirl_plugin import distributed
from pirl_plugin.registry import Configurable
from pirl_plugin.schema import PositiveInt, checked
from pirl_plugin.weights.files import write_atomically

log = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d+)\.pt")


@register_hook("run_checkpoint")
@checked
class RunCheckpointHook(Configurable, ClassyHook):
    """Writes ``run_dir/checkpoints/step_N.pt``: model, optimiser, loss with its bank, counters, state of every rank.

    A rank's own state are its random generators and the losses of an epoch that is not at its end yet. Rank 0 writes
    one file for the job. The last file is written when training ends, whatever the periods say.

    Args:
        every_epochs: epochs between checkpoints; null: none by epochs.
        every_steps: optimiser steps between checkpoints; null: none by steps.
        keep: number of latest checkpoints to keep.
        keep_every_epochs: epochs between checkpoints that are kept for good, for curves; null: none.
    """

    def __init__(
        self,
        every_epochs: PositiveInt | None = 1,
        every_steps: PositiveInt | None = None,
        keep: PositiveInt = 2,
        keep_every_epochs: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        self.every_epochs, self.every_steps = every_epochs, every_steps
        self.keep, self.keep_every_epochs = keep, keep_every_epochs
        self.state.last_saved_step = -1
        self.state.kept_steps = []
        self._losses: list[float] = []

    def on_start(self, task: ClassyTask) -> None:
        """Takes up the random states of the checkpoint that was restored, if one was."""
        if task.run_dir is None:
            raise ValueError("checkpoint needs a folder: set run_dir, or set checkpoint to null.")
        if task.checkpoint_dict is not None:
            rank, saved = distributed.rank(), task.checkpoint_dict
            if rank < len(saved.get("random_states", [])):  # more ranks than before: the new ones keep their own seeds
                set_random_state(saved["random_states"][rank])
                self._losses = saved.get("losses", {}).get(rank, [])
            task.checkpoint_dict = None  # the restored tensors live in the task now; this copy would double the bank

    def on_phase_start(self, task: ClassyTask) -> None:
        """Hands back the losses of an epoch that was interrupted, so that its mean is that of all of it."""
        if self._losses:
            task.losses_so_far, self._losses = self._losses, []

    def on_step(self, task: ClassyTask) -> None:
        """Saves every ``every_steps`` optimiser steps."""
        if self.every_steps and task.train and task.is_update_step and task.step_idx % self.every_steps == 0:
            self._save(task)

    def on_phase_end(self, task: ClassyTask) -> None:
        """Saves every ``every_epochs`` epochs."""
        if not task.train:
            return
        keeps = bool(self.keep_every_epochs) and (task.epoch + 1) % (self.keep_every_epochs or 1) == 0
        if keeps:
            self.state.kept_steps.append(task.step_idx)
            self.state.last_saved_step = -1  # a file of this very step does not know yet that it is to be kept
        if keeps or (self.every_epochs and (task.epoch + 1) % self.every_epochs == 0):
            self._save(task)

    def on_end(self, task: ClassyTask) -> None:
        """Saves the end of the run."""
        self._save(task)

    def _save(self, task: ClassyTask) -> None:
        if self.state.last_saved_step == task.step_idx:
            return
        self.state.last_saved_step = task.step_idx
        states = distributed.gather_objects(get_random_state())
        pending = task.losses_so_far if task.images_seen % task.images_per_epoch else []
        losses = dict(enumerate(distributed.gather_objects(pending)))
        if not distributed.is_primary():
            return
        folder = checkpoint_folder(task.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step_{task.step_idx:09d}.pt"
        content = get_checkpoint_dict(task, {"config": task.config})
        write_atomically({**content, "random_states": states, "losses": losses}, path)
        log.info("Checkpoint written: %s", path)
        for old in checkpoints(task.run_dir)[: -self.keep]:
            if step_of(old) not in self.state.kept_steps:
                old.unlink()


def checkpoint_folder(run_dir: Path) -> Path:
    """Where a run's checkpoints lie."""
    return Path(run_dir) / "checkpoints"


def checkpoints(run_dir: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    folder = checkpoint_folder(run_dir)
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Optimiser step that a checkpoint was written after."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"A checkpoint is named step_N.pt, got {path.name}.")
    return int(match.group(1))


def get_random_state() -> dict[str, Any]:
    """State of every global random generator of this process, in types that a weights-only load accepts."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restores what :func:`get_random_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
