"""Where a report's numbers come from: folders of benchmark runs, and those of the pretrainings that they measured."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pirl_plugin.records import Record, read_run, result_folders

log = logging.getLogger(__name__)

_FROM_A_SWEEP = re.compile(r"(?P<name>.+?)(?:-seed(?P<seed>\d+))?-[0-9a-f]{12}")
_LEVELS_UP = 3  # a benchmark's folder lies at most so deep in its pretraining's


@dataclass(frozen=True)
class Source:
    """A benchmark run's folder and what it holds.

    Attributes:
        folder: of the run.
        records: its results, the headline first, or its failure.
        command: that made it; empty where it is not known.
        task: what a sweep calls the benchmark; empty where the run was not part of one.
        pretraining: folder of the pretraining that it measured; None where it is not beside it.
    """

    folder: Path
    records: tuple[Record, ...]
    command: str = ""
    task: str = ""
    pretraining: Path | None = None


@dataclass(frozen=True)
class Planned:
    """A benchmark run that there should be.

    Attributes:
        folder: where it goes.
        method: what it measures, as the report is to name it.
        task: what the sweep calls the benchmark.
        seed: its seed.
    """

    folder: Path
    method: str
    task: str
    seed: int


def find(folders: Sequence[Path]) -> list[Source]:
    """All benchmark runs of some folders and those below them, each once, in the order of the folders.

    Raises:
        FileNotFoundError: a folder that is not there.
        ValueError: no results in any of them.
    """
    places: dict[Path, None] = {}
    for folder in folders:
        root = folder.parent if folder.is_file() else folder
        places |= dict.fromkeys(result_folders(root))
        places |= dict.fromkeys(sorted(path.parent for path in root.rglob("outcome.json") if _is_benchmark(path)))
    unique = {place.resolve(): place for place in reversed(list(places))}
    runs = [_guessed(place) for place in sorted(unique.values(), key=list(places).index)]
    found = read(runs)
    if not found:
        raise ValueError(f"no benchmark results under {', '.join(map(str, folders))}: run tools/benchmark.py first.")
    return found


def read(runs: Iterable[Planned]) -> list[Source]:
    """What the planned runs left behind; those that have not even failed yet are left out."""
    found = [source for run in runs if (source := _read(run)) is not None]
    names = {
        (source.task, record.status): record for source in found if source.task for record in reversed(source.records)
    }
    return [_with_known_name(source, names.get((source.task, "ok"))) for source in found]


def links(folder: Path) -> dict[str, Path]:
    """What of a run a reader may want to open, by name."""
    files = {"config": "config.yaml", "log": "log.txt", "output": "console.txt", "machine": "environment.json"}
    return {"folder": folder} | {name: folder / file for name, file in files.items() if (folder / file).is_file()}


def _read(run: Planned) -> Source | None:
    outcome = _json_of(run.folder / "outcome.json")
    try:
        records = read_run(run.folder)
    except ValueError as error:
        log.warning("%s", error)
        records = [_failure(run, str(error))]
    if outcome.get("state") in ("failed", "skipped") and not any(record.status == "failed" for record in records):
        records = [_failure(run, f"{outcome['state']}: {outcome.get('reason') or 'no reason given'}")]
    if not records:
        return None
    return Source(run.folder, tuple(records), _command(run.folder, outcome), run.task, _pretraining(run.folder))


def _failure(run: Planned, reason: str) -> Record:
    return Record(run.method, run.task, "", "", {}, "", None, "", run.seed, status="failed", reason=reason)


def _with_known_name(source: Source, like: Record | None) -> Source:
    """A run that died before it could say which benchmark it was: another one of the same task tells."""
    if like is None or any(record.dataset for record in source.records):
        return source
    what: dict[str, Any] = {"benchmark": like.benchmark, "protocol": like.protocol, "dataset": like.dataset}
    named = tuple(dataclasses.replace(record, **what) for record in source.records)
    return dataclasses.replace(source, records=named)


def _is_benchmark(outcome: Path) -> bool:
    return outcome.parent.parent.name == "benchmarks"


def _guessed(folder: Path) -> Planned:
    """What a folder's name tells of a run of a sweep."""
    task = _FROM_A_SWEEP.fullmatch(folder.name)
    method = _FROM_A_SWEEP.fullmatch(folder.parent.parent.name)
    if task is None or method is None:
        return Planned(folder, folder.parent.parent.name if method is None else method["name"], folder.name, 0)
    return Planned(folder, method["name"], task["name"], int(method["seed"] or 0))


def _pretraining(folder: Path) -> Path | None:
    above = list(folder.resolve().parents)[:_LEVELS_UP]
    inside = list(folder.parents)[:_LEVELS_UP]
    found = next((index for index, place in enumerate(above) if (place / "metrics.jsonl").is_file()), None)
    if found is None:
        return None
    return inside[found] if found < len(inside) else above[found]


def _command(folder: Path, outcome: dict[str, Any]) -> str:
    """The command line: as the sweep noted it, else as the run itself did."""
    if outcome.get("command"):
        return str(outcome["command"])
    arguments = _json_of(folder / "environment.json").get("command")
    return f"python {shlex.join(map(str, arguments))}" if isinstance(arguments, list) and arguments else ""


def _json_of(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
