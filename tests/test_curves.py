"""Curves of probes: aggregation by hand, values carried on in the log, the picture and the table."""

import json

import numpy as np
import pytest
from PIL import Image

from pirl_plugin.commands.show_curves import main
from pirl_plugin.records import Record, write_record
from pirl_plugin.report.curves import Curves, Point, metric_curve, probe_curves


def record(method, value, seen, seed=0, **changes):
    facts = {"benchmark": "linear", "protocol": "small", "dataset": "d", "setting": {"layer": "res5"}, "metric": "top1"}
    extra = {"extra": {"images_seen": seen}}
    return Record(method=method, value=value, unit="%", seed=seed, **{**facts, **extra, **changes})


def test_mean_and_sample_deviation_over_seeds_by_hand():
    """10, 12, 14 have mean 12 and sample deviation 2."""
    records = [record("pirl", value, 500, seed) for seed, value in enumerate((10.0, 12.0, 14.0))]
    records += [
        record("pirl", 5.0, 100),
        record("random", 7.0, 0),
        record("random", None, 0, status="failed", reason="x"),
    ]
    lines = {
        "pirl": [Point(100, 5.0, 0.0, 1), Point(500, 12.0, 2.0, 3)],
        "random": [Point(0, 7.0, 0.0, 1)],
    }
    assert probe_curves(records) == [Curves("linear on d (small): top1, layer res5", "top1", "%", lines)]
    assert probe_curves(records, "mAP") == []


def test_what_was_measured_otherwise_has_a_panel_of_its_own():
    view = {"name": "eval_view", "crop": 64}
    records = [
        record("pirl", 10.0, 500),
        record("pirl", 20.0, 500, seed=1),
        record("pirl", 70.0, 500, seed=2, dataset="e"),
        record("pirl", 80.0, 500, seed=2, protocol="paper*"),
        record("pirl", 90.0, 500, seed=2, extra={"images_seen": 500, "transform": view}),
    ]
    found = {probe.title: probe.lines["pirl"] for probe in probe_curves(records)}
    assert {title: points[0].mean for title, points in found.items()} == {
        "linear on d (small): top1, layer res5, conditions A": 15.0,
        "linear on e (small): top1, layer res5": 70.0,
        "linear on d (paper*): top1, layer res5": 80.0,
        "linear on d (small): top1, layer res5, conditions B": 90.0,
    }


def test_weights_of_unknown_history_are_not_called_untrained(caplog):
    records = [
        record("elsewhere", 60.0, None, weights_sha256="a", extra={}),
        record("random", 7.0, None, extra={}),
        record("pirl", 40.0, 500, weights_sha256="b"),
    ]
    (probe,) = probe_curves(records)
    assert probe.lines == {"random": [Point(0, 7.0, 0.0, 1)], "pirl": [Point(500, 40.0, 0.0, 1)]}
    assert "left out of the curves: elsewhere, linear on d (small): images seen not known" in caplog.text


def test_trunks_of_one_method_are_lines_of_their_own():
    trunks = [{"depth": 18}, {"depth": 50}]
    records = [record("pirl", 40.0, 500, extra={"images_seen": 500, "trunk": trunk}) for trunk in trunks]
    assert list(probe_curves(records)[0].lines) == ["pirl, depth 18", "pirl, depth 50"]


def test_a_health_value_that_loggers_repeat_is_one_point(tmp_path):
    lines = [
        {"images_seen": 10, "loss": 3.0},
        {"images_seen": 20, "loss": 2.0, "rankme": 4.0, "health_step": 2},
        {"images_seen": 30, "loss": 2.0, "rankme": 4.0, "health_step": 2},
        {"images_seen": 40, "loss": 1.0, "rankme": 5.0, "health_step": 4},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert metric_curve(tmp_path, "rankme") == [(20, 4.0), (40, 5.0)]
    assert metric_curve(tmp_path, "loss") == [(10, 3.0), (20, 2.0), (30, 2.0), (40, 1.0)]
    assert metric_curve(tmp_path / "nowhere", "loss") == []


@pytest.fixture
def runs(tmp_path):
    for method, seen, value in (("pirl", 100, 30.0), ("pirl", 200, 40.0), ("random", 0, 35.0)):
        for seed in (0, 1):
            folder = tmp_path / method / f"linear-{seen}-{seed}"
            folder.mkdir(parents=True)
            write_record(record(method, value + seed, seen, seed), folder / "result.json")
    (tmp_path / "pirl" / "metrics.jsonl").write_text(
        '{"images_seen": 100, "loss": 3.0}\n{"images_seen": 200, "loss": 2.0}\n'
    )
    return tmp_path


def test_the_command_prints_the_table_and_draws_the_picture(runs, capsys):
    assert main([str(runs / "pirl"), str(runs / "random"), "--out", str(runs / "curves.png")]) == 0
    printed = capsys.readouterr().out
    assert "| 200 | 40.5 ± 0.7 | – |" in printed
    assert "| 0 | – | 35.5 ± 0.7 |" in printed
    pixels = np.asarray(Image.open(runs / "curves.png").convert("RGB")).reshape(-1, 3)
    for colour in ((0x00, 0x72, 0xB2), (0x68, 0x70, 0x7C)):  # the curve of the method, the line of the reference
        assert (np.abs(pixels.astype(int) - colour).max(axis=1) < 8).sum() > 50


def test_no_results_is_one_clear_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "run tools/benchmark.py first" in capsys.readouterr().err
