"""The table of the comparison, against numbers worked out by hand and against numpy."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

import numpy as np
import pytest

from pirl_plugin.records import Record
from pirl_plugin.report.aggregate import Cell, Entry, Table, aggregate, marks
from pirl_plugin.report.plain import as_csv, as_markdown, failures, for_terminal


def entry(method: str, value: float | None, seed: int = 0, headline: bool = True, **changes: Any) -> Entry:
    facts: dict[str, Any] = {
        "benchmark": "linear",
        "protocol": "goyal19",
        "dataset": "voc2007",
        "setting": {"layer": "res5"},
        "metric": "mAP",
        "unit": "%",
        "config_sha256": f"{method}{seed}",
        "weights_sha256": f"{method}{seed}",
    } | changes
    if value is None:
        facts |= {"status": "failed", "reason": facts.get("reason") or "out of memory"}
    return Entry(Record(method=method, value=value, seed=seed, **facts), f"{method}-{seed}", headline)


def only(table: Table) -> Cell:
    """The cell of a table that has one."""
    (cell,) = table.cells.values()
    return cell


def texts(table: Table) -> dict[str, list[str]]:
    return {table.row_name(row): [table.cell(row, column).text for column in table.columns] for row in table.rows}


def test_mean_and_sample_deviation_by_hand() -> None:
    """60, 62, 67: mean 63; squares 9 + 1 + 16 = 26, over n - 1 = 2: 13."""
    cell = only(aggregate([entry("pirl", value, seed) for seed, value in enumerate([60.0, 62.0, 67.0])]))
    assert (cell.count, cell.mean, cell.values) == (3, 63.0, (60.0, 62.0, 67.0))
    assert cell.std == pytest.approx(math.sqrt(13))
    assert cell.text == "63.0 ± 3.6"


def test_one_seed_has_no_deviation() -> None:
    cell = only(aggregate([entry("pirl", 61.25)]))
    assert (cell.count, cell.mean, cell.std, cell.text) == (1, 61.25, None, "61.2")


def test_many_cells_agree_with_numpy() -> None:
    values = np.random.default_rng(0).normal(50, 9, size=(4, 5))
    table = aggregate(entry(f"m{m}", values[m, s], s) for s in range(5) for m in range(4))
    cells = [table.cell(row, table.columns[0]) for row in table.rows]
    assert [cell.mean for cell in cells] == pytest.approx(values.mean(axis=1))
    assert [cell.std for cell in cells] == pytest.approx(values.std(axis=1, ddof=1))


@pytest.mark.parametrize(
    "change",
    [
        {"protocol": "goyal19*"},
        {"dataset": "voc2012"},
        {"setting": {"layer": "res4"}},
        {"metric": "AP"},
        {"benchmark": "voc07_svm"},
        {"extra": {"changed": {"batch_size": [16, 4]}}},
        {"extra": {"changed": {"num_epochs": [28, 10]}}},
        {"extra": {"num_test": 200}},
        {"extra": {"transform": {"name": "eval_view", "crop": 32}}},
    ],
)
def test_what_was_measured_otherwise_is_never_averaged(change: dict[str, Any]) -> None:
    table = aggregate([entry("pirl", 60.0, 0), entry("pirl", 80.0, 1, **change)])
    assert sorted(cell.mean or 0 for cell in table.cells.values()) == [60.0, 80.0]
    assert len({table.column_name(c) + c.benchmark + c.protocol + c.dataset for c in table.columns}) == 2


@pytest.mark.parametrize("key", ["images_seen", "trunk"])
def test_checkpoints_and_trunks_have_rows_of_their_own(key: str) -> None:
    first, second = (1000, 2000) if key == "images_seen" else ({"depth": 18}, {"depth": 50})
    table = aggregate([entry("pirl", 60.0, 0, extra={key: first}), entry("pirl", 80.0, 1, extra={key: second})])
    assert [cell.text for cell in table.cells.values()] == ["60.0", "80.0"]
    assert len(set(map(table.row_name, table.rows))) == 2


def test_one_seed_with_two_results_has_no_mean() -> None:
    table = aggregate([entry("pirl", 60.0), entry("pirl", 80.0, weights_sha256="other")])
    cell = only(table)
    assert (cell.mean, cell.std, cell.mark, cell.text) == (None, None, "", "60.0 / 80.0")
    assert "not averaged" in cell.notes[0]


def test_a_copy_counts_once() -> None:
    assert only(aggregate([entry("pirl", 60.0), entry("pirl", 60.0)])).count == 1


def test_seeds_that_share_their_weights_are_told() -> None:
    cell = only(aggregate([entry("pirl", 60.0 + seed, seed, weights_sha256="same") for seed in range(3)]))
    assert "same weights" in cell.notes[0]


def test_failed_and_missing_are_no_numbers() -> None:
    table = aggregate(
        [
            entry("pirl", 60.0, 0),
            entry("pirl", 70.0, 0, benchmark="knn"),
            entry("pirl", None, 1),
            entry("npid", None, 0, metric="", setting={}, unit="", reason="no <space> left"),
        ]
    )
    assert texts(table) == {"pirl": ["60.0", "70.0"], "npid": ["failed", "–"]}
    assert failures(table) == [("pirl", "linear", 1, "out of memory"), ("npid", "linear", 0, "no <space> left")]
    pirl = table.cell(table.rows[0], table.columns[0])
    assert pirl.notes == ["n = 1", "seed 1 failed: out of memory"]


def test_a_benchmark_that_only_failed_has_a_column() -> None:
    table = aggregate([entry("pirl", 60.0), entry("pirl", None, benchmark="detection_voc", metric="")])
    assert texts(table) == {"pirl": ["60.0", "failed"]}
    assert [column.benchmark for column in table.headlines] == ["linear", "detection_voc"]


def test_the_best_and_those_within_its_error_by_hand() -> None:
    """best 63, s² = 13, n = 3; near 61, 62, 63: s² = 1: error √(14 / 3) = 2.16 > 1; far 60, s² = 1: distance 3."""
    rows = {"best": [60, 62, 67], "near": [61, 62, 63], "far": [59, 60, 61], "single": [62.9]}
    table = aggregate(entry(name, float(v), seed) for name, values in rows.items() for seed, v in enumerate(values))
    found = {row.method: table.cell(row, table.columns[0]).mark for row in table.rows}
    assert found == {"best": "best", "near": "within", "far": "", "single": ""}


@pytest.mark.parametrize("values", [[60.0], [60.0, 61.0]])
def test_a_method_alone_is_not_best(values: list[float]) -> None:
    assert only(aggregate([entry("pirl", value, seed) for seed, value in enumerate(values)])).mark == ""


def test_equal_means_are_both_best() -> None:
    cells = [Cell((entry(name, 60.0),)) for name in "ab"] + [Cell(), Cell((entry("c", 59.9),))]
    assert marks(cells) == ["best", "best", "", ""]


def test_a_metric_without_a_better_direction_has_no_mark() -> None:
    table = aggregate([entry("a", 1.0, metric="loss"), entry("b", 2.0, metric="loss")])
    assert [cell.mark for cell in table.cells.values()] == ["", ""]


def test_csv_holds_every_cell() -> None:
    table = aggregate([entry("a, b", 1 / 3, 0), entry("a, b", 1.0, 1), entry("c", 2.0, benchmark="knn")])
    lines = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert [(line["method"], line["status"], line["n"]) for line in lines] == [
        ("a, b", "ok", "2"),
        ("a, b", "missing", "0"),
        ("c", "missing", "0"),
        ("c", "ok", "1"),
    ]
    assert float(lines[0]["mean"]) == pytest.approx(2 / 3)
    assert list(map(float, lines[0]["values"].split())) == [1 / 3, 1.0]


def test_markdown_escapes_names() -> None:
    text = as_markdown(aggregate([entry("a|b <script>", 1.0)]), "Title", "")
    assert r"| a\|b &lt;script&gt; | 1.0 |" in text


def test_terminal_table_is_never_wider_than_asked() -> None:
    names = [f"a_method_of_some_length_{index}" for index in range(9)]
    found = [entry(name, 1.0, benchmark=f"a_benchmark_of_some_length_{index}") for name in names for index in range(9)]
    lines = for_terminal(aggregate(found)).splitlines()
    assert max(map(len, lines)) <= 120
    assert lines[1].split() == ["a_method_of_some_length_0", "1.0", "★"]
    narrow = for_terminal(aggregate([entry("pirl", 60.0), entry("npid", 50.0)]))
    assert narrow.splitlines()[1].split()[-3:] == ["60.0", "★", "50.0"]


def test_many_methods_stand_in_rows_and_what_the_columns_are_below() -> None:
    names = [f"method_{index}" for index in range(9)]
    found = [entry(name, float(index)) for index, name in enumerate(names)]
    found += [entry(name, 1.5, benchmark="knn", setting={"k": 20}) for name in names]
    lines = for_terminal(aggregate(found)).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["linear", "knn"],
        ["mAP", "%", "mAP", "%"],
        ["method_0", "0.0", "1.5", "★"],
    ]
    assert lines[2:11] == sorted(lines[2:11])
    assert [line.partition(" = ")[0] for line in lines[12:]] == ["linear", "knn"]
    assert lines[13].endswith("mAP, k 20")


def test_columns_of_one_benchmark_are_told_apart_in_the_terminal() -> None:
    names = [f"method_{index}" for index in range(9)]
    found = [entry(name, 1.0, dataset=dataset) for name in names for dataset in ("a", "b")]
    assert for_terminal(aggregate(found)).splitlines()[0].split() == ["linear", "on", "a", "linear", "on", "b"]
