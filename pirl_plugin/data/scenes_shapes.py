"""Outlines of the object classes of the generated scenes: polygons within the unit circle, y downwards.

An outline is a list of polygons, each ``(V, 2)`` float64: the first is the body, any further ones are holes in it.
Every class varies in its own proportions; place, size and pose are the scene's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Polygon = npt.NDArray[np.float64]
Outline = list[Polygon]


def arc(
    start: float, end: float, points: int = 24, radius: float = 1.0, centre: tuple[float, float] = (0, 0)
) -> Polygon:
    """Points on a circle from angle ``start`` to ``end`` (radians), both included."""
    angles = np.linspace(start, end, points)
    return np.stack([centre[0] + radius * np.cos(angles), centre[1] + radius * np.sin(angles)], axis=1)


def disc(rng: np.random.Generator) -> Outline:
    """A filled circle."""
    return [arc(0, 2 * math.pi, 36, 0.9)]


def ring(rng: np.random.Generator) -> Outline:
    """A circle with a round hole."""
    return [arc(0, 2 * math.pi, 36), arc(0, 2 * math.pi, 36, rng.uniform(0.5, 0.65))]


def square(rng: np.random.Generator) -> Outline:
    """A square (a rectangle or a slanted one, once the scene has posed it)."""
    return [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.78]


def triangle(rng: np.random.Generator) -> Outline:
    """A triangle, its tip up."""
    return [np.array([(rng.uniform(-0.3, 0.3), -0.95), (0.95, 0.75), (-0.95, 0.75)])]


def star(rng: np.random.Generator) -> Outline:
    """A star of five points."""
    radii = np.tile([1.05, rng.uniform(0.38, 0.5)], 5)
    angles = np.arange(10) * math.pi / 5 - math.pi / 2
    return [np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)]


def cross(rng: np.random.Generator) -> Outline:
    """A plus sign."""
    a = rng.uniform(0.25, 0.36)
    return [
        np.array([
            (-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a),
        ])
    ]  # fmt: skip


def crescent(rng: np.random.Generator) -> Outline:
    """A waxing moon: the unit circle less a circle to its right."""
    offset, radius = rng.uniform(0.5, 0.65), 0.85
    x = (1 + offset**2 - radius**2) / (2 * offset)  # where the two circles meet
    y = math.sqrt(1 - x**2)
    outer, inner = math.atan2(y, x), math.atan2(y, x - offset)
    body = np.concatenate(
        [
            arc(outer, 2 * math.pi - outer),
            arc(2 * math.pi - inner, inner, radius=radius, centre=(offset, 0)),
        ]
    )
    return [body + np.array([0.25, 0])]


def arrow(rng: np.random.Generator) -> Outline:
    """An arrow, upwards."""
    shaft, neck = rng.uniform(0.2, 0.3), rng.uniform(-0.2, 0.05)
    return [np.array([(0, -1.05), (0.85, neck), (shaft, neck), (shaft, 1), (-shaft, 1), (-shaft, neck), (-0.85, neck)])]


def heart(rng: np.random.Generator) -> Outline:
    """A heart."""
    t = np.linspace(0, 2 * math.pi, 40)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return [np.stack([x, y - 2.5], axis=1) / 16.5]


def hourglass(rng: np.random.Generator) -> Outline:
    """Two triangles, tip to tip."""
    waist = rng.uniform(0.06, 0.16)
    return [np.array([(-0.8, -0.95), (0.8, -0.95), (waist, 0), (0.8, 0.95), (-0.8, 0.95), (-waist, 0)])]


def horseshoe(rng: np.random.Generator) -> Outline:
    """A U upside down."""
    inner = rng.uniform(0.45, 0.58)
    return [
        np.concatenate([
            [(-0.95, 0.95)], arc(math.pi, 2 * math.pi, 18, 0.95), [(0.95, 0.95), (inner, 0.95)],
            arc(2 * math.pi, math.pi, 18, inner), [(-inner, 0.95)],
        ])
    ]  # fmt: skip


def drop(rng: np.random.Generator) -> Outline:
    """A drop of water, its tip up."""
    tip = np.array([(0.0, -1.15)])
    return [np.concatenate([tip, arc(-0.5, math.pi + 0.5, 28, 0.68, (0, 0.3))])]


SHAPES: dict[str, Callable[[np.random.Generator], Outline]] = {
    "disc": disc,
    "ring": ring,
    "square": square,
    "triangle": triangle,
    "star": star,
    "cross": cross,
    "crescent": crescent,
    "arrow": arrow,
    "heart": heart,
    "hourglass": hourglass,
    "horseshoe": horseshoe,
    "drop": drop,
}
