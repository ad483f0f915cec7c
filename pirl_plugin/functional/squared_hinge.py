"""Linear classifiers with the squared hinge loss: Newton's method, many problems at once or one by its Gram matrix.

A problem minimises over w, the bias among its numbers,

    f(w) = |w|^2 / 2 + sum_i cost_i * max(0, 1 - sign_i * <x_i, w>)^2

which is liblinear's L2-regularised L2-loss SVM. f is convex and quadratic in pieces, each piece with its own active
points (those with a slack), so that Newton's method ends after a few steps; the length of each is the minimum along the
line. The gap between f(w) and the dual's value at the variables that belong to w is |grad f(w)|^2 / 2. As f is at least
as curved as |w|^2 / 2, a gradient no longer than ``tolerance * |w|`` means: no further than that from the minimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CG_STEPS = 500  # of one Newton step at most: the next begins where it ends
_CG_REDUCTION = 0.05  # of the residual, by which a Newton step is good enough to be taken
_LINE_STEPS = 20
_LINE_REDUCTION = 0.1  # of the slope along the line


@torch.no_grad()
def minimize_together(
    x: Tensor, signs: Tensor, costs: Tensor, start: Tensor, tolerance: float, max_steps: int
) -> tuple[Tensor, Tensor]:
    """Separators of P problems on the same points, with few matrix products for all of them.

    Gradients are in float64; the products of conjugate gradients, which only steer, in float32. Their preconditioner
    (Jacobi's) suits points whose coordinates are uncorrelated: turn the points to their principal axes before.

    Args:
        x: points, ``(n, D)`` float64.
        signs: 1 or -1 of each point, ``(P, n)`` float64.
        costs: of each point, ``(P, n)`` float64; 0 leaves it out.
        start: where to begin, ``(P, D)`` float64.
        tolerance: distance to the minimum, as a fraction of the separator's length.
        max_steps: Newton steps at most.

    Returns:
        ``(P, D)`` float64, and the Newton steps of each, ``(P,)`` int64: ``max_steps + 1`` where that was not enough.
    """
    found, steps = start.clone(), torch.zeros(len(start), dtype=torch.int64, device=start.device)
    rough = x.float()
    squares = rough**2
    left = torch.arange(len(start), device=start.device)  # the problems that are not solved yet
    w, scores = start, start @ x.T
    for _ in range(max_steps + 1):
        slack = (1 - signs * scores).clamp(min=0)
        gradient = w - 2 * (costs * signs * slack) @ x
        keep = (gradient.norm(dim=1) > tolerance * w.norm(dim=1)).nonzero().squeeze(1)
        if len(keep) < len(left):
            left, w, scores, slack, gradient = left[keep], w[keep], scores[keep], slack[keep], gradient[keep]
            signs, costs = signs[keep], costs[keep]
        if len(left) == 0:
            break
        steps[left] += 1
        direction = _newton_direction(rough, squares, 2 * costs * (slack > 0), gradient)
        change = direction @ x.T
        linear, square = (w * direction).sum(dim=1, keepdim=True), direction.square().sum(dim=1, keepdim=True)
        length = _line_minimum(linear, square, signs * scores, signs * change, costs)
        w, scores = w + length * direction, scores + length * change
        found[left] = w
    return found, steps


def _newton_direction(x: Tensor, squares: Tensor, curvatures: Tensor, gradient: Tensor) -> Tensor:
    """Approximately ``-(I + X^T diag(curvature) X)^-1 gradient`` of each problem, by conjugate gradients in float32.

    Args:
        x: ``(n, D)`` float32.
        squares: ``x**2``.
        curvatures: ``(P, n)``.
        gradient: ``(P, D)``, none of them zero.

    Returns:
        ``(P, D)`` in the gradient's precision.
    """
    scale = gradient.norm(dim=1, keepdim=True)
    residual, curvature = (-gradient / scale).float(), curvatures.float()
    inverse = 1 / (1 + curvature @ squares)
    found = solution = torch.zeros_like(residual)
    found = found.clone()
    left = torch.arange(len(residual), device=residual.device)
    direction = inverse * residual
    product = (residual * direction).sum(dim=1, keepdim=True)
    goal = _CG_REDUCTION**2 * product
    for _ in range(_CG_STEPS):
        image = direction + (curvature * (direction @ x.T)) @ x
        length = product / (direction * image).sum(dim=1, keepdim=True)
        solution = solution + length * direction
        residual = residual - length * image
        z = inverse * residual
        before, product = product, (residual * z).sum(dim=1, keepdim=True)
        direction = z + product / before * direction
        found[left] = solution
        keep = (product > goal).squeeze(1).nonzero().squeeze(1)
        if len(keep) == 0:
            break
        if len(keep) < len(left):
            left, solution, residual, direction = left[keep], solution[keep], residual[keep], direction[keep]
            product, goal, inverse, curvature = product[keep], goal[keep], inverse[keep], curvature[keep]
    return found.to(gradient.dtype) * scale


@torch.no_grad()
def minimize_by_gram(
    gram: Tensor, signs: Tensor, costs: Tensor, start: Tensor, tolerance: float, max_steps: int
) -> tuple[Tensor, int]:
    """The separator of one problem with few points, as their weighted sum: ``w = sum_i coefficient_i x_i``.

    The Newton step is exact: where the active points stay the same, their coefficients solve
    ``(K + diag(1 / (2 cost))) coefficient = sign`` and the others' are 0.

    Args:
        gram: inner products K of the points, ``(n, n)`` float64.
        signs: 1 or -1 of each point, ``(n,)`` float64.
        costs: of each point, ``(n,)`` float64, positive.
        start: coefficients to begin with, ``(n,)`` float64.
        tolerance: distance to the minimum, as a fraction of the separator's length.
        max_steps: Newton steps at most.

    Returns:
        ``(n,)`` float64, and the Newton steps: ``max_steps + 1`` where that was not enough.
    """
    coefficients, scores = start, gram @ start
    for step in range(max_steps + 1):
        slack = (1 - signs * scores).clamp(min=0)
        gradient = coefficients - 2 * costs * signs * slack
        length = (coefficients @ scores).clamp(min=0)
        if bool(gradient @ gram @ gradient <= tolerance**2 * length):
            return coefficients, step
        active = slack.nonzero().squeeze(1)
        system = gram[active][:, active]
        system.diagonal().add_(1 / (2 * costs[active]))
        direction = -coefficients
        direction[active] += torch.cholesky_solve(signs[active, None], torch.linalg.cholesky(system)).squeeze(1)
        change = gram @ direction
        t = _line_minimum(
            (coefficients @ change).reshape(1, 1),
            (direction @ change).reshape(1, 1),
            (signs * scores)[None],
            (signs * change)[None],
            costs[None],
        )[0]
        coefficients, scores = coefficients + t * direction, scores + t * change
    return coefficients, max_steps + 1


def _line_minimum(linear: Tensor, square: Tensor, margins: Tensor, gains: Tensor, costs: Tensor) -> Tensor:
    """Where along ``w + t * direction`` f is (nearly) smallest, ``(P, 1)``.

    The slope rises along the line in straight pieces: Newton's method on it, kept between bounds that close in.

    Args:
        linear: ``<w, direction>``, ``(P, 1)``.
        square: ``|direction|^2``, ``(P, 1)``.
        margins: ``sign * <x, w>``, ``(P, n)``.
        gains: ``sign * <x, direction>``, ``(P, n)``.
        costs: ``(P, n)``.
    """
    t, weighted = torch.ones_like(linear), costs * gains
    low, high = torch.zeros_like(t), torch.full_like(t, torch.inf)
    at_zero = linear - 2 * (weighted * (1 - margins).clamp(min=0)).sum(dim=1, keepdim=True)
    for _ in range(_LINE_STEPS):
        slack = (1 - margins - t * gains).clamp(min=0)
        slope = linear + t * square - 2 * (weighted * slack).sum(dim=1, keepdim=True)
        if bool((slope.abs() <= _LINE_REDUCTION * at_zero.abs()).all()):
            break
        curvature = square + 2 * (weighted * gains * (slack > 0)).sum(dim=1, keepdim=True)
        low, high = torch.where(slope < 0, t, low), torch.where(slope < 0, high, t)
        t = t - slope / curvature
        beyond = torch.where(high.isinf(), 2 * low, (low + high) / 2)
        t = torch.where((t > low) & (t < high), t, beyond)
    return t
