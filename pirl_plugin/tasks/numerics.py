"""Losses and gradients that are not finite: noticed without waiting for the device, reported, kept from the weights.

Whether a step was good is decided on the device; the host learns of it one step later (``step_flags``).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pirl_plugin import distributed
from pirl_plugin.hooks.background import HostCopies
from pirl_plugin.registry import REGISTRIES
from pirl_plugin.tasks.step_flags import Flags
from pirl_plugin.weights.files import write_atomically

log = logging.getLogger(__name__)

MOST_SAVED = 20
"""Batches that a run saves for replay; more say nothing new."""

MOST_IN_A_ROW = 20
"""Steps that may be skipped one after the other: then the network itself is lost."""


@dataclass
class StepRecord:
    """What is said of a step if it turns out bad."""

    step: int
    epoch: int
    lr: float
    excluded: bool = False
    batches: list[Mapping[str, Any]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)


class Numerics:
    """The steps whose flags are not known yet, and what becomes of bad ones.

    Args:
        run_dir: where batches are saved; None saves none.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self.run_dir = run_dir
        self.in_a_row = self.saved = 0
        self._current: StepRecord | None = None
        self._waiting: deque[StepRecord] = deque()

    def note(self, record: StepRecord | None, batch: Mapping[str, Any], loss: Tensor) -> None:
        """Adds a batch to the step being made; ``record`` begins a new one."""
        self._current = record or self._current
        assert self._current is not None
        self._current.batches.append(batch)
        self._current.losses.append(loss.detach())

    def bad_loss(self) -> Tensor:
        """Whether a loss of the step being made is not finite, 0-dim bool on the device."""
        assert self._current is not None
        return ~torch.isfinite(torch.stack(self._current.losses)).all()

    def close_step(self) -> None:
        """The step being made is complete; its flags will come."""
        assert self._current is not None
        self._waiting.append(self._current)
        self._current = None

    def forget(self) -> None:
        """Drops all steps: the run goes back."""
        self._current = None
        self._waiting.clear()

    def report(self, flags: Flags) -> tuple[StepRecord, str] | None:
        """What to say of the oldest step whose flags are not known yet; None for a good or an excluded one."""
        record = self._waiting.popleft()
        if not flags.bad or record.excluded:
            self.in_a_row = 0
            return None
        self.in_a_row += 1
        losses = torch.stack(record.losses).float().cpu()
        mine = bool((~torch.isfinite(losses)).any())
        what = "The loss" if flags.bad_loss else "The gradient"
        whose = " of another process" if flags.bad_loss and not mine else ""
        text = (
            f"{what}{whose} is not finite in step {record.step} (epoch {record.epoch}, learning rate {record.lr:g}, "
            f"images {self._ids(record)}; rank {distributed.rank()})."
        )
        if mine or not flags.bad_loss:
            text += self._save(record, losses)
        return record, text

    @staticmethod
    def _ids(record: StepRecord) -> str:
        ids = torch.cat([batch["target"].flatten() for batch in record.batches]).tolist()
        return ", ".join(map(str, ids[:8])) + (f", ... ({len(ids)} in all)" if len(ids) > 8 else "")

    def _save(self, record: StepRecord, losses: Tensor) -> str:
        if self.run_dir is None or self.saved >= MOST_SAVED:
            return ""
        self.saved += 1
        path = Path(self.run_dir) / "nonfinite" / f"step_{record.step:09d}_rank_{distributed.rank()}.pt"
        keys = ("step", "epoch", "lr")
        content = {**{key: getattr(record, key) for key in keys}, "losses": losses, "batches": list(record.batches)}
        try:
            write_atomically(HostCopies().copy(content), path)
        except OSError as error:
            return f" The batch cannot be saved: {error}."
        return f" The batch is saved in {path}."


class Snapshot:
    """A network and its optimiser as they were before a step, on their device."""

    def __init__(self, modules: Iterable[nn.Module], optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.live = [value for module in modules for value in _state_of(module)]
        self.kept = [torch.empty_like(value) for value in self.live]
        self._momentum: dict[Any, Tensor] = {}

    @torch.no_grad()
    def take(self) -> None:
        """Copies the present state."""
        for kept, value in zip(self.kept, self.live, strict=True):
            kept.copy_(value)
        self._momentum = {
            (parameter, name): value.clone()
            for parameter, state in self.optimizer.state.items()
            for name, value in state.items()
            if isinstance(value, Tensor)
        }

    @torch.no_grad()
    def restore_where(self, bad: Tensor) -> None:
        """Puts the copied state back if ``bad``, a 0-dim bool on the device; momentum that was not there becomes 0."""
        for kept, value in zip(self.kept, self.live, strict=True):
            value.copy_(torch.where(bad, kept, value))
        for parameter, state in self.optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    before = self._momentum.get((parameter, name))
                    value.copy_(torch.where(bad, torch.zeros_like(value) if before is None else before, value))


def gradients_are_finite(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Whether all gradients are finite, 0-dim bool on their device: by their norms, in one pass."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.ones((), dtype=torch.bool)
    return torch.isfinite(torch.stack(list(torch._foreach_norm(gradients)))).all()


def _state_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, but for those of memory banks, wherever they are.

    A bank can be larger than the network by far, and a step that is taken back has not touched it: hooks write it after
    that, and keep from it what is not finite.
    """
    banks = tuple(REGISTRIES["memory_bank"].values())
    spared = {id(row) for part in module.modules() if isinstance(part, banks) for row in part.buffers()}
    return [value.detach() for value in (*module.parameters(), *module.buffers()) if id(value) not in spared]
