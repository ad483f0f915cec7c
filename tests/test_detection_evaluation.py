"""Average precision of detections: hand-worked cases, slow independent versions, and pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence

import numpy as np
import pytest

from pirl_plugin.benchmarks.detection.engine import Detections
from pirl_plugin.benchmarks.detection.evaluation import (
    IOU_THRESHOLDS,
    coco_average_precision,
    overlaps,
    voc_average_precision,
)
from pirl_plugin.benchmarks.detection.voc import Example

Box = Sequence[float]


def example(*objects: tuple[Box, int] | tuple[Box, int, bool]) -> Example:
    return Example(
        "image",
        np.array([item[0] for item in objects], dtype=np.float32).reshape(-1, 4),
        np.array([item[1] for item in objects], dtype=np.int64),
        np.array([item[2] if len(item) > 2 else False for item in objects], dtype=bool),
    )


def found(*detections: tuple[Box, int, float]) -> Detections:
    return Detections(
        np.array([item[0] for item in detections], dtype=np.float32).reshape(-1, 4),
        np.array([item[2] for item in detections], dtype=np.float32),
        np.array([item[1] for item in detections], dtype=np.int64),
    )


def ap50(examples: list[Example], detections: list[Detections | None], rule: str = "interpolated") -> float:
    return float(voc_average_precision(examples, detections, 1, rule, [0.5])[0, 0])  # type: ignore[arg-type]


UNIT, FAR = (0, 0, 10, 10), (50, 50, 60, 60)


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_overlaps_by_hand() -> None:
    """10 x 10 and 10 x 10 shifted by 5: shared 50 of 150; a box of 2 x 5 within the first: 10 of 100, wholly inside."""
    iou, inside = overlaps([(0, 0, 10, 10), (1, 1, 3, 6)], [(5, 0, 15, 10), (0, 0, 10, 10), (90, 90, 99, 99)])
    np.testing.assert_allclose(iou, [[1 / 3, 1, 0], [0, 0.1, 0]])
    np.testing.assert_allclose(inside, [[0.5, 1, 0], [0, 1, 0]])


def test_the_overlap_is_that_of_vocs_inclusive_pixels() -> None:
    """VOC's files say xmin, ymin, xmax, ymax with both ends inside; its code adds 1 to each width."""
    rng = np.random.default_rng(0)
    low = rng.integers(1, 50, (2, 20, 2))
    a, b = np.concatenate([low, low + rng.integers(1, 40, low.shape)], axis=-1)
    iou, _ = overlaps(a - [1, 1, 0, 0], b - [1, 1, 0, 0])
    for i in range(20):
        for j in range(20):
            width = max(0, min(a[i, 2], b[j, 2]) - max(a[i, 0], b[j, 0]) + 1)
            height = max(0, min(a[i, 3], b[j, 3]) - max(a[i, 1], b[j, 1]) + 1)
            areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (a[i], b[j])]
            assert iou[i, j] == pytest.approx(width * height / (sum(areas) - width * height))


def test_voc_by_hand() -> None:
    """Right, wrong, right on three objects: precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3; the third is never found.

    Area: 1/3 * 1 + 1/3 * 2/3 = 5/9. Eleven points: 1 at 0, .1, .2, .3; 2/3 at .4, .5, .6; 0 beyond: 6 / 11.
    """
    examples = [example((UNIT, 0), (FAR, 0)), example((UNIT, 0))]
    detections = [found((UNIT, 0, 0.9), ((80, 80, 90, 90), 0, 0.8)), found((UNIT, 0, 0.7))]
    assert ap50(examples, detections) == pytest.approx(5 / 9)
    assert ap50(examples, detections, "eleven_point") == pytest.approx(6 / 11)


def test_a_recall_of_three_tenths_reaches_the_third_level() -> None:
    """Three of ten objects found, nothing else: precision 1 at 0, .1, .2, .3, so 4 / 11."""
    examples = [example((UNIT, 0)) for _ in range(10)]
    detections: list[Detections | None] = [found((UNIT, 0, 0.9)) for _ in range(3)] + [found() for _ in range(7)]
    assert ap50(examples, detections, "eleven_point") == pytest.approx(4 / 11)


def test_an_object_is_found_once() -> None:
    """A second detection of the same object is wrong, however good: with a miss before it, recall 1 at precision 1."""
    assert ap50([example((UNIT, 0))], [found((UNIT, 0, 0.9), (UNIT, 0, 0.8))]) == pytest.approx(1)
    two = [example((UNIT, 0), (FAR, 0))]
    doubled = [found((UNIT, 0, 0.9), (UNIT, 0, 0.8), (FAR, 0, 0.7))]
    assert ap50(two, doubled) == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)


def test_a_detection_goes_with_the_object_that_it_overlaps_most() -> None:
    """VOC: the second detection overlaps the found object most, so it does not take the free one (COCO's would)."""
    near = (0, 0, 10, 13)
    objects = [example((UNIT, 0), (near, 0))]
    detections = [found((UNIT, 0, 0.9), ((0, 0, 10, 10.5), 0, 0.8))]
    assert ap50(objects, detections) == pytest.approx(1 / 2)
    assert coco_average_precision(objects, detections, 1)["AP50"] == pytest.approx((51 / 101) * 1 + 50 / 101 * 1)


def test_difficult_objects_count_neither_way() -> None:
    """However many detections sit on one; and it is no object to be found."""
    examples = [example((UNIT, 0, True), (FAR, 0))]
    detections = [found((UNIT, 0, 0.9), (UNIT, 0, 0.8), (FAR, 0, 0.7))]
    assert ap50(examples, detections) == pytest.approx(1)
    assert np.isnan(ap50([example((UNIT, 0, True))], [found((UNIT, 0, 0.9))]))
    assert coco_average_precision(examples, detections, 1)["AP50"] == pytest.approx(1)


def test_the_overlap_must_be_above_the_threshold() -> None:
    """IoU of exactly 0.5: half of the object. Not found by VOC's rule here, found by COCO's."""
    half = [found(((0, 0, 5, 10), 0, 0.9))]
    assert ap50([example((UNIT, 0))], half) == 0
    assert ap50([example((UNIT, 0))], [found(((0, 0, 5.01, 10), 0, 0.9))]) == 1
    assert coco_average_precision([example((UNIT, 0))], half, 1)["AP50"] == 1


def test_thresholds_and_classes() -> None:
    """IoU 0.8 is above six thresholds (.5 to .75) and below the rest; class 1 has no object, class 2 is not found."""
    examples = [example((UNIT, 0), (UNIT, 2))]
    ap = voc_average_precision(examples, [found(((0, 0, 8.001, 10), 0, 0.5), (FAR, 1, 0.9))], 3)
    np.testing.assert_allclose(ap[:, 0], [1] * 7 + [0] * 3)
    assert np.isnan(ap[:, 1]).all()
    np.testing.assert_array_equal(ap[:, 2], 0)


def test_unreadable_images_are_left_out_with_their_objects() -> None:
    examples = [example((UNIT, 0)), example((UNIT, 0))]
    assert ap50(examples, [found((UNIT, 0, 0.9)), None]) == 1
    assert ap50(examples, [found((UNIT, 0, 0.9)), found()]) == pytest.approx(1 / 2)
    assert coco_average_precision(examples, [found((UNIT, 0, 0.9)), None], 1)["AP50"] == 1


def test_nothing_found_is_zero() -> None:
    examples = [example((UNIT, 0))]
    assert ap50(examples, [found()]) == 0
    assert coco_average_precision(examples, [found()], 1) == {"AP": 0, "AP50": 0, "AP75": 0, "APs": 0}


def test_what_cannot_be_evaluated() -> None:
    with pytest.raises(ValueError, match="2 examples and 1 detections"):
        ap50([example(), example()], [found()])
    with pytest.raises(ValueError, match="NaN: the detector has diverged"):
        ap50([example((UNIT, 0))], [found((UNIT, 0, float("nan")))])


# -- against slow versions ---------------------------------------------------------------------------------------------


def scene(seed: int, images: int = 12, classes: int = 3) -> tuple[list[Example], list[Detections]]:
    """Random objects, and detections that are shifted copies of some, repeated, of wrong classes or anywhere."""
    rng = np.random.default_rng(seed)
    examples, detections = [], []
    for _ in range(images):
        low = rng.uniform(0, 150, (rng.integers(0, 6), 2))
        boxes = np.concatenate([low, low + rng.uniform(5, 130, (len(low), 1)) * rng.uniform(0.5, 1, low.shape)], axis=1)
        labels = rng.integers(0, classes, len(boxes))
        examples.append(example(*zip(boxes, labels, rng.random(len(boxes)) < 0.2, strict=True)))
        copies = np.repeat(np.arange(len(boxes)), 3)
        size = np.repeat(boxes[copies, 2:] - boxes[copies, :2], 2, axis=1)
        near = boxes[copies] + rng.normal(0, 0.05, (len(copies), 4)) * size
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        its = np.where(rng.random(len(copies)) < 0.2, rng.integers(0, classes, len(copies)), labels[copies])
        anywhere = rng.uniform(0, 100, (4, 2))
        all_boxes = np.concatenate([near, np.concatenate([anywhere, anywhere + rng.uniform(1, 90, (4, 2))], axis=1)])
        all_labels = np.concatenate([its, rng.integers(0, classes, 4)])
        keep = rng.random(len(all_boxes)) < 0.7
        detections.append(found(*zip(all_boxes[keep], all_labels[keep], rng.random(int(keep.sum())), strict=True)))
    return examples, detections


def slow_iou(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height)


def slow_voc(examples: list[Example], detections: list[Detections], label: int, threshold: float, rule: str) -> float:
    """One detection after the other, sets and fractions; nothing is shared with the package."""
    claims = sorted(
        (
            (float(d.scores[k]), -i, d.boxes[k].tolist())
            for i, d in enumerate(detections)
            for k in np.flatnonzero(d.labels == label)
        ),
        reverse=True,
    )
    objects = {
        i: [(e.boxes[k].tolist(), bool(e.difficult[k])) for k in np.flatnonzero(e.labels == label)]
        for i, e in enumerate(examples)
    }
    total = sum(not hard for items in objects.values() for _, hard in items)
    if total == 0:
        return float("nan")
    taken, points, right, wrong = set(), [], 0, 0
    for _, minus_image, box in claims:
        best, where = 0.0, None
        for number, (other, _) in enumerate(objects[-minus_image]):
            if slow_iou(box, other) > best:
                best, where = slow_iou(box, other), number
        if where is None or best <= threshold:
            wrong += 1
        elif not objects[-minus_image][where][1]:
            key = (minus_image, where)
            right, wrong = (right, wrong + 1) if key in taken else (right + 1, wrong)
            taken.add(key)
        if right + wrong:
            points.append((right, right / (right + wrong)))

    def best_from(count: float) -> float:
        return max((precision for hits, precision in points if hits >= count - 1e-9), default=0.0)

    if rule == "eleven_point":
        return sum(best_from(total * k / 10) for k in range(11)) / 11
    return sum(best_from(hit) for hit in range(1, total + 1)) / total


@pytest.mark.parametrize("rule", ["eleven_point", "interpolated"])
@pytest.mark.parametrize("seed", range(4))
def test_voc_against_the_slow_version(seed: int, rule: str) -> None:
    examples, detections = scene(seed)
    fast = voc_average_precision(examples, detections, 3, rule)  # type: ignore[arg-type]
    slow = [[slow_voc(examples, detections, c, t, rule) for c in range(3)] for t in IOU_THRESHOLDS]
    np.testing.assert_allclose(fast, slow, atol=1e-12)
    assert 0.02 < np.nanmean(fast) < 0.98  # it says something


def pycoco(examples: list[Example], detections: list[Detections], classes: int) -> dict[str, float]:
    tools, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")

    def width_height(box: np.ndarray) -> list[float]:
        x0, y0, x1, y1 = box.astype(np.float64).tolist()
        return [x0, y0, x1 - x0, y1 - y0]

    annotations, results = [], []
    for image, (truth, detected) in enumerate(zip(examples, detections, strict=True), start=1):
        for box, label, difficult in zip(truth.boxes, truth.labels, truth.difficult, strict=True):
            bbox = width_height(box)
            annotation = {"id": len(annotations) + 1, "image_id": image, "category_id": int(label) + 1, "bbox": bbox}
            annotations.append({**annotation, "area": bbox[2] * bbox[3], "iscrowd": int(difficult)})
        for box, score, label in zip(detected.boxes, detected.scores, detected.labels, strict=True):
            claim = {"image_id": image, "category_id": int(label) + 1, "bbox": width_height(box)}
            results.append({**claim, "score": float(score)})
    with contextlib.redirect_stdout(io.StringIO()):
        truth_set = tools.COCO()
        truth_set.dataset = {
            "images": [{"id": image} for image in range(1, len(examples) + 1)],
            "categories": [{"id": c + 1} for c in range(classes)],
            "annotations": annotations,
        }
        truth_set.createIndex()
        run = evaluation.COCOeval(truth_set, truth_set.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    return {name: float(value) for name, value in zip(names, run.stats[:6], strict=True) if value >= 0}


@pytest.mark.parametrize("seed", range(6))
def test_coco_agrees_with_pycocotools(seed: int) -> None:
    examples, detections = scene(seed, images=40)
    ours, theirs = coco_average_precision(examples, detections, 3), pycoco(examples, detections, 3)
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert len(ours) == 6
    assert all(0.02 < value < 0.98 for value in ours.values())


def test_coco_agrees_with_pycocotools_on_ties_crowds_and_many_detections() -> None:
    """Equal scores, 151 detections of one image, a class without objects, one without detections.

    In the last image the first detection overlaps two objects equally; only if it takes the second does the next one,
    which overlaps the first alone, find an object.
    """
    rng = np.random.default_rng(1)
    many = [((x, 0, x + 10, 10), 0, round(float(rng.random()), 1)) for x in np.linspace(0, 100, 150)]
    examples = [
        example(*(((x, 0, x + 10, 10), 0, x % 3 == 0) for x in range(0, 100, 10)), ((200, 0, 210, 10), 0)),
        example((UNIT, 0), (UNIT, 0), (FAR, 0)),
        example((UNIT, 0, True), ((2, 2, 6, 6), 0), (FAR, 2)),
        example(),
        example((UNIT, 0), ((2, 0, 12, 10), 0)),
    ]
    detections = [
        found(*many, ((200, 0, 210, 10), 0, 0.01)),
        found((UNIT, 0, 0.5), (UNIT, 0, 0.5), (UNIT, 0, 0.5), (FAR, 0, 0.5)),
        found(((1, 1, 7, 7), 0, 0.5), ((2, 2, 6, 6), 0, 0.4), (UNIT, 1, 0.9)),
        found((UNIT, 0, 0.95)),
        found(((1, 0, 11, 10), 0, 0.97), ((0, 0, 7, 10), 0, 0.96)),
    ]
    ours = coco_average_precision(examples, detections, 3)
    assert ours == pytest.approx(pycoco(examples, detections, 3), abs=1e-6)
    assert set(ours) == {"AP", "AP50", "AP75", "APs"}
