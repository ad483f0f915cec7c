"""One run of a sweep as a job: what a launcher carries to wherever it is made."""

from __future__ import annotations

import contextlib
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pirl_plugin.run_lock import FolderInUseError, is_in_use, locked
from pirl_plugin.sweep.plan import Run
from pirl_plugin.sweep.settings import quoted
from pirl_plugin.sweep.state import FAILED, FINISHED, Outcome, forget_outcome, read_outcome, write_outcome

CONSOLE = "console.txt"
INTERRUPTED = 130  # exit code of a command that Ctrl-C ended
PREEMPTED = 75  # exit code of a training that was told to stop and has saved its state
_LOCK = ".job.lock"  # of a sweep's job, from its very start; the command that it runs has one of its own
_AGAIN = 1.0  # seconds between two looks at a folder that is in use
_STEP = re.compile(r"step_(\d+)\.pt")

Entry = Callable[[Sequence[str]], int]
"""A command: arguments to exit code."""


class Preempted(KeyboardInterrupt):
    """A run was told to stop by a signal and has saved its state: the same job goes on."""


@dataclass(frozen=True)
class Job:
    """A run and its folders.

    Attributes:
        run: what to do.
        folder: where it goes.
        weights_from: folder of the pretraining whose newest checkpoint it measures; None for pretraining.
        more: further overrides that change nothing in the result: device, workers.
    """

    run: Run
    folder: Path
    weights_from: Path | None = None
    more: tuple[str, ...] = ()

    def arguments(self) -> list[str]:
        """The command's arguments.

        Raises:
            FileNotFoundError: the pretraining left no checkpoint.
        """
        found = [*self.run.overrides, *self.more, f"run_dir={quoted(str(self.folder))}"]
        if self.weights_from is not None:
            found.append(f"weights={quoted(str(newest_checkpoint(self.weights_from)))}")
        return found


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint of the most steps in a pretraining's folder.

    Raises:
        FileNotFoundError: there is none.
    """
    files = (folder / "checkpoints").glob("*.pt")
    steps = {int(match[1]): file for file in files if (match := _STEP.fullmatch(file.name))}
    if not steps:
        raise FileNotFoundError(f"{folder} holds no checkpoint.")
    return steps[max(steps)]


def perform(job: Job, entry: Entry) -> Outcome:
    """Makes a run, with all that it prints in its ``console.txt``, and leaves its outcome in its folder.

    Where another process makes it already, it waits for that, and makes only what is not finished then.

    Raises:
        KeyboardInterrupt: it was interrupted; ``Preempted`` where it was told to stop and has saved its state.
    """
    with _alone_in(job.folder):
        done = read_outcome(job.folder, job.run.id)
        return done if done is not None and done.state == FINISHED else _perform(job, entry)


def is_being_made(folder: Path) -> bool:
    """Whether another process makes the run of a folder, for a sweep or on its own."""
    return is_in_use(folder, _LOCK) or is_in_use(folder)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(folder, _LOCK))
                break
            except FolderInUseError:
                time.sleep(_AGAIN)
        while is_in_use(folder):
            time.sleep(_AGAIN)
        yield


def _perform(job: Job, entry: Entry) -> Outcome:
    forget_outcome(job.folder)
    start, command = time.monotonic(), ""
    with (job.folder / CONSOLE).open("w", encoding="utf-8") as console, _printing_to(console):
        try:
            arguments = job.arguments()
            command = f"python tools/{job.run.command}.py {shlex.join(arguments)}"
            print(f"$ {command}", flush=True)
            code = entry(arguments)
        except Exception as error:  # whatever a plugin's component may raise: the other runs go on
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
            code = 1
    if code == PREEMPTED:
        raise Preempted
    if code == INTERRUPTED:
        raise KeyboardInterrupt  # no outcome: the run goes on when the sweep does
    seconds = round(time.monotonic() - start, 1)
    state, reason = (FINISHED, "") if code == 0 else (FAILED, _reason(job.folder / CONSOLE, code))
    outcome = Outcome(job.run.id, state, reason, seconds, command)
    write_outcome(job.folder, outcome)
    return outcome


@contextlib.contextmanager
def _printing_to(file: IO[str]) -> Iterator[None]:
    with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def _reason(console: Path, code: int) -> str:
    """What a failed run said last: its line ``error: ...`` and what is indented below it."""
    lines = console.read_text(encoding="utf-8", errors="replace").splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith("error:")]
    if not starts:
        return f"exit code {code}; see {console.name}"
    first = starts[-1]
    below = [line.strip() for line in lines[first + 1 :] if line.startswith("  ")]
    return "; ".join([lines[first].removeprefix("error:").strip(), *below])
