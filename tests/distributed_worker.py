"""What test_distributed.py compares: the same scenarios in one process and in two.

Run as a program, with RANK and WORLD_SIZE set: ``python distributed_worker.py FOLDER`` writes ``FOLDER/rank_R.pt``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from classy_vision.generic.distributed_util import set_cpu_device
from classy_vision.hooks import build_hook
from classy_vision.losses import ClassyLoss, build_loss
from classy_vision.trainer.classy_trainer import ClassyTrainer
from small_task import DIM, NUM_IMAGES, Recorder, build, everything, freeze_batch_norm

from pirl_plugin import distributed
from pirl_plugin.registry import REGISTRIES, Configurable
from pirl_plugin.registry import build as build_component

GLOBAL_BATCH = 8


class QueueAndPrototypes(Configurable, ClassyLoss):
    """A contrast with a queue of the momentum copy's embeddings, and parameters of its own."""

    needed_hooks = ("memory_bank_update",)
    views = ("image", "momentum/image")

    def __init__(self, size: int = 20) -> None:
        super().__init__()
        self.memory_bank = build_component("memory_bank", {"name": "fifo_queue", "size": size}, dim=DIM)
        self.prototypes = torch.nn.Linear(DIM, DIM, bias=False)

    def forward(self, output: Mapping[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        query, key = F.normalize(self.prototypes(output["image"])), F.normalize(output["momentum/image"])
        logits = torch.cat([(query * key).sum(dim=1, keepdim=True), query @ self.memory_bank.rows.T], dim=1) / 0.2
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))


REGISTRIES["loss"]["queue_and_prototypes"] = QueueAndPrototypes
MOMENTUM: dict[str, Any] = {
    "transform": {"name": "image_view", "image_size": 16},
    "collator": {"name": "view_collator"},
    "model": {"name": "momentum_ssl_model", "shuffle_batch_norm": True},
    "heads": {"image": {"name": "mlp", "hidden_dim": 12, "dim": DIM}},
    "loss": {"name": "queue_and_prototypes"},
    "hooks": [
        {"name": "memory_bank_update", "view": "momentum/image"},
        {"name": "momentum_update", "momentum": 0.5, "schedule": "cosine"},
    ],
}
SCENARIOS: dict[str, dict[str, Any]] = {
    # all other images are negatives, so that one process and two draw the same
    # rounding alone sets seed 0 apart at step 3: by 0.4 % in float32, by 2e-15 in float64; seed 1 by 2e-6
    "nce": {"loss": {"estimator": "nce", "num_negatives": NUM_IMAGES - 1, "normalizer_steps": 2}, "seed": 1},
    "accumulated": {
        "loss": {"num_negatives": NUM_IMAGES - 1},
        "accumulate_steps": 2,
        "batch_size": GLOBAL_BATCH // 2,
        "clip_grad_norm": 0.1,
    },
    "idle_image_head": {"loss": {"num_negatives": NUM_IMAGES - 1, "lam": 1.0}},
    "momentum": MOMENTUM,
    "momentum_accumulated": {
        **MOMENTUM,
        "accumulate_steps": 2,
        "batch_size": GLOBAL_BATCH // 2,
        "loss": {"name": "queue_and_prototypes", "size": 16},  # two whole groups of batches
    },
    "repeated_ids": {
        "loss": {"num_negatives": 2},
        "dataset": {"name": "generated_scenes", "num_images": 3, "size": 32},
        "num_epochs": 2,
    },
}


def run(name: str) -> dict[str, Any]:
    """One scenario with this process's share of the global batch."""
    changes = {"batch_size": GLOBAL_BATCH, **SCENARIOS[name]}
    seen = Recorder()
    task = build(seen, **{**changes, "batch_size": changes["batch_size"] // distributed.world_size()})
    freeze_batch_norm(task.base_model)
    start = task.base_loss.memory_bank.rows.clone()
    ClassyTrainer().train(task)
    return {
        "start": start,
        "losses": torch.tensor(seen.losses),
        "ids": torch.stack(seen.ids),
        "embeddings": torch.stack(seen.embeddings),
        "rows": torch.stack(seen.rows),
        "gradients": seen.gradients,
        "end": everything(task),
        "normalizer": getattr(task.base_loss, "normalizer", 0.0),
        "epoch_mean": sum(task.losses) / len(task.losses),
        "random": torch.rand(4),
    }


def own_seeds() -> dict[str, Any]:
    """A plain program, whose ranks have drawn different rows and see different images."""
    rank = distributed.rank()
    torch.manual_seed(rank)
    config = {"num_images": 6, "dim": 4, "num_negatives": 3, "temperature": 0.5}
    loss = build_loss({"name": "pirl_nce", **config})
    before = loss.memory_bank.rows.clone()
    hook = build_hook({"name": "memory_bank_update"})
    task = SimpleNamespace(
        base_loss=loss, train=True, num_updates=0, get_global_batchsize=lambda: 4, optimizer_period=1
    )
    hook.on_start(task)
    started = loss.memory_bank.rows.clone()
    output = {"image": torch.randn(2, 4), "patches": torch.randn(2, 4)}
    ids = torch.tensor([2, 3]) + rank  # 3 is on both ranks
    loss(output, ids)
    task.num_updates, task.last_batch = 4, SimpleNamespace(sample={"target": ids}, output=output)
    hook.on_step(task)
    rows = loss.memory_bank.rows.clone()
    return {"before": before, "started": started, "rows": rows, "image": output["image"], "normalizer": loss.normalizer}


def shuffled() -> dict[str, Any]:
    """What a momentum copy's batch norm sees: pixels 0, 10, 20, ... by rank, and who was in whose batch."""
    torch.manual_seed(0)
    model = build_component(
        "model",
        {"name": "momentum_ssl_model", "shuffle_batch_norm": True, "online_views": []},
        trunk={"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "small"},
        heads={"image": {"name": "linear", "dim": 3}},
    )
    torch.manual_seed(distributed.rank())  # each rank would draw an order of its own
    seen: list[torch.Tensor] = []
    model.normalize.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][:, 0, 0, 0]))
    model.momentum_trunk.forward = lambda x: x.mean(dim=(2, 3)).repeat(1, 22)[:, :64]  # type: ignore[method-assign]
    images = torch.arange(4, dtype=torch.uint8).add(4 * distributed.rank()).mul(10)
    views = {"image": images.view(4, 1, 1, 1).expand(4, 3, 16, 16).contiguous()}
    output = model(views)["momentum/image"]
    expected = model.eval()(views)["momentum/image"]  # not shuffled in evaluation
    return {"seen": seen[0], "own": seen[1], "output": output, "expected": expected}


if __name__ == "__main__":
    torch.set_num_threads(1)
    set_cpu_device()  # as the host's trainers do
    folder = Path(sys.argv[1])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results = {name: run(name) for name in SCENARIOS} | {"own_seeds": own_seeds(), "shuffled": shuffled()}
    torch.save(results, folder / f"rank_{rank}.pt")
    dist.destroy_process_group()
