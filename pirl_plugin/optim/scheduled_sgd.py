"""SGD whose learning rate follows one stated rule: linear scaling, linear warm-up, then cosine or steps."""

from __future__ import annotations

from typing import Any, Literal

import torch
from classy_vision.optim import ClassyOptimizer, register_optimizer
from classy_vision.optim.classy_optimizer import OptionsView
from classy_vision.optim.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
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
        constant_lr: parameters that keep the peak learning rate all the time: those whose dotted name has one of these
            as a part, such as ``[prediction]`` for SimSiam's prediction head.
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
        constant_lr: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.options_view = _MainOptions(self)
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
        self.constant_lr = set(constant_lr or ())
        self._peak_lr = lr

    def prepare(self, param_groups: list[dict[str, Any]]) -> None:
        """Makes the torch optimiser; the host calls it with the first values of all schedules."""
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
            param_groups,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            fused=True,  # weights, gradients and momenta pass the memory once: half the default's time on a CPU
        )

    def peak_lr(self, global_batch_size: int) -> float:
        """Learning rate after the warm-up, by the linear scaling rule."""
        return self.lr * global_batch_size / (self.lr_batch_size or global_batch_size)

    def lr_scheduler(self, global_batch_size: int, num_epochs: int) -> ParamScheduler:
        """The learning rate as a function of the fraction of training done."""
        self._peak_lr = peak = self.peak_lr(global_batch_size)
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
        """Parameters of ``modules`` in groups: with weight decay, and without (vectors, unless asked).

        Those of ``constant_lr`` make groups of their own, after the others.

        Raises:
            ValueError: a part of ``constant_lr`` that no parameter's name has.
        """
        trained = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
        unknown = self.constant_lr - {part for name, _ in trained for part in name.split(".")}
        if unknown:
            raise ValueError(f"constant_lr: no trained parameter's name has the part {sorted(unknown)[0]!r}.")
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, p in trained:
            key = (not self.constant_lr.isdisjoint(name.split(".")), p.ndim <= 1 and not self.decay_norm_and_bias)
            groups.setdefault(key, []).append(p)
        return [
            {
                "params": params,
                "lr": ConstantParamScheduler(self._peak_lr) if constant else lr,
                "weight_decay": 0.0 if spared else self.weight_decay,
            }
            for (constant, spared), params in sorted(groups.items(), key=lambda item: item[0])
        ]


class _MainOptions(OptionsView):
    """Options of the optimiser's first group, whose learning rate follows the schedule: one value for each."""

    def __getattr__(self, name: str) -> Any:
        first = self.optimizer.param_groups[0]
        if name not in first:
            raise AttributeError(name)
        return first[name]
