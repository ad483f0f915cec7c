"""The batched SVM solver against the objective itself, a hand-worked case and liblinear, on slow and quick spectra."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.svm import LinearSVC

from pirl_plugin.benchmarks.svm import newton as svm_newton
from pirl_plugin.benchmarks.svm.grid import COSTS, cross_validate, solve
from pirl_plugin.benchmarks.svm.problem import Problem, SVMSettings
from pirl_plugin.functional.squared_hinge import minimize_by_gram, minimize_together
from pirl_plugin.speed.svm import SPECTRA, Sizes, make_task, run

SMALL = Sizes(train=240, test=150, dims=60, classes=4, plain_classes=4)
NEWTON, LIBLINEAR = SVMSettings("newton"), SVMSettings("liblinear", num_jobs=1)


@pytest.fixture(params=["together", "by gram"])
def way(request, monkeypatch):
    """Both ways of the solver, whatever the sizes."""
    monkeypatch.setattr(svm_newton, "_PRODUCTS", 0 if request.param == "together" else 1e9)
    return request.param


@pytest.fixture(params=SPECTRA)
def task(request):
    return make_task(SMALL, SPECTRA[request.param])


def problems_of(task, costs=COSTS["vissl"], rows=None):
    rows = np.arange(len(task.train)) if rows is None else rows
    return [Problem(rows, labels[rows].astype(np.int8), costs) for labels in task.train_labels.T]


def objective(x, targets, cost):
    """``(|w|^2 + b^2) / 2 + sum of C_i max(0, 1 - y_i (w x_i + b))^2`` and its gradient, C_i = 2 C for positives."""
    weight, augmented = cost * np.where(targets == 1, 2, 1), np.append(x, np.ones((len(x), 1)), axis=1)

    def value(w):
        slack = np.maximum(0, 1 - targets * (augmented @ w))
        return w @ w / 2 + weight @ slack**2, w - 2 * augmented.T @ (weight * slack * targets)

    return value


# -- one fit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", [0.1, 2.0])
def test_one_point_by_hand(cost):
    """x = 2: f = w^2 / 2 + C (1 - 2 w)^2 is smallest at w = 4 C / (1 + 8 C)."""
    x, sign = torch.tensor([[2.0]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    w, steps = minimize_together(x, sign, cost * sign, torch.zeros_like(sign), 1e-10, 50)
    assert w.item() == pytest.approx(4 * cost / (1 + 8 * cost), rel=1e-9)
    assert 1 <= steps.item() <= 50
    coefficient, _ = minimize_by_gram(x @ x.T, sign[0], cost * sign[0], torch.zeros_like(sign[0]), 1e-10, 50)
    assert 2 * coefficient.item() == pytest.approx(w.item(), rel=1e-12)


@pytest.mark.parametrize("cost", [1e-5, 0.1, 20.0, 1000.0])
def test_the_separator_minimises_the_objective(way, task, cost):
    (one, *_) = problems_of(task, (cost,))
    (found,) = solve(task.train, [one], NEWTON)
    w, value = np.append(found.weights[0], found.biases[0]), objective(task.train, one.targets, cost)
    best = minimize(value, w, jac=True, method="L-BFGS-B", options={"maxiter": 20_000, "ftol": 1e-15, "gtol": 1e-12}).x
    assert np.linalg.norm(value(w)[1]) <= 1.01e-4 * np.linalg.norm(w)
    np.testing.assert_allclose(w, best, atol=1.1e-4 * np.linalg.norm(best))
    assert found.converged.all()


@pytest.mark.parametrize("cost", [0.1, 5.0, 1000.0])
def test_it_is_linear_svc(way, task, cost):
    """liblinear given time: at its usual tolerance and limit its own error at high costs is the larger one."""
    (one, *_) = problems_of(task, (cost,))
    theirs = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, tol=1e-9, max_iter=200_000, dual=True, random_state=0)
    theirs.fit(task.train, one.targets)
    (found,) = solve(task.train, [one], NEWTON)
    length = np.linalg.norm(theirs.coef_)
    np.testing.assert_allclose(found.weights, theirs.coef_, atol=2e-4 * length)
    np.testing.assert_allclose(found.biases, theirs.intercept_, atol=2e-4 * length)


# -- many fits ---------------------------------------------------------------------------------------------------------


@functools.lru_cache
def by_liblinear(spectrum):
    return run(make_task(SMALL, SPECTRA[spectrum]), range(SMALL.classes), LIBLINEAR)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_same_costs_are_chosen_and_the_same_map_found(way, spectrum):
    ours, theirs = run(make_task(SMALL, SPECTRA[spectrum]), range(SMALL.classes), NEWTON), by_liblinear(spectrum)
    assert ours.costs == theirs.costs
    assert len(set(ours.costs)) > 1
    assert np.mean(ours.precisions) == pytest.approx(np.mean(theirs.precisions), abs=0.02)  # percent; 0.1 is allowed


def test_fits_are_counted(way, task):
    found = cross_validate(task.train, problems_of(task, (0.1, 10.0)), 3, NEWTON, lambda items, *_: items)
    assert (found.fits, found.unconverged) == (4 * 3 * 2, 0)


def test_order_of_costs_rows_and_chunks_change_nothing(way, task, monkeypatch):
    """Each problem as if it were alone: other rows, other costs, unordered, in chunks of one, and asked for twice."""
    first, second, third, _ = problems_of(task, (0.1, 10.0))
    rows = np.arange(20, 200)
    part = Problem(rows, third.targets[rows], (50.0, 0.5, 5.0))
    asked = [first, part, second, first]
    alone = [next(solve(task.train, [one], NEWTON)) for one in asked]
    for size in (svm_newton._BYTES, 1):
        monkeypatch.setattr(svm_newton, "_BYTES", size)
        found = list(solve(task.train, asked, NEWTON))
        for ours, expected in zip(found, alone, strict=True):
            np.testing.assert_allclose(ours.scores(task.test), expected.scores(task.test), atol=2e-3)
    assert found[0] is found[3]
    (direct,) = solve(task.train[rows], [Problem(np.arange(180), part.targets, (0.5,))], NEWTON)
    np.testing.assert_allclose(found[1].scores(task.test)[:, [1]], direct.scores(task.test), atol=1e-3)


def test_more_dimensions_than_points(way):
    wide = make_task(Sizes(40, 10, 90, 2, 2), 1.0)
    for ours, theirs in zip(
        solve(wide.train, problems_of(wide, (0.1, 10.0)), NEWTON),
        solve(wide.train, problems_of(wide, (0.1, 10.0)), LIBLINEAR),
        strict=True,
    ):
        assert ours.weights.shape == (2, 90)
        np.testing.assert_allclose(ours.weights, theirs.weights, atol=2e-3)


@pytest.mark.parametrize("cost", [0.01, 1000.0])
def test_equal_points_and_a_single_positive_by_hand(way, cost):
    """|(x, 1)|^2 = 2, so that a score s costs s^2 / 4 + 2 C (1 - s)^2 + 5 C (1 + s)^2: s = -6 C / (14 C + 1 / 2).

    liblinear is still at -0.83 after its 2,000 passes at C = 1000.
    """
    x, targets = np.ones((6, 3)) / np.sqrt(3), np.array([1, -1, -1, -1, -1, -1], dtype=np.int8)
    (found,) = solve(x, [Problem(np.arange(6), targets, (cost,))], NEWTON)
    np.testing.assert_allclose(found.scores(x), -6 * cost / (14 * cost + 0.5), rtol=1e-4)


def test_progress_moves_and_ends(way, task):
    told = []

    def progress(items, total, what):
        for number, item in enumerate(items, 1):
            told.append((number, total, what))
            yield item

    problems = problems_of(task, (0.1, 1.0, 10.0))
    list(solve(task.train, problems, NEWTON, progress, "SVMs"))
    steps = 3 if way == "together" else 4  # costs of all problems, or problems at all costs
    assert told == [(number, steps, "SVMs") for number in range(1, steps + 1)]


def test_fits_that_end_at_the_limit_are_counted(way, task, monkeypatch):
    monkeypatch.setattr(svm_newton, "_MAX_STEPS", 2)
    (found, *_) = solve(task.train, problems_of(task, (1e-5, 1000.0)), NEWTON)
    assert found.converged.tolist() == [True, False]
    assert found.unconverged == 1
