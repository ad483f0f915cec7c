"""What test_lightly_losses.py compares: the same batch in one process and, a half each, in two.

Run as a program, with RANK and WORLD_SIZE set: ``python lightly_worker.py FOLDER`` writes ``FOLDER/rank_R.pt``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from classy_vision.generic.distributed_util import set_cpu_device
from classy_vision.trainer.classy_trainer import ClassyTrainer
from lightly_methods import Watch, small
from small_task import everything, freeze_batch_norm
from torch import Tensor

from pirl_plugin import distributed
from pirl_plugin.registry import build
from pirl_plugin.tasks import SSLPretrainingTask

CONFIGS: dict[str, dict[str, Any]] = {
    "nt_xent": {"name": "nt_xent", "temperature": 0.3},
    "barlow_twins": {"name": "barlow_twins", "lambda_param": 0.01},
    "vicreg": {"name": "vicreg", "lambda_param": 5.0, "mu_param": 3.0, "nu_param": 2.0},
    "simsiam": {"name": "simsiam"},
    "byol": {"name": "byol"},
}


OF_THE_GLOBAL_BATCH = ("simclr_32", "barlow_twins_32", "vicreg_32")


def embeddings() -> dict[str, Tensor]:
    """A model's output for 8 images with two views each; the mean is not 0, as it would be after a batch norm."""
    generator = torch.Generator().manual_seed(3)
    names = ("image", "image/prediction", "momentum/image")
    return {name: 0.3 + torch.randn(8, 2, 5, generator=generator) for name in names}


def measured(name: str, part: slice = slice(None)) -> dict[str, Any]:
    """Loss of a part of the batch, and its gradients with respect to what the network gave."""
    output = {key: both[part].clone().requires_grad_() for key, both in embeddings().items()}
    loss = build("loss", CONFIGS[name])(output, torch.arange(len(output["image"])))
    loss.backward()
    gradients = {key: both.grad for key, both in output.items() if both.grad is not None}
    return {"loss": loss.detach(), "gradients": gradients}


def trained(name: str) -> dict[str, Any]:
    """Two steps of a method with this process's share of each batch."""
    task = SSLPretrainingTask.from_config(small(name, batch_size=4))
    start = {part: value.clone() for part, value in task.base_model.state_dict().items()}
    seen = Watch()
    task.hooks.append(seen)
    ClassyTrainer().train(task)
    end = everything(task)
    running = {key for key in end if "running_" in key}  # of each rank's own images
    return {
        "start": {f"model.{part}": value for part, value in start.items()},
        "end": {key: value for key, value in end.items() if key not in running},
        "without_gradient": seen.without_gradient,
        "ids": seen.ids,
    }


def frozen(name: str) -> dict[str, Any]:
    """Weights and losses of two steps without batch norm, whose statistics would be of each rank's own images."""
    settings = {"batch_size": 8 // distributed.world_size(), "heads": {"image": {"name": "linear", "dim": 16}}}
    task = SSLPretrainingTask.from_config(small(name, **settings))
    freeze_batch_norm(task.base_model)
    seen = Watch()
    task.hooks.append(seen)
    ClassyTrainer().train(task)
    return {"losses": torch.tensor(seen.losses), "end": everything(task)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    set_cpu_device()  # as the host's trainers do
    folder = Path(sys.argv[1])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    mine = slice(4 * rank, 4 * rank + 4)
    results = {
        "losses": {name: measured(name, mine) for name in CONFIGS},
        "tasks": {name: trained(name) for name in ("simclr", "byol", "moco_v2")},
        "frozen": {name: frozen(name) for name in OF_THE_GLOBAL_BATCH},
    }
    torch.save(results, folder / f"rank_{rank}.pt")
    dist.destroy_process_group()
