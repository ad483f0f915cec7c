"""What can be known to go wrong before a run has begun."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import torch

from pirl_plugin.hooks.checkpoint_files import checkpoint_folder
from pirl_plugin.tasks import SSLPretrainingTask

log = logging.getLogger(__name__)


def refuse_unusable_folder(run_dir: Path) -> None:
    """Raises where something stands where a run's folders or files will be.

    Raises:
        OSError: says what and where.
    """
    for folder in (run_dir, checkpoint_folder(run_dir)):
        if folder.is_symlink() and not folder.exists():
            raise OSError(
                f"{folder} is a link to {os.readlink(folder)}, which does not exist: remove it, or make that."
            )
        if folder.exists() and not folder.is_dir():
            raise OSError(f"{folder} must be a folder, and is a file: choose another run_dir, or move it away.")
    for name in (".lock", "config.yaml", "environment.json", "metrics.jsonl", "log.txt"):
        if (run_dir / name).is_dir():
            raise OSError(f"{run_dir / name} must be a file, and is a folder: choose another run_dir, or move it away.")


def refuse_small_disk(task: SSLPretrainingTask) -> None:
    """Raises where not even one checkpoint fits on the disk; warns where not all that are kept do.

    Raises:
        OSError: says how much is needed and how much there is.
    """
    assert task.run_dir is not None
    hook = next((hook for hook in task.hooks if hasattr(hook, "keep")), None)
    if hook is None:
        return
    one, free = checkpoint_bytes(task), shutil.disk_usage(task.run_dir).free
    if free < one:
        raise OSError(f"{task.run_dir}: a checkpoint takes {_gb(one)}, the disk has {_gb(free)} left: make room.")
    # the newest is written before the oldest is removed
    if free < one * (hook.keep + 1):
        message = "%s: %d checkpoints of %s are kept and one is being written, the disk has %s left."
        log.warning(message, task.run_dir, hook.keep, _gb(one), _gb(free))


def checkpoint_bytes(task: SSLPretrainingTask) -> int:
    """About how large a checkpoint will be: weights, momentum, and the loss with its bank."""
    model = [*task.base_model.parameters(), *task.base_model.buffers()]
    momentum = list(task.base_model.parameters())
    loss = [*task.base_loss.parameters(), *task.base_loss.buffers()]
    return sum(value.numel() * value.element_size() for value in (*model, *momentum, *loss))


def warn_of_idle_gpu(device: torch.device) -> None:
    """Says so where this machine has a GPU that this torch cannot use, and the run is on the CPU."""
    if device.type == "cpu" and torch.version.cuda is None and Path("/proc/driver/nvidia/version").exists():
        log.warning("This machine has a GPU, but this torch (%s) is a build without CUDA.", torch.__version__)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
