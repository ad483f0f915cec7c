"""What losses with prototypes or clusters do outside a training step, at the right moments."""

from __future__ import annotations

import logging
from typing import ClassVar

import torch
from classy_vision.hooks import ClassyHook, register_hook
from classy_vision.tasks import ClassyTask
from torch import Tensor

from pirl_plugin.functional.pending_colours import coloured
from pirl_plugin.heartbeat import STARTING
from pirl_plugin.hooks.memory_bank_update import finite_if_skipped, optimizer_stepped
from pirl_plugin.registry import Configurable
from pirl_plugin.schema import checked

log = logging.getLogger(__name__)


@register_hook("cluster_assignment")
@checked
class ClusterAssignmentHook(Configurable, ClassyHook):
    """Has the loss assign clusters before each epoch, and shows it the embeddings of each optimiser step.

    For losses with ``synchronize``, ``start_epoch``, ``after_step``, ``stored_view`` and ``needs_first_pass``: see
    ``swav`` and ``deepcluster_v2``. What they keep is in their buffers, and so in checkpoints. One that needs it gets
    the embeddings of all images before the first epoch, by a pass over the data without training.
    """

    only_where_needed: ClassVar[str] = "cluster_assignment"

    on_phase_end = on_end = ClassyHook._noop

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def on_start(self, task: ClassyTask) -> None:
        """Makes the loss the same on all ranks, and fills its memory if it wants that."""
        self._waiting = []
        task.base_loss.synchronize()
        if task.base_loss.needs_first_pass:
            self._embed_all(task)

    def on_phase_start(self, task: ClassyTask) -> None:
        """Lets the loss prepare an epoch."""
        if task.train:
            task.base_loss.start_epoch(task.train_phase_idx, task.num_updates)

    def on_step(self, task: ClassyTask) -> None:
        """Shows the loss what the last optimiser step has seen."""
        if not task.train:
            return
        batch = task.last_batch
        new = finite_if_skipped(task, batch.output[task.base_loss.stored_view].detach())
        self._waiting.append((batch.sample["target"], new))
        if optimizer_stepped(task):
            ids, embeddings = zip(*self._waiting, strict=True)
            self._waiting = []
            task.base_loss.after_step(torch.cat(ids), torch.cat(embeddings), task.num_updates)

    @torch.no_grad()
    def _embed_all(self, task: ClassyTask) -> None:
        """One pass, with batch statistics as in training and the views of the first epoch."""
        views, loss = task.datasets["train"], task.base_loss
        log.info("Embedding %d images before the first epoch, for their clusters", len(views))
        device = next(task.base_model.parameters()).device
        task.base_model.train()
        for batch in views.iterator(current_phase_id=0, pin_memory=device.type == "cuda"):
            pixels = coloured(batch["input"], device)[loss.stored_view].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=getattr(task, "precision", "") == "bf16"):
                output = task.base_model({loss.stored_view: pixels})
            loss.after_step(batch["target"].to(device), output[loss.stored_view], 0)
            # else the pass as a whole would be taken for a hang; how far a process is, its collectives say
            getattr(task, "mark", lambda doing: None)(STARTING)
