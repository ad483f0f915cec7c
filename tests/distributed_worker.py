"""What test_distributed.py compares: the same scenarios in one process and in two.

Run as a program, with RANK and WORLD_SIZE set: ``python distributed_worker.py FOLDER`` writes ``FOLDER/rank_R.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from classy_vision.generic.distributed_util import set_cpu_device
from classy_vision.hooks import build_hook
from classy_vision.losses import build_loss
from classy_vision.trainer.classy_trainer import ClassyTrainer
from small_task import NUM_IMAGES, Recorder, build, everything, freeze_batch_norm

from pirl_plugin import distributed

GLOBAL_BATCH = 8
SCENARIOS: dict[str, dict[str, Any]] = {
    # all other images are negatives, so that one process and two draw the same
    "nce": {"loss": {"estimator": "nce", "num_negatives": NUM_IMAGES - 1, "normalizer_steps": 2}},
    "accumulated": {
        "loss": {"num_negatives": NUM_IMAGES - 1},
        "accumulate_steps": 2,
        "batch_size": GLOBAL_BATCH // 2,
        "clip_grad_norm": 0.1,
    },
    "idle_image_head": {"loss": {"num_negatives": NUM_IMAGES - 1, "lam": 1.0}},
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
        "normalizer": task.base_loss.normalizer,
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    set_cpu_device()  # as the host's trainers do
    folder = Path(sys.argv[1])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results = {name: run(name) for name in SCENARIOS} | {"own_seeds": own_seeds()}
    torch.save(results, folder / f"rank_{rank}.pt")
    dist.destroy_process_group()
