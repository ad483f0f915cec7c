"""Images, boxes and average precision against detectron2's own reader, mapper and evaluator."""
# ruff: noqa: E402  (what imports detectron2 comes after the question whether there is one)

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

detectron2 = pytest.importorskip(
    "detectron2", reason="detectron2 is not installed: it is on no package index, see docs/benchmarks.md, Detection"
)

from detectron2.config import get_cfg
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng
from detectron2_world import OBJECTS, RESNET18, a_context, a_devkit, a_trunk, examples_of, small, write_annotation

from pirl_plugin.benchmarks.detection import detectron2_engine as engine
from pirl_plugin.benchmarks.detection.detectron2_config import options
from pirl_plugin.benchmarks.detection.engine import Detections
from pirl_plugin.benchmarks.detection.evaluation import IOU_THRESHOLDS, voc_average_precision
from pirl_plugin.data.voc import VOC_CLASSES


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    return a_devkit(tmp_path)


def test_records_are_those_of_detectron2s_own_reader_without_boxes_that_have_no_area(devkit: Path) -> None:
    theirs = load_voc_instances(str(devkit), "train", VOC_CLASSES)
    theirs[1]["annotations"].pop(1)
    ours = engine.records(examples_of(devkit))
    assert [record["annotations"] for record in ours] == [record["annotations"] for record in theirs]
    assert [record["image_id"] for record in ours] == [0, 1, 2, 3]
    assert len(ours[0]["annotations"]) == 2  # the difficult one is trained on, too


@pytest.mark.parametrize("training", [True, False])
def test_an_image_is_prepared_as_by_detectron2s_own_mapper(devkit: Path, training: bool) -> None:
    settings = small(train_min_sizes=[40, 56, 90], train_max_size=100, min_size=None)
    cfg = get_cfg()
    cfg.merge_from_list([part for item in options(settings, RESNET18, 20, "BN").items() for part in item])
    examples = examples_of(devkit)
    theirs, ours = DatasetMapper(cfg, training), engine.Mapper(examples, settings, training)
    flipped = 0
    for seed in range(8):
        for index, record in enumerate(load_voc_instances(str(devkit), "train", VOC_CLASSES)[:3]):
            record["annotations"] = [item for item in record["annotations"] if item["bbox"][2] - item["bbox"][0] > 1]
            seed_all_rng(seed)
            expected = theirs(record)
            seed_all_rng(seed)
            mapped = ours({"image_id": index})
            assert torch.equal(mapped["image"], expected["image"])
            assert (mapped["width"], mapped["height"], mapped["unreadable"]) == (64, 50, False)
            if training:
                torch.testing.assert_close(
                    mapped["instances"].gt_boxes.tensor, expected["instances"].gt_boxes.tensor, rtol=0, atol=1e-4
                )
                assert mapped["instances"].gt_classes.tolist() == expected["instances"].gt_classes.tolist()
                flipped += bool(mapped["instances"].gt_boxes.tensor[0, 0] != expected_left(index, mapped))
            else:
                assert "instances" not in mapped
    assert not training or 0 < flipped < 24


def expected_left(index: int, mapped: dict[str, Any]) -> float:
    """Left edge of the image's first box where it is not flipped."""
    return float(np.float32((list(OBJECTS.values())[index][0][2] - 1) * mapped["image"].shape[2] / 64))


def test_an_unreadable_image(devkit: Path) -> None:
    """Another one stands in, in training with its own objects; a test leaves it out."""
    (devkit / "JPEGImages" / "000001.jpg").write_bytes(b"damaged")
    examples = examples_of(devkit)
    mapped = engine.Mapper(examples, small(), training=True)({"image_id": 0})
    assert mapped["unreadable"]
    assert [VOC_CLASSES[label] for label in mapped["instances"].gt_classes.tolist()] == ["person"]
    trunk = a_trunk()
    found, notes = engine.train_and_detect(
        trunk, RESNET18, examples, examples_of(devkit, "test"), small(iterations=3), a_context(trunk)
    )
    assert [detections is None for detections in found] == [True, False, False, False]
    assert notes["unreadable_train"] >= 1


@pytest.mark.parametrize(("year", "rule"), [(2007, "eleven_point"), (2012, "interpolated")])
def test_our_ap_is_that_of_detectron2s_evaluator(year: int, rule: Any, tmp_path: Path) -> None:
    """On the same detections. It writes scores with three decimals and boxes with one: so are these.

    Numbers of objects are not multiples of ten, where its recalls miss the levels 0.3, 0.6 and 0.7 by rounding.
    """
    rng = np.random.default_rng(4)
    names = [f"{number:06d}" for number in range(40)]
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("\n".join(names))
    kinds, left = VOC_CLASSES[:3], [17, 23, 11]
    found: list[Detections] = []
    scores = iter(rng.permutation(np.arange(60, 999)) / 1000)
    for name in names:
        objects, rows = [], []
        for _ in range(rng.integers(0, 4)):
            label = int(rng.integers(3))
            x, y = rng.integers(1, 30, 2)
            w, h = rng.integers(5, 30, 2)
            difficult = int(rng.random() < 0.2) if left[label] > 0 else 1
            left[label] -= 1 - difficult
            objects.append((kinds[label], difficult, int(x), int(y), int(x + w), int(y + h)))
            for _ in range(rng.integers(0, 3)):
                noise = rng.normal(0, 0.15 * min(w, h), 4).round(1)
                rows.append((np.array([x - 1, y - 1, x + w, y + h]) + noise, label, next(scores)))
        rows += [(rng.integers([0, 0, 21, 21], [20, 20, 41, 41]), int(rng.integers(3)), next(scores))] * (
            rng.random() < 0.5
        )
        write_annotation(tmp_path / "Annotations" / f"{name}.xml", objects)
        Image.new("RGB", (64, 64)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        found.append(
            Detections(
                np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
                np.array([row[2] for row in rows], np.float32),
                np.array([row[1] for row in rows], np.int64),
            )
        )
    examples = examples_of(tmp_path, "test")
    totals = [sum(int(((e.labels == label) & ~e.difficult).sum()) for e in examples) for label in range(3)]
    assert all(total % 10 for total in totals)
    assert min(totals) > 5
    MetadataCatalog.get(f"ours_{year}").set(thing_classes=kinds, dirname=str(tmp_path), split="test", year=year)
    evaluator = PascalVOCDetectionEvaluator(f"ours_{year}")
    evaluator.reset()
    for name, detections in zip(names, found, strict=True):
        instances = Instances((64, 64))
        instances.pred_boxes = Boxes(torch.from_numpy(detections.boxes))
        instances.scores = torch.from_numpy(detections.scores)
        instances.pred_classes = torch.from_numpy(detections.labels)
        evaluator.process([{"image_id": name}], [{"instances": instances}])
    theirs = evaluator.evaluate()["bbox"]
    ours = 100 * voc_average_precision(list(examples), found, 3, rule)
    assert 20 < theirs["AP50"] < 95
    assert ours[0].mean() == pytest.approx(theirs["AP50"], abs=1e-9)
    assert ours[np.isclose(IOU_THRESHOLDS, 0.75)].mean() == pytest.approx(theirs["AP75"], abs=1e-9)
    assert ours.mean() == pytest.approx(theirs["AP"], abs=1e-9)
    MetadataCatalog.remove(f"ours_{year}")
