"""Published numbers as text: by themselves, or beside measured ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from pirl_plugin.published.attribution import CONFLICTS
from pirl_plugin.published.results import Published, matching, related, results
from pirl_plugin.records import Record
from pirl_plugin.text import aligned

_APART = "NOT comparable with the above (other protocols, or setups that their sources do not state):"

_Key = tuple[str, str, str, str]  # benchmark, protocol, dataset, metric


def beside(records: Sequence[Record], most: int = 40, most_apart: int = 10) -> str:
    """Measured results with the published ones of the same protocol, and below, set apart, some of the others.

    Args:
        records: of any benchmarks; failed ones are left out.
        most: published numbers of the same protocol to show for each benchmark and metric, the same method's first.
        most_apart: of the others.

    Returns:
        Text of one paragraph for each benchmark, protocol, dataset, metric and setting (but the layers of a run, which
        share one) that anything is published for; a line that says so where nothing is.
    """
    groups: dict[tuple[_Key, str], list[Record]] = {}
    for record in records:
        if record.status == "ok":
            key = record.benchmark, record.protocol, record.dataset, record.metric
            others = {name: value for name, value in record.setting.items() if name != "layer"}
            groups.setdefault((key, repr(sorted(others.items()))), []).append(record)
    found = [text for (key, _), group in groups.items() if (text := _group(key, group, most, most_apart))]
    if found:
        return "\n\n".join(found)
    asked = sorted({f"{record.benchmark} on {record.dataset}" for record in records})
    return f"No published numbers for {', '.join(asked) or 'no results'}."


def listed(
    benchmark: str,
    dataset: str | None = None,
    method: str | None = None,
    metric: str | None = None,
    protocol: str | None = None,
) -> str:
    """All published numbers of a benchmark as text, by protocol, each with its source.

    Args:
        benchmark: ours.
        dataset: ours; None: all.
        method: only methods whose name holds this, in any case.
        metric: only this one.
        protocol: only numbers under this one of our protocols.
    """
    chosen = results(benchmark, dataset, method, metric, protocol)
    protocols = sorted({row.protocol for row in chosen if row.protocol})
    parts = []
    for name in [*protocols, None]:
        of_it = [row for row in chosen if row.protocol == name]
        if of_it:
            title = f"protocol {name}" if name else "under none of our protocols, as far as their sources say"
            head = ("method", "trunk", "pretrained on", "epochs", "benchmark", "setting", "metric", "%", "source")
            lines = [_described(row) for row in of_it]
            parts.append(f"{title}\n{aligned([head, *lines], indent=2)}")
    return "\n\n".join([*parts, *_conflicts(chosen)]) or "No published numbers for this choice."


def _group(key: _Key, group: Sequence[Record], most: int, most_apart: int) -> str:
    """The paragraph of one benchmark, protocol, dataset and metric; empty where nothing is published for it."""
    benchmark, protocol, dataset, metric = key
    same = dict.fromkeys(row for record in group for row in matching(*key, record.setting))
    other = dict.fromkeys(row for record in group for row in related(*key, record.setting))
    if not same and not other:
        return ""
    methods = {_first_word(record.method) for record in group}
    shown, left = _choose(same, methods, most)
    apart, left_apart = _choose(other, methods, most_apart)
    head = ("", "method", "trunk", "pretrained on", "epochs", "setting", f"{metric} %", "source")
    lines = [head, *map(_measured, group), *map(_published, shown), *([_none_line(protocol)] if not same else [])]
    table = aligned([*lines, *map(_published, apart)], indent=2).splitlines()
    parts = [f"{benchmark} on {dataset}, protocol {protocol}", *table[: len(lines)]]
    parts += [f"  ... and {left} more"] if left else []
    parts += [_APART, *table[len(lines) :]] if apart else []
    parts += [f"  ... and {left_apart} more: python tools/published.py {_command(key)}"] if left_apart else []
    return "\n".join([*parts, *_conflicts([*shown, *apart])])


def _choose(found: Iterable[Published], methods: set[str], most: int) -> tuple[list[Published], int]:
    """The first ones, those of the measured methods before others, and how many are left."""
    ordered = sorted(found, key=lambda row: _first_word(row.method) not in methods)
    return ordered[:most], max(0, len(ordered) - most)


def _measured(record: Record) -> tuple[str, ...]:
    setting = ", ".join(f"{name}={value}" for name, value in record.setting.items())
    return ("measured", record.method, _trunk(record), "", "", setting, f"{record.value:.2f}", f"seed {record.seed}")


def _described(row: Published) -> tuple[str, ...]:
    what = (row.method, row.trunk, row.pretrain_data, _epochs(row), row.benchmark, row.layer_or_setting)
    return (*what, row.metric, _value(row), row.source)


def _published(row: Published) -> tuple[str, ...]:
    what = (row.method, row.trunk, row.pretrain_data, _epochs(row), row.layer_or_setting)
    return ("published", *what, _value(row), row.source)


def _none_line(protocol: str) -> tuple[str, ...]:
    return ("published", f"none under protocol {protocol}", "", "", "", "", "", "")


def _trunk(record: Record) -> str:
    """``ResNet-50`` and what differs from it, for a trunk of ours; its name for another."""
    trunk = record.extra.get("trunk")
    if not isinstance(trunk, Mapping):
        return ""
    more = ", ".join(f"{name} {value}" for name, value in trunk.items() if name not in ("name", "depth"))
    name = f"ResNet-{trunk['depth']}" if trunk.get("name") == "resnet_trunk" else str(trunk.get("name", ""))
    return f"{name} ({more})" if more else name


def _epochs(row: Published) -> str:
    return str(row.epochs) if row.epochs is not None else ""


def _value(row: Published) -> str:
    text = f"{row.value:g}"
    return (text if "." in text else f"{text}.0") + (f" +- {row.deviation:g}" if row.deviation is not None else "")


def _first_word(method: str) -> str:
    """``pirl`` for PIRL-c2x, PIRL (Jigsaw) and pirl_paper; ``npid`` for NPID++."""
    return re.split(r"[^a-z]+", method.lower(), maxsplit=1)[0]


def _command(key: _Key) -> str:
    benchmark, _, dataset, metric = key
    return f"benchmark={benchmark} dataset={dataset} metric={metric}"


def _conflicts(shown: Iterable[Published]) -> list[str]:
    """A line for each number among those shown about which sources differ."""
    told = {(row.benchmark, row.method) for row in shown}
    lines = [
        f"  - {conflict.text}"
        for conflict in CONFLICTS
        if any((name, method) in told for name in conflict.benchmarks for method in conflict.methods)
    ]
    return ["Where sources differ:\n" + "\n".join(lines)] if lines else []
