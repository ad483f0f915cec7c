"""Where a training is: steps, images and epochs, over all processes and accumulated batches."""

from __future__ import annotations

import torch
from classy_vision.tasks import ClassificationTask


class CountingTask(ClassificationTask):
    """Base of our tasks: counts optimiser steps, where the host counts batches.

    Attributes:
        accumulate_steps: batches whose gradients make one optimiser step.
        log_every: optimiser steps between logged values.
    """

    accumulate_steps: int
    log_every: int

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return torch.device("cuda", torch.cuda.current_device()) if self.use_gpu else torch.device("cpu")

    @property
    def global_batch_size(self) -> int:
        """Images of one optimiser step over all processes."""
        return int(self.get_global_batchsize()) * self.accumulate_steps

    @property
    def images_seen(self) -> int:
        """Images that gradients have been computed for; the host calls the counter ``num_updates``."""
        return int(self.num_updates)

    @property
    def step_idx(self) -> int:
        """Optimiser steps made."""
        return self.images_seen // self.global_batch_size

    @property
    def images_per_epoch(self) -> int:
        """Images of one epoch over all processes."""
        return self.global_batch_size * self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch."""
        return int(self.datasets["train"].steps_per_epoch) // self.accumulate_steps

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.steps_per_epoch * int(self.num_epochs)

    @property
    def num_batches_per_phase(self) -> int:
        """Batches of a whole epoch, also in one that is entered again in its middle (the host's name)."""
        return int(self.datasets["train"].steps_per_epoch)

    @property
    def epoch(self) -> int:
        """Current epoch, from 0; -1 before the first."""
        return int(self.train_phase_idx)

    @property
    def is_update_step(self) -> bool:
        """Whether the last batch ended in an optimiser step."""
        return self.images_seen % self.global_batch_size == 0

    @property
    def is_log_step(self) -> bool:
        """Whether values of the last batch are logged, so that waiting for the device is allowed."""
        return self.is_update_step and self.step_idx % self.log_every == 0

    @property
    def where(self) -> float:
        """Fraction of the training done, in [0, 1]."""
        return self.step_idx / max(1, self.total_steps)
