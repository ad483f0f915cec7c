"""Numbers of run folders as curves against images seen: what a probe measured, and the signs of health beside it."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pirl_plugin.records import Record, read_records
from pirl_plugin.report.aggregate import Column, Entry, Row, Table, aggregate, in_words
from pirl_plugin.report.plain import group_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """Mean and sample standard deviation (0 for one value) over seeds of the probe, after some images."""

    images_seen: int
    mean: float
    std: float
    count: int


@dataclass(frozen=True)
class Curves:
    """What one probe found: one column of the comparison.

    Attributes:
        title: benchmark, dataset, protocol, setting and, where probes differ in nothing else, their conditions.
        metric: name of the metric.
        unit: of the values.
        lines: points of each method, in the order of images seen; 0 is no pretraining.
    """

    title: str
    metric: str
    unit: str
    lines: Mapping[str, Sequence[Point]]


def probe_curves(records: Sequence[Record], metric: str | None = None) -> list[Curves]:
    """Results of runs at several checkpoints; those that the report would not average are not averaged here either.

    Left out, with a warning: weights of which it is not known how many images they have seen, and seeds with several
    results.

    Args:
        records: with ``extra["images_seen"]`` but for random weights.
        metric: the only one; None: all.
    """
    table = aggregate(Entry(_with_images_seen(record)) for record in records if record.status == "ok")
    chosen = [column for column in table.columns if metric in (None, column.metric)]
    found = [(column, _lines(table, column)) for column in chosen]
    return [
        Curves(f"{group_name(column)}: {table.column_name(column)}", column.metric, column.unit, lines)
        for column, lines in found
        if lines
    ]


def _with_images_seen(record: Record) -> Record:
    """Random weights have seen none, and no file says so."""
    if record.weights_sha256 is not None or "images_seen" in record.extra:
        return record
    return dataclasses.replace(record, extra={**record.extra, "images_seen": 0})


def _lines(table: Table, column: Column) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for row in table.rows:  # in the order of images seen
        cell = table.cell(row, column)
        if not cell.entries:
            continue
        if row.images_seen is None or cell.mean is None:
            why = "images seen not known" if row.images_seen is None else "a seed has several results"
            log.warning("left out of the curves: %s, %s: %s", row.method, group_name(column), why)
            continue
        point = Point(row.images_seen, cell.mean, cell.std or 0.0, cell.count)
        found.setdefault(_line_name(table, row), []).append(point)
    return found


def _line_name(table: Table, row: Row) -> str:
    """The method, and its trunk where there are several."""
    several = len({other.trunk for other in table.rows if other.method == row.method}) > 1
    return f"{row.method}, {in_words(json.loads(row.trunk))}" if several and row.trunk else row.method


def metric_curve(run_dir: Path, key: str) -> list[tuple[int, float]]:
    """``(images seen, value)`` of each line of ``metrics.jsonl`` that has the key; a value carried on is given once."""
    file = run_dir / "metrics.jsonl"
    if not file.is_file():
        return []
    points: dict[int, float] = {}
    last_health = None
    for line in file.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if key not in values:
            continue
        is_health = key == "rankme" or key.startswith("retrieval/")
        if is_health and values.get("health_step") == last_health:
            continue
        last_health = values.get("health_step") if is_health else last_health
        points[int(values["images_seen"])] = float(values[key])
    return sorted(points.items())


def run_records(run_dirs: Sequence[Path]) -> list[Record]:
    """Records of all benchmarks below some run folders.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no results in any of them.
    """
    found = [record for run_dir in run_dirs for record in read_records(run_dir)]
    if not found:
        raise ValueError(f"No benchmark results under {', '.join(map(str, run_dirs))}: run tools/benchmark.py first.")
    return found
