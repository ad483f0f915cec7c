"""The run's curves as a file that any tool reads."""

from __future__ import annotations

import json
import math
from pathlib import Path

from classy_vision.hooks import register_hook
from classy_vision.tasks import ClassyTask

from pirl_plugin.atomic import write_text
from pirl_plugin.hooks.scalars import ScalarHook, step_of
from pirl_plugin.schema import checked


@register_hook("metrics_jsonl")
@checked
class MetricsJsonlHook(ScalarHook):
    """Appends a line to ``run_dir/metrics.jsonl`` at every logged step: the values of ``collect_scalars`` as JSON.

    A resumed run first drops the lines of steps that it is going to repeat, so that no step stands there twice. A value
    that is not finite is written as null.

    Args:
        file: where to write instead; needed for tasks that have no run folder.
    """

    def __init__(self, file: str | None = None) -> None:
        super().__init__()
        self.file = Path(file) if file else None
        self._path: Path | None = None

    def open(self, task: ClassyTask) -> None:
        run_dir = getattr(task, "run_dir", None)
        self._path = self.file or (Path(run_dir) / "metrics.jsonl" if run_dir else None)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _drop_lines_after(self._path, step_of(task))

    def write(self, task: ClassyTask, values: dict[str, float]) -> None:
        if self._path is not None:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(finite) + "\n")


def _drop_lines_after(path: Path, step: int) -> None:
    """Removes the lines of later steps, and what an interrupted write left."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    kept = "".join(f"{line}\n" for line in text.splitlines() if _step(line) <= step)
    if kept != text:
        write_text(kept, path)


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
