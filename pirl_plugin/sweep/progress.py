"""A sweep's progress: one live table on a terminal, a line for each change without one."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from pirl_plugin.sweep.plan import Run
from pirl_plugin.sweep.run import Execution
from pirl_plugin.sweep.state import FAILED, FINISHED, RUNNING, SKIPPED, WAITING

log = logging.getLogger(__name__)

_STYLES = {WAITING: "dim", RUNNING: "bold", FINISHED: "green", FAILED: "bold red", SKIPPED: "yellow"}
_MOST_ROWS = 30


class Progress:
    """Shows an execution's states; a context manager around ``Execution.run``.

    Args:
        execution: what to show.
        console: where; default: the terminal's standard error.
    """

    def __init__(self, execution: Execution, console: Console | None = None) -> None:
        self.execution = execution
        self.console = console or Console(stderr=True)
        self.started = {run_id: 0.0 for run_id in execution.states}
        self.seen = dict(execution.states)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> Progress:
        done = sum(state == FINISHED for state in self.seen.values())
        log.info("%d runs, %d of them finished already.", len(self.seen), done)
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self.live.stop()
        counts = Counter(self.execution.states.values())
        log.info("%s", ", ".join(f"{counts[state]} {state}" for state in _STYLES if counts[state]))

    def __call__(self, states: Mapping[str, str]) -> None:
        """Takes note of the states."""
        for run_id, state in states.items():
            if state == self.seen[run_id]:
                continue
            self.seen[run_id] = state
            if state == RUNNING:
                self.started[run_id] = time.monotonic()
            if not self.console.is_terminal:
                log.info("%s: %s", state, self.execution.runs[run_id].label)
        if self.console.is_terminal:
            self.live.update(self.table(), refresh=True)

    def table(self) -> Table:
        """The runs that are on their way, those that failed, and the next ones, as many as there is room for."""
        runs, states = self.execution.runs, self.seen
        counts = Counter(states.values())
        title = "  ".join(f"{counts[state]} {state}" for state in _STYLES if counts[state])
        table = Table("run", "state", "progress", "last", "time", title=title, title_justify="left", box=None)
        order = [RUNNING, FAILED, SKIPPED, WAITING, FINISHED]
        rows = sorted(runs.values(), key=lambda run: order.index(states[run.id]))
        for run in rows[: min(_MOST_ROWS, max(3, self.console.height - 4))]:
            state = states[run.id]
            where, last = progress_of(run, self.execution.folder(run)) if state == RUNNING else ("", "")
            took = f"{time.monotonic() - self.started[run.id]:.0f} s" if state == RUNNING else ""
            if state in (FAILED, SKIPPED):
                outcome = self.execution.outcome(run)
                last = outcome.reason[:60] if outcome else ""
            table.add_row(run.label, state, where, last, took, style=_STYLES[state])
        return table


def progress_of(run: Run, folder: Path) -> tuple[str, str]:
    """How far a pretraining is and its last logged loss, from its ``metrics.jsonl``; empty for a benchmark."""
    last = _last_metrics(folder / "metrics.jsonl") if run.benchmark is None else {}
    if "step" not in last:
        return "", ""
    where = f"epoch {last['epoch']}" if "epoch" in last else f"step {last['step']}"
    if "progress" in last:
        where += f" ({100 * float(str(last['progress'])):.0f} %)"
    loss = last.get("loss")
    return where, f"loss {loss:.3f}" if isinstance(loss, float) else ""


def _last_metrics(path: Path) -> dict[str, object]:
    """The last whole line of a JSON-lines file, without reading all of it."""
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        for line in reversed(list(_lines(file.read()))):
            with contextlib.suppress(ValueError):
                content = json.loads(line)
                if isinstance(content, dict):
                    return content
    return {}


def _lines(content: bytes) -> Iterator[str]:
    yield from (line for line in content.decode(errors="replace").splitlines() if line.strip())
