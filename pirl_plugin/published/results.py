"""The table of published numbers as objects, and the questions that can be asked of it."""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pirl_plugin.published.attribution import ATTRIBUTIONS, BEST

_TABLE = Path(__file__).with_name("published_results.csv")
_SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)

# our benchmark and dataset -> the table's names of it, with what each means in a record's ``setting``
BENCHMARKS: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    ("linear", "imagenet"): {"ImageNet linear": {}},
    ("linear", "places205"): {"Places205 linear": {}},
    ("linear", "inaturalist2018"): {"iNat18 linear": {}},
    ("voc07_svm", "voc2007"): {"VOC07 SVM": {}},
    ("voc07_low_shot_svm", "voc2007"): {f"VOC07 low-shot SVM k={k}": {"k": k} for k in _SHOTS},
    ("detection_voc", "voc2007"): {"VOC07 detection": {}},
    ("detection_voc", "voc0712"): {"VOC07+12 detection": {}},
    ("semi_supervised", "imagenet"): {f"ImageNet semi-sup {part}": {"labels": part} for part in ("1%", "10%")},
    ("knn", "imagenet"): {"ImageNet kNN": {}},
    ("knn", "places205"): {"Places205 kNN": {}},
}
_SETTINGS = {name: setting for names in BENCHMARKS.values() for name, setting in names.items()}
_SAME_QUESTION = (
    "k",
    "labels",
    "layer",
)  # settings that a number under another protocol must share to be worth showing
_METRICS = ("top1", "top5", "mAP", "mAP 11-pt", "AP", "AP50", "AP75")


@dataclass(frozen=True)
class Published:
    """One published number.

    Attributes:
        method: as its source names it.
        trunk: as its source describes it.
        pretrain_data: what it was pretrained on.
        epochs: of the pretraining, where stated.
        benchmark: the table's name of the benchmark, e.g. ``ImageNet linear``.
        layer_or_setting: how it was measured, in the table's words.
        metric: top1, top5, mAP, AP, AP50, AP75, ...
        value: in percent.
        deviation: standard deviation over pretrainings, where stated.
        source: where it stands.
        protocol: of ours that it was measured under; None where its source does not allow to say so.
        setting: what the table's words are in a record's ``setting``; ``{"layer": "best"}`` is the best of all layers.
        is_result: false for a gain over another row and for a chosen constant.
    """

    method: str
    trunk: str
    pretrain_data: str
    epochs: int | None
    benchmark: str
    layer_or_setting: str
    metric: str
    value: float
    deviation: float | None
    source: str
    protocol: str | None
    setting: Mapping[str, Any] = field(hash=False)
    is_result: bool = True


def rows(benchmark: str | None = None, dataset: str | None = None, method: str | None = None) -> list[Published]:
    """All published numbers, or those of one of our benchmarks, of a dataset, of methods whose name holds ``method``.

    What stands in the table but is no benchmark of ours (fine-tuning, VOC2007 logistic regression) is among all of them
    only.
    """
    chosen = _names(benchmark, dataset)
    return [
        row
        for row in _all()
        if (row.benchmark in chosen or (benchmark is None and dataset is None))
        and (method is None or method.lower() in row.method.lower())
    ]


def results(
    benchmark: str | None = None,
    dataset: str | None = None,
    method: str | None = None,
    metric: str | None = None,
    protocol: str | None = None,
) -> list[Published]:
    """Those of ``rows`` that are results, by metric and protocol of ours, too."""
    return [
        row
        for row in rows(benchmark, dataset, method)
        if row.is_result and metric in (None, row.metric) and protocol in (None, row.protocol)
    ]


def available(
    dataset: str | None = None, method: str | None = None, metric: str | None = None, protocol: str | None = None
) -> dict[tuple[str, str], int]:
    """How many results there are, by our benchmark and dataset; those without any are left out."""
    counts = {
        (ours, on): len(results(ours, on, method, metric, protocol)) for ours, on in BENCHMARKS if dataset in (None, on)
    }
    return {key: count for key, count in counts.items() if count}


def matching(
    benchmark: str, protocol: str, dataset: str, metric: str, setting: Mapping[str, Any] | None = None
) -> list[Published]:
    """Published numbers that a measured one may stand beside: same benchmark, protocol, dataset, metric and setting.

    Args:
        benchmark: ours, e.g. ``linear``.
        protocol: ours; one with ``*`` or of another name has none.
        dataset: ours, e.g. ``imagenet``; a part of it has another name, and none.
        metric: as in a record.
        setting: as in a record; what it says must not contradict. The best of all layers stands beside any layer.
    """
    found: dict[Any, Published] = {}
    for row in _results(benchmark, dataset, metric):
        if _matches(row, protocol, setting):
            # some numbers stand in two tables of one source
            what = (row.method, row.trunk, row.pretrain_data, row.epochs, row.value, tuple(row.setting.items()))
            found.setdefault(what, row)
    return list(found.values())


def related(
    benchmark: str, protocol: str, dataset: str, metric: str, setting: Mapping[str, Any] | None = None
) -> list[Published]:
    """Published numbers of the same benchmark that do not compare: other protocols, other or unstated setups.

    Args:
        benchmark: see ``matching``.
        protocol: see ``matching``.
        dataset: see ``matching``.
        metric: see ``matching``.
        setting: see ``matching``; of it only layer, k and the part of the labels must not contradict.
    """
    return [
        row
        for row in _results(benchmark, dataset, metric)
        if not _matches(row, protocol, setting) and _agrees(row.setting, setting, _SAME_QUESTION)
    ]


def _names(benchmark: str | None, dataset: str | None) -> set[str]:
    return {
        name
        for (ours, on), names in BENCHMARKS.items()
        if benchmark in (None, ours) and dataset in (None, on)
        for name in names
    }


def _results(benchmark: str, dataset: str, metric: str) -> list[Published]:
    return [row for row in rows(benchmark, dataset) if row.metric == metric and row.is_result]


def _matches(row: Published, protocol: str, setting: Mapping[str, Any] | None) -> bool:
    return row.protocol == protocol and _agrees(row.setting, setting, None)


def _agrees(row: Mapping[str, Any], asked: Mapping[str, Any] | None, keys: tuple[str, ...] | None) -> bool:
    """Whether two settings contradict each other nowhere, or not in the named keys."""
    asked = _normal(asked or {})
    both = [key for key in row if key in asked and (keys is None or key in keys)]
    return all(row[key] == asked[key] or (key == "layer" and row[key] in (BEST, "not stated")) for key in both)


def _normal(setting: Mapping[str, Any]) -> dict[str, Any]:
    """A record's setting with the part of the labels as ``1%``, given as a fraction or by a list's name."""
    if "fraction" in setting:
        return {**setting, "labels": f"{100 * float(setting['fraction']):g}%"}
    if "list" in setting:  # SimCLR's lists are 1percent.txt and 10percent.txt; what others hold is not known
        named = re.search(r"(?<!\d)(1|10) ?percent", str(setting["list"]))
        return {**setting, "labels": f"{named[1]}%" if named else "not known"}
    return dict(setting)


@functools.cache
def _all() -> tuple[Published, ...]:
    with open(_TABLE, encoding="utf-8", newline="") as file:
        return tuple(_read(csv.DictReader(file)))


def _read(lines: Iterator[dict[str, str]] | csv.DictReader[str]) -> Iterator[Published]:
    for line in lines:
        value, _, deviation = line["value"].partition("+-")
        protocol, setting = _attributed(line)
        yield Published(
            method=line["method"],
            trunk=line["trunk"],
            pretrain_data=line["pretrain_data"],
            epochs=int(line["epochs"]) if line["epochs"] else None,
            benchmark=line["benchmark"],
            layer_or_setting=line["layer_or_setting"],
            metric=line["metric"],
            value=float(value),
            deviation=float(deviation) if deviation else None,
            source=line["source"],
            protocol=protocol,
            setting=setting,
            is_result=line["metric"] in _METRICS and value[0] not in "+-",
        )


def _attributed(line: Mapping[str, str]) -> tuple[str | None, dict[str, Any]]:
    """Protocol and setting of a row of the table."""
    setting = dict(_SETTINGS.get(line["benchmark"], {}))
    neighbours = re.match(r"k=(\d+)", line["layer_or_setting"]) if line["benchmark"].endswith("kNN") else None
    if neighbours:
        setting["k"] = int(neighbours[1])
    for statement in ATTRIBUTIONS.get(line["benchmark"], ()):
        if statement.holds(line["method"], line["trunk"], line["layer_or_setting"], line["source"]):
            return statement.protocol, {**setting, **statement.settings[line["layer_or_setting"]]}
    return None, setting
