"""From records to a table: methods in rows, what was measured in columns, mean and deviation over seeds in cells.

Results that were not measured in the same way never meet in one column, and never in one mean.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pirl_plugin.records import Record

MISSING, FAILED = "–", "failed"
RULE = (
    "Marked in a column: the best mean (bold, ★), and each mean whose distance to it is at most one standard error of "
    "their difference, √(s₁²/n₁ + s₂²/n₂), with s the sample standard deviation over n seeds (bold, ≈). With one seed "
    "the error is not known: only the best itself is marked. Columns without a better direction, or with one method "
    "alone, have no mark."
)
_HIGHER = ("top1", "top5", "mAP", "mAP_11point", "mAP 11-pt", "AP", "AP50", "AP75", "auc", "same_class")
_TEST_SET = ("num_test", "num_classes", "transform")  # in ``extra``: what was measured on, and how it was seen
_CHANGES = ("changed",)  # in ``extra``: how a run departs from the protocol that it names


@dataclass(frozen=True)
class Entry:
    """A record and where it comes from.

    Attributes:
        record: the result or failure.
        run: its run's folder, or any other name that tells runs apart.
        headline: whether it is its run's main result.
    """

    record: Record
    run: str = ""
    headline: bool = False


@dataclass(frozen=True)
class Row:
    """A method; where it was measured after different numbers of images, or on different trunks, one row for each.

    Attributes:
        method: its name.
        images_seen: in pretraining; None where not known.
        trunk: configuration of the trunk as JSON; empty where not known.
    """

    method: str
    images_seen: int | None = None
    trunk: str = ""


@dataclass(frozen=True)
class Column:
    """What was measured. Results whose columns differ in anything are never averaged, nor ranked together.

    Attributes:
        benchmark: registered name.
        protocol: variant of it.
        dataset: measured on.
        setting: as JSON.
        metric: name of the metric.
        unit: of the values.
        conditions: hash of what else must agree: changes of the protocol's numbers, test set, evaluation view.
    """

    benchmark: str
    protocol: str
    dataset: str
    setting: str
    metric: str
    unit: str
    conditions: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """The setting as it was in the records."""
        return dict(json.loads(self.setting))


@dataclass(frozen=True)
class Cell:
    """Results of one method in one column.

    Attributes:
        entries: the results, in the order of their seeds.
        failures: failed runs that should have had a result here.
        mark: ``best``, ``within`` its error, or empty.
    """

    entries: tuple[Entry, ...] = ()
    failures: tuple[Entry, ...] = ()
    mark: str = ""

    @property
    def values(self) -> tuple[float, ...]:
        """The values, in the order of the seeds."""
        return tuple(float(entry.record.value) for entry in self.entries if entry.record.value is not None)

    @property
    def count(self) -> int:
        """How many seeds."""
        return len(self.entries)

    @property
    def is_ambiguous(self) -> bool:
        """Whether one seed has several results, of different weights or settings: these have no mean."""
        return len({entry.record.seed for entry in self.entries}) < len(self.entries)

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None where there is none."""
        return float(np.mean(self.values)) if self.entries and not self.is_ambiguous else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; None for less than two."""
        return float(np.std(self.values, ddof=1)) if self.count > 1 and not self.is_ambiguous else None

    @property
    def text(self) -> str:
        """``61.3 ± 0.4``, ``61.3``, ``failed`` or ``–``."""
        if self.is_ambiguous:
            return " / ".join(f"{value:.1f}" for value in self.values)
        if self.mean is None:
            return FAILED if self.failures else MISSING
        return f"{self.mean:.1f} ± {self.std:.1f}" if self.std is not None else f"{self.mean:.1f}"

    @property
    def notes(self) -> list[str]:
        """What a reader of the number must know: seeds, failures, results that do not fit together."""
        found = []
        if self.is_ambiguous:
            found.append("not averaged: one seed has several results, of different weights or settings")
        elif self.entries:
            weights = {entry.record.weights_sha256 for entry in self.entries}
            same = self.count > 1 and len(weights) == 1 and None not in weights
            found.append(
                f"n = {self.count}" + (" runs on the same weights: pretraining's share is not in ±" if same else "")
            )
        return found + [f"seed {entry.record.seed} failed: {entry.record.reason}" for entry in self.failures]


@dataclass(frozen=True)
class Table:
    """The comparison.

    Attributes:
        rows: methods in the order of their first results, each by images seen.
        columns: in the order of their first results, those of a benchmark together.
        cells: by row and column; missing ones are not in it.
        headlines: columns that hold a run's main result.
        changes: of each column, what its ``conditions`` stand for.
    """

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    cells: Mapping[tuple[Row, Column], Cell]
    headlines: tuple[Column, ...]
    changes: Mapping[Column, Mapping[str, Any]]

    def cell(self, row: Row, column: Column) -> Cell:
        """The cell, empty where there is nothing."""
        return self.cells.get((row, column), Cell())

    def row_name(self, row: Row) -> str:
        """The method's name, with what tells it from the other rows of the same name."""
        others = [other for other in self.rows if other.method == row.method]
        parts = [row.method]
        if len({other.images_seen for other in others}) > 1:
            parts.append("images seen not known" if row.images_seen is None else f"{row.images_seen:,} images seen")
        if len({other.trunk for other in others}) > 1:
            parts.append(in_words(json.loads(row.trunk)) if row.trunk else "trunk not known")
        return ", ".join(parts)

    def column_name(self, column: Column, without: Iterable[str] = ()) -> str:
        """Setting and metric in words, with a letter where columns differ in their conditions alone.

        Args:
            column: of this table.
            without: settings to leave out.
        """
        alike = [other for other in self.columns if _visible(other) == _visible(column)]
        letter = f", conditions {_letter(alike.index(column))}" if len(alike) > 1 else ""
        said = {key: value for key, value in column.settings.items() if key not in without}
        return ", ".join(part for part in (column.metric, in_words(said)) if part) + letter


def shared_settings(columns: Sequence[Column]) -> dict[str, Any]:
    """Settings that several columns have in common; a single one's are its own."""
    first = columns[0].settings
    others = [column.settings for column in columns[1:]]
    return {key: value for key, value in first.items() if others and all(o.get(key) == value for o in others)}


def aggregate(entries: Iterable[Entry]) -> Table:
    """The table of any records.

    A copy of a result (same method, column, seed, weights and configuration, hence the same run read twice) counts
    once. A failure stands in all columns of its benchmark that its run would have filled: those of its protocol and
    dataset, where these are known.
    """
    kept = list(_without_copies(entries))
    results = [entry for entry in kept if entry.record.status == "ok"]
    found: dict[tuple[Row, Column], list[Entry]] = defaultdict(list)
    changes: dict[Column, Mapping[str, Any]] = {}
    headlines: dict[Column, None] = {}
    for entry in results:
        row, column = row_of(entry.record), column_of(entry.record)
        found[row, column].append(entry)
        changes.setdefault(column, conditions(entry.record))
        if entry.headline:
            headlines.setdefault(column)
    rows = dict.fromkeys(row for row, _ in found)
    failures = _failures([entry for entry in kept if entry.record.status == "failed"], rows, changes, headlines)
    rows |= dict.fromkeys(row for row, _ in failures)
    cells = {
        place: Cell(
            tuple(sorted(found.get(place, ()), key=lambda entry: entry.record.seed)), tuple(failures.get(place, ()))
        )
        for place in dict.fromkeys([*found, *failures])
    }
    benchmarks = list(dict.fromkeys(column.benchmark for column in changes))
    columns = sorted(changes, key=lambda column: benchmarks.index(column.benchmark))
    for column in columns:
        cells |= _marked(column, {place: cell for place, cell in cells.items() if place[1] == column})
    methods = list(dict.fromkeys(row.method for row in rows))
    in_order = sorted(rows, key=lambda row: (methods.index(row.method), row.images_seen or 0))
    return Table(tuple(in_order), tuple(columns), cells, tuple(c for c in columns if c in headlines), changes)


def row_of(record: Record) -> Row:
    """The row that a record belongs to."""
    seen, trunk = record.extra.get("images_seen"), record.extra.get("trunk")
    return Row(record.method, None if seen is None else int(seen), _json(trunk) if trunk else "")


def column_of(record: Record) -> Column:
    """The column that a record belongs to."""
    more = conditions(record)
    return Column(
        record.benchmark,
        record.protocol,
        record.dataset,
        _json(record.setting),
        record.metric,
        record.unit,
        hashlib.sha256(_json(more).encode()).hexdigest()[:8] if more else "",
    )


def conditions(record: Record) -> dict[str, Any]:
    """What must agree between two results besides protocol, dataset, setting and metric."""
    return {key: record.extra[key] for key in (*_CHANGES, *_TEST_SET) if record.extra.get(key)}


def marks(cells: Sequence[Cell]) -> list[str]:
    """``best``, ``within`` or empty for the cells of one column, by ``RULE``; higher is better."""
    means = [cell.mean for cell in cells if cell.mean is not None]
    if len(means) < 2:
        return [""] * len(cells)
    best = next(cell for cell in cells if cell.mean == max(means))
    return [_mark(cell, best) for cell in cells]


def _mark(cell: Cell, best: Cell) -> str:
    if cell.mean is None or best.mean is None:
        return ""
    if cell.mean == best.mean:
        return "best"
    if cell.std is None or best.std is None:
        return ""
    return "within" if best.mean - cell.mean <= math.hypot(_error(cell.std, cell), _error(best.std, best)) else ""


def _error(std: float, cell: Cell) -> float:
    return std / math.sqrt(cell.count)


def _marked(column: Column, cells: Mapping[tuple[Row, Column], Cell]) -> dict[tuple[Row, Column], Cell]:
    if column.metric.rpartition("/")[2] not in _HIGHER:
        return {}
    found = zip(cells.items(), marks(list(cells.values())), strict=True)
    return {place: Cell(cell.entries, cell.failures, mark) for (place, cell), mark in found}


def _without_copies(entries: Iterable[Entry]) -> Iterable[Entry]:
    seen = set()
    for entry in entries:
        record = entry.record
        what = (row_of(record), column_of(record), record.seed, record.weights_sha256, record.config_sha256)
        if record.status == "failed" or record.config_sha256 is None or what not in seen:
            seen.add(what)
            yield entry


def _failures(
    failed: Sequence[Entry],
    rows: Iterable[Row],
    changes: dict[Column, Mapping[str, Any]],
    headlines: dict[Column, None],
) -> dict[tuple[Row, Column], list[Entry]]:
    """Failures by place; adds a column for a benchmark that only ever failed to ``changes`` and ``headlines``."""
    found: dict[tuple[Row, Column], list[Entry]] = defaultdict(list)
    known = list(rows)
    for entry in failed:
        record = entry.record
        asked = (record.benchmark, record.protocol, record.dataset)
        columns = [column for column in changes if _fits(asked, column)]
        if not columns:
            columns = [Column(*asked, "{}", record.metric, record.unit)]
            changes[columns[0]] = {}
            headlines.setdefault(columns[0])
        places = [row for row in known if row.method == record.method] or [Row(record.method)]
        for column in columns:
            for row in places[-1:]:
                found[row, column].append(entry)
    return found


def _fits(asked: tuple[str, str, str], column: Column) -> bool:
    benchmark, protocol, dataset = asked
    same_protocol = protocol in ("", column.protocol, column.protocol.rstrip("*"))
    return benchmark == column.benchmark and same_protocol and dataset in ("", "unknown", column.dataset)


def _visible(column: Column) -> tuple[str, ...]:
    return column.benchmark, column.protocol, column.dataset, column.setting, column.metric, column.unit


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def in_words(values: Mapping[str, Any]) -> str:
    """``k 20, layer res5``."""
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
