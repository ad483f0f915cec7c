"""How far the run is and how long it will take."""

from __future__ import annotations

import logging
import sys
import time

from classy_vision.hooks import register_hook
from classy_vision.tasks import ClassyTask
from tqdm import tqdm

from pirl_plugin.distributed import is_primary
from pirl_plugin.hooks.scalars import ScalarHook, images_seen, is_update_step, step_of
from pirl_plugin.schema import PositiveFloat, checked

log = logging.getLogger(__name__)


@register_hook("progress")
@checked
class ProgressHook(ScalarHook):
    """Shows epoch, loss, learning rate, images/s and the time left: a bar on a terminal, else a line now and then.

    The loss is that of the last logged step: to show a newer one would make the host wait for the device.

    Args:
        every_seconds: seconds between lines, where standard error is not a terminal.
    """

    def __init__(self, every_seconds: PositiveFloat = 30.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self._bar: tqdm | None = None
        self._values: dict[str, float] = {}
        self._last = (0.0, 0, 0)

    def open(self, task: ClassyTask) -> None:
        self._values = {}
        self._last = (time.perf_counter(), step_of(task), images_seen(task))
        self._next_line = 0.0
        if sys.stderr.isatty():
            total = getattr(task, "total_steps", None)
            self._bar = tqdm(total=total, initial=step_of(task), unit="step", dynamic_ncols=True, smoothing=0.05)

    def write(self, task: ClassyTask, values: dict[str, float]) -> None:
        self._values = values
        if self._bar is not None:
            rate = f"{values['images_per_second']:.0f} images/s"
            self._bar.set_postfix_str(", ".join((*_loss_and_lr(values), rate)), refresh=False)

    def on_step(self, task: ClassyTask) -> None:
        super().on_step(task)
        if not (task.train and is_update_step(task) and is_primary()):
            return
        if self._bar is not None:
            self._bar.set_description(_epoch(task), refresh=False)
            self._bar.update(step_of(task) - self._bar.n)
        elif time.perf_counter() >= self._next_line:  # the first step too, to show that it runs
            self._line(task)

    def on_end(self, task: ClassyTask) -> None:
        if is_primary() and self._bar is None and step_of(task) != self._last[1]:
            self._line(task)
        super().on_end(task)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, task: ClassyTask) -> None:
        now, step, images = time.perf_counter(), step_of(task), images_seen(task)
        before, step_before, images_before = self._last
        self._last, self._next_line = (now, step, images), now + self.every_seconds
        seconds = max(now - before, 1e-9)
        parts = [_epoch(task), f"step {step}"]
        total = getattr(task, "total_steps", None)
        if total:
            parts[-1] += f"/{total} ({100 * step / total:.0f}%)"
        parts += [*_loss_and_lr(self._values), f"{(images - images_before) / seconds:.0f} images/s"]
        if total and step > step_before:
            parts.append(f"ETA {tqdm.format_interval((total - step) * seconds / (step - step_before))}")
        _say("  ".join(parts))


def _epoch(task: ClassyTask) -> str:
    epoch = int(getattr(task, "epoch", getattr(task, "train_phase_idx", 0))) + 1
    epochs = getattr(task, "num_epochs", None)
    return f"epoch {epoch}/{epochs}" if epochs else f"epoch {epoch}"


def _loss_and_lr(values: dict[str, float]) -> list[str]:
    return [f"{name} {values[name]:.4g}" for name in ("loss", "lr") if name in values]


def _say(line: str) -> None:
    """Through the log where one is set up; a plain program has none, and should still see how far it is."""
    if log.hasHandlers() and log.isEnabledFor(logging.INFO):
        log.info(line)
    else:
        print(line, file=sys.stderr, flush=True)
