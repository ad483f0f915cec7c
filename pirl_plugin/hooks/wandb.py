"""The run's curves in Weights & Biases."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import Any, Literal

from classy_vision.hooks import register_hook
from classy_vision.tasks import ClassyTask

from pirl_plugin.hooks.scalars import ScalarHook
from pirl_plugin.schema import checked


@register_hook("wandb_scalars")
@checked
class WandbScalarsHook(ScalarHook):
    """Sends the values of ``collect_scalars`` to Weights & Biases; a resumed run goes on in the same W&B run.

    Args:
        project: W&B project.
        entity: W&B user or team; null takes the account's own.
        name: name of the run; null takes the run folder's name.
        mode: ``offline`` keeps everything in the run folder, for ``wandb sync``.

    Raises:
        ModuleNotFoundError: the package ``wandb`` is not installed.
    """

    def __init__(
        self,
        project: str = "pirl_plugin",
        entity: str | None = None,
        name: str | None = None,
        mode: Literal["online", "offline", "disabled"] = "online",
    ) -> None:
        super().__init__()
        if importlib.util.find_spec("wandb") is None:  # said now, not after the data has been read
            raise ModuleNotFoundError(
                "The hook wandb_scalars needs the package wandb, which is not installed: "
                "pip install 'pirl-plugin[wandb]', or take the hook out."
            )
        self.project, self.entity, self.name_of_run, self.mode = project, entity, name, mode
        self._run: Any = None

    def open(self, task: ClassyTask) -> None:
        import wandb  # optional, and slow to import

        run_dir = Path(task.run_dir).resolve() if getattr(task, "run_dir", None) else None
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.name_of_run or (run_dir.name if run_dir else None),
            mode=self.mode,
            id=run_id(run_dir) if run_dir else None,
            resume="allow",
            dir=str(run_dir) if run_dir else None,
            config=getattr(task, "config", None),
        )
        # W&B's own step only goes up, a resumed run's may go back to its last checkpoint
        self._run.define_metric("*", step_metric="step")

    def write(self, task: ClassyTask, values: dict[str, float]) -> None:
        self._run.log(values)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def run_id(run_dir: Path) -> str:
    """The W&B run of a run folder: the same whenever the run is resumed."""
    return hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
