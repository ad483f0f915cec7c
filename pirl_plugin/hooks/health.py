"""Signs, long before a probe shows it, that a run learns: the embeddings' rank, and images that find themselves."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
import torch.nn.functional as F
from classy_vision.hooks import ClassyHook, register_hook
from classy_vision.tasks import ClassyTask
from torch import Tensor

from pirl_plugin.distributed import is_primary
from pirl_plugin.functional.rankme import rankme
from pirl_plugin.hooks.memory_bank_update import MemoryBankUpdateHook
from pirl_plugin.hooks.outputs import output_of
from pirl_plugin.hooks.scalars import is_update_step, step_of
from pirl_plugin.registry import Configurable
from pirl_plugin.schema import PositiveInt, checked


@register_hook("rankme")
@checked
class RankMeHook(Configurable, ClassyHook):
    """RankMe of the last image embeddings, as they are: ``task.health["rankme"]`` (Garrido et al. 2022, Eq. 1-2).

    From about 1 (all embeddings point one way: collapse) to ``min(num_embeddings, dim)``. Loggers that stand after this
    hook write the value; ``task.health["health_step"]`` is the step it was measured at. Rank 0's images only.

    Args:
        every_steps: optimiser steps between measurements; null: once an epoch.
        num_embeddings: how many of the latest embeddings are used.
        view: whose embeddings.
    """

    on_start = on_phase_start = on_phase_end = on_end = ClassyHook._noop

    def __init__(
        self, every_steps: PositiveInt | None = None, num_embeddings: PositiveInt = 2048, view: str = "image"
    ) -> None:
        super().__init__()
        self.every_steps, self.num_embeddings, self.view = every_steps, num_embeddings, view
        self._embeddings: deque[Tensor] = deque()

    def get_classy_state(self) -> dict[str, Any]:
        """With the embeddings looked back at, so that a resumed run publishes the same values."""
        return {**super().get_classy_state(), "embeddings": list(self._embeddings)}

    def set_classy_state(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``get_classy_state`` gave."""
        rest = dict(state_dict)
        self._embeddings = deque(rest.pop("embeddings", ()))
        super().set_classy_state(rest)

    def on_step(self, task: ClassyTask) -> None:
        if not task.train or not is_primary():
            return
        embeddings = output_of(task, self.view, "rankme").flatten(0, -2)
        if self.is_within(task, self.num_embeddings, len(embeddings)):
            self._keep(embeddings)
        if is_update_step(task) and self.steps_until_due(task) == 0:
            self.publish(task)
            # what the next measurement will not look at would lie in every checkpoint until then
            if not self.is_within(task, self.num_embeddings, len(embeddings), steps=self._period(task)):
                self._embeddings.clear()

    def steps_until_due(self, task: ClassyTask) -> int:
        """Optimiser steps from the one that the last batch belongs to until the next measurement."""
        step = step_of(task) + (not is_update_step(task))
        return -step % self._period(task)

    def is_within(self, task: ClassyTask, count: int, batch: int, steps: int | None = None) -> bool:
        """Whether a batch is among the last that give ``count`` embeddings before a measurement.

        Args:
            task: what is trained.
            count: embeddings or images that the measurement looks at.
            batch: how many a batch has.
            steps: optimiser steps from the batch to the measurement, where it is not the last batch and the next one.
        """
        steps = self.steps_until_due(task) if steps is None else steps
        return steps < math.ceil(count / max(1, batch * int(getattr(task, "accumulate_steps", 1))))

    def _period(self, task: ClassyTask) -> int:
        return int(self.every_steps or task.steps_per_epoch)

    def publish(self, task: ClassyTask) -> None:
        """Computes the values; waits for the device."""
        latest = torch.cat(list(self._embeddings))[-self.num_embeddings :].cpu()
        usable = bool(torch.isfinite(latest).all()) and bool(latest.any())
        task.health["rankme"] = rankme(latest) if usable else math.nan
        task.health["health_step"] = step_of(task)

    def _keep(self, embeddings: Tensor) -> None:
        # a copy: compiled models may write the next batch into the same memory
        self._embeddings.append(embeddings.to(torch.float32, copy=True))
        if self._embeddings[0].device != embeddings.device:  # of before a resume
            self._embeddings = deque(kept.to(embeddings.device) for kept in self._embeddings)
        while sum(map(len, self._embeddings)) - len(self._embeddings[0]) >= self.num_embeddings:
            self._embeddings.popleft()


@register_hook("health")
@checked
class HealthHook(RankMeHook):
    """``rankme``, and how often the bank row nearest to an embedding is its own image's: ``retrieval/<view>``.

    Retrieval is a fraction; an untrained network gets ``retrieval/chance``, 1 / n. It is measured on the last batches
    before it is due, each against the rows as they were before the batch was written to them: this hook must therefore
    stand before ``memory_bank_update``.

    Args:
        every_steps: optimiser steps between measurements; null: once an epoch.
        num_embeddings: how many of the latest embeddings RankMe uses.
        num_images: how many images retrieval is measured on.
        max_rows: rows to search, for larger banks a fixed random sample and the own row.
    """

    on_phase_start = on_phase_end = on_end = ClassyHook._noop

    def __init__(
        self,
        every_steps: PositiveInt | None = None,
        num_embeddings: PositiveInt = 2048,
        num_images: PositiveInt = 512,
        max_rows: PositiveInt = 100_000,
    ) -> None:
        super().__init__(every_steps, num_embeddings)
        self.num_images, self.max_rows = num_images, max_rows
        self._found: dict[str, list[Tensor]] = {}
        self._candidates: Tensor | None = None

    def get_classy_state(self) -> dict[str, Any]:
        """With the images found so far."""
        return {**super().get_classy_state(), "found": self._found}

    def set_classy_state(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``get_classy_state`` gave."""
        rest = dict(state_dict)
        self._found = {view: list(found) for view, found in rest.pop("found", {}).items()}
        super().set_classy_state(rest)

    def on_start(self, task: ClassyTask) -> None:
        """Refuses an order of hooks in which an image would find the row that was just written for it."""
        hooks = list(task.hooks)
        writers = [place for place, hook in enumerate(hooks) if isinstance(hook, MemoryBankUpdateHook)]
        if writers and self in hooks and writers[0] < hooks.index(self):
            raise ValueError(
                "hooks: health must stand before memory_bank_update: after the update a row is close to its own image "
                "whether the network has learned anything or not."
            )

    def on_step(self, task: ClassyTask) -> None:
        if task.train and is_primary() and self.is_within(task, self.num_images, len(task.last_batch.sample["target"])):
            self._search(task)
        super().on_step(task)

    def publish(self, task: ClassyTask) -> None:
        super().publish(task)
        for view, found in self._found.items():
            task.health[f"retrieval/{view}"] = float(torch.cat([part.cpu() for part in found]).float().mean())
        if self._found:
            task.health["retrieval/chance"] = 1 / min(len(task.base_loss.memory_bank.rows), self.max_rows)
        self._found = {}

    def _search(self, task: ClassyTask) -> None:
        bank = getattr(task.base_loss, "memory_bank", None)
        if bank is None or not getattr(bank, "rows_by_image", True):
            return
        rows = bank.rows
        if self._candidates is None and len(rows) > self.max_rows:
            generator = torch.Generator().manual_seed(0)
            self._candidates = torch.randperm(len(rows), generator=generator)[: self.max_rows].to(rows.device)
        batch = task.last_batch
        for view, embeddings in batch.output.items():
            if embeddings.shape[1:] != rows.shape[1:]:
                continue  # several crops of an image, or what a pretext knows of its views
            found = own_row_is_nearest(embeddings, batch.sample["target"], rows, self._candidates)
            self._found.setdefault(view, []).append(found)


@torch.no_grad()
def own_row_is_nearest(embeddings: Tensor, ids: Tensor, rows: Tensor, candidates: Tensor | None = None) -> Tensor:
    """Whether no other image's row is as similar (cosine) to an embedding as its own image's.

    Args:
        embeddings: ``(B, D)``, of any length.
        ids: image ids ``(B,)``.
        rows: the bank, ``(n, D)``, unit norm.
        candidates: ids of the rows to compare with; all of them when not given.

    Returns:
        ``(B,)`` bool. A tie is no success, so that a collapsed network scores 0.
    """
    queries = F.normalize(embeddings.detach().float(), dim=1)
    others = (rows if candidates is None else rows[candidates]).float()  # a bfloat16 product could not tell them apart
    columns = torch.arange(len(rows), device=rows.device) if candidates is None else candidates
    similarity = queries @ others.T
    own = (queries * rows[ids].float()).sum(dim=1)
    best_other = similarity.masked_fill(columns == ids.unsqueeze(1), -torch.inf).amax(dim=1)
    return own > best_other + 1e-6  # both sides are rounded differently
