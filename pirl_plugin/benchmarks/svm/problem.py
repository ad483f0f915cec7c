"""What a linear SVM is asked and what it answers: the terms that all solvers share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pirl_plugin import schema

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]  # as ``BenchmarkContext.progress``
SolverName = Literal["newton", "liblinear"]
MAX_ITER = 2000  # of the published protocols

CLASS_WEIGHT = {1: 2, -1: 1}  # of positives and negatives, in the published protocols


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
        converged: whether each fit reached the solver's tolerance before its limit, ``(K,)``.
    """

    weights: Floats
    biases: Floats
    iterations: Ints
    converged: Bools

    @property
    def unconverged(self) -> int:
        """Number of fits that ended at the solver's limit."""
        return int((~self.converged).sum())

    def scores(self, x: Floats) -> Floats:
        """Signed distances times the weights' norm, ``(N, K)`` of ``(N, D)``."""
        return x @ self.weights.T + self.biases


@dataclass(frozen=True)
class SVMSettings:
    """How the SVMs are fitted.

    Attributes:
        solver: ``newton``: all at once, on the device. ``liblinear``: scikit-learn's LinearSVC, one after another.
        max_iter: of liblinear, passes over the images at most; the published 2,000 is often reached at high costs.
        seed: of liblinear's random order of the images.
        num_jobs: processes for liblinear; None: one a core, as far as memory allows, none beside this one for little.
        device: of ``newton``.
    """

    solver: SolverName = "newton"
    max_iter: int = MAX_ITER
    seed: int = 0
    num_jobs: int | None = None
    device: str = "cpu"


def refuse_without_effect(solver: SolverName, max_iter: int, num_jobs: int | None) -> None:
    """Raises for settings of liblinear where it does not solve.

    Raises:
        ConfigError: all of them.
    """
    given = {"max_iter": max_iter != MAX_ITER, "num_jobs": num_jobs is not None}
    without = [name for name, is_given in given.items() if is_given and solver != "liblinear"]
    if without:
        raise schema.ConfigError(
            schema.Problem(name, f"has no effect with solver={solver}: leave it out, or set solver=liblinear.")
            for name in without
        )


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
