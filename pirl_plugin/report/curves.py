"""Numbers of run folders as curves against images seen: what a probe measured, and the signs of health beside it."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pirl_plugin.records import Record, read_records


@dataclass(frozen=True)
class Point:
    """Mean and sample standard deviation (0 for one value) over seeds of the probe, after some images."""

    images_seen: int
    mean: float
    std: float
    count: int


def probe_curves(records: Sequence[Record]) -> dict[tuple[str, str, str], dict[str, list[Point]]]:
    """Results of one run at several checkpoints.

    Args:
        records: with ``extra["images_seen"]``, 0 for random weights.

    Returns:
        ``{(benchmark, setting, metric): {method: points in the order of images seen}}``.
    """
    values: dict[tuple[str, str, str], dict[str, dict[int, list[float]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for record in records:
        if record.status == "ok" and record.value is not None:
            setting = ", ".join(f"{key}={value}" for key, value in record.setting.items())
            seen = int(record.extra.get("images_seen", 0))
            values[record.benchmark, setting, record.metric][record.method][seen].append(record.value)
    return {
        key: {
            method: [
                Point(seen, statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found))
                for seen, found in sorted(by_seen.items())
            ]
            for method, by_seen in methods.items()
        }
        for key, methods in values.items()
    }


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
