"""The benchmark ``detection_voc`` as users run it: records, names, engines, overrides, mistakes."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detection_worlds import TRUNK, context, devkit, scenes

from pirl_plugin.benchmarks import run_benchmark
from pirl_plugin.benchmarks.context import Result
from pirl_plugin.benchmarks.detection import DetectionVOC, engine
from pirl_plugin.benchmarks.detection.engine import Detections, resolve
from pirl_plugin.registry import build, check, lookup
from pirl_plugin.schema import ConfigError

TINY = {
    "engine": "torchvision",
    "protocol": "moco",
    "batch_size": 2,
    "iterations": 2,
    "lr": 0.01,
    "min_size": 32,
    "rois_per_image": 8,
    "proposals": 10,
}


def config(**changes: Any) -> dict[str, Any]:
    benchmark = {"name": "detection_voc", **TINY, **changes.pop("benchmark", {})}
    return {
        "benchmark": benchmark,
        "weights": "random",
        "trunk": TRUNK,
        "image_size": 32,
        "dataset": {"name": "generated_scenes", "num_images": 4, "size": 32, "num_classes": 2},
        "device": "cpu",
        **changes,
    }


def perfect(trunk: Any, trunk_config: Any, train: Any, test: Any, settings: Any, context: Any) -> Any:
    """An engine that cheats: every object, difficult ones too, with full score."""
    found = [
        Detections(example.boxes, np.ones(len(example.boxes), dtype=np.float32), example.labels) for example in test
    ]
    return found, {"note": "cheated"}


def ran_with(monkeypatch: pytest.MonkeyPatch, engine_function: Any, **arguments: Any) -> list[Result]:
    """The benchmark with a detectron2 that is really the given function."""
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    name = "pirl_plugin.benchmarks.detection.detectron2_engine"
    module = types.ModuleType(name)
    module.train_and_detect = engine_function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return list(DetectionVOC(**{"engine": "detectron2", **arguments}).run(context(scenes(8), scenes(8, split="test"))))


def test_from_a_configuration_to_records(tmp_path: Path) -> None:
    records = run_benchmark(config(run_dir=str(tmp_path)))
    best = records[0]
    assert (best.metric, best.protocol, best.unit, best.benchmark) == ("AP50", "moco*", "%", "detection_voc")
    assert best.setting == {"engine": "torchvision", "train_set": "voc07", "rule": "eleven_point"}
    assert 0 <= best.value <= 100
    named = {(record.setting["rule"], record.metric) for record in records}
    for rule in ("eleven_point", "interpolated"):
        assert {(rule, metric) for metric in ("AP", "AP50", "AP75")} <= named
    assert {("coco", "coco/AP"), ("coco", "coco/AP50"), ("coco", "coco/AP75")} <= named
    assert json.loads((tmp_path / "result.json").read_text())["value"] == best.value
    extra = best.extra
    assert extra["engine"] == "torchvision"
    assert extra["changed"]["iterations"] == [9000, 2]
    assert extra["numbers"]["iterations"] == 2
    assert set(extra["per_class"]) == set(build("dataset", config()["dataset"]).class_names)
    assert (extra["num_train"], extra["num_test"], extra["num_classes"]) == (4, 4, 2)
    assert any("L1" in difference for difference in extra["differences_from_detectron2"])


def test_perfect_detections_are_a_hundred_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    """By every rule, at every threshold; exactly one headline."""
    found = ran_with(monkeypatch, perfect)
    assert {round(result.value, 6) for result in found} == {100.0}
    assert sum(result.headline for result in found) == 1
    (headline,) = (result for result in found if result.headline)
    assert (headline.metric, headline.protocol, headline.setting["engine"]) == ("AP50", "paper", "detectron2")
    assert "changed" not in headline.extra
    assert headline.extra["note"] == "cheated"
    assert set(headline.extra["per_class"].values()) == {100.0}


def test_ap75_is_that_of_075(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes of 0.77 of each object's area: found at .5 to .75, so AP is 6 of 10."""

    def narrower(*arguments: Any) -> Any:
        found, notes = perfect(*arguments)
        cuts = [np.outer(d.boxes[:, 2] - d.boxes[:, 0], [0, 0, 0.23, 0]).astype(np.float32) for d in found]
        return [Detections(d.boxes - cut, d.scores, d.labels) for d, cut in zip(found, cuts, strict=True)], notes

    values = {r.metric: r.value for r in ran_with(monkeypatch, narrower) if r.setting["rule"] == "interpolated"}
    assert values == pytest.approx({"AP50": 100, "AP": 60, "AP75": 100})


def test_unreadable_images_and_absent_classes_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(*arguments: Any) -> Any:
        found, notes = perfect(*arguments)
        return [None, *found[1:]], notes

    (headline,) = (result for result in ran_with(monkeypatch, half) if result.headline)
    assert headline.value == pytest.approx(100)
    assert headline.extra["unreadable_test"] == 1


def test_auto_is_detectron2_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    assert resolve("auto") == resolve("torchvision") == "torchvision"
    with pytest.raises(ValueError, match=r"detectron2 is not installed.*use engine=torchvision"):
        resolve("detectron2")
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: object())
    assert resolve("auto") == resolve("detectron2") == "detectron2"
    assert resolve("torchvision") == "torchvision"


def test_the_training_set_decides_on_the_numbers(tmp_path: Path) -> None:
    plain = DetectionVOC(protocol="paper")
    assert plain.settings("voc07").iterations == 12_500
    assert plain.settings("voc07+12").iterations == 25_000
    assert DetectionVOC(protocol="paper", train_set="voc07").settings("voc07+12").iterations == 12_500
    assert plain.settings("voc07").name == "paper"
    assert DetectionVOC(**TINY).settings("voc07").name == "moco*"


def test_voc0712_takes_the_numbers_of_both_years(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = {"a": [("cat", (5, 5, 40, 40), False)]}
    devkit(tmp_path, images)
    devkit(tmp_path, images, "test")
    devkit(tmp_path, images, year="VOC2012")
    train, test = (
        build("dataset", {"name": "voc0712", "root": str(tmp_path), "split": split}) for split in ("trainval", "test")
    )
    monkeypatch.setattr("pirl_plugin.benchmarks.detection.torchvision_engine.train_and_detect", perfect)
    (headline,) = (r for r in DetectionVOC(engine="torchvision").run(context(train, test)) if r.headline)
    assert headline.setting["train_set"] == "voc07+12"
    assert headline.extra["numbers"]["iterations"] == 25_000
    assert (headline.extra["num_train"], headline.extra["num_test"]) == (2, 1)
    assert sum(value is not None for value in headline.extra["per_class"].values()) == 1


def test_mistakes_in_the_data_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="different classes"):
        list(DetectionVOC(**TINY).run(context(scenes(num_classes=3), scenes())))
    root = devkit(tmp_path, {"a": [("cat", (5, 5, 40, 40), False)]})
    devkit(tmp_path, {"b": [("cat", (5, 5, 40, 40), True)]}, "test")
    train, test = (build("dataset", {"name": "voc", "root": root, "split": split}) for split in ("trainval", "test"))
    with pytest.raises(ValueError, match="no object that counts"):
        list(DetectionVOC(**TINY).run(context(train, test)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "papr"}, "Did you mean 'paper'"),
        ({"iterations": 0}, "greater than or equal to 1"),
        ({"engine": "mmdet"}, "'auto', 'detectron2' or 'torchvision'"),
        ({"anchor_sizes": []}, "at least 1 item"),
        ({"anchor_size": [3.0]}, "unknown key. Did you mean 'anchor_sizes'"),
    ],
)
def test_mistakes_in_the_configuration(change: dict[str, Any], message: str) -> None:
    problems = check("benchmark", {"name": "detection_voc", **change})
    assert len(problems) == 1
    assert message in str(problems[0])
    with pytest.raises(ConfigError):
        run_benchmark(config(benchmark=change))


def test_it_is_registered() -> None:
    assert lookup("benchmark", "detection_voc") is DetectionVOC
