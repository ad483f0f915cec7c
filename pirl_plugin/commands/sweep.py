"""``python tools/sweep.py``: pretrains, benchmarks and compares; started again it goes on where it stopped."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pirl_plugin import config as configs
from pirl_plugin import registry
from pirl_plugin.atomic import write_text
from pirl_plugin.benchmarks.runner import problems_of as benchmark_problems
from pirl_plugin.commands import benchmark, train
from pirl_plugin.commands.parser import Parser
from pirl_plugin.commands.running import FAILED, OK, Preempted, exit_code, log_to
from pirl_plugin.commands.show_views import leave_views
from pirl_plugin.report.build import write_report
from pirl_plugin.report.plain import for_terminal
from pirl_plugin.report.sources import Planned, read
from pirl_plugin.schema import Problem, check_arguments
from pirl_plugin.signals import told_to_stop
from pirl_plugin.sweep import jobs
from pirl_plugin.sweep.estimate import estimate
from pirl_plugin.sweep.estimate import table as estimates_table
from pirl_plugin.sweep.plan import BENCHMARK, TRAIN, Run, plan
from pirl_plugin.sweep.progress import Progress
from pirl_plugin.sweep.run import Execution
from pirl_plugin.sweep.settings import Sweep
from pirl_plugin.sweep.state import FINISHED
from pirl_plugin.text import aligned

log = logging.getLogger(__name__)

_GOES_ON = "the same command goes on"

ENTRIES = {TRAIN: train.main, BENCHMARK: benchmark.main}

_EPILOG = """\
examples:
  python tools/sweep.py sweep=demo                                            everything on generated scenes, in minutes
  python tools/sweep.py sweep=demo methods=[pirl_32,npid_32] seeds=[0,1,2]    two methods, three seeds
  python tools/sweep.py sweep=lambda roots.imagenet=DIR --dry-run             what would be done
  python tools/sweep.py sweep=methods_32 roots.photographs=LABELLED_DIR launcher=slurm

Ctrl-C, SIGTERM or a crash loses nothing: the same command goes on. What is finished is never made again.
sweeps: {sweeps}
launchers: {launchers}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0: every run is finished, 1: one failed, 2: a mistake in the command, 75: told to stop."""
    groups = configs.groups()
    parser = Parser(
        "sweep.py",
        "Pretrain several methods, run every benchmark on each, and compare.",
        _EPILOG.format(sweeps=", ".join(groups["sweep"]), launchers=", ".join(groups["launcher"])),
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="choices and settings, in Hydra's syntax")
    parser.add_argument("--dry-run", action="store_true", help="print the plan with rough estimates and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    outcome: list[bool] = []
    code = exit_code(lambda: outcome.append(sweep(arguments.overrides, arguments.dry_run)), arguments.debug)
    return code if code != OK or outcome == [True] else FAILED


def sweep(overrides: Sequence[str], dry_run: bool = False) -> bool:
    """Plans, makes and reports; whether every run is finished at the end."""
    config = configs.load("sweep", overrides, problems_of)
    settings = Sweep(**config)
    runs = plan(settings, load)
    launcher = registry.build("launcher", settings.launcher)
    execution = Execution(runs, Path(settings.store), launcher, ENTRIES)
    if dry_run:
        print(table(runs, execution.states))
        found = [estimate(run, {} if run.needs else load(TRAIN, run.overrides), execution.store) for run in runs]
        print(f"\n{estimates_table(runs, found)}")
        return True
    folder = Path(settings.run_dir)
    log_to(folder)
    write_text(configs.to_yaml(config), folder / "config.yaml")
    with _stopping_in_order(), Progress(execution) as progress:
        execution.run(progress)
    for run in runs:
        outcome = execution.outcome(run)
        if outcome is not None and outcome.reason:
            log.warning("%s: %s: %s", outcome.state, run.label, outcome.reason)
    report(settings, execution)
    return all(state == FINISHED for state in execution.states.values())


@contextlib.contextmanager
def _stopping_in_order() -> Iterator[None]:
    """Has signals and Ctrl-C end the runs that are on their way, each of which saves what it has."""
    told: list[str] = []

    def end(signal: str) -> None:
        told.append(signal)
        raise KeyboardInterrupt  # no Exception, which a run in this very process might take for its own failure

    try:
        with told_to_stop(end):
            yield
    except KeyboardInterrupt as error:
        if isinstance(error, jobs.Preempted):  # a training in this very process took the signal
            told.append("a signal")
        if told:
            raise Preempted(f"{told[0]}: {_GOES_ON}") from None
        raise KeyboardInterrupt(f": {_GOES_ON}") from None


def report(settings: Sweep, execution: Execution) -> None:
    """Writes the report of this plan's runs, failed ones too, and prints its headline."""
    _show_views(execution)
    measured = [run for run in execution.runs.values() if run.benchmark]
    sources = read(Planned(execution.folder(run), _row_name(run), str(run.benchmark), run.seed) for run in measured)
    if sources:
        folder = Path(settings.run_dir)
        print(for_terminal(write_report(sources, folder, f"Sweep {settings.name}")))
        print(f"\nReport: {folder / 'report.html'}")


def _show_views(execution: Execution) -> None:
    """Pictures of what each method sees, one for each pretraining; the report can do without."""
    for run in execution.runs.values():
        if run.command == TRAIN and execution.states[run.id] == FINISHED:
            try:
                leave_views(execution.folder(run))
            except (OSError, ValueError, LookupError, ImportError) as error:
                log.warning("no picture of what %s sees: %s", run.label, error)


def _row_name(run: Run) -> str:
    return f"{run.method} ({run.variant})" if run.variant else run.method


def load(command: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The complete configuration that a run's command would have, checked."""
    if command == TRAIN:
        return registry.completed("task", configs.load(TRAIN, overrides))
    config = configs.load(BENCHMARK, overrides, benchmark_problems)
    return {**config, "benchmark": registry.completed("benchmark", config["benchmark"])}


def problems_of(config: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with a sweep's own settings; those of its runs are checked with the plan."""
    return check_arguments(Sweep, config, "", registry.check)


def table(runs: Sequence[Run], states: Mapping[str, str]) -> str:
    """The plan as text: a line for each run, with its state and its command."""
    rows = [(run.id, run.label, states[run.id], f"tools/{run.command}.py {' '.join(run.overrides)}") for run in runs]
    return aligned([("id", "run", "state", "command"), *rows])
