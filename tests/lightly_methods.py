"""Methods as their YAMLs say, in the size of a test."""

from __future__ import annotations

from typing import Any

import torch
from classy_vision.hooks import ClassyHook

from pirl_plugin import config as configs

METHODS = ("simclr", "moco_v1", "moco_v2", "byol", "simsiam", "barlow_twins", "vicreg")
# heads of the papers' sizes would take most of the time and memory
HEADS: dict[str, tuple[str, ...]] = {
    "simclr": ("dim=16",),
    "moco_v1": ("dim=16",),
    "moco_v2": ("dim=16",),
    "byol": ("hidden_dim=24", "dim=16"),
    "simsiam": ("hidden_dim=24", "dim=16", "bottleneck_dim=8"),
    "barlow_twins": ("hidden_dim=24", "dim=16"),
    "vicreg": ("hidden_dim=24", "dim=16"),
}


def small(method: str, **changes: Any) -> dict[str, Any]:
    """The configuration of a method's YAML, its views, network and data made small; ``changes`` replace keys of it."""
    name = method.removesuffix("_32")
    overrides = [
        f"method={method}",
        "trunk=resnet18_narrow",
        "trunk.width=0.125",
        "dataset.num_images=16",
        "dataset.size=32",
        "transform.image_size=16",
        "device=cpu",
        "log_every=1",
        "num_epochs=1",
        "batch_size=8",
        "optimizer.warmup_epochs=0",
        *(f"heads.image.{setting}" for setting in HEADS[name]),
    ]
    if name.startswith("moco"):
        overrides += ["loss.dim=16", "loss.memory_bank.size=20"]
    if method == "moco_v1":
        overrides += ["optimizer.milestones=[1]", "num_epochs=2"]
    config = configs.load("train", overrides)
    loggers = {"progress", "metrics_jsonl", "tensorboard_scalars", "unreadable_images"}
    hooks = [hook for hook in config["hooks"] if hook["name"] not in loggers]
    return {**config, "hooks": hooks, "checkpoint": None, "run_dir": None, **changes}


class Watch(ClassyHook):
    """Keeps what each step gave; stands after the hooks of the method."""

    on_start = on_phase_start = on_phase_end = on_end = ClassyHook._noop

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.ids: list[int] = []
        self.outputs: list[dict[str, torch.Tensor]] = []
        self.rows: list[torch.Tensor] = []
        self.without_gradient: list[str] = []  # of the last step: zero_init_residual stops the first one's

    def on_step(self, task: Any) -> None:
        batch = task.last_batch
        self.losses.append(float(batch.loss))
        self.ids += batch.sample["target"].tolist()
        self.outputs.append({name: x.clone() for name, x in batch.output.items()})
        if hasattr(task.base_loss, "memory_bank"):
            self.rows.append(task.base_loss.memory_bank.rows.clone())
        named = task.base_model.named_parameters()
        self.without_gradient = [name for name, p in named if p.requires_grad and (p.grad is None or not p.grad.any())]
