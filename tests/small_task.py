"""A pretraining task that takes milliseconds a step, and what tests want to see of it."""

from __future__ import annotations

from typing import Any

import torch
from classy_vision.hooks import ClassyHook
from classy_vision.tasks import build_task
from classy_vision.trainer import LocalTrainer
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from pirl_plugin.tasks import SSLPretrainingTask

NUM_IMAGES, DIM = 24, 16


def config(**changes: Any) -> dict[str, Any]:
    """The task as a dictionary; ``changes`` replace top-level keys; a ``loss`` without a name is merged."""
    loss = {"name": "pirl_nce", "dim": DIM, "num_negatives": 8, "temperature": 0.2, "estimator": "infonce"}
    base = {
        "name": "ssl_pretraining",
        "dataset": {"name": "generated_scenes", "num_images": NUM_IMAGES, "size": 32},
        "transform": {"name": "image_and_jigsaw_patches", "image_size": 16, "jigsaw_size": 24, "patch_size": 8},
        "collator": {"name": "jigsaw_collator"},
        "trunk": {"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "small"},
        "heads": {
            "image": {"name": "linear", "dim": DIM},
            "patches": {"name": "jigsaw", "patch_dim": 8, "dim": DIM},
        },
        "optimizer": {"name": "scheduled_sgd", "lr": 0.05, "lr_batch_size": None},
        "hooks": [{"name": "memory_bank_update"}],
        "batch_size": 8,
        "device": "cpu",
    }
    chosen = changes.get("loss", {})
    return {**base, **changes, "loss": chosen if "name" in chosen else {**loss, **chosen}}


def build(*hooks: ClassyHook, **changes: Any) -> SSLPretrainingTask:
    """The task, with hooks of the test's own after the configured ones."""
    task: SSLPretrainingTask = build_task(config(**changes))
    task.hooks.extend(hooks)
    return task


def train(*hooks: ClassyHook, **changes: Any) -> SSLPretrainingTask:
    """Builds the task and trains it to its end, in this process."""
    task = build(*hooks, **changes)
    LocalTrainer().train(task)
    return task


def freeze_batch_norm(module: nn.Module) -> None:
    """Else each part of a batch has statistics of its own."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features))
        else:
            freeze_batch_norm(child)


class Recorder(ClassyHook):
    """Keeps each batch's loss and ids, and a copy of the bank and of the gradients after it."""

    on_start = on_phase_start = on_phase_end = on_end = ClassyHook._noop

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.ids: list[torch.Tensor] = []
        self.embeddings: list[torch.Tensor] = []
        self.rows: list[torch.Tensor] = []
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_step(self, task: Any) -> None:
        self.losses.append(float(task.last_batch.loss))
        self.ids.append(task.last_batch.sample["target"].clone())
        self.embeddings.append(task.last_batch.output["image"].clone())
        self.rows.append(task.base_loss.memory_bank.rows.clone())
        named = task.base_model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def everything(task: SSLPretrainingTask) -> dict[str, torch.Tensor]:
    """All tensors that training has changed: weights, batch statistics, momentum, bank, Z."""
    found = {f"model.{name}": value for name, value in task.base_model.state_dict().items()}
    found |= {f"loss.{name}": value for name, value in task.base_loss.state_dict().items()}
    momentum = task.optimizer.optimizer.state_dict()["state"]
    return found | {f"momentum.{index}": state["momentum_buffer"] for index, state in momentum.items()}


def assert_identical(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bit by bit."""
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
