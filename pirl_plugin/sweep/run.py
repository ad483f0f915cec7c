"""Makes the runs of a plan: starts what can start, skips what cannot any more, until nothing is left."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pirl_plugin.sweep.jobs import CONSOLE, Entry, Job, is_being_made
from pirl_plugin.sweep.launchers import Handle, Launcher
from pirl_plugin.sweep.plan import Run
from pirl_plugin.sweep.state import (
    FAILED,
    FINISHED,
    RUNNING,
    SKIPPED,
    WAITING,
    Outcome,
    forget_outcome,
    is_finished,
    read_outcome,
    write_outcome,
)

log = logging.getLogger(__name__)

_PATIENCE = 60.0  # seconds that jobs have to end: a training finishes its step and writes its checkpoint

Watch = Callable[[Mapping[str, str]], None]


class Execution:
    """A plan on its way.

    Args:
        runs: the plan, each run after the one that it needs.
        store: folder that the runs' folders are relative to.
        launcher: starts the jobs.
        entries: main function of each command.
        more: overrides that change nothing in the result, for every run.

    Attributes:
        states: ``waiting``, ``running``, ``finished``, ``failed`` or ``skipped``, by run id.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        store: Path,
        launcher: Launcher,
        entries: Mapping[str, Entry],
        more: Sequence[str] = (),
    ) -> None:
        self.runs = {run.id: run for run in runs}
        self.store, self.launcher, self.entries, self.more = store, launcher, entries, tuple(more)
        self.states = {run.id: FINISHED if is_finished(self.folder(run), run.id) else WAITING for run in runs}
        self._handles: dict[str, Handle] = {}
        self._made_elsewhere: set[str] = set()

    def folder(self, run: Run) -> Path:
        """Where a run goes."""
        return self.store / run.folder

    def outcome(self, run: Run) -> Outcome | None:
        """What a run left behind."""
        return read_outcome(self.folder(run), run.id)

    def run(self, watch: Watch = lambda states: None, every: float = 0.2) -> None:
        """Makes everything that is not finished; ``watch`` sees the states now and then.

        What is running ends when this is interrupted, trainings once they have saved their state.
        """
        try:
            while any(state in (WAITING, RUNNING) for state in self.states.values()):
                moved = self._collect() + self._skip() + self._start()
                watch(self.states)
                if not moved:
                    time.sleep(every)
        except BaseException:
            self._end()
            raise
        watch(self.states)

    def _end(self) -> None:
        """Lets the jobs end in good order; one that takes too long, or all when interrupted again, by force."""
        ending = [handle for handle in self._handles.values() if handle.interrupt()]
        if ending:
            log.info("ending %d running, at most %.0f s; once more ends at once", len(ending), _PATIENCE)
        end = time.monotonic() + _PATIENCE
        try:
            while time.monotonic() < end and not all(handle.is_over() for handle in ending):
                time.sleep(0.05)
        finally:
            for handle in ending:
                handle.stop()

    def _collect(self) -> int:
        """Takes in the jobs that have ended."""
        over = [run_id for run_id, handle in self._handles.items() if handle.is_over()]
        taken = 0
        for run_id in over:
            run = self.runs[run_id]
            if run.needs in self._handles:
                continue  # what became of the one that it needs may be the reason
            del self._handles[run_id]
            taken += 1
            outcome = self.outcome(run) or self._left_without_a_word(run)
            self.states[run_id] = outcome.state
            if outcome.state == FAILED:
                log.warning("failed: %s: %s", run.label, outcome.reason)
        return taken

    def _left_without_a_word(self, run: Run) -> Outcome:
        """Killed, or out of memory, with no time to say so; or never started, as a queue does without what it needs."""
        if run.needs and self.states[run.needs] in (FAILED, SKIPPED):
            outcome = self._lost(run)
        else:
            reason = f"the process ended without a word: killed, or out of memory; see {CONSOLE}, if it came that far"
            outcome = Outcome(run.id, FAILED, reason)
        write_outcome(self.folder(run), outcome)
        return outcome

    def _lost(self, run: Run) -> Outcome:
        assert run.needs is not None
        return Outcome(run.id, SKIPPED, f"{self.runs[run.needs].label} {self.states[run.needs]}")

    def _skip(self) -> int:
        """Gives up the runs whose pretraining failed."""
        lost = [
            run
            for run in self.runs.values()
            if self.states[run.id] == WAITING and run.needs and self.states[run.needs] in (FAILED, SKIPPED)
        ]
        for run in lost:
            write_outcome(self.folder(run), self._lost(run))
            self.states[run.id] = SKIPPED
        return len(lost)

    def _start(self) -> int:
        """Starts runs that can start, as many as the launcher takes; what another sweep makes or has made counts."""
        started = 0
        for run in self.runs.values():
            if self.states[run.id] != WAITING or len(self._handles) >= self.launcher.capacity:
                continue
            waits = run.needs is not None and self.states[run.needs] != FINISHED
            if waits and not (self.launcher.knows_dependencies and run.needs in self._handles):
                continue
            if is_finished(self.folder(run), run.id):
                self.states[run.id] = FINISHED
                started += 1
                continue
            if self._is_made_elsewhere(run):
                continue
            forget_outcome(self.folder(run))
            weights_from = self.folder(self.runs[run.needs]) if run.needs else None
            job = Job(run, self.folder(run), weights_from, self.more)
            needs = self._handles.get(run.needs) if run.needs else None
            self._handles[run.id] = self.launcher.start(job, self.entries[run.command], needs)
            self.states[run.id] = RUNNING
            started += 1
        return started

    def _is_made_elsewhere(self, run: Run) -> bool:
        """By another sweep, or by hand: it waits, and its place is for another run."""
        if self.launcher.knows_its_jobs or not is_being_made(self.folder(run)):
            return False
        if run.id not in self._made_elsewhere:
            self._made_elsewhere.add(run.id)
            log.info("made elsewhere already, waiting for it: %s", run.label)
        return True
