"""The one place that moves a momentum copy."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from classy_vision.hooks import ClassyHook, register_hook
from classy_vision.tasks import ClassyTask

from pirl_plugin.hooks.memory_bank_update import optimizer_stepped
from pirl_plugin.registry import Configurable
from pirl_plugin.schema import Fraction, checked


@register_hook("momentum_update")
@checked
class MomentumUpdateHook(Configurable, ClassyHook):
    """Moves the momentum copy of the model towards the trained network, after each optimiser step.

    The copy of optimiser step k is therefore used from step k + 1 on, as in MoCo's code, which moves it at the start of
    the next step.

    Args:
        momentum: weight of the copy's own parameters (MoCo 0.999, BYOL 0.996 at the start).
        schedule: ``constant``, or ``cosine`` from ``momentum`` to 1 over the run:
            ``1 - (1 - momentum) * (cos(pi * k / K) + 1) / 2`` at step k of K, from 0 (BYOL).
    """

    only_where_needed: ClassVar[str] = "momentum_update"

    on_start = on_phase_start = on_phase_end = on_end = ClassyHook._noop

    def __init__(self, momentum: Fraction = 0.999, schedule: Literal["constant", "cosine"] = "constant") -> None:
        super().__init__()
        self.momentum, self.schedule = momentum, schedule

    def on_step(self, task: ClassyTask) -> None:
        """Moves the copy once per optimiser step."""
        if task.train and optimizer_stepped(task):
            task.base_model.update_momentum(self.momentum_at((task.step_idx - 1) / task.total_steps))

    def momentum_at(self, where: float) -> float:
        """The momentum at a fraction of the training, in [0, 1)."""
        if self.schedule == "constant":
            return self.momentum
        return 1 - (1 - self.momentum) * (math.cos(math.pi * where) + 1) / 2
