"""The fast solver of the SVMs: Newton's method on liblinear's objective, all classes and folds at once, on any device.

From the smallest cost to the largest, each fit begins where the last one ended. Problems with many points share their
matrix products (``minimize_together``). Those with few, as in low-shot learning, are solved one by one through their
inner products (``minimize_by_gram``), where a factorisation takes no longer than products with all points would.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pirl_plugin.benchmarks.svm.problem import (
    CLASS_WEIGHT,
    Floats,
    Problem,
    Progress,
    Solution,
    SVMSettings,
    triangular,
)
from pirl_plugin.functional.squared_hinge import minimize_by_gram, minimize_together

_TOLERANCE = 1e-4  # of a separator's length
_MAX_STEPS = 100  # of Newton's method; five to ten are usual
_PRODUCTS = 60  # with all points, that a Newton step of one problem comes to: what a factorisation is weighed against
_BYTES = 2**29  # that the points' coefficients of the problems solved together may take, and a matrix of inner products
_ARRAYS = 12  # of them, about, that are alive at once


def newton(
    x: Floats, problems: Sequence[Problem], settings: SVMSettings, progress: Progress, what: str
) -> Iterator[Solution]:
    """Solutions in the order of the problems.

    Args:
        x: ``(N, D)``, rows that the problems name.
        problems: what to solve.
        settings: of these, the device counts.
        progress: shows how far it is.
        what: name of it there.
    """
    solver = _Solver(x, problems, settings.device)
    chunks = solver.chunks(problems)
    steps = itertools.chain.from_iterable(map(solver.solve, chunks))
    for solutions in progress(steps, sum(map(solver.steps, chunks)), what):
        yield from solutions


class _Solver:
    """The points, and what is made of them once for all problems."""

    def __init__(self, x: Floats, problems: Sequence[Problem], device: str) -> None:
        self.basis: Floats | None = None
        if x.shape[0] < x.shape[1]:
            x, self.basis = triangular(x)
        self.x = torch.as_tensor(np.append(x, np.ones((len(x), 1)), axis=1), device=device)  # the last is the bias's
        self.few = int((3 * _PRODUCTS * self.x.numel()) ** (1 / 3))
        pairs = sum(len(problem.rows) ** 2 for problem in problems if self._is_small(problem))
        self.one_gram = len(x) ** 2 <= min(pairs, _BYTES // 8)

    def chunks(self, problems: Sequence[Problem]) -> list[list[Problem]]:
        """Neighbours that are solved together: of many points, and of the same number of costs."""
        together = max(1, _BYTES // (8 * _ARRAYS * sum(self.x.shape)))
        chunks: list[list[Problem]] = []
        for problem in problems:
            last = chunks[-1] if chunks else []
            alike = last and not self._is_small(last[0]) and len(last[0].costs) == len(problem.costs)
            if alike and not self._is_small(problem) and len(last) < together:
                last.append(problem)
            else:
                chunks.append([problem])
        return chunks

    def steps(self, chunk: Sequence[Problem]) -> int:
        """How often ``solve`` yields."""
        return 1 if self._is_small(chunk[0]) else len(chunk[0].costs)

    def solve(self, chunk: Sequence[Problem]) -> Iterator[list[Solution]]:
        """All solutions of a chunk at its end; an empty list after each cost before."""
        return self._alone(chunk[0]) if self._is_small(chunk[0]) else self._together(chunk)

    def _is_small(self, problem: Problem) -> bool:
        return len(problem.rows) <= self.few

    def _together(self, chunk: Sequence[Problem]) -> Iterator[list[Solution]]:
        x, axes = self._principal
        signs = x.new_zeros(len(chunk), len(x))
        for row, problem in zip(signs, chunk, strict=True):
            row[self._tensor(problem.rows)] = self._tensor(problem.targets).to(x.dtype)
        costs = self._tensor(np.array([problem.costs for problem in chunk], dtype=np.float64))
        order, every = costs.argsort(dim=1), torch.arange(len(chunk), device=x.device)
        w, weights = x.new_zeros(len(chunk), x.shape[1]), x.new_zeros(*costs.shape, x.shape[1])
        steps = torch.zeros_like(order)
        for number in range(costs.shape[1]):
            if number:
                yield []
            which = order[:, number]
            cost = costs[every, which, None] * _class_weights(signs)
            w, taken = minimize_together(x, signs, cost, w, _TOLERANCE, _MAX_STEPS)
            weights[every, which], steps[every, which] = w @ axes.T, taken
        yield [self._solution(*found) for found in zip(weights, steps, strict=True)]

    def _alone(self, problem: Problem) -> Iterator[list[Solution]]:
        rows, signs = self._tensor(problem.rows), self._tensor(problem.targets).to(self.x.dtype)
        x = self.x[rows]
        gram = self._gram[rows][:, rows] if self.one_gram else x @ x.T
        coefficients, weights = torch.zeros_like(signs), x.new_zeros(len(problem.costs), x.shape[1])
        steps = torch.zeros(len(problem.costs), dtype=torch.int64)
        for which in np.argsort(problem.costs).tolist():
            costs = problem.costs[which] * _class_weights(signs)
            coefficients, steps[which] = minimize_by_gram(gram, signs, costs, coefficients, _TOLERANCE, _MAX_STEPS)
            weights[which] = coefficients @ x
        yield [self._solution(weights, steps)]

    @functools.cached_property
    def _principal(self) -> tuple[Tensor, Tensor]:
        """The points by their principal axes (not centred), and the axes, orthonormal columns ``(D, D)``."""
        _, axes = torch.linalg.eigh(self.x.T @ self.x)
        return self.x @ axes, axes

    @functools.cached_property
    def _gram(self) -> Tensor:
        return self.x @ self.x.T

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, device=self.x.device)

    def _solution(self, weights: Tensor, steps: Tensor) -> Solution:
        """Of ``(K, D)`` weights with the bias behind them, and ``(K,)`` Newton steps."""
        w, taken = weights.cpu().numpy(), steps.cpu().numpy()
        separators = w[:, :-1] if self.basis is None else w[:, :-1] @ self.basis.T
        return Solution(np.ascontiguousarray(separators), w[:, -1].copy(), taken, taken <= _MAX_STEPS)


def _class_weights(signs: Tensor) -> Tensor:
    """Of each point; 0 for one that a problem does not have."""
    return CLASS_WEIGHT[1] * (signs > 0).to(signs.dtype) + CLASS_WEIGHT[-1] * (signs < 0).to(signs.dtype)
