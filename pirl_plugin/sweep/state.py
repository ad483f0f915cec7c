"""What became of a sweep's runs, as their folders say it: nothing else is remembered between two starts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pirl_plugin.atomic import write_text

WAITING, RUNNING, FINISHED, FAILED, SKIPPED = "waiting", "running", "finished", "failed", "skipped"
_OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        id: of the run.
        state: ``finished``, ``failed`` or ``skipped``.
        reason: why it failed or was skipped; empty otherwise.
        seconds: wall time of this attempt.
        command: the command line, to repeat it by hand.
    """

    id: str
    state: str
    reason: str = ""
    seconds: float = 0.0
    command: str = ""


def read_outcome(folder: Path, run_id: str) -> Outcome | None:
    """The outcome that a run left in its folder; None where there is none, or one of another run."""
    try:
        content: dict[str, Any] = json.loads((folder / _OUTCOME).read_text(encoding="utf-8"))
        outcome = Outcome(**content)
    except (OSError, ValueError, TypeError):
        return None
    return outcome if outcome.id == run_id else None


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Leaves an outcome in a run's folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps(asdict(outcome), indent=2, ensure_ascii=False) + "\n", folder / _OUTCOME)


def forget_outcome(folder: Path) -> None:
    """Takes an outcome away, before the run is made again."""
    (folder / _OUTCOME).unlink(missing_ok=True)


def is_finished(folder: Path, run_id: str) -> bool:
    """Whether this very run is done."""
    outcome = read_outcome(folder, run_id)
    return outcome is not None and outcome.state == FINISHED
