"""Linear SVMs, many at a time: one class against the rest, several costs, cross-validation.

The SVM is that of Goyal et al. 2019 and VISSL: squared hinge loss, L2 penalty (the bias is penalised too, as liblinear
does), positives weighted twice. A solver gets the rows of one matrix and a list of problems, and gives back a solution
for each, so that another one only has to be added to ``SOLVERS``.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pirl_plugin.benchmarks.average_precision import average_precision
from pirl_plugin.benchmarks.svm.liblinear import liblinear
from pirl_plugin.benchmarks.svm.newton import newton
from pirl_plugin.benchmarks.svm.problem import Floats, Ints, Problem, Progress, Solution, SVMSettings

Solver = Callable[[Floats, Sequence[Problem], SVMSettings, Progress, str], Iterator[Solution]]

SOLVERS: dict[str, Solver] = {"newton": newton, "liblinear": liblinear}
COSTS: dict[str, tuple[float, ...]] = {
    "vissl": (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0),
    # the released code's example, and the powers of one half that it always adds
    "goyal19": (*(10.0**exponent for exponent in range(-7, 3)), *(0.5**power for power in range(4, 20))),
}


def _quiet(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    return items


def solve(
    x: Floats,
    problems: Sequence[Problem],
    settings: SVMSettings,
    progress: Progress = _quiet,
    what: str = "SVMs",
) -> Iterator[Solution]:
    """Solutions in the order of the problems.

    Equal problems (low-shot samples that take all there is) are solved once.

    Args:
        x: ``(N, D)``, rows that the problems name.
        problems: what to solve.
        settings: how.
        progress: shows how far it is.
        what: name of it there.
    """
    different = {problem.key: problem for problem in problems}
    solutions = SOLVERS[settings.solver](x, list(different.values()), settings, progress, what)
    return _repeated([problem.key for problem in problems], solutions)


def _repeated(keys: Sequence[Hashable], solutions: Iterator[Solution]) -> Iterator[Solution]:
    """A solution for each key, from one for each different key in the order of their first use."""
    uses, kept = Counter(keys), dict[Hashable, Solution]()
    for key in keys:
        if key not in kept:
            kept[key] = next(solutions)
        uses[key] -= 1
        yield kept[key] if uses[key] else kept.pop(key)


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
    solutions = solve(x, [part for _, part, _ in parts], settings, progress, what)
    found: list[list[list[float]]] = [[] for _ in problems]
    fits = unconverged = 0
    for (index, _, held), solution in zip(parts, solutions, strict=True):
        scores = solution.scores(x[held.rows])
        found[index].append([average_precision(column, held.targets, "step") for column in scores.T])
        fits += len(solution.iterations)
        unconverged += solution.unconverged
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
    fold = stratified_folds(problem.targets, fewest)
    places = [(np.flatnonzero(fold != held), np.flatnonzero(fold == held)) for held in range(fewest)]
    return [(_part(problem, kept), _part(problem, held)) for kept, held in places]


def stratified_folds(targets: npt.NDArray[np.int8], folds: int) -> Ints:
    """The fold of each row as scikit-learn's ``StratifiedKFold`` has it: each fold's share of both classes, in order.

    Args:
        targets: 1 or -1, ``(n,)``.
        folds: number of them.
    """
    # which class comes first decides which fold gets the rows that are left over
    code = (targets != targets[0]).astype(np.int64)
    counts = np.stack([np.bincount(np.sort(code)[start::folds], minlength=2) for start in range(folds)])
    fold = np.empty(len(targets), dtype=np.int64)
    for which in (0, 1):
        fold[code == which] = np.arange(folds).repeat(counts[:, which])
    return fold


def _part(problem: Problem, of: Ints) -> Problem:
    return dataclasses.replace(problem, rows=problem.rows[of], targets=problem.targets[of])
