"""The rows of a memory bank: how they begin and how they move; for a whole bank and for a part of one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_AT_A_TIME = 8192  # rows that are drawn and normalised while they are in the cache
_SHORTEST = 1e-6  # a shorter mean has no direction


@torch.no_grad()
def random_rows(count: int, dim: int, dtype: str, generator: torch.Generator | None = None) -> Tensor:
    """Random directions, ``(count, dim)``, unit norm.

    Uniform in a cube, then normalised, as released NPID and PIRL code draws them. Each random 64-bit number gives eight
    coordinates: that takes a tenth of the time of as many normal deviates, which at 1.28 M x 128 is the difference
    between two seconds and a quarter of one.

    Args:
        count: rows.
        dim: dimensions.
        dtype: ``float32`` or ``bfloat16``.
        generator: default: torch's global one.
    """
    rows = torch.empty(count, dim, dtype=_DTYPES[dtype])
    for part in rows.split(_AT_A_TIME):
        words = torch.empty((part.numel() + 7) // 8, dtype=torch.int64)
        words.random_(-(2**63), None, generator=generator)
        # bytes -128 ... 127 moved by one half: centred, and never all zero
        coordinates = words.view(torch.int8)[: part.numel()].view_as(part).float().add_(0.5)
        part.copy_(coordinates.div_(torch.linalg.vector_norm(coordinates, dim=1, keepdim=True)))
    return rows


def bytes_to_build(count: int, dim: int, dtype: str) -> int:
    """Bytes that ``random_rows`` takes at most: the rows, and pieces of them as drawn and in float32."""
    return count * dim * _DTYPES[dtype].itemsize + 8 * dim * _AT_A_TIME


def mean_by_id(ids: Tensor, embeddings: Tensor) -> Tensor:
    """Every embedding replaced by the mean of those with its id, ``(B, D)``; the same bits for equal ids.

    ``torch.unique`` would make the host wait for a GPU; a ``(B, B)`` comparison does not.
    """
    same = ids.unsqueeze(0) == ids.unsqueeze(1)
    mean = same.to(embeddings.dtype) @ embeddings / same.sum(dim=1, keepdim=True)
    return mean[same.to(torch.uint8).argmax(dim=1)]


def moved(old: Tensor, new: Tensor, momentum: float) -> Tensor:
    """``normalise(momentum * old + (1 - momentum) * new)`` of rows ``(B, D)``, in float32.

    Opposite vectors can cancel; a row without a direction would stay zero for ever, so it stays as it is instead.
    """
    old = old.float()
    mixed = momentum * old + (1 - momentum) * new
    norm = mixed.norm(dim=1, keepdim=True)
    return torch.where(norm > _SHORTEST, mixed / norm.clamp_min(_SHORTEST), old)


def unit(embeddings: Tensor) -> Tensor:
    """Unit-norm float32 embeddings without gradient, whatever precision they came in."""
    return F.normalize(embeddings.detach().float(), dim=1)


def check_ids(ids: Tensor, num_images: int) -> None:
    """Raises where an id has no row. On a GPU the check runs there, without waiting for it.

    Raises:
        IndexError: an id outside ``0 .. num_images - 1`` (CPU; an asynchronous assertion on a GPU).
    """
    valid = ((ids >= 0) & (ids < num_images)).all()
    hint = f"the bank has {num_images} rows, valid 0..{num_images - 1}: set loss.num_images to the dataset's size."
    if ids.is_cuda:
        torch._assert_async(valid, f"An image id is outside the memory bank; {hint}")
    elif not valid:
        outside = ids[(ids < 0) | (ids >= num_images)][0].item()
        raise IndexError(f"Image id {outside} is outside the memory bank; {hint}")


def check_shape(ids: Tensor, embeddings: Tensor, dim: int) -> None:
    """Raises where embeddings are not ``(B, dim)`` for ``(B,)`` ids.

    Raises:
        ValueError: another shape.
    """
    if embeddings.shape != (ids.shape[0], dim):
        raise ValueError(f"embeddings must be {(ids.shape[0], dim)} for these ids, got {tuple(embeddings.shape)}.")
