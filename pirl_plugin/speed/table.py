"""Rows of measurements as text, as Markdown and as JSON, with what they were measured on."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pirl_plugin.atomic import write_text
from pirl_plugin.records import environment, hardware_name
from pirl_plugin.speed.measuring import Row, Settings
from pirl_plugin.text import aligned

HEADINGS = ("area", "what", "against", "ours", "theirs", "ratio", "wanted", "")


def as_text(measured: Iterable[tuple[str, Row]]) -> str:
    """Aligned columns; each row's detail stands below it."""
    measured = list(measured)
    lines = aligned([HEADINGS, *(_cells(area, row) for area, row in measured)]).split("\n")
    details = ["", *(row.detail for _, row in measured)]
    return "\n".join(line + (f"\n    {detail}" if detail else "") for line, detail in zip(lines, details, strict=True))


def as_markdown(measured: Iterable[tuple[str, Row]]) -> str:
    """A table for a README."""
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(_cells(area, row) for area, row in measured)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def conditions(settings: Settings) -> dict[str, Any]:
    """Machine, versions, date and settings of a measurement."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": hardware_name(),
        "quick": settings.quick,
        "repeats": settings.repeats,
        "device": str(settings.device),
        "threads": settings.threads,
        **environment(),
    }


def write_json(measured: Iterable[tuple[str, Row]], under: Mapping[str, Any], path: Path) -> None:
    """Every number unrounded; infinite ratios as null, since JSON has none."""
    rows = [{"area": area, **dataclasses.asdict(row), "reached": row.reached} for area, row in measured]
    for row in rows:
        row["ratio"] = row["ratio"] if math.isfinite(row["ratio"]) else None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps({**under, "rows": rows}, indent=2) + "\n", path)


def _cells(area: str, row: Row) -> tuple[str, ...]:
    wanted = "" if row.wanted is None else f"{'<=' if row.at_most else '>='} {row.wanted:g}"
    verdict = {None: "", True: "reached", False: "missed"}[row.reached]
    ratio = f"{row.ratio:.3g}" if math.isfinite(row.ratio) else "-"
    ours, theirs = amount(row.ours, row.unit), amount(row.theirs, row.unit)
    return (area, row.what, row.against, ours, theirs, ratio, wanted, verdict)


def amount(value: float, unit: str) -> str:
    """``0.0123`` s as ``12.3 ms``, bytes in MB, rates as they are."""
    if unit == "s":
        return f"{value:.3g} s" if value >= 1 or value == 0 else f"{value * 1e3:.3g} ms"
    if unit == "bytes":
        return f"{value / 1e6:.4g} MB"
    return f"{value:.4g} {unit}".strip()
