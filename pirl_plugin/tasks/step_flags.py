"""What all ranks must know of each step, without the host waiting for the device."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pirl_plugin.distributed import is_distributed


class Flags(NamedTuple):
    """Of one optimiser step, over all ranks: told to stop; a loss, or anything at all, that is not finite."""

    stop: bool
    bad_loss: bool
    bad: bool


class StepFlags:
    """Flags of the latest steps, the same on every rank and in the same step.

    On a GPU the flags of a step are looked at one step later, when they have long arrived: the host may be a step ahead
    of the device all the time. On a CPU they are there at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.lag = device, 1 if device.type == "cuda" else 0
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def push(self, bad_loss: Tensor, bad_gradient: Tensor, stop: bool) -> Tensor:
        """Adds a step; collective.

        Args:
            bad_loss: whether this rank's loss is not finite, 0-dim bool.
            bad_gradient: whether the gradient is not finite, 0-dim bool.
            stop: whether this rank was told to stop.

        Returns:
            Whether anything is not finite on any rank, 0-dim bool, on the device.
        """
        told = torch.full((), stop, dtype=torch.bool, device=self.device)
        flags = torch.stack([told, bad_loss, bad_loss | bad_gradient]).to(torch.int32)
        if is_distributed():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        if self.device.type == "cuda":
            host = torch.empty(3, dtype=torch.int32, pin_memory=True).copy_(flags, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._waiting.append((host, event))
        else:
            self._waiting.append((flags, None))
        return flags[2] > 0

    def pop(self, all_of_them: bool = False) -> list[Flags]:
        """Flags that are due, oldest first; or all that there are, which waits for the device."""
        found = []
        while len(self._waiting) > (0 if all_of_them else self.lag):
            flags, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            found.append(Flags(*(bool(value) for value in flags.tolist())))
        return found
