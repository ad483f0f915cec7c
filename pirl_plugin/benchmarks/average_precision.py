"""Average precision by named rules: pure numpy, fractions in [0, 1].

What several sources call AP differs in how the precision-recall curve becomes one number:

* ``interpolated``: area under the curve whose precision at recall r is the best one at any recall >= r (VOC 2010 and
  later; what Goyal et al. 2019 and VISSL report on VOC07);
* ``eleven_point``: mean of that precision at recall 0, 0.1, ..., 1 (the rule of VOC 2007 itself);
* ``step``: sum of precision times step of recall, nothing interpolated (scikit-learn's ``average_precision``, by which
  the published protocols choose the SVM's cost).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

Rule = Literal["interpolated", "eleven_point", "step"]
Floats = npt.NDArray[np.float64]

# k / 10 is rounded like every other quotient, so that a recall of 3 / 10 reaches the third of them; 3 * 0.1 is larger
_ELEVEN_RECALLS = np.arange(11) / 10


def precision_recall(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Recall and precision at every threshold that the scores tell apart, from the highest to the lowest.

    Images of equal score are found together or not at all, so that neither their order nor a sort's habits matter.

    Args:
        scores: ``(N,)``, higher is likelier.
        labels: ``(N,)``: 1 positive, -1 negative, 0 ignored.

    Returns:
        Two arrays ``(T,)``; recall never falls and ends in 1.

    Raises:
        ValueError: no positive, other labels, shapes that do not fit, or scores that are not a number.
    """
    found, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if found.ndim != 1 or truth.shape != found.shape:
        raise ValueError(f"scores (N,) and labels (N,) do not fit: {found.shape}, {truth.shape}.")
    if not np.isin(truth, (-1, 0, 1)).all():
        raise ValueError(f"labels must be 1, -1 or 0 (ignored), got {np.unique(truth)[:5].tolist()}.")
    counted = truth != 0
    found, positive = found[counted], truth[counted] == 1
    if np.isnan(found).any():
        raise ValueError("the scores hold NaN: the classifier has diverged.")
    if not positive.any():
        raise ValueError("there is no positive, so that recall and average precision are not defined.")
    order = np.argsort(-found, kind="stable")
    found, hits = found[order], np.cumsum(positive[order])
    last_of_equals = np.append(np.flatnonzero(found[1:] != found[:-1]), len(found) - 1)
    hits = hits[last_of_equals]
    return hits / hits[-1], hits / (last_of_equals + 1)


def area_under(recall: npt.ArrayLike, precision: npt.ArrayLike, rule: Rule) -> float:
    """One number from a precision-recall curve, for classification and detection alike.

    Args:
        recall: ``(T,)``, never falling, from the highest threshold to the lowest; quotients in float64.
            It need not reach 1: the precision beyond its end is 0.
        precision: ``(T,)``, at the same thresholds.
        rule: see the module's text.

    Returns:
        In [0, 1]; 0 for an empty curve (nothing was found).

    Raises:
        ValueError: an unknown rule, arrays that do not fit, or a recall that falls or is not in [0, 1].
    """
    r, p = np.asarray(recall, dtype=np.float64), np.asarray(precision, dtype=np.float64)
    if r.ndim != 1 or r.shape != p.shape:
        raise ValueError(f"recall (T,) and precision (T,) do not fit: {r.shape}, {p.shape}.")
    steps = np.diff(r, prepend=0.0)
    if not (steps >= 0).all() or not (r <= 1).all():  # also refuses NaN, which is a recall among no positives
        raise ValueError("recall must be in [0, 1] and never fall from one threshold to the next lower one.")
    if rule == "step":
        return float(steps @ p)
    best = np.maximum.accumulate(p[::-1])[::-1]  # at this recall or a higher one
    if rule == "interpolated":
        return float(steps @ best)
    if rule == "eleven_point":
        at = np.searchsorted(r, _ELEVEN_RECALLS, side="left")
        return float(np.append(best, 0.0)[at].mean())
    raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, got {rule!r}.")


def average_precision(scores: npt.ArrayLike, labels: npt.ArrayLike, rule: Rule = "interpolated") -> float:
    """Average precision of one class, in [0, 1].

    Args:
        scores: ``(N,)``, higher is likelier.
        labels: ``(N,)``: 1 positive, -1 negative, 0 ignored (VOC: shown by difficult objects only).
        rule: see the module's text.

    Raises:
        ValueError: see ``precision_recall``.
    """
    return area_under(*precision_recall(scores, labels), rule)


def average_precisions(scores: npt.ArrayLike, labels: npt.ArrayLike, rule: Rule = "interpolated") -> Floats:
    """Average precision of each class, ``(C,)`` in [0, 1]; NaN for a class without a positive.

    Args:
        scores: ``(N, C)``.
        labels: ``(N, C)``: 1 positive, -1 negative, 0 ignored.
        rule: see the module's text.

    Raises:
        ValueError: see ``precision_recall``.
    """
    found, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if found.ndim != 2 or truth.shape != found.shape:
        raise ValueError(f"scores (N, C) and labels (N, C) do not fit: {found.shape}, {truth.shape}.")
    columns: list[Any] = [
        average_precision(found[:, c], truth[:, c], rule) if (truth[:, c] == 1).any() else np.nan
        for c in range(found.shape[1])
    ]
    return np.array(columns, dtype=np.float64)


def mean_average_precision(scores: npt.ArrayLike, labels: npt.ArrayLike, rule: Rule = "interpolated") -> float:
    """Mean of the classes' average precision, in [0, 1]; a class without a positive is left out.

    Args:
        scores: ``(N, C)``.
        labels: ``(N, C)``: 1 positive, -1 negative, 0 ignored.
        rule: see the module's text.

    Raises:
        ValueError: no class has a positive, and what ``precision_recall`` refuses.
    """
    found = average_precisions(scores, labels, rule)
    if np.isnan(found).all():
        raise ValueError(f"none of the {len(found)} classes has a positive: there is nothing to average.")
    return float(np.nanmean(found))
