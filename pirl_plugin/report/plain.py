"""The comparison as text: Markdown, CSV, and a table for the terminal."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from pirl_plugin.report.aggregate import FAILED, MISSING, RULE, Cell, Column, Row, Table, in_words
from pirl_plugin.text import aligned

_SIGNS = {"best": " ★", "within": " ≈", "": ""}
_WIDEST = 120  # characters of a table for the terminal


def as_csv(table: Table) -> str:
    """One line for each method and column, numbers in full."""
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in table.rows:
        for column in table.columns:
            line = _line(row, column, table.cell(row, column))
            if writer is None:
                writer = csv.DictWriter(text, list(line), lineterminator="\n")
                writer.writeheader()
            writer.writerow(line)
    return text.getvalue()


def _line(row: Row, column: Column, cell: Cell) -> dict[str, Any]:
    return {
        "method": row.method,
        "images_seen": row.images_seen,
        "trunk": row.trunk,
        "benchmark": column.benchmark,
        "protocol": column.protocol,
        "conditions": column.conditions,
        "dataset": column.dataset,
        "setting": column.setting,
        "metric": column.metric,
        "unit": column.unit,
        "status": "ok" if cell.entries else (FAILED if cell.failures else "missing"),
        "n": cell.count,
        "mean": cell.mean,
        "std": cell.std,
        "values": " ".join(map(repr, cell.values)),
        "seeds": " ".join(str(entry.record.seed) for entry in cell.entries),
        "mark": cell.mark,
        "reason": "; ".join(str(entry.record.reason) for entry in cell.failures),
    }


def as_markdown(table: Table, title: str, summary: str) -> str:
    """The headline, then all results by benchmark, then what failed and why."""
    lines = [f"# {_plain(title)}", "", _plain(summary), "", "## Headline", ""]
    lines += [*_markdown(table, table.headlines, long=True), "", RULE, "", "## All results", ""]
    for group in groups(table):
        lines += [f"### {_plain(group_name(group[0]))}", "", *_markdown(table, group), ""]
    failed = failures(table)
    if failed:
        lines += ["## What failed", "", "| method | benchmark | seed | reason |", "|---|---|---:|---|"]
        lines += [f"| {' | '.join(_plain(str(item)) for item in line)} |" for line in failed] + [""]
    return "\n".join(lines)


def for_terminal(table: Table) -> str:
    """The headline, not too wide: benchmarks in rows; with short names methods or benchmarks; else in blocks."""
    names = {column: f"{group_name(column)}: {table.column_name(column)}" for column in table.headlines}
    heads = ["", *(table.row_name(row) for row in table.rows)]
    rows = [[names[column], *(shown(table.cell(row, column)) for row in table.rows)] for column in table.headlines]
    blocks = []
    for column in table.headlines:
        cells = [(table.row_name(row), shown(table.cell(row, column))) for row in table.rows]
        lines = [cell for cell in cells if cell[1] != MISSING]
        blocks.append(f"{names[column]}\n{aligned(lines, indent=2)}")
    with_short_names = (_with_short_names(table, names, methods_in_rows) for methods_in_rows in (True, False))
    choices = (aligned([heads, *rows]), *with_short_names, "\n\n".join(blocks))
    return next((text for text in choices if max(map(len, text.splitlines())) <= _WIDEST), choices[-1])


def _with_short_names(table: Table, names: Mapping[Column, str], methods_in_rows: bool) -> str:
    """What the names stand for is said below."""
    short = short_names(table.headlines)
    metrics = [f"{column.metric} {column.unit}".strip() for column in table.headlines]
    rows = [["", *short.values()], ["", *metrics]]
    rows += [[table.row_name(row), *(shown(table.cell(row, c)) for c in table.headlines)] for row in table.rows]
    meanings = [
        textwrap.fill(f"{short[column]} = {name}", _WIDEST, subsequent_indent="  ") for column, name in names.items()
    ]
    return "\n".join(
        [aligned(rows if methods_in_rows else [list(column) for column in zip(*rows, strict=True)]), "", *meanings]
    )


def short_names(columns: Sequence[Column]) -> dict[Column, str]:
    """The benchmark, and for those that have it in common as much more as tells them apart."""
    parts = {
        c: (
            c.benchmark,
            f"on {c.dataset}",
            f"({c.protocol})",
            in_words(c.settings),
            f"{c.metric} {c.unit}",
            c.conditions,
        )
        for c in columns
    }
    used = dict.fromkeys(columns, 1)
    while True:
        names = {column: " ".join(part[: used[column]]) for column, part in parts.items()}
        alike = [c for c in columns if list(names.values()).count(names[c]) > 1 and used[c] < len(parts[c])]
        if not alike:
            return names
        for column in alike:
            used[column] += 1


def shown(cell: Cell) -> str:
    """A cell's text with its mark."""
    return cell.text + _SIGNS[cell.mark]


def groups(table: Table) -> list[list[Column]]:
    """Columns of one benchmark, protocol and dataset together."""
    found: dict[str, list[Column]] = {}
    for column in table.columns:
        found.setdefault(group_name(column), []).append(column)
    return list(found.values())


def group_name(column: Column) -> str:
    """``linear on voc2007 (goyal19)``."""
    dataset = f" on {column.dataset}" if column.dataset else ""
    return f"{column.benchmark}{dataset}" + (f" ({column.protocol})" if column.protocol else "")


def failures(table: Table) -> list[tuple[str, str, int, str]]:
    """Method, benchmark, seed and reason of each failed run."""
    found = {
        (id(entry), row.method, column.benchmark, entry.record.seed, str(entry.record.reason)): None
        for (row, column), cell in table.cells.items()
        for entry in cell.failures
    }
    return [what[1:] for what in found]


def _markdown(table: Table, columns: Sequence[Column], long: bool = False) -> list[str]:
    """A table with methods in rows."""
    heads = [
        _plain(f"{group_name(column)}: {table.column_name(column)}" if long else table.column_name(column))
        for column in columns
    ]
    lines = [f"| method | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for row in table.rows:
        cells = [table.cell(row, column) for column in columns]
        if long or any(cell.text != MISSING for cell in cells):
            texts = [f"**{shown(cell)}**" if cell.mark else cell.text for cell in cells]
            lines.append(f"| {_plain(table.row_name(row))} | {' | '.join(texts)} |")
    return lines


def _plain(text: str) -> str:
    """Text that Markdown takes as it stands."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("\n", " ")
    return re.sub(r"([\\`*|\[\]])", r"\\\1", text)
