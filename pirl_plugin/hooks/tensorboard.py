"""The run's curves in TensorBoard."""

from __future__ import annotations

from pathlib import Path

from classy_vision.hooks import register_hook
from classy_vision.tasks import ClassyTask
from torch.utils.tensorboard import SummaryWriter

from pirl_plugin.hooks.scalars import ScalarHook, step_of
from pirl_plugin.schema import checked


@register_hook("tensorboard_scalars")
@checked
class TensorboardScalarsHook(ScalarHook):
    """Writes the values of ``collect_scalars`` as TensorBoard events to ``run_dir/tensorboard``.

    A resumed run hides the events of steps that it is going to repeat.

    Args:
        folder: where to write instead; needed for tasks that have no run folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__()
        self.folder = folder
        self._writer: SummaryWriter | None = None

    def open(self, task: ClassyTask) -> None:
        run_dir = getattr(task, "run_dir", None)
        folder = self.folder or (Path(run_dir) / "tensorboard" if run_dir else None)
        if folder is not None:
            step = step_of(task)
            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, task: ClassyTask, values: dict[str, float]) -> None:
        if self._writer is None:
            return
        for name, value in values.items():
            if name != "step":
                self._writer.add_scalar(name, value, global_step=int(values["step"]))
        self._writer.flush()  # a run that crashes keeps its curves

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
