"""Average precision: worked out by hand, against brute force over thresholds and scikit-learn, ties, ignored images."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from pirl_plugin.benchmarks.average_precision import (
    area_under,
    average_precision,
    average_precisions,
    mean_average_precision,
    precision_recall,
)

RULES = ["interpolated", "eleven_point", "step"]


def slow(scores, labels, rule) -> float:
    """Straight from the definitions, in exact fractions: every threshold, every recall level."""
    pairs = [(s, y) for s, y in zip(scores, labels, strict=True) if y != 0]
    positives = sum(y == 1 for _, y in pairs)
    curve = []
    for threshold in sorted({s for s, _ in pairs}, reverse=True):
        taken = [y for s, y in pairs if s >= threshold]
        hits = sum(y == 1 for y in taken)
        curve.append((Fraction(hits, positives), Fraction(hits, len(taken))))

    def best(recall: Fraction) -> Fraction:
        return max((p for r, p in curve if r >= recall), default=Fraction(0))

    if rule == "eleven_point":
        return float(sum(best(Fraction(k, 10)) for k in range(11)) / 11)
    total, before = Fraction(0), Fraction(0)
    for recall, precision in curve:
        total += (recall - before) * (best(recall) if rule == "interpolated" else precision)
        before = recall
    return float(total)


def test_by_hand():
    """Ranked + - + - -: recall 1/2, 1/2, 1, 1, 1; precision 1, 1/2, 2/3, 1/2, 2/5.

    step: 1/2 * 1 + 1/2 * 2/3 = 5/6; interpolated the same, as nothing later is better. Eleven points: precision 1 for
    the six recalls up to 0.5, 2/3 for the five above: (6 + 10/3) / 11 = 28/33.
    """
    scores, labels = [5, 4, 3, 2, 1], [1, -1, 1, -1, -1]
    assert average_precision(scores, labels, "step") == pytest.approx(5 / 6)
    assert average_precision(scores, labels, "interpolated") == pytest.approx(5 / 6)
    assert average_precision(scores, labels, "eleven_point") == pytest.approx(28 / 33)


def test_interpolation_by_hand():
    """Ranked - + +: precision 0, 1/2, 2/3 at recall 0, 1/2, 1.

    step: (1/2 + 2/3) / 2 = 7/12. Interpolated, 2/3 holds at every recall below 1 too: 2/3 by both rules.
    """
    scores, labels = [3, 2, 1], [-1, 1, 1]
    assert average_precision(scores, labels, "step") == pytest.approx(7 / 12)
    assert average_precision(scores, labels, "interpolated") == pytest.approx(2 / 3)
    assert average_precision(scores, labels, "eleven_point") == pytest.approx(2 / 3)


def test_ties_by_hand():
    """+ above a tie of + - -: thresholds give (1/2, 1) and (1, 2/4); whatever the order within the tie."""
    for tied in ([1, -1, -1], [-1, 1, -1], [-1, -1, 1]):
        labels = [1, *tied]
        assert average_precision([2, 1, 1, 1], labels, "step") == pytest.approx(3 / 4)
        assert average_precision([2, 1, 1, 1], labels, "interpolated") == pytest.approx(3 / 4)
        assert average_precision([2, 1, 1, 1], labels, "eleven_point") == pytest.approx((6 + 5 / 2) / 11)


@pytest.mark.parametrize("rule", RULES)
def test_constant_scores_give_the_share_of_positives(rule):
    assert average_precision(np.zeros(10), [1] * 3 + [-1] * 7, rule) == pytest.approx(0.3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("labels", [[1, 1, 1], [1]])
def test_only_positives_are_found_perfectly(rule, labels):
    assert average_precision(range(len(labels)), labels, rule) == 1


def test_a_recall_of_exactly_a_tenth_reaches_its_point():
    """Ten positives, the first three ahead of 90 negatives: precision 1 at the recalls 0, 0.1, 0.2 AND 0.3.

    The remaining seven come last: at recall 1 precision is 10/100.
    """
    labels = [1] * 3 + [-1] * 90 + [1] * 7
    assert average_precision(-np.arange(100), labels, "eleven_point") == pytest.approx((4 + 7 / 10) / 11)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("levels", [2, 5, 1000], ids=lambda levels: f"{levels} levels")
def test_agrees_with_brute_force(rule, levels):
    rng = np.random.default_rng(levels)
    for count in (1, 2, 3, 10, 60):
        for _ in range(6):
            scores = rng.integers(0, levels, count) / 7 - 3
            labels = rng.choice([-1, -1, 0, 1], count)
            labels[rng.integers(count)] = 1
            expected = slow(scores.tolist(), labels.tolist(), rule)
            assert average_precision(scores, labels, rule) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("levels", [3, 1000])
def test_step_is_scikit_learns(levels):
    rng = np.random.default_rng(levels)
    for count in (2, 20, 200):
        scores, labels = rng.integers(0, levels, count).astype(float), rng.choice([-1, 1], count)
        labels[0] = 1
        assert average_precision(scores, labels, "step") == pytest.approx(average_precision_score(labels == 1, scores))


@pytest.mark.parametrize("rule", RULES)
def test_order_and_scale_do_not_matter(rule):
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 50).astype(float), rng.choice([-1, 0, 1], 50)
    expected = average_precision(scores, labels, rule)
    for _ in range(5):
        order = rng.permutation(50)
        assert average_precision(1e6 * scores[order] - 3, labels[order], rule) == expected


@pytest.mark.parametrize("rule", RULES)
def test_ignored_images_change_nothing_wherever_they_stand(rule):
    scores, labels = np.array([4.0, 3.0, 2.0, 1.0]), np.array([-1, 1, -1, 1])
    expected = average_precision(scores, labels, rule)
    with_ignored = np.append(scores, [9.0, 3.0, 0.0]), np.append(labels, [0, 0, 0])
    assert average_precision(*with_ignored, rule) == expected
    as_negatives = average_precision(with_ignored[0], np.append(labels, [-1, -1, -1]), rule)
    assert as_negatives < expected


def test_precision_and_recall_by_hand():
    recall, precision = precision_recall([0.9, 0.8, 0.8, 0.1], [-1, 1, -1, 1])
    assert recall.tolist() == [0, 1 / 2, 1]
    assert precision.tolist() == [0, 1 / 3, 2 / 4]


def test_mean_with_difficult_labels_by_hand():
    """Class 0: the difficult image on top is dropped: + - gives 1. Class 1: - + gives 1/2. Mean 3/4."""
    scores = np.array([[9.0, 1.0], [2.0, 7.0], [1.0, 5.0]])
    labels = np.array([[0, 0], [1, -1], [-1, 1]])
    assert average_precisions(scores, labels).tolist() == [1, 1 / 2]
    assert mean_average_precision(scores, labels) == 3 / 4
    as_negative = np.where(labels == 0, -1, labels)
    assert mean_average_precision(scores, as_negative) == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_a_class_without_positives_is_left_out_of_the_mean():
    scores = np.array([[2.0, 1.0], [1.0, 2.0]])
    found = average_precisions(scores, np.array([[1, -1], [-1, 0]]))
    assert found[0] == 1
    assert np.isnan(found[1])
    assert mean_average_precision(scores, np.array([[1, -1], [-1, 0]])) == 1
    with pytest.raises(ValueError, match="none of the 2 classes has a positive"):
        mean_average_precision(scores, np.full((2, 2), -1))


def test_a_curve_that_ends_early_counts_nothing_beyond_its_end():
    """A detector that finds half of the objects, all right: 1/2; eleven points: six of eleven recalls."""
    assert area_under([1 / 4, 1 / 2], [1, 1], "interpolated") == 1 / 2
    assert area_under([1 / 4, 1 / 2], [1, 1], "step") == 1 / 2
    assert area_under([1 / 4, 1 / 2], [1, 1], "eleven_point") == pytest.approx(6 / 11)
    assert [area_under([], [], rule) for rule in RULES] == [0, 0, 0]


def test_a_wrong_detection_adds_a_point_of_equal_recall():
    """tp fp tp of two objects: recall 1/2, 1/2, 1; precision 1, 1/2, 2/3."""
    assert area_under([1 / 2, 1 / 2, 1], [1, 1 / 2, 2 / 3], "interpolated") == pytest.approx(5 / 6)
    assert area_under([1 / 2, 1 / 2, 1], [1, 1 / 2, 2 / 3], "eleven_point") == pytest.approx((6 + 10 / 3) / 11)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1, 2], [-1, -1], "no positive"),
        ([1, 2], [0, -1], "no positive"),
        ([1, 2], [1, 2], "labels must be 1, -1 or 0"),
        ([1, np.nan], [1, -1], "NaN"),
        ([1, 2, 3], [1, -1], "do not fit"),
        ([], [], "no positive"),
    ],
)
def test_what_has_no_average_precision_is_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        average_precision(scores, labels)


def test_wrong_curves_and_rules_are_refused():
    with pytest.raises(ValueError, match="never fall"):
        area_under([0.5, 0.4], [1, 1], "step")
    with pytest.raises(ValueError, match="never fall"):
        area_under([np.nan], [0], "interpolated")
    with pytest.raises(ValueError, match="do not fit"):
        area_under([0.5], [1, 1], "step")
    with pytest.raises(ValueError, match="rule must be one of interpolated, eleven_point, step, got '11'"):
        area_under([0.5], [1], "11")
    with pytest.raises(ValueError, match=r"\(N, C\)"):
        mean_average_precision([1, 2], [1, -1])
