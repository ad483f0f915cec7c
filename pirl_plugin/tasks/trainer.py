"""The training loop: classy-vision's, and what runs of weeks need besides."""

from __future__ import annotations

from classy_vision.trainer.classy_trainer import ClassyTrainer

from pirl_plugin.distributed import barrier
from pirl_plugin.tasks.ssl_pretraining import SSLPretrainingTask
from pirl_plugin.tasks.stopping import RollBack


class Trainer(ClassyTrainer):
    """Trains a task in the process group there is; goes back to the last checkpoint where the task asks for it."""

    def train(self, task: SSLPretrainingTask) -> None:
        """See ``ClassyTrainer.train``.

        Raises:
            StopRequested: the run was told to stop, and has.
        """
        task.prepare()
        barrier()
        task.on_start()
        while not task.done_training():
            task.on_phase_start()
            try:
                while True:
                    task.step()
            except StopIteration:
                pass
            except RollBack as error:
                task.roll_back(error)
                continue
            try:
                task.on_phase_end()
            except RollBack as error:
                task.roll_back(error)
        task.on_end()
