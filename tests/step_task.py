"""A training task moved on by hand, for tests of hooks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

BATCH = 4


class Task:
    """What hooks see of a training task, moved on by hand: four images a step, ten steps an epoch."""

    def __init__(self, run_dir: Path | None = None, step: int = 0, accumulate_steps: int = 1) -> None:
        self.run_dir, self.train, self.log_every = run_dir, True, 5
        self.accumulate_steps, self.steps_per_epoch, self.num_epochs, self.total_steps = accumulate_steps, 10, 2, 20
        self.micro_steps = step * accumulate_steps
        self.optimizer = SimpleNamespace(options_view=SimpleNamespace(lr=0.03))
        self.base_loss = SimpleNamespace(last_statistics={}, memory_bank=SimpleNamespace(rows=torch.eye(8)))
        self.use_gpu = False
        self.health: dict[str, float] = {}
        self.hooks: list[Any] = []
        self.last_batch: Any = None
        self.datasets = {"train": SimpleNamespace(dataset=Files())}

    step_idx = property(lambda self: self.micro_steps // self.accumulate_steps)
    images_seen = property(lambda self: self.micro_steps * BATCH)
    is_update_step = property(lambda self: self.micro_steps % self.accumulate_steps == 0)
    epoch = property(lambda self: max(0, self.step_idx - 1) // self.steps_per_epoch)

    def step(
        self,
        loss: float = 1.0,
        output: dict[str, Tensor] | None = None,
        ids: Tensor | None = None,
        unreadable: tuple[int, ...] = (),
    ) -> None:
        self.micro_steps += 1
        sample = {
            "target": torch.arange(BATCH) if ids is None else ids,
            "unreadable": torch.tensor(unreadable, dtype=torch.int64),
        }
        output = {"image": torch.eye(8)[:BATCH]} if output is None else output
        self.last_batch = SimpleNamespace(loss=torch.tensor(loss), output=output, sample=sample)
        for hook in self.hooks:
            hook.on_step(self)

    def run(self, steps: int, *hooks: Any, **arguments: Any) -> None:
        self.start(*hooks)
        for _ in range(steps):
            self.step(**arguments)
        self.finish()

    def start(self, *hooks: Any) -> None:
        self.hooks = list(hooks)
        for event in ("on_start", "on_phase_start"):
            for hook in self.hooks:
                getattr(hook, event)(self)

    def finish(self) -> None:
        for event in ("on_phase_end", "on_end"):
            for hook in self.hooks:
                getattr(hook, event)(self)


class Files:
    """A dataset of twenty images."""

    def __len__(self) -> int:
        return 20

    def file_name(self, image_id: int) -> str:
        return f"{image_id}.jpg"
