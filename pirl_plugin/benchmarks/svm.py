"""Linear SVMs, many at a time: one class against the rest, several costs, cross-validation, in several processes.

The SVM is that of Goyal et al. 2019 and VISSL: scikit-learn's ``LinearSVC`` (liblinear) with squared hinge loss and L2
penalty in its dual form, positives weighted twice. A solver gets the rows of one matrix and a list of problems, and
gives back a solution for each, so that another one only has to be added to ``SOLVERS``.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from joblib import Parallel, cpu_count, delayed
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from pirl_plugin.benchmarks.average_precision import average_precision
from pirl_plugin.records import memory_gib

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]  # as ``BenchmarkContext.progress``

COSTS: dict[str, tuple[float, ...]] = {
    "vissl": (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0),
    # the released code's example, and the powers of one half that it always adds
    "goyal19": (*(10.0**exponent for exponent in range(-7, 3)), *(0.5**power for power in range(4, 20))),
}
_CLASS_WEIGHT = {1: 2, -1: 1}
_TOLERANCE = 1e-4
_SMALL = 1e9  # numbers times costs; below it, half a minute, starting processes takes longer than it saves


@dataclass(frozen=True)
class Problem:
    """One class against the rest on some rows of a matrix, at several costs.

    Attributes:
        rows: of the matrix, ``(n,)``.
        targets: 1 or -1 for each of these rows, ``(n,)``; both must occur.
        costs: C of the SVM, each a fit of its own.
    """

    rows: Ints
    targets: npt.NDArray[np.int8]
    costs: tuple[float, ...]

    @property
    def key(self) -> Hashable:
        """Equal for equal problems."""
        return self.rows.tobytes(), self.targets.tobytes(), self.costs


@dataclass(frozen=True)
class Solution:
    """The separators of one problem, one for each cost.

    Attributes:
        weights: ``(K, D)``.
        biases: ``(K,)``.
        iterations: of the solver, ``(K,)``.
    """

    weights: Floats
    biases: Floats
    iterations: Ints

    def scores(self, x: Floats) -> Floats:
        """Signed distances times the weights' norm, ``(N, K)`` of ``(N, D)``."""
        return x @ self.weights.T + self.biases


@dataclass(frozen=True)
class SVMSettings:
    """How the SVMs are fitted.

    Attributes:
        solver: name in ``SOLVERS``.
        max_iter: passes over the images at most; the published protocols' 2,000 is often reached at high costs.
        seed: of the solver's random order of the images.
        num_jobs: processes; None: one a core, as far as memory allows, and none beside this one for small problems.
    """

    solver: Literal["liblinear"] = "liblinear"
    max_iter: int = 2000
    seed: int = 0
    num_jobs: int | None = None

    def unconverged(self, solution: Solution) -> int:
        """Number of fits that ended at the limit."""
        return int((solution.iterations >= self.max_iter).sum())


def solve(x: Floats, problems: Sequence[Problem], settings: SVMSettings) -> Iterator[Solution]:
    """Solutions in the order of the problems; the same whatever the number of processes.

    Equal problems (low-shot samples that take all there is) are solved once. Processes, not threads: liblinear lets go
    of Python's lock, but all its fits in a process draw from one random generator, so that threads would change each
    other's results.

    Args:
        x: ``(N, D)``, rows that the problems name; shared with the processes through a memory-mapped file.
        problems: what to solve.
        settings: how.
    """
    fit = SOLVERS[settings.solver]
    different = {problem.key: problem for problem in problems}
    jobs = settings.num_jobs or _default_jobs(x, list(different.values()))
    solutions: Iterator[Solution] = (fit(x, problem, settings) for problem in different.values())
    if jobs > 1:
        calls = (delayed(fit)(x, problem, settings) for problem in different.values())
        solutions = Parallel(n_jobs=jobs, return_as="generator", batch_size=1, pre_dispatch="2*n_jobs")(calls)
    return _repeated([problem.key for problem in problems], solutions)


def _repeated(keys: Sequence[Hashable], solutions: Iterator[Solution]) -> Iterator[Solution]:
    """A solution for each key, from one for each different key in the order of their first use."""
    uses, kept = Counter(keys), dict[Hashable, Solution]()
    for key in keys:
        if key not in kept:
            kept[key] = next(solutions)
        uses[key] -= 1
        yield kept[key] if uses[key] else kept.pop(key)


def _liblinear(x: Floats, problem: Problem, settings: SVMSettings) -> Solution:
    rows = np.ascontiguousarray(x[problem.rows])
    basis = None
    if 2 * rows.shape[0] <= rows.shape[1]:
        rows, basis = triangular(rows)
    weights, biases, iterations = [], [], []
    for cost in problem.costs:
        classifier = LinearSVC(
            C=cost,
            loss="squared_hinge",
            penalty="l2",
            dual=True,
            tol=_TOLERANCE,
            class_weight=_CLASS_WEIGHT,
            max_iter=settings.max_iter,
            random_state=settings.seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead, see ``SVMSettings.unconverged``
            classifier.fit(rows, problem.targets)
        weights.append(classifier.coef_[0] if basis is None else basis @ classifier.coef_[0])
        biases.append(float(classifier.intercept_[0]))
        iterations.append(int(np.max(classifier.n_iter_)))
    return Solution(np.stack(weights), np.array(biases), np.array(iterations, dtype=np.int64))


SOLVERS: dict[str, Callable[[Floats, Problem, SVMSettings], Solution]] = {"liblinear": _liblinear}


def triangular(x: Floats) -> tuple[Floats, Floats]:
    """The same points in as many dimensions as there are points: all inner products stay.

    The dual of an SVM knows its points by their inner products alone, so that the solver goes the same way to the same
    separator (but for rounding), through fewer numbers, half of them zeros that liblinear skips.

    Args:
        x: ``(n, D)`` with n <= D.

    Returns:
        Lower triangular ``(n, n)``, and the ``(D, n)`` orthonormal basis: ``x = triangle @ basis.T``. A separator ``w``
        found there is ``basis @ w`` here, and other points come there as ``other @ basis``.
    """
    basis, upper = np.linalg.qr(x.T)
    return np.ascontiguousarray(upper.T), basis


@dataclass(frozen=True)
class CrossValidation:
    """How well each cost did on rows that were not fitted.

    Attributes:
        precisions: average precision of P problems and K costs, ``(P, K)`` in [0, 1]; NaN for a problem with a single
            positive or negative.
        fits: number of SVMs fitted.
        unconverged: number of those that ended at the limit of iterations.
    """

    precisions: Floats
    fits: int
    unconverged: int


def cross_validate(
    x: Floats,
    problems: Sequence[Problem],
    folds: int,
    settings: SVMSettings,
    progress: Progress,
    what: str = "cross-validation",
) -> CrossValidation:
    """The published protocols' measure of a cost.

    As scikit-learn's ``cross_val_score`` with ``scoring="average_precision"``: stratified folds in the order of the
    rows, each held out once, the mean of their average precision. A class with fewer positives (or negatives) than
    folds gets as many folds as it has of them.

    Args:
        x: ``(N, D)``.
        problems: P of them, one at least, all with the same K costs.
        folds: parts that the rows of a problem are divided into.
        settings: of the solver.
        progress: shows how far it is.
        what: name of it there.
    """
    parts = [(index, *part) for index, problem in enumerate(problems) for part in _held_out(problem, folds)]
    solutions = progress(solve(x, [part for _, part, _ in parts], settings), len(parts), what)
    found: list[list[list[float]]] = [[] for _ in problems]
    fits = unconverged = 0
    for (index, _, held), solution in zip(parts, solutions, strict=True):
        scores = solution.scores(x[held.rows])
        found[index].append([average_precision(column, held.targets, "step") for column in scores.T])
        fits += len(solution.iterations)
        unconverged += settings.unconverged(solution)
    none = np.full(len(problems[0].costs), np.nan)
    precisions = np.stack([np.mean(of_folds, axis=0) if of_folds else none for of_folds in found])
    return CrossValidation(precisions, fits, unconverged)


def choose_costs(precisions: Floats, costs: Sequence[float]) -> list[float]:
    """The cost of the best cross-validated average precision of each class; of equals, the first.

    A class that could not be cross-validated (NaN) gets the cost that is best in the mean of the others; where there is
    none, ``nearest_to_one``.

    Args:
        precisions: ``(P, K)``, as ``cross_validate`` returns them.
        costs: K of them.
    """
    known = ~np.isnan(precisions[:, 0])
    common = costs[int(np.argmax(precisions[known].mean(axis=0)))] if known.any() else nearest_to_one(costs)
    return [
        costs[int(np.argmax(of_class))] if is_known else common
        for of_class, is_known in zip(precisions, known, strict=True)
    ]


def nearest_to_one(costs: Sequence[float]) -> float:
    """The cost for where nothing can be held out to choose it: the nearest to 1, the library's default, by ratio."""
    return costs[int(np.argmin(np.abs(np.log(costs))))]


def _held_out(problem: Problem, folds: int) -> list[tuple[Problem, Problem]]:
    """Each fold as what is fitted and what is held out."""
    fewest = min(folds, *(int((problem.targets == sign).sum()) for sign in (1, -1)))
    if fewest < 2:
        return []
    split = StratifiedKFold(fewest).split(np.zeros((len(problem.rows), 1)), problem.targets)
    return [(_part(problem, kept), _part(problem, held)) for kept, held in split]


def _part(problem: Problem, of: Ints) -> Problem:
    return dataclasses.replace(problem, rows=problem.rows[of], targets=problem.targets[of])


def _default_jobs(x: Floats, problems: Sequence[Problem]) -> int:
    numbers = [len(problem.rows) * min(x.shape[1], len(problem.rows)) for problem in problems]
    if sum(n * len(problem.costs) for n, problem in zip(numbers, problems, strict=True)) < _SMALL:
        return 1
    # a copy of the rows and liblinear's own, 16 bytes a number, beside an interpreter with torch
    needed = 24 * max(len(problem.rows) for problem in problems) * x.shape[1] / 2**30 + 0.5
    fit_in = (memory_gib() or np.inf) / 2 / needed
    return max(1, int(min(cpu_count(), len(problems), fit_in)))
