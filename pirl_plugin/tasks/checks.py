"""Mistakes that a task's signature cannot show, each refused with what to do about it, and what follows from parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pirl_plugin.data.loading import SampledViews
from pirl_plugin.models.trunks import ResNetTrunk, bfloat16_hazards
from pirl_plugin.registry import lookup
from pirl_plugin.schema import parameters


def chosen_device(device: str, sync_batch_norm: bool) -> str:
    """``cuda`` or ``cpu`` for ``auto``, ``cuda`` or ``cpu``.

    Raises:
        ValueError: a GPU that is not there, or batch norm over processes without one.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda was asked for, but torch sees no GPU: use device=cpu or install a CUDA build.")
    chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if sync_batch_norm and chosen == "cpu":
        raise ValueError(
            "sync_batch_norm needs a GPU (torch's SyncBatchNorm has no CPU kernels), the run would be on the CPU: "
            "set sync_batch_norm=false."
        )
    return chosen


def with_num_images(loss: Mapping[str, Any], num_images: int) -> dict[str, Any]:
    """Fills in the number of training images for a loss that takes it.

    Raises:
        ValueError: the configuration states another number.
    """
    if "num_images" not in parameters(lookup("loss", loss["name"])):
        return dict(loss)
    stated = loss.get("num_images")
    if stated not in (None, num_images):
        raise ValueError(f"loss.num_images is {stated}, but the dataset has {num_images} images: leave it null.")
    return {**loss, "num_images": num_images}


def refuse_unwritten_bank(loss: nn.Module, hooks: Iterable[Any]) -> None:
    """Raises for a memory bank that no hook writes, and for a hook without a bank to write."""
    writers = [hook for hook in hooks if isinstance(hook, lookup("hook", "memory_bank_update"))]
    if hasattr(loss, "memory_bank") and not writers:
        raise ValueError(
            "The loss has a memory bank, but no hook writes it: add {'name': 'memory_bank_update'} to hooks."
        )
    if len(writers) > 1:
        raise ValueError(
            f"hooks hold memory_bank_update {len(writers)} times: keep one, or a row moves as often a step."
        )
    if writers and not hasattr(loss, "memory_bank"):
        raise ValueError("hooks hold memory_bank_update, but the loss has no memory bank: take the hook out.")


def freeze_idle_heads(heads: Mapping[str, nn.Module] | nn.ModuleDict, loss: nn.Module) -> None:
    """Freezes heads whose view does not enter the loss (its weight is 0): they would never get a gradient.

    ``DistributedDataParallel`` waits for every gradient that it was told of. A loss that does not say which ``views``
    it uses is taken to use all.
    """
    used: Sequence[str] | None = getattr(loss, "views", None)
    for view, head in heads.items():
        if used is not None and view not in used:
            head.requires_grad_(False)


def refuse_wrong_bfloat16_gradients(trunk: ResNetTrunk, views: SampledViews) -> None:
    """Raises where torch's CPU kernels would give wrong gradients, see ``bfloat16_hazards``."""
    _, sample, _ = views[(0, 0)]
    for name, view in sample.items():
        hazards = bfloat16_hazards(trunk, view.shape[-2], view.shape[-1])
        if hazards:
            raise ValueError(
                f"precision=bf16 on the CPU gives wrong gradients for the view {name!r} of {view.shape[-2]} pixels: "
                f"{hazards[0]} sees a 1x1 input (a fault of torch's CPU kernels). Use precision=float32, larger "
                "views, or trunk.stem=small."
            )


def refuse_other_batch_size(state: Mapping[str, Any], global_batch_size: int) -> None:
    """Raises for a checkpoint of a run with another global batch: its steps and its schedule do not continue."""
    saved = state.get("global_batch_size", global_batch_size)
    if saved != global_batch_size:
        raise ValueError(
            f"The checkpoint is of a run with {saved} images a step over all processes, this one takes "
            f"{global_batch_size}: start as many processes as before, or set run_dir to a new folder."
        )
