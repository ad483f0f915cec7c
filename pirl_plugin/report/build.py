"""The report of a set of runs: ``report.html``, ``report.md``, ``report.csv``, and its figures as files."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pirl_plugin.atomic import write_text
from pirl_plugin.published import Published, matching, related
from pirl_plugin.records import Record
from pirl_plugin.report import plain
from pirl_plugin.report.aggregate import (
    MISSING,
    RULE,
    Cell,
    Column,
    Entry,
    Row,
    Table,
    aggregate,
    column_of,
    in_words,
    row_of,
    shared_settings,
)
from pirl_plugin.report.curves import metric_curve
from pirl_plugin.report.figures import Curve, Picture, curves, inline
from pirl_plugin.report.html import page
from pirl_plugin.report.invariance_figure import draw_invariance, invariance_svg, read_panels
from pirl_plugin.report.photos import neighbours, views
from pirl_plugin.report.sources import Source, links

_TRAINING = {"loss": "loss, nats", "rankme": "RankMe"}
_MOST_PUBLISHED = 200


def write_report(sources: Sequence[Source], out: Path, title: str = "Comparison") -> Table:
    """Writes the report.

    Args:
        sources: benchmark runs, of this machine or others.
        out: folder for the report; made if need be.
        title: of the page.

    Returns:
        The table in it.
    """
    table = aggregate(
        Entry(record, str(source.folder), headline=index == 0)
        for source in sources
        for index, record in enumerate(source.records)
    )
    out.mkdir(parents=True, exist_ok=True)
    summary = _summary(table, sources)
    write_text(plain.as_csv(table), out / "report.csv")
    write_text(plain.as_markdown(table, title, summary), out / "report.md")
    write_text(page(_content(table, sources, out, title, summary), out), out / "report.html")
    return table


def _content(table: Table, sources: Sequence[Source], out: Path, title: str, summary: str) -> dict[str, Any]:
    by_folder = {str(source.folder): source for source in sources}
    names = {source.folder: table.row_name(row) for source in sources if (row := _row(table, source))}
    failed = plain.failures(table)
    content: dict[str, Any] = {
        "title": title,
        "summary": summary,
        "rule": RULE,
        "headline": _grid(table, table.headlines, by_folder, "Main result of each benchmark", long=True),
        "failures": _plain_table("Failed runs", ["method", "benchmark", "seed", "reason"], failed, words=(0, 1, 3)),
        "groups": [_group(table, group, by_folder) for group in plain.groups(table)],
        "layers": _layers(table, out / "figures"),
        "training": _training(sources, names, out / "figures"),
        "costs": _costs(table, sources, names),
        "invariance": _invariance(sources, names, out / "figures"),
        "neighbours": neighbours(sources, names, out / "figures"),
        "views": views(_pretrainings(sources), out / "figures"),
        "published": _published(table, matching, "published under the same protocol, beside ours", ours=True),
        "apart": _published(table, related, "published otherwise", ours=False),
    }
    shown = [("headline", "Headline"), ("failures", "What failed"), ("results", "All results"), ("layers", "By layer")]
    shown += [("training", "Training"), ("cost", "Time and memory"), ("invariance", "Invariance")]
    shown += [("neighbours", "Nearest neighbours"), ("views", "What each method sees")]
    shown += [("published", "Published numbers")]
    always = ("headline", "results", "cost", "published")
    return {**content, "sections": [(key, name) for key, name in shown if key in always or content.get(key)]}


def _summary(table: Table, sources: Sequence[Source]) -> str:
    records = [record for source in sources for record in source.records]
    hardware = sorted({record.hardware for record in records if record.hardware})
    commits = sorted({record.commit[:12] for record in records if record.commit})
    parts = [f"{_count(len(table.rows), 'row')} of methods, {_count(len(sources), 'benchmark run')}"]
    parts.append(f"{_count(sum(record.status == 'failed' for record in records), 'failure')}")
    return "; ".join([", ".join(parts), *hardware, *([f"commit {', '.join(commits)}"] if commits else [])]) + "."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# -- tables of results -------------------------------------------------------------------------------------------------


def _group(table: Table, columns: Sequence[Column], sources: Mapping[str, Source]) -> dict[str, Any]:
    name = plain.group_name(columns[0])
    marked = [column for column in columns if ", conditions " in table.column_name(column)]
    starred = [column for column in columns if column.protocol.endswith("*") and column not in marked][:1]
    notes = [
        (
            table.column_name(column).rpartition(", ")[2] if column in marked else "the protocol's numbers, but for",
            _conditions(table.changes[column]),
        )
        for column in [*marked, *starred]
    ]
    notes = [note for index, note in enumerate(notes) if note not in notes[:index]]
    shared = shared_settings(columns)
    caption = "; ".join(["mean ± standard deviation over seeds", *([in_words(shared)] if shared else [])])
    return {
        **_grid(table, columns, sources, caption, without=shared),
        "title": name,
        "conditions": notes,
    }


def _grid(
    table: Table,
    columns: Sequence[Column],
    sources: Mapping[str, Source],
    caption: str,
    long: bool = False,
    without: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    rows = []
    for row in table.rows:
        cells = [table.cell(row, column) for column in columns]
        if long or any(cell.text != MISSING for cell in cells):
            rows.append({"name": table.row_name(row), "cells": [_cell(cell, sources) for cell in cells]})
    heads, short = [], plain.short_names(columns)
    for column in columns:
        unit = f" ({column.unit})" if column.unit else ""
        name = plain.group_name(column)
        if long:
            heads.append(
                {
                    "title": short[column],
                    "small": f"{column.metric}{unit}",
                    "whole": f"{name}: {table.column_name(column)}",
                }
            )
        else:
            heads.append({"title": table.column_name(column, without or {}) + unit, "small": "", "whole": ""})
    return {"caption": caption, "columns": heads, "rows": rows}


def _conditions(found: Mapping[str, Any]) -> list[str]:
    """What a column's results were made under: changes as ``num_epochs: 2, not 28``, then the rest."""
    lines = [
        f"{what}: {_short(here)}, not {_short(theirs)}" for what, (theirs, here) in found.get("changed", {}).items()
    ]
    return lines + [f"{what}: {_short(value)}" for what, value in found.items() if what != "changed"]


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_short(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_short, value)) if value else "none"
    return "none published" if value is None else str(value)


def _cell(cell: Cell, sources: Mapping[str, Source]) -> dict[str, Any]:
    runs = []
    for entry in (*cell.entries, *cell.failures):
        value, source = entry.record.value, sources[entry.run]
        shown = f"{value:.6g} {entry.record.unit}".strip() if value is not None else "failed"
        runs.append(
            {"seed": entry.record.seed, "value": shown, "links": links(source.folder), "command": source.command}
        )
    failed = bool(cell.failures)
    text = cell.text + (" (some failed)" if failed and cell.entries else "")
    return {"text": text, "mark": cell.mark, "mean": cell.mean, "notes": cell.notes, "runs": runs, "failed": failed}


def _plain_table(
    caption: str, heads: Sequence[str], rows: Sequence[Sequence[Any]], words: Sequence[int]
) -> dict[str, Any] | None:
    return {"caption": caption, "heads": heads, "rows": rows, "words": tuple(words)} if rows else None


# -- figures -----------------------------------------------------------------------------------------------------------


def _layers(table: Table, folder: Path) -> list[Picture]:
    """Means by layer, for benchmarks that measured several."""
    found = []
    for index, columns in enumerate(plain.groups(table)):
        panels: dict[str, dict[str, list[Curve]]] = {}
        for row in table.rows:
            points: dict[str, list[tuple[float, float]]] = {}
            for column in columns:
                settings = column.settings
                layer = re.fullmatch(r"(?:conv|res|layer)(\d+)", str(settings.pop("layer", "")))
                mean = table.cell(row, column).mean
                if layer and mean is not None:
                    what = ", ".join([column.metric, *(f"{key} {value}" for key, value in settings.items())])
                    points.setdefault(what, []).append((float(layer[1]), mean))
            for what, curve in points.items():
                if len(curve) > 1:
                    panels.setdefault(what, {})[table.row_name(row)] = [sorted(curve)]
        if panels:
            first = dict(list(panels.items())[:3])
            caption = f"{plain.group_name(columns[0])}, by layer of the trunk (mean over seeds)."
            found.append(curves(first, f"layers-{index}", caption, folder, "layer"))
    return found


def _training(sources: Sequence[Source], names: Mapping[Path, str], folder: Path) -> list[Picture]:
    """Loss and RankMe of the pretrainings, a line for each of their folders."""
    panels: dict[str, dict[str, list[Curve]]] = {}
    for pretraining, source in _pretrainings(sources).items():
        for key, title in _TRAINING.items():
            points = metric_curve(pretraining, key)
            if points:
                name = names.get(source.folder, source.records[0].method)
                panels.setdefault(title, {}).setdefault(name, []).append(points)
    if not panels:
        return []
    caption = (
        "What the pretraining wrote in its metrics.jsonl, a line for each seed. "
        "Losses of different methods are different quantities: they do not compare."
    )
    return [curves(panels, "training", caption, folder, "images seen")]


def _invariance(sources: Sequence[Source], names: Mapping[Path, str], folder: Path) -> list[Picture]:
    """Histograms of the first seed of each method."""
    found: dict[str, Picture] = {}
    for source in sources:
        name = names.get(source.folder, source.records[0].method)
        key = f"{name} on {source.records[0].dataset}"
        if key in found or not (source.folder / "invariance.json").is_file():
            continue
        panels, stem = read_panels(source.folder), f"invariance-{len(found)}"
        folder.mkdir(parents=True, exist_ok=True)
        for suffix in ("png", "svg"):
            draw_invariance(panels, folder / f"{stem}.{suffix}", name)
        numbers = "; ".join(
            f"{panel['features']}: AUC {100 * panel['auc']:.1f} %, mean distance {panel['same_mean']:.2f} against "
            f"{panel['different_mean']:.2f}"
            for panel in panels
        )
        alt = f"Histograms of distances between views of the same and of different images. {numbers}."
        svg = inline(invariance_svg(panels), stem)
        found[key] = Picture(stem, f"{key}, seed {source.records[0].seed}.", alt, svg, len(panels))
    return list(found.values())


# -- time, memory and published numbers --------------------------------------------------------------------------------


def _costs(table: Table, sources: Sequence[Source], names: Mapping[Path, str]) -> list[dict[str, Any]]:
    training = []
    for pretraining, source in _pretrainings(sources).items():
        last = _last_metrics(pretraining)
        name = (
            f"{names.get(source.folder, source.records[0].method)} ({re.sub('-[0-9a-f]{12}$', '', pretraining.name)})"
        )
        keys = ("images_seen", "seconds", "images_per_second", "peak_memory_mib")
        training.append([name, *(last.get(key) for key in keys)])
    times: dict[tuple[str, str], list[float]] = {}
    for source in sources:
        record = source.records[0]
        seconds = [r.seconds for r in source.records if r.seconds is not None]
        if seconds and record.status == "ok":
            what = plain.group_name(column_of(record))
            times.setdefault((names.get(source.folder, record.method), what), []).append(max(seconds))
    measured = list(dict.fromkeys(what for _, what in times))
    methods = list(dict.fromkeys(name for name, _ in times))
    rows = [[name, *(_mean(times.get((name, what))) for what in measured)] for name in methods]
    heads = ["pretraining", "images seen", "seconds", "images per second", "peak memory, MiB"]
    tables = [
        _plain_table("Pretraining", heads, training, words=(0,)),
        _plain_table("Benchmarks: seconds, mean over their runs", ["method", *measured], rows, words=(0,)),
    ]
    return [found for found in tables if found]


def _mean(values: Sequence[float] | None) -> float | None:
    return statistics.fmean(values) if values else None


def _published(table: Table, ask: Callable[..., list[Published]], caption: str, ours: bool) -> list[dict[str, Any]]:
    """A table for each column that anything is published for."""
    found: dict[str, dict[str, Any]] = {}
    for column in table.columns:
        rows = ask(column.benchmark, column.protocol, column.dataset, column.metric, column.settings)[:_MOST_PUBLISHED]
        if not rows:
            continue
        lines: list[list[Any]] = []
        if ours:
            cells = [(table.row_name(row), table.cell(row, column)) for row in table.rows]
            lines += [
                [f"{name} (here)", c.mean, "", "", "", "measured here"] for name, c in cells if c.mean is not None
            ]
        for row in sorted(rows, key=lambda row: -row.value):
            data = f"{row.pretrain_data}{f', {row.epochs} epochs' if row.epochs else ''}"
            lines.append([row.method, row.value, row.trunk, data, row.layer_or_setting, row.source])
        title = f"{plain.group_name(column)}, {table.column_name(column)}: {caption}"
        heads = ["method", column.metric, "trunk", "pretrained on", "setting", "source"]
        entry = _plain_table(title, heads, lines, words=(0, 2, 3, 4, 5))
        if entry:
            found.setdefault(repr(lines) if not ours else title, entry)
    return list(found.values())


def _pretrainings(sources: Sequence[Source]) -> dict[Path, Source]:
    """Each pretraining's folder with the benchmark run that measured it after the most images."""
    in_order = sorted(sources, key=lambda source: int(source.records[0].extra.get("images_seen") or 0))
    last = {source.pretraining: source for source in in_order if source.pretraining is not None}
    folders = dict.fromkeys(source.pretraining for source in sources if source.pretraining is not None)
    return {folder: last[folder] for folder in folders}


def _last_metrics(pretraining: Path) -> dict[str, Any]:
    lines = (pretraining / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found: dict[str, Any] = {}
    for line in lines:
        found |= json.loads(line)
    return found


def _row(table: Table, source: Source) -> Row | None:
    record: Record = source.records[0]
    same = [row for row in table.rows if row.method == record.method]
    return row_of(record) if row_of(record) in same else (same[-1] if same else None)
