"""The one place that writes a memory bank."""

from __future__ import annotations

from typing import ClassVar

import torch
from classy_vision.hooks import ClassyHook, register_hook
from classy_vision.tasks import ClassyTask
from torch import Tensor

from pirl_plugin.hooks.outputs import output_of
from pirl_plugin.registry import Configurable
from pirl_plugin.schema import checked


@register_hook("memory_bank_update")
@checked
class MemoryBankUpdateHook(Configurable, ClassyHook):
    """Writes the newest embeddings to the loss's memory bank, once per optimiser step, never in evaluation.

    The host calls ``on_step`` after the optimiser has stepped, so the loss has read the old rows by then. Under
    gradient accumulation the micro-batches of one optimiser step are written together.

    Args:
        view: name of the embedding that is stored; PIRL stores the untransformed image's, MoCo ``momentum/key``.
    """

    only_where_needed: ClassVar[str] = "memory_bank_update"

    on_phase_start = on_phase_end = on_end = ClassyHook._noop

    def __init__(self, view: str = "image") -> None:
        super().__init__()
        self.view = view
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def on_start(self, task: ClassyTask) -> None:
        """Makes the rows identical on all ranks: each has drawn its own random ones.

        Raises:
            ValueError: the loss says by its ``stored_view`` that another view belongs into its bank.
        """
        wanted = getattr(task.base_loss, "stored_view", self.view)
        if wanted != self.view:
            raise ValueError(
                f"hooks: memory_bank_update must store the view {wanted!r} for this loss, not {self.view!r}: "
                f"add view: {wanted} to it."
            )
        self._waiting = []
        task.base_loss.memory_bank.synchronize()

    def on_step(self, task: ClassyTask) -> None:
        """Writes what the last optimiser step has seen."""
        if not task.train:
            return
        embeddings = output_of(task, self.view, "memory_bank_update")
        self._waiting.append((task.last_batch.sample["target"], finite_if_skipped(task, embeddings)))
        if optimizer_stepped(task):
            ids, waiting = zip(*self._waiting, strict=True)
            self._waiting = []
            task.base_loss.memory_bank.update(torch.cat(ids), torch.cat(waiting))


def finite_if_skipped(task: ClassyTask, embeddings: Tensor) -> Tensor:
    """Zeros for what is not finite where a run goes on after such a step; nothing waits for the device."""
    goes_on = getattr(task, "on_nonfinite", "stop") == "skip" or getattr(task, "excluded_steps", ())
    return torch.nan_to_num(embeddings, nan=0.0, posinf=0.0, neginf=0.0) if goes_on else embeddings


def optimizer_stepped(task: ClassyTask) -> bool:
    """Whether the last batch ended in an optimiser step.

    From the host's own counters (``num_updates`` counts images), so that it holds for any of its tasks.
    """
    return (task.num_updates // task.get_global_batchsize()) % task.optimizer_period == 0
