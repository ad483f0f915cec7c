"""One generated scene: what is in it and where (cheap), and how it looks (a millisecond).

The class decides the outline of an object and, as in nature, makes one texture of the object and one of its
surroundings likelier than others (``typicality``; at 0 the outline is all there is). Place, size, pose, colours,
distractors, light and noise come from the same distributions for every class, so that none of them tells the class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pirl_plugin.data.scenes_shapes import Outline, Polygon

Floats = npt.NDArray[np.float32]

_TEXTURES = 5  # plain, clouds, stripes, checks, dots
_OVERSAMPLING = 4  # sub-pixels per pixel and axis, for smooth edges
_MIN_CONTRAST = 0.5  # between an object's and the background's mean colour, in RGB [0, 1]
_MIN_VISIBLE = 0.6  # an object of which less lies in the frame counts as difficult


@dataclass(frozen=True)
class SceneObject:
    """An object in a scene; coordinates are fractions of the image's side, x to the right, y downwards."""

    label: int
    outline: Outline

    @property
    def full_box(self) -> npt.NDArray[np.float64]:
        """x0, y0, x1, y1 of the whole body, parts outside the frame included."""
        return np.concatenate([self.outline[0].min(axis=0), self.outline[0].max(axis=0)])

    @property
    def box(self) -> npt.NDArray[np.float64]:
        """x0, y0, x1, y1 of the body's part in the frame."""
        return self.full_box.clip(0, 1)

    @property
    def difficult(self) -> bool:
        """Whether the frame cuts off much of it."""
        return _area(self.box) < _MIN_VISIBLE * _area(self.full_box)


def plan_scene(rng: np.random.Generator, label: int, shapes: Sequence[object]) -> list[SceneObject]:
    """The objects of a scene: the main one, of class ``label``, then up to two small ones of any class.

    Args:
        rng: what is drawn from it here is the geometry; go on with the same generator to ``paint_scene``.
        label: class of the main object, an index of ``shapes``.
        shapes: outline functions, see ``scenes_shapes``.
    """
    radius = rng.uniform(0.27, 0.4)
    slack = 0.47 - radius
    centre = 0.5 + rng.uniform(-slack, slack, 2)
    objects = [_posed(rng, label, shapes, centre, radius)]
    taken = [(centre, radius)]
    for _ in range(int(rng.integers(3))):
        radius = rng.uniform(0.1, 0.15)
        candidates = rng.uniform(0.03, 0.97, (12, 2))
        for candidate in candidates:
            if all(math.dist(candidate, other) > radius + 0.95 * reach for other, reach in taken):
                objects.append(_posed(rng, int(rng.integers(len(shapes))), shapes, candidate, radius))
                taken.append((candidate, radius))
                break
    return objects


def _posed(
    rng: np.random.Generator, label: int, shapes: Sequence[object], centre: npt.NDArray[np.float64], radius: float
) -> SceneObject:
    """An object of a class at a place, turned, stretched, slanted and mirrored at random."""
    outline: Outline = shapes[label](rng)  # type: ignore[operator]
    angle, stretch, slant = rng.uniform(-0.7, 0.7), rng.uniform(0.8, 1.25), rng.uniform(-0.2, 0.2)
    mirror = 1 if rng.random() < 0.5 else -1
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    pose = radius * turn @ np.array([[mirror * math.sqrt(stretch), slant], [0, 1 / math.sqrt(stretch)]])
    return SceneObject(label, [polygon @ pose.T + centre for polygon in outline])


def paint_scene(
    rng: np.random.Generator, objects: Sequence[SceneObject], size: int, typicality: float
) -> npt.NDArray[np.uint8]:
    """The picture of a scene, ``(size, size, 3)`` uint8.

    Args:
        rng: the generator that ``plan_scene`` drew the objects from, in the state that it left.
        objects: as ``plan_scene`` gives them; later ones are painted below earlier ones.
        size: side in pixels.
        typicality: probability that an object, or the main object's background, has the texture typical of its class.
    """
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    ground = rng.random(3, dtype=np.float32)
    typical_background = _typical_textures(objects[0].label)[1] if rng.random() < typicality else None
    canvas = _background(rng, ground, x, y, typical_background)
    for polygon in _distractors(rng):
        _fill(canvas, [polygon], rng.random(3, dtype=np.float32))
    for item in reversed(objects):
        first, second = _object_colours(rng, ground)
        typical = _typical_textures(item.label)[0] if rng.random() < typicality else None
        _fill(canvas, item.outline, first, second, _pattern(rng, x, y, typical))
    return _photographed(rng, canvas, x, y)


def _typical_textures(label: int) -> tuple[int, int]:
    """Texture of a class's objects and of their surroundings; no two of up to 25 classes have both alike."""
    return label % _TEXTURES, (label + label // _TEXTURES) % _TEXTURES


def _background(rng: np.random.Generator, ground: Floats, x: Floats, y: Floats, texture: int | None) -> Floats:
    """A textured colour gradient around the colour ``ground``."""
    tilt = rng.uniform(-0.25, 0.25, (2, 3)).astype(np.float32)
    canvas = ground + (x[..., None] - 0.5) * tilt[0] + (y[..., None] - 0.5) * tilt[1]
    tint = rng.uniform(-0.3, 0.3, 3).astype(np.float32)
    return canvas + (_pattern(rng, x, y, texture) - 0.5)[..., None] * tint


def _pattern(rng: np.random.Generator, x: Floats, y: Floats, texture: int | None) -> Floats:
    """A texture between 0 and 1: plain, clouds, stripes, checks or dots, of random scale and direction; None: any."""
    kind = int(rng.integers(_TEXTURES)) if texture is None else texture
    if kind == 0:
        return np.full_like(x, 0.5)
    if kind == 1:
        cells = int(rng.integers(4, 14))
        clouds = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        return np.asarray(clouds.resize(x.shape[::-1], Image.Resampling.BICUBIC))
    angle, waves = rng.uniform(0, math.pi), rng.uniform(4, 10)
    shift = rng.uniform(0, 2 * math.pi, 2)
    step = 2 * math.pi * waves
    kx, ky = np.float32(step * math.cos(angle)), np.float32(step * math.sin(angle))
    u = np.sin(x * kx + y * ky + np.float32(shift[0]))
    if kind > 2:
        v = np.sin(y * kx - x * ky + np.float32(shift[1]))
        u = u * v if kind == 3 else u + v - 0.7
    return (0.5 + 2 * u).clip(0, 1)


def _object_colours(rng: np.random.Generator, ground: Floats) -> tuple[Floats, Floats]:
    """Two colours for an object, whose mean stands out from the background's."""
    candidates = rng.random((16, 3), dtype=np.float32)
    distance = np.sqrt(((candidates - ground) ** 2).sum(axis=1))
    mean = candidates[np.argmax(distance.clip(None, _MIN_CONTRAST))]  # the first that is far enough, else the farthest
    spread = rng.uniform(-0.25, 0.25, 3).astype(np.float32)
    return mean + spread, mean - spread


def _distractors(rng: np.random.Generator) -> list[Polygon]:
    """Thin strokes and specks that belong to no class."""
    polygons = []
    for _ in range(int(rng.integers(5))):
        middle, angle = rng.random(2), rng.uniform(0, math.pi)
        half_length = rng.uniform(0.1, 0.3) if rng.random() < 0.5 else 0.02
        along = half_length * np.array([math.cos(angle), math.sin(angle)])
        across = rng.uniform(0.008, 0.02) * np.array([-math.sin(angle), math.cos(angle)])
        polygons.append(middle + np.stack([along + across, along - across, -along - across, -along + across]))
    return polygons


def _fill(
    canvas: Floats, outline: Outline, colour: Floats, second: Floats | None = None, pattern: Floats | None = None
) -> None:
    """Paints an outline (fractions of the side) onto the canvas, in one colour or in two mixed by a pattern."""
    size = canvas.shape[0]
    low = np.floor(outline[0].min(axis=0) * size).astype(int).clip(0, size)
    high = np.ceil(outline[0].max(axis=0) * size).astype(int).clip(0, size)
    width, height = (high - low).tolist()
    if width <= 0 or height <= 0:
        return
    stencil = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    draw = ImageDraw.Draw(stencil)
    for polygon, value in zip(outline, (255, *[0] * len(outline)), strict=False):
        draw.polygon(((polygon * size - low) * _OVERSAMPLING - 0.5).ravel().tolist(), fill=value)
    cover = np.asarray(stencil.reduce(_OVERSAMPLING), dtype=np.float32)[..., None] / 255
    part = (slice(low[1], high[1]), slice(low[0], high[0]))
    paint = colour if pattern is None or second is None else colour + pattern[part][..., None] * (second - colour)
    canvas[part] += cover * (paint - canvas[part])


def _photographed(rng: np.random.Generator, canvas: Floats, x: Floats, y: Floats) -> npt.NDArray[np.uint8]:
    """Light that falls off to one side, exposure, and the noise of a sensor."""
    tilt_x, tilt_y = rng.uniform(-0.45, 0.45, 2)
    light = np.float32(rng.uniform(0.85, 1.15)) + (x - 0.5) * np.float32(tilt_x) + (y - 0.5) * np.float32(tilt_y)
    canvas *= light[..., None]
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(0, 0.05))
    canvas *= 255
    return canvas.clip(0, 255).astype(np.uint8)


def _area(box: npt.NDArray[np.float64]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))
