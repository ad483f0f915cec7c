"""LARS, with the schedule of ``scheduled_sgd``: for batches of thousands of images."""

from __future__ import annotations

from typing import Any

from classy_vision.optim import register_optimizer

from pirl_plugin.optim.scheduled_sgd import ScheduledSGD
from pirl_plugin.optional import optional
from pirl_plugin.schema import PositiveFloat, checked


@register_optimizer("scheduled_lars")
@checked
class ScheduledLARS(ScheduledSGD):
    """LARS (You et al. 2017), lightly's: SGD whose steps are in proportion to each weight tensor's own norm.

    Biases and normalisation parameters, as long as they do not decay, take SGD's own steps.

    Args:
        trust_coefficient: size of a step relative to the weights, at a learning rate of 1.
        **scheduled_sgd: see ``ScheduledSGD``; the weight decay must be above 0.

    Raises:
        ImportError: lightly is not installed.
        ValueError: no weight decay.
    """

    def __init__(self, trust_coefficient: PositiveFloat = 0.001, **scheduled_sgd: Any) -> None:
        super().__init__(**scheduled_sgd)
        if self.weight_decay == 0:
            raise ValueError(
                "weight_decay must be above 0, got 0: lightly's LARS takes a parameter without decay for a bias and "
                "does not scale its steps. 1.0e-9 is as good as none."
            )
        self.trust_coefficient = trust_coefficient
        self._lars = optional("lightly.utils.lars", "methods", "The optimizer scheduled_lars").LARS

    def prepare(self, param_groups: list[dict[str, Any]]) -> None:
        """Makes the optimiser; the host calls it with the first values of all schedules."""
        self.optimizer = self._lars(
            param_groups,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            trust_coefficient=self.trust_coefficient,
        )
