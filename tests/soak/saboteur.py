"""A hook that has one rank die, hang or freeze in a step: for tests, chosen by ``plugins=[soak.saboteur]``."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Literal

from classy_vision.hooks import ClassyHook, register_hook
from classy_vision.tasks import ClassyTask

from pirl_plugin import distributed
from pirl_plugin.registry import Configurable
from pirl_plugin.schema import PositiveInt, checked


@register_hook("saboteur")
@checked
class SaboteurHook(Configurable, ClassyHook):
    """Does its harm once in a run folder.

    Args:
        how: ``die`` by SIGKILL, ``hang`` for ever in Python, ``freeze`` the whole process, or ``raise`` an error.
        rank: the one that it happens to.
        step: after which.
    """

    on_start = on_phase_start = on_phase_end = on_end = ClassyHook._noop

    def __init__(
        self, how: Literal["die", "hang", "freeze", "raise"] = "die", rank: int = 1, step: PositiveInt = 5
    ) -> None:
        super().__init__()
        self.how, self.rank, self.step = how, rank, step

    def on_step(self, task: ClassyTask) -> None:
        """The harm."""
        done = Path(task.run_dir) / "sabotaged"
        if distributed.rank() != self.rank or task.step_idx != self.step or done.exists():
            return
        done.touch()
        if self.how == "raise":
            raise ValueError("sabotage")
        if self.how == "hang":
            time.sleep(3600)
        os.kill(os.getpid(), signal.SIGKILL if self.how == "die" else signal.SIGSTOP)
