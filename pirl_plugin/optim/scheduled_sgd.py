"""SGD whose learning rate follows one stated rule: linear scaling, linear warm-up, then cosine or steps."""

from __future__ import annotations

from typing import Any, Literal

import torch
from classy_vision.optim import ClassyOptimizer, register_optimizer
from classy_vision.optim.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    IntervalScaling,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
    UpdateInterval,
)
from torch import nn

from pirl_plugin.registry import Configurable
from pirl_plugin.schema import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, checked


@register_optimizer("scheduled_sgd")
@checked
class ScheduledSGD(Configurable, ClassyOptimizer):
    """SGD with momentum; peak learning rate ``lr * global_batch_size / lr_batch_size`` (Goyal et al. 2017).

    Args:
        lr: peak learning rate at a global batch of ``lr_batch_size`` images.
        lr_batch_size: the global batch that ``lr`` is given for; null: ``lr`` is taken as it is.
        momentum: of SGD.
        weight_decay: L2 penalty.
        nesterov: Nesterov's momentum.
        decay_norm_and_bias: apply the weight decay to biases and normalisation parameters too.
        schedule: ``cosine``, one half-wave from the peak to ``final_lr_ratio`` of it, or ``multistep``; both per step.
        warmup_epochs: linear warm-up from ``warmup_lr_ratio`` of the peak.
        warmup_lr_ratio: where the warm-up begins, as a fraction of the peak.
        final_lr_ratio: where the cosine ends, as a fraction of the peak; PIRL: 1.2e-4 of 0.12.
        milestones: epochs at which ``multistep`` multiplies by ``gamma``.
        gamma: factor of ``multistep``.
    """

    def __init__(
        self,
        lr: PositiveFloat = 0.12,
        lr_batch_size: PositiveInt | None = 1024,
        momentum: Fraction = 0.9,
        weight_decay: NonNegativeFloat = 1e-4,
        nesterov: bool = False,
        decay_norm_and_bias: bool = False,
        schedule: Literal["cosine", "multistep"] = "cosine",
        warmup_epochs: NonNegativeFloat = 0.0,
        warmup_lr_ratio: Fraction = 0.0,
        final_lr_ratio: Fraction = 0.001,
        milestones: list[PositiveInt] | None = None,
        gamma: Fraction = 0.1,
    ) -> None:
        super().__init__()
        if (schedule == "multistep") != bool(milestones):
            raise ValueError(
                f"milestones go with schedule='multistep' and only there, got {schedule!r} and {milestones}."
            )
        if milestones and milestones != sorted(set(milestones)):
            raise ValueError(f"milestones must rise, got {milestones}.")
        self.lr, self.lr_batch_size = lr, lr_batch_size
        self.momentum, self.weight_decay, self.nesterov = momentum, weight_decay, nesterov
        self.decay_norm_and_bias = decay_norm_and_bias
        self.schedule, self.warmup_epochs, self.warmup_lr_ratio = schedule, warmup_epochs, warmup_lr_ratio
        self.final_lr_ratio, self.milestones, self.gamma = final_lr_ratio, milestones or [], gamma

    def prepare(self, param_groups: list[dict[str, Any]]) -> None:
        """Makes the torch optimiser; the host calls it with the first values of all schedules."""
        self.optimizer = torch.optim.SGD(param_groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)

    def peak_lr(self, global_batch_size: int) -> float:
        """Learning rate after the warm-up, by the linear scaling rule."""
        return self.lr * global_batch_size / (self.lr_batch_size or global_batch_size)

    def lr_scheduler(self, global_batch_size: int, num_epochs: int) -> ParamScheduler:
        """The learning rate as a function of the fraction of training done."""
        peak = self.peak_lr(global_batch_size)
        main = self._main_schedule(peak, num_epochs)
        main.update_interval = UpdateInterval.STEP
        if self.warmup_epochs == 0:
            return main
        if self.warmup_epochs >= num_epochs:
            raise ValueError(f"warmup_epochs must be less than num_epochs = {num_epochs}, got {self.warmup_epochs}.")
        fraction = self.warmup_epochs / num_epochs
        # a cosine starts where the warm-up ends; milestones are epochs of the whole run, warm-up included
        scaling = IntervalScaling.RESCALED if self.schedule == "cosine" else IntervalScaling.FIXED
        return CompositeParamScheduler(
            schedulers=[LinearParamScheduler(peak * self.warmup_lr_ratio, peak), main],
            lengths=[fraction, 1 - fraction],
            interval_scaling=[IntervalScaling.RESCALED, scaling],
            update_interval=UpdateInterval.STEP,
        )

    def _main_schedule(self, peak: float, num_epochs: int) -> ParamScheduler:
        if self.schedule == "cosine":
            return CosineParamScheduler(peak, peak * self.final_lr_ratio)
        if self.milestones[-1] >= num_epochs:
            raise ValueError(f"milestones must lie before num_epochs = {num_epochs}, got {self.milestones}.")
        values = [peak * self.gamma**k for k in range(len(self.milestones) + 1)]
        return MultiStepParamScheduler(values, num_updates=num_epochs, milestones=self.milestones)

    def param_groups_of(self, *modules: nn.Module, lr: ParamScheduler) -> list[dict[str, Any]]:
        """Parameters of ``modules`` in at most two groups: with weight decay, and without (vectors, unless asked)."""
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.ndim > 1 or self.decay_norm_and_bias]
        spared = [p for p in trained if p.ndim <= 1 and not self.decay_norm_and_bias]
        groups = [(decayed, self.weight_decay), (spared, 0.0)]
        return [{"params": params, "lr": lr, "weight_decay": decay} for params, decay in groups if params]
