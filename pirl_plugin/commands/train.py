"""``python tools/train.py``: pretraining, from overrides to a finished run folder."""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from classy_vision.tasks import build_task
from classy_vision.trainer import DistributedTrainer, LocalTrainer

from pirl_plugin import config as configs
from pirl_plugin.atomic import write_text
from pirl_plugin.commands.running import exit_code, log_to
from pirl_plugin.hooks.checkpoint import checkpoints
from pirl_plugin.records import environment
from pirl_plugin.registry import completed, lookup
from pirl_plugin.tasks import SSLPretrainingTask
from pirl_plugin.weights.files import read_weights

log = logging.getLogger(__name__)

# what may change between the pieces of one run without changing its result
_FREE_KEYS = ("run_dir", "device", "num_workers", "log_every", "hooks", "checkpoint", "compile", "about")

_EPILOG = """\
examples:
  python tools/train.py                                             PIRL on generated scenes, on whatever there is
  python tools/train.py method=pirl_32 dataset=image_folder dataset.root=photos num_epochs=100
  torchrun --nproc_per_node=8 tools/train.py method=pirl dataset=imagenet dataset.root=imagenet
  python tools/train.py method=pirl trunk=resnet18 loss.lam=0.3 --print-config

groups: {groups}
The same command again goes on where the run stopped. Names and parameters: python tools/list.py
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0 for a finished run, 2 for a mistake in the command."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Pretrain a trunk without labels.",
        epilog=_EPILOG.format(groups=", ".join(configs.groups())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="choices and settings, in Hydra's syntax")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: train(arguments.overrides, arguments.print_config), arguments.debug)


def train(overrides: Sequence[str], print_config: bool = False) -> None:
    """Composes, checks, builds, resumes where there is something to resume, and trains."""
    config = configs.load("train", overrides)
    task: SSLPretrainingTask = build_task(config)
    if print_config:
        print(configs.to_yaml(task.config), end="")
        return
    assert task.run_dir is not None
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    primary = int(os.environ.get("RANK", "0")) == 0
    log_to(task.run_dir if primary else None)
    if not _resume(task):
        return
    if primary:
        write_text(configs.to_yaml(task.config), task.run_dir / "config.yaml")
        write_text(json.dumps(environment(), indent=2) + "\n", task.run_dir / "environment.json")
        log.info("%s", _introduction(task, processes))
    try:
        (DistributedTrainer() if processes > 1 else LocalTrainer()).train(task)
        # before the processes part: they make up the global batch that steps are counted in
        log.info("Finished after %d steps: %s", task.step_idx, task.run_dir)
    except KeyboardInterrupt:
        saved = checkpoints(task.run_dir)
        where = f"the same command goes on from {saved[-1]}" if saved else "nothing was saved yet"
        raise KeyboardInterrupt(f" after step {task.step_idx}: {where}") from None
    finally:
        if dist.is_initialized():
            # torch 2.11 waits for ever where the wrapped model outlives the process group that it belongs to
            task.distributed_model = task.distributed_loss = None
            dist.destroy_process_group()


def _resume(task: SSLPretrainingTask) -> bool:
    """Sets the newest checkpoint of the run folder on the task; False where the run is finished already.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    assert task.run_dir is not None
    found = checkpoints(task.run_dir)
    if not found:
        return True
    state = read_weights(found[-1])
    saved = completed("task", state["input_args"]["config"])  # settings that are newer than it at their defaults
    changed = configs.differences(_identity(saved), _identity(task.config))
    if changed:
        raise ValueError(
            f"{task.run_dir} holds a run with other settings ({'; '.join(changed)}). "
            "Set run_dir to a new folder, or repeat the settings to go on with that run."
        )
    if state["classy_state_dict"]["num_updates"] >= _images_in_all(task):
        log.info("Finished already: %s", found[-1])
        return False
    log.info("Going on from %s", found[-1])
    task._set_checkpoint_dict(state)
    return True


def _images_in_all(task: SSLPretrainingTask) -> int:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return int(task.datasets["train"].images_per_epoch(processes)) * int(task.num_epochs)


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """What decides a run's result: of the hooks, those that model or loss need; the others only look on."""
    working = [hook for hook in config["hooks"] or [] if hasattr(lookup("hook", hook["name"]), "only_where_needed")]
    return {**{key: value for key, value in config.items() if key not in _FREE_KEYS}, "hooks": working}


def _introduction(task: SSLPretrainingTask, processes: int) -> str:
    parameters = sum(p.numel() for p in task.base_model.parameters())
    bank = getattr(task.base_loss, "memory_bank", None)
    size = sum(rows.numel() * rows.element_size() for rows in bank.buffers()) / 1e6 if bank is not None else 0
    return (
        f"{task.method}: {len(task.datasets['train'])} images, {task.num_epochs} epochs, "
        f"{task.datasets['train'].get_batchsize_per_replica()} images x {processes} process(es) a step, "
        f"{parameters / 1e6:.1f} M parameters, "
        f"{f'{size:.1f} MB of memory bank, ' if size else ''}on {task.device}; folder {task.run_dir}"
    )
