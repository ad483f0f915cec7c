"""Collectives with one meaning for one process and for many: without a process group each is the identity."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pirl_plugin.rendezvous import fresh_store

_entered = 0


def collectives_entered() -> int:
    """How many of this module's collectives this process has come to: who waits in one is ahead of who has not."""
    return _entered


def _enter() -> None:
    global _entered
    _entered += 1


def is_distributed() -> bool:
    """Whether a process group of more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def is_primary() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


@torch.no_grad()
def all_gather(tensor: Tensor) -> Tensor:
    """Concatenates every rank's tensor along the first dimension, in rank order; without gradient.

    Args:
        tensor: ``(B, ...)``, the same shape on every rank.

    Returns:
        ``(world_size * B, ...)``.
    """
    if not is_distributed():
        return tensor
    _enter()
    gathered = tensor.new_empty((world_size() * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor.contiguous())
    return gathered


@torch.no_grad()
def all_gather_rows(tensor: Tensor) -> Tensor:
    """Like ``all_gather``, but ranks may have different numbers of rows: ``(B_r, ...)`` to ``(sum of B_r, ...)``."""
    if not is_distributed():
        return tensor
    counts = all_gather(torch.tensor([len(tensor)], device=tensor.device)).tolist()
    padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    gathered = all_gather(padded).unflatten(0, (world_size(), max(counts)))
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


@torch.no_grad()
def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean over ranks, a new tensor."""
    if not is_distributed():
        return tensor.clone()
    _enter()
    reduced = tensor.clone()
    dist.all_reduce(reduced)
    return reduced / world_size()


@torch.no_grad()
def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, a new tensor."""
    if not is_distributed():
        return tensor.clone()
    _enter()
    reduced = tensor.clone()
    dist.all_reduce(reduced)
    return reduced


@torch.no_grad()
def all_to_all(tensor: Tensor) -> Tensor:
    """``result[s]`` on rank r is ``tensor[r]`` of rank s, for ``(world_size, ...)`` of the same shape on every rank."""
    if not is_distributed():
        return tensor
    _enter()
    received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, tensor.contiguous())
    return received


@torch.no_grad()
def broadcast_(tensor: Tensor) -> Tensor:
    """Overwrites ``tensor`` with rank 0's values on every rank."""
    if is_distributed():
        _enter()
        dist.broadcast(tensor, src=0)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """One small picklable value of every rank, in rank order, on every rank."""
    if not is_distributed():
        return [value]
    _enter()
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def barrier() -> None:
    """Waits for every rank."""
    if is_distributed():
        _enter()
        dist.barrier()


def launched_processes() -> int:
    """Number of processes that ``torchrun`` started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_processes() -> int:
    """How many of them run on this machine, 1 without ``torchrun``."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def planned_place() -> tuple[int, int]:
    """Rank and number of processes: those of the group where there is one, else those that ``torchrun`` is to make."""
    if dist.is_available() and dist.is_initialized():
        return rank(), world_size()
    return int(os.environ.get("RANK", "0")), launched_processes()


def is_launched_primary() -> bool:
    """Whether this is the first process, known before there is a process group."""
    return int(os.environ.get("RANK", "0")) == 0


def local_rank() -> int:
    """Number of this process among those that ``torchrun`` started on this machine, 0 without it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the processes that ``torchrun`` started; nothing for a single one.

    Each process gets the GPU of its local rank where ``device`` is one.
    """
    if launched_processes() == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(local_rank())
    place, size = planned_place()
    store, backend = fresh_store(place, size), "nccl" if device.type == "cuda" else "gloo"
    if store is None:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=store, rank=place, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
