"""The reference solver of the SVMs: scikit-learn's ``LinearSVC`` (liblinear, dual), one fit after another."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from joblib import Parallel, cpu_count, delayed

from pirl_plugin.benchmarks.svm.problem import (
    CLASS_WEIGHT,
    Floats,
    Problem,
    Progress,
    Solution,
    SVMSettings,
    triangular,
)
from pirl_plugin.records import memory_gib

_TOLERANCE = 1e-4
_SMALL = 1e9  # numbers times costs; below it, half a minute, starting processes takes longer than it saves


def liblinear(
    x: Floats, problems: Sequence[Problem], settings: SVMSettings, progress: Progress, what: str
) -> Iterator[Solution]:
    """Solutions in the order of the problems; the same whatever the number of processes.

    Processes, not threads: liblinear lets go of Python's lock, but all its fits in a process draw from one random
    generator, so that threads would change each other's results.

    Args:
        x: ``(N, D)``, rows that the problems name; shared with the processes through a memory-mapped file.
        problems: what to solve.
        settings: how.
        progress: shows how many problems are done.
        what: name of it there.
    """
    jobs = settings.num_jobs or _default_jobs(x, problems)
    solutions: Iterator[Solution] = (fit(x, problem, settings) for problem in problems)
    if jobs > 1:
        calls = (delayed(fit)(x, problem, settings) for problem in problems)
        solutions = Parallel(n_jobs=jobs, return_as="generator", batch_size=1, pre_dispatch="2*n_jobs")(calls)
    yield from progress(solutions, len(problems), what)


def fit(x: Floats, problem: Problem, settings: SVMSettings) -> Solution:
    """One problem at all its costs."""
    from sklearn.exceptions import ConvergenceWarning  # scikit-learn is slow to import, and only needed here
    from sklearn.svm import LinearSVC

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
            class_weight=CLASS_WEIGHT,
            max_iter=settings.max_iter,
            random_state=settings.seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # counted instead, see ``Solution.converged``
            classifier.fit(rows, problem.targets)
        weights.append(classifier.coef_[0] if basis is None else basis @ classifier.coef_[0])
        biases.append(float(classifier.intercept_[0]))
        iterations.append(int(np.max(classifier.n_iter_)))
    taken = np.array(iterations, dtype=np.int64)
    return Solution(np.stack(weights), np.array(biases), taken, taken < settings.max_iter)


def _default_jobs(x: Floats, problems: Sequence[Problem]) -> int:
    numbers = [len(problem.rows) * min(x.shape[1], len(problem.rows)) for problem in problems]
    if sum(n * len(problem.costs) for n, problem in zip(numbers, problems, strict=True)) < _SMALL:
        return 1
    # a copy of the rows and liblinear's own, 16 bytes a number, beside an interpreter with torch
    needed = 24 * max(len(problem.rows) for problem in problems) * x.shape[1] / 2**30 + 0.5
    fit_in = (memory_gib() or np.inf) / 2 / needed
    return max(1, int(min(cpu_count(), len(problems), fit_in)))
