"""Optimisers with a learning rate schedule."""

from pirl_plugin.optim.scheduled_lars import ScheduledLARS
from pirl_plugin.optim.scheduled_sgd import ScheduledSGD

__all__ = ["ScheduledLARS", "ScheduledSGD"]
