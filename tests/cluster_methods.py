"""SwAV and DeepCluster-v2 as their YAMLs say, in the size of a test; run as a program, one of two processes.

``python cluster_methods.py FOLDER`` with RANK and WORLD_SIZE set writes ``FOLDER/METHOD_rank_R.pt``.
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
from small_task import freeze_batch_norm
from torch import Tensor, nn

from pirl_plugin import config as configs
from pirl_plugin.tasks import SSLPretrainingTask

_SMALL = {
    "swav": ["loss.num_prototypes=6", "loss.queue={name:fifo_queue,size:10}", "loss.queue_start_epoch=1"],
    "deepcluster_v2": ["loss.num_clusters=[5,3,4]"],
}
_SMALL["swav_256"] = _SMALL["swav"]


def small(method: str, *overrides: str, **changes: Any) -> dict[str, Any]:
    """The configuration of a method's YAML, its views, network and data made small; ``changes`` replace keys of it."""
    config = configs.load(
        "train",
        [
            f"method={method}",
            "trunk=resnet18_narrow",
            "trunk.width=0.125",
            "dataset.num_images=20",
            "dataset.size=32",
            "transform.image_size=16",
            "device=cpu",
            "log_every=1",
            "num_epochs=3",
            "batch_size=8",
            "heads.image.hidden_dim=12",
            "heads.image.dim=8",
            "loss.dim=8",
            "optimizer.warmup_epochs=0",
            "optimizer.warmup_lr_ratio=0.0",
            *(["transform.num_crops=2", "transform.crop_size=8"] if method in ("swav", "swav_256") else []),
            *_SMALL[method.removesuffix("_32")],
            *overrides,
        ],
    )
    return {**config, "hooks": [{"name": "cluster_assignment"}], "checkpoint": None, "run_dir": None, **changes}


def without_batch_statistics(task: SSLPretrainingTask) -> None:
    """Else each process's part of a batch has statistics of its own."""
    freeze_batch_norm(task.base_model.trunk)
    for head in task.base_model.heads.values():
        head.mlp[1] = nn.Identity()


def of_processes(method: str, batch_size: int) -> dict[str, Tensor]:
    """What a training without batch statistics ends with."""
    # plain SGD: the norms that LARS divides by would make much of the last bits
    task = SSLPretrainingTask.from_config(small(f"{method}_32", batch_size=batch_size))
    without_batch_statistics(task)
    ClassyTrainer().train(task)
    found = {f"model.{name}": value for name, value in task.base_model.named_parameters()}
    found |= {f"loss.{name}": value for name, value in task.base_loss.state_dict().items()}
    return {name: value.detach() for name, value in found.items()}


def main(folder: Path) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    set_cpu_device()  # as the host's trainers do
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    for method in ("swav", "deepcluster_v2"):
        torch.save(of_processes(method, 8 // world_size), folder / f"{method}_rank_{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
