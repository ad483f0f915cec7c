"""liblinear's SVMs and the choice of their costs, against slow loops, the objective itself and scikit-learn's own."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import LinearSVC

from pirl_plugin.benchmarks.svm import liblinear as svm_liblinear
from pirl_plugin.benchmarks.svm.grid import COSTS, choose_costs, cross_validate, nearest_to_one, solve, stratified_folds
from pirl_plugin.benchmarks.svm.problem import Problem, SVMSettings, triangular

HERE = SVMSettings("liblinear", num_jobs=1)
real = svm_liblinear.fit


def quiet(items, total, what):
    return items


def points(count: int = 60, dims: int = 8, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(count, dims)) + 0.5
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-5)


def problem(x: np.ndarray, positives: int, costs=(1.0,), seed: int = 0) -> Problem:
    """Positives are where a random direction with noise points."""
    rng = np.random.default_rng(seed)
    score = x @ rng.normal(size=x.shape[1]) + 0.2 * rng.normal(size=len(x))
    targets = np.full(len(x), -1, dtype=np.int8)
    targets[np.argsort(-score)[:positives]] = 1
    return Problem(np.arange(len(x)), targets, costs)


def reference(cost: float) -> LinearSVC:
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, tol=1e-4, dual=True, random_state=0)


# -- one fit -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", [0.1, 2.0])
def test_the_separator_minimises_the_objective(cost):
    """``(|w|^2 + b^2) / 2 + sum of C_i max(0, 1 - y_i (w x_i + b))^2``, C_i = 2 C for positives and C for negatives."""
    x = points()
    one = problem(x, 20, (cost,))
    (found,) = solve(x, [one], HERE)
    weight = cost * np.where(one.targets == 1, 2, 1)
    augmented = np.append(x, np.ones((len(x), 1)), axis=1)

    def objective(w):
        slack = np.maximum(0, 1 - one.targets * (augmented @ w))
        return w @ w / 2 + weight @ slack**2, w - 2 * augmented.T @ (weight * slack * one.targets)

    best = minimize(objective, np.zeros(9), jac=True, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-10}).x
    np.testing.assert_allclose(np.append(found.weights[0], found.biases[0]), best, atol=2e-3)


def test_each_cost_is_scikit_learns_own_fit_of_the_named_rows():
    x = points()
    whole = problem(x, 20, (0.01, 1.0, 50.0))
    rows = np.arange(7, 47)
    (found,) = solve(x, [Problem(rows, whole.targets[rows], whole.costs)], HERE)
    for index, cost in enumerate(whole.costs):
        theirs = reference(cost).fit(x[rows], whole.targets[rows])
        np.testing.assert_array_equal(found.weights[index], theirs.coef_[0])
        np.testing.assert_allclose(found.scores(x)[:, index], theirs.decision_function(x), atol=1e-12)
        assert found.iterations[index] == theirs.n_iter_


# -- fewer dimensions --------------------------------------------------------------------------------------------------


def test_triangular_keeps_every_inner_product_and_brings_separators_back():
    x, other, w = points(10, 40), points(6, 40, seed=1), np.random.default_rng(2).normal(size=10)
    small, basis = triangular(x)
    assert small.shape == (10, 10)
    np.testing.assert_array_equal(small, np.tril(small))
    np.testing.assert_allclose(small @ small.T, x @ x.T, atol=1e-14)
    np.testing.assert_allclose(small @ w, x @ (basis @ w), atol=1e-13)
    np.testing.assert_allclose((other @ basis) @ w, other @ (basis @ w), atol=1e-13)


def test_triangular_of_equal_points():
    x = np.ones((3, 5))
    small, _ = triangular(x)
    np.testing.assert_allclose(small @ small.T, x @ x.T, atol=1e-14)


@pytest.mark.parametrize("count", [20, 59, 61])
def test_many_dimensions_change_nothing(count):
    """With 20 points of 120 dimensions the solver takes the triangle: the same separator on the same way."""
    x = points(count, 120)
    one = problem(x, 6, (0.1, 10.0, 1000.0))
    (found,) = solve(x, [one], HERE)
    for index, cost in enumerate(one.costs):
        theirs = reference(cost).fit(x, one.targets)
        np.testing.assert_allclose(found.weights[index], theirs.coef_[0], atol=1e-10)
        assert found.iterations[index] == theirs.n_iter_


# -- many fits ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_number_of_processes_does_not_matter():
    """Bit for bit; with threads it would: liblinear's fits of one process share a random generator."""
    x = points(300, 40)
    problems = [problem(x, positives, (1.0, 100.0), seed=positives) for positives in (10, 60, 150)]
    for one, two in zip(
        solve(x, problems, HERE), solve(x, problems, SVMSettings("liblinear", num_jobs=2)), strict=True
    ):
        np.testing.assert_array_equal(one.weights, two.weights)
        np.testing.assert_array_equal(one.biases, two.biases)


def test_equal_problems_are_solved_once(monkeypatch):
    x, asked = points(), []
    monkeypatch.setattr(svm_liblinear, "fit", lambda *given: asked.append(given[1]) or real(*given))
    a, b = problem(x, 10, (1.0,)), problem(x, 20, (1.0,))
    other_costs = Problem(a.rows, a.targets, (2.0,))
    given = [a, b, Problem(a.rows.copy(), a.targets.copy(), (1.0,)), other_costs, b]
    found = list(solve(x, given, HERE))
    assert [id(one) for one in asked] == [id(one) for one in (given[2], given[4], other_costs)]
    for one, expected in zip(found, given, strict=True):
        np.testing.assert_array_equal(one.weights, real(x, expected, HERE).weights)


def test_the_seed_decides_the_solvers_order():
    x = points(200, 30)
    one = problem(x, 40, (1000.0,))
    first, again, other = (next(solve(x, [one], SVMSettings("liblinear", num_jobs=1, seed=seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.weights, again.weights)
    assert not np.array_equal(first.weights, other.weights)
    np.testing.assert_allclose(first.weights, other.weights, rtol=0.05, atol=0.05)


def test_fits_that_do_not_converge_are_counted_and_not_warned_of():
    x = points()
    one = problem(x, 20, (0.01, 1000.0))
    settings = SVMSettings("liblinear", num_jobs=1, max_iter=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = solve(x, [one], settings)
        assert found.unconverged == 1
        validation = cross_validate(x, [one], 3, settings, quiet)
    assert (validation.fits, validation.unconverged) == (6, 3)


# -- the choice of costs -----------------------------------------------------------------------------------------------


def slow_folds(targets, count):
    """Stratified folds in order: the images of each class are dealt out in runs, as evenly as the class allows."""
    fold = np.zeros(len(targets), dtype=int)
    by_appearance = sorted(set(targets.tolist()), key=targets.tolist().index)
    # how many of each class a fold gets: those of the labels, sorted by class, that are dealt out one by one
    encoded = sorted(by_appearance.index(target) for target in targets.tolist())
    for code, sign in enumerate(by_appearance):
        sizes = [sum(other == code for other in encoded[start::count]) for start in range(count)]
        fold[targets == sign] = np.repeat(np.arange(count), sizes)
    return fold


def slow_precision(x, targets, cost, folds=3):
    fold = slow_folds(targets, folds)
    values = []
    for held in range(folds):
        fitted = reference(cost).fit(x[fold != held], targets[fold != held])
        values.append(average_precision_score(targets[fold == held] == 1, fitted.decision_function(x[fold == held])))
    return sum(values) / folds


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_chosen_costs_are_those_of_a_slow_loop():
    x = points(90, 12)
    costs = (0.01, 0.1, 1.0, 10.0, 100.0)
    problems = [problem(x, positives, costs, seed=positives) for positives in (3, 7, 30, 60)]
    found = cross_validate(x, problems, 3, HERE, quiet)
    expected = np.array([[slow_precision(x, one.targets, cost) for cost in costs] for one in problems])
    np.testing.assert_allclose(found.precisions, expected, atol=1e-12)
    slow_choice = [max(costs, key=lambda cost, row=row: row[costs.index(cost)]) for row in expected]
    assert choose_costs(found.precisions, costs) == slow_choice
    assert len(set(slow_choice)) > 1
    assert found.fits == 4 * 3 * 5
    assert found.precisions[2, 1] == pytest.approx(
        cross_val_score(reference(0.1), x, problems[2].targets, cv=3, scoring="average_precision").mean()
    )


def test_costs_on_rows_of_a_larger_matrix():
    """Cross-validation of a sample touches its own rows only: what the others hold does not matter."""
    x = points(90, 12)
    whole = problem(x, 30, (0.1, 10.0))
    rows = np.sort(np.random.default_rng(1).choice(90, 40, replace=False))
    part = Problem(rows, whole.targets[rows], whole.costs)
    expected = cross_validate(x[rows], [Problem(np.arange(40), part.targets, part.costs)], 3, HERE, quiet)
    other = np.where(np.isin(np.arange(90), rows)[:, None], x, np.nan)
    np.testing.assert_array_equal(cross_validate(other, [part], 3, HERE, quiet).precisions, expected.precisions)


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_are_scikit_learns(folds):
    for seed in range(30):
        rng = np.random.default_rng(seed)
        targets = np.where(rng.random(rng.integers(12, 60)) < rng.uniform(0.2, 0.8), 1, -1).astype(np.int8)
        targets[rng.permutation(len(targets))[: 2 * folds]] = np.repeat([1, -1], folds)
        found = stratified_folds(targets, folds)
        for fold, (_, held) in enumerate(StratifiedKFold(folds).split(targets[:, None], targets)):
            np.testing.assert_array_equal(np.flatnonzero(found == fold), held)


def test_two_positives_get_two_folds_and_one_none():
    x = points(30, 5)
    costs = (0.1, 1.0)
    problems = [problem(x, positives, costs) for positives in (1, 2, 5, 29)]
    found = cross_validate(x, problems, 3, HERE, quiet)
    assert np.isnan(found.precisions).all(axis=1).tolist() == [True, False, False, True]
    assert found.precisions[1] == pytest.approx([slow_precision(x, problems[1].targets, cost, 2) for cost in costs])
    assert found.fits == (2 + 3) * 2


def test_choices_by_hand():
    """Class 0: the first of two equally good; class 1: the last; class 2 unknown: best in the mean, 0.6 of cost 1."""
    precisions = np.array([[0.5, 0.8, 0.8], [0.2, 0.4, 0.5], [np.nan] * 3])
    assert choose_costs(precisions, (0.1, 1.0, 10.0)) == [1.0, 10.0, 10.0]
    precisions[1] = [0.2, 0.4, 0.3]
    assert choose_costs(precisions, (0.1, 1.0, 10.0)) == [1.0, 1.0, 1.0]
    assert choose_costs(np.full((2, 3), np.nan), (0.2, 3.0, 1e3)) == [3.0, 3.0]
    assert nearest_to_one((0.2, 6.0)) == 0.2


def test_cost_grids():
    assert COSTS["vissl"] == (0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000)
    assert len(COSTS["goyal19"]) == len(set(COSTS["goyal19"])) == 26
    assert min(COSTS["goyal19"]) == 1e-7
    assert max(COSTS["goyal19"]) == 100
    assert {0.5**4, 0.5**19, 1e-3} <= set(COSTS["goyal19"])
