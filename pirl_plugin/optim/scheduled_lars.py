"""LARS, with the schedule of ``scheduled_sgd``: for batches of thousands of images."""

from __future__ import annotations

from typing import Any

import torch
from classy_vision.optim import register_optimizer
from torch import Tensor

from pirl_plugin.optim.scheduled_sgd import ScheduledSGD
from pirl_plugin.schema import PositiveFloat, checked

_Tensors = list[Tensor] | tuple[Tensor, ...]


@register_optimizer("scheduled_lars")
@checked
class ScheduledLARS(ScheduledSGD):
    """LARS (You et al. 2017): SGD whose steps are in proportion to each weight tensor's own norm.

    Biases and normalisation parameters, as long as they do not decay, take SGD's own steps.

    Args:
        trust_coefficient: size of a step relative to the weights, at a learning rate of 1.
        **scheduled_sgd: see ``ScheduledSGD``; the weight decay must be above 0.

    Raises:
        ValueError: no weight decay.
    """

    def __init__(self, trust_coefficient: PositiveFloat = 0.001, **scheduled_sgd: Any) -> None:
        super().__init__(**scheduled_sgd)
        if self.weight_decay == 0:
            raise ValueError(
                "weight_decay must be above 0, got 0: LARS takes a parameter without decay for a bias and does not "
                "scale its steps. 1.0e-9 is as good as none."
            )
        self.trust_coefficient = trust_coefficient

    def prepare(self, param_groups: list[dict[str, Any]]) -> None:
        """Makes the optimiser; the host calls it with the first values of all schedules."""
        self.optimizer = LARS(
            param_groups,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            trust_coefficient=self.trust_coefficient,
        )


class LARS(torch.optim.Optimizer):
    """``v <- momentum * v + t * (g + decay * w)``, ``w <- w - lr * v``, for each weight tensor w with its gradient g.

    ``t = trust_coefficient * |w| / (|g| + decay * |w| + 1e-8)``; without decay, or where w is zero, ``t = 1``; where g
    is zero, ``t = 0``. The same as lightly's, with the same state, but nothing waits for the device, where that one
    compares every norm with 0 on the host.

    Args:
        params: parameters or groups of them, all of one type on one device.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: L2 penalty.
        nesterov: Nesterov's momentum.
        trust_coefficient: size of a step relative to the weights, at a learning rate of 1.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
    ) -> None:
        group = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        # lightly's two others are in checkpoints, and are what they have always been
        super().__init__(params, {**group, "trust_coefficient": trust_coefficient, "dampening": 0, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves all parameters that have a gradient; ``closure`` is not needed."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if weights:
                self._move(weights, [p.grad for p in weights], group)

    def _move(self, weights: _Tensors, steps: _Tensors, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            trusts = _trusts(weights, steps, group)
            steps = torch._foreach_add(steps, weights, alpha=group["weight_decay"])
            torch._foreach_mul_(steps, trusts)
        if group["momentum"]:
            for p in weights:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            velocities = [self.state[p]["momentum_buffer"] for p in weights]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, steps)
            nesterov = group["nesterov"]
            steps = torch._foreach_add(steps, velocities, alpha=group["momentum"]) if nesterov else velocities
        torch._foreach_add_(weights, steps, alpha=-group["lr"])


def _trusts(weights: _Tensors, gradients: _Tensors, group: dict[str, Any]) -> list[Tensor]:
    """The factor of each weight tensor's step, 0-dim."""
    w, g = (torch.stack(torch._foreach_norm(each)) for each in (weights, gradients))
    trusts = group["trust_coefficient"] * (w / (g + w * group["weight_decay"] + group["eps"]))
    return list(torch.where(w == 0, 1.0, torch.where(g == 0, 0.0, trusts)).unbind())
