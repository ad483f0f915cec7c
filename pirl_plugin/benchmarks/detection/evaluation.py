"""Average precision of detections, by PASCAL VOC's and by COCO's rules: pure numpy, whatever engine made them.

Boxes are x0 y0 x1 y1, measured from the image's corner, so that width is x1 - x0. VOC's files count pixels from 1 and
include both ends, and VOC's evaluation (detectron2's, too) therefore adds 1 to every width there; as our x0 is one less
than xmin, the overlaps are the same numbers. What is followed, and where sources differ:

* VOC: a detection goes with the object that it overlaps most; it is right if their IoU is ABOVE the threshold (as in
  detectron2; the devkit takes equality, too), the object is not difficult and nothing found it before. With a difficult
  object it counts neither way, however many do; everything else is wrong, second detections included.
* detectron2 writes scores with three decimals and boxes with one, and compares recalls with 0.1 k in floating point, so
  that k objects of ten do not reach the level k / 10 for k = 3, 6, 7. Neither is done here.
* COCO: 101 recall levels, each object found by the best free detection at an IoU of AT LEAST the threshold, at most 100
  detections of an image. Difficult objects are COCO's crowds: any number of detections inside them is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pirl_plugin.benchmarks.average_precision import Rule, area_under
from pirl_plugin.benchmarks.detection.engine import Detections
from pirl_plugin.benchmarks.detection.voc import Example

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]

IOU_THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
MAX_DETECTIONS = 100
COCO_AREAS = {"": (0.0, 1e10), "s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, 1e10)}
_COCO_RECALLS = np.linspace(0, 1, 101)


def overlaps(found: npt.ArrayLike, truth: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Intersection over union, and over the first box alone, of every pair: both ``(n, m)``.

    Args:
        found: boxes ``(n, 4)``.
        truth: boxes ``(m, 4)``.
    """
    a = np.asarray(found, dtype=np.float64).reshape(-1, 1, 4)
    b = np.asarray(truth, dtype=np.float64).reshape(1, -1, 4)
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    shared = sides.prod(axis=-1)
    area_a, area_b = ((box[..., 2:] - box[..., :2]).prod(axis=-1) for box in (a, b))
    union = area_a + area_b - shared
    iou = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    inside = np.divide(shared, np.broadcast_to(area_a, shared.shape), out=np.zeros_like(shared), where=area_a > 0)
    return iou, inside


def voc_average_precision(
    examples: Sequence[Example],
    detections: Sequence[Detections | None],
    num_classes: int,
    rule: Rule = "eleven_point",
    thresholds: Sequence[float] | Floats = IOU_THRESHOLDS,
) -> Floats:
    """Average precision of each IoU threshold and class, ``(T, C)`` in [0, 1]; NaN for a class without an object.

    Args:
        examples: the objects of each image.
        detections: what was found in each; an image with None is left out, its objects too.
        num_classes: C.
        rule: ``eleven_point`` (VOC 2007) or ``interpolated`` (the area; VOC 2010 and later).
        thresholds: an IoU must be above.

    Raises:
        ValueError: other numbers of examples and detections, or scores that are not a number.
    """
    pairs = readable(examples, detections)
    found = np.full((len(thresholds), num_classes), np.nan)
    for label in range(num_classes):
        matches = [_best_objects(example, detected, label) for example, detected in pairs]
        objects = sum(match.countable for match in matches)
        if objects == 0:
            continue
        scores = np.concatenate([match.scores for match in matches])
        order = np.argsort(-scores, kind="stable")
        first = np.cumsum([0, *(match.objects for match in matches)])  # objects are numbered through all images
        of = np.concatenate([match.index + start for match, start in zip(matches, first[:-1], strict=True)])[order]
        iou = np.concatenate([match.iou for match in matches])[order]
        difficult = np.concatenate([match.difficult for match in matches])[order]
        for row, threshold in enumerate(thresholds):
            right = _first_of_each(of, (iou > threshold) & ~difficult)
            wrong = ~right & ~((iou > threshold) & difficult)
            found[row, label] = _area(right, wrong, objects, rule)
    return found


@dataclass(frozen=True)
class _Matches:
    """Detections of one class in one image, in their order, and the object that each overlaps most."""

    scores: Floats
    index: Indices
    iou: Floats
    difficult: Bools
    objects: int
    countable: int


def _best_objects(example: Example, detected: Detections, label: int) -> _Matches:
    mine, theirs = example.labels == label, detected.labels == label
    difficult = example.difficult[mine]
    scores = detected.scores[theirs].astype(np.float64)
    if not mine.any():
        nothing = np.zeros(len(scores))
        return _Matches(scores, nothing.astype(np.int64), nothing, nothing.astype(bool), 0, 0)
    iou, _ = overlaps(detected.boxes[theirs], example.boxes[mine])
    best = iou.argmax(axis=1)
    top = iou[np.arange(len(best)), best]
    return _Matches(scores, best, top, difficult[best], len(difficult), int((~difficult).sum()))


def _first_of_each(values: Indices, counted: Bools) -> Bools:
    """Marks the first counted place of each value."""
    places = np.flatnonzero(counted)
    _, first = np.unique(values[places], return_index=True)
    marked = np.zeros(len(values), dtype=bool)
    marked[places[first]] = True
    return marked


def _area(right: Bools, wrong: Bools, objects: int, rule: Rule) -> float:
    counted = right | wrong  # ignored detections are no thresholds of the curve either
    hits = np.cumsum(right[counted])
    return area_under(hits / objects, hits / np.arange(1, len(hits) + 1), rule)


def coco_average_precision(
    examples: Sequence[Example], detections: Sequence[Detections | None], num_classes: int
) -> dict[str, float]:
    """COCO's ``AP``, ``AP50``, ``AP75``, ``APs``, ``APm`` and ``APl`` in [0, 1], means over the classes with objects.

    Small, medium and large are boxes of up to 32^2, up to 96^2 and more pixels. A number without any object is left
    out.

    Args:
        examples: the objects of each image.
        detections: what was found in each; an image with None is left out, its objects too.
        num_classes: number of classes.

    Raises:
        ValueError: other numbers of examples and detections, or scores that are not a number.
    """
    pairs = readable(examples, detections)
    found: dict[str, float] = {}
    for suffix, area in COCO_AREAS.items():
        of_classes = np.stack([_coco_class(pairs, label, area) for label in range(num_classes)])
        known = ~np.isnan(of_classes[:, 0])
        if known.any():
            means = of_classes[known].mean(axis=0)
            found[f"AP{suffix}"] = float(means.mean())
            if not suffix:
                found["AP50"], found["AP75"] = float(means[0]), float(means[5])
    return found


def _coco_class(pairs: Sequence[tuple[Example, Detections]], label: int, area: tuple[float, float]) -> Floats:
    """Average precision of one class and range of areas at each threshold, ``(T,)``; NaN without an object."""
    scores: list[Floats] = []
    right: list[Bools] = []
    wrong: list[Bools] = []
    objects = 0
    for example, detected in pairs:
        mine, theirs = example.labels == label, detected.labels == label
        if not (mine.any() or theirs.any()):
            continue
        order = np.argsort(-detected.scores[theirs].astype(np.float64), kind="stable")[:MAX_DETECTIONS]
        boxes, truth, crowd = detected.boxes[theirs][order], example.boxes[mine], example.difficult[mine]
        ignored = crowd | _outside(truth, area)
        hit, void = _coco_matches(boxes, truth, crowd, ignored)
        void |= ~hit & _outside(boxes, area)
        scores.append(detected.scores[theirs].astype(np.float64)[order])
        right.append(hit & ~void)
        wrong.append(~hit & ~void)
        objects += int((~ignored).sum())
    if objects == 0:
        return np.full(len(IOU_THRESHOLDS), np.nan)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hits, misses = (np.cumsum(np.concatenate(marks, axis=1)[:, order], axis=1) for marks in (right, wrong))
    return np.array([_at_101_recalls(h, m, objects) for h, m in zip(hits, misses, strict=True)])


def _coco_matches(
    boxes: npt.NDArray[np.float32], truth: npt.NDArray[np.float32], crowd: Bools, ignored: Bools
) -> tuple[Bools, Bools]:
    """Which detections, by falling score, found an object, and which of these an ignored one: ``(T, n)`` each.

    Each takes the object that it overlaps most among those still free, counted ones before ignored ones; a crowd is
    always free, and how much of the detection lies inside it is what counts there.
    """
    bounds = np.minimum(IOU_THRESHOLDS, 1 - 1e-10)[:, None]
    hit, void = (np.zeros((len(bounds), len(boxes)), dtype=bool) for _ in range(2))
    if len(truth) == 0:
        return hit, void
    iou, inside = overlaps(boxes, truth)
    overlap = np.where(crowd, inside, iou)
    rows = np.arange(len(bounds))
    free = np.ones((len(bounds), len(truth)), dtype=bool)
    for place, here in enumerate(overlap):
        near = (here >= bounds) & (free | crowd)
        counted = near & ~ignored
        eligible = np.where(counted.any(axis=1, keepdims=True), counted, near)
        # of equally good ones the last, as in COCO's own evaluation
        best = len(truth) - 1 - np.where(eligible, here, -1.0)[:, ::-1].argmax(axis=1)
        hit[:, place] = eligible.any(axis=1)
        void[:, place] = hit[:, place] & ignored[best]
        free[rows[hit[:, place]], best[hit[:, place]]] = False
    return hit, void


def _at_101_recalls(hits: Indices, misses: Indices, objects: int) -> float:
    precision = hits / np.maximum(hits + misses, 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(hits / objects, _COCO_RECALLS, side="left")
    return float(np.append(best, 0.0)[at].mean())


def _outside(boxes: npt.NDArray[np.float32], area: tuple[float, float]) -> Bools:
    sides = boxes[:, 2:].astype(np.float64) - boxes[:, :2]
    areas = sides.prod(axis=1)
    return (areas < area[0]) | (areas > area[1])


def readable(examples: Sequence[Example], detections: Sequence[Detections | None]) -> list[tuple[Example, Detections]]:
    """The images that could be read, with what was found in them.

    Raises:
        ValueError: other numbers of examples and detections, or scores that are not a number.
    """
    if len(examples) != len(detections):
        raise ValueError(f"{len(examples)} examples and {len(detections)} detections do not fit.")
    pairs = [(a, b) for a, b in zip(examples, detections, strict=True) if b is not None]
    if any(np.isnan(detected.scores).any() for _, detected in pairs):
        raise ValueError("the scores hold NaN: the detector has diverged; a smaller learning rate may help.")
    return pairs
