"""A method's YAML in the size of a test: does it learn, all of it, and does a resumed run end in the same bits?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from classy_vision.hooks import ClassyHook
from classy_vision.tasks import build_task
from classy_vision.trainer import LocalTrainer
from small_task import assert_identical
from test_checkpoint_resume import flat

from pirl_plugin import config as configs
from pirl_plugin.hooks.checkpoint import checkpoints
from pirl_plugin.tasks import SSLPretrainingTask
from pirl_plugin.weights.files import read_weights

STEPS = 24
TINY = [
    "dataset=generated_scenes",
    "dataset.num_images=16",
    "dataset.size=32",
    "trunk=resnet18_narrow",
    "trunk.width=0.125",
    "batch_size=8",
    f"num_epochs={STEPS // 2}",
    "optimizer.warmup_epochs=0",
    "optimizer.lr=0.02",
    "optimizer.lr_batch_size=null",
    "device=cpu",
    "checkpoint={name:run_checkpoint,every_epochs:6,keep:2}",
]


class Losses(ClassyHook):
    """Each step's loss, and what is logged beside it."""

    on_start = on_phase_start = on_phase_end = on_end = ClassyHook._noop

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.statistics: list[dict[str, float]] = []

    def on_step(self, task: SSLPretrainingTask) -> None:
        self.losses.append(float(task.last_batch.loss))
        statistics = getattr(task.base_loss, "last_statistics", {})
        self.statistics.append({name: float(value) for name, value in statistics.items()})


class Watch(Losses):
    """Losses and statistics of all steps, and the parameters that have had a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: set[str] = set()

    def on_step(self, task: SSLPretrainingTask) -> None:
        super().on_step(task)
        self.moved |= {name for name, p in trained(task).items() if p.grad is not None and p.grad.any()}


def trained(task: SSLPretrainingTask) -> dict[str, torch.nn.Parameter]:
    """All that the optimiser is to change: of trunk, heads and loss."""
    parts = {"model": task.base_model, "loss": task.base_loss}
    return {
        f"{part}.{name}": parameter
        for part, module in parts.items()
        for name, parameter in module.named_parameters()
        if not name.startswith("momentum_")
    }


def run(
    method: str, settings: list[str], folder: Path, start: dict[str, Any] | None = None
) -> tuple[SSLPretrainingTask, Watch]:
    """A whole tiny training by the method's YAML, from a checkpoint's state if there is one."""
    overrides = [f"method={method}", *TINY, *settings, f"run_dir={folder}"]
    task, watch = build_task(configs.load("train", overrides)), Watch()
    task.hooks.append(watch)
    if start is not None:
        task._set_checkpoint_dict(start)
    LocalTrainer().train(task)
    return task, watch


def assert_learns_and_resumes(method: str, settings: list[str], folder: Path, falls: bool = True) -> None:
    """Trains a method twice, the second time from the middle on.

    Args:
        method: name of its YAML.
        settings: overrides that make it small or calm.
        folder: for the runs.
        falls: whether the loss must, in so few steps.
    """
    task, watch = run(method, settings, folder / "whole")
    assert len(watch.losses) == STEPS
    quarter = STEPS // 4
    assert not falls or sum(watch.losses[-quarter:]) < 0.95 * sum(watch.losses[:quarter])
    assert [name for name, parameter in trained(task).items() if not parameter.requires_grad] == []
    assert trained(task).keys() - watch.moved == set()

    middle, last = (read_weights(path) for path in checkpoints(folder / "whole"))
    assert 0 < middle["classy_state_dict"]["num_updates"] < last["classy_state_dict"]["num_updates"]
    torch.manual_seed(99)
    resumed, rest = run(method, settings, folder / "again", middle)
    assert rest.losses == watch.losses[STEPS // 2 :]
    assert rest.statistics == watch.statistics[STEPS // 2 :]
    again = read_weights(checkpoints(folder / "again")[-1])
    for part in ("base_model", "loss", "optimizer"):
        assert_identical(flat(last["classy_state_dict"][part]), flat(again["classy_state_dict"][part]))
    assert resumed.step_idx == STEPS
