"""The SVMs of VOC07: cross-validation over all costs and the last fits, against one LinearSVC after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pirl_plugin.benchmarks.average_precision import average_precision
from pirl_plugin.benchmarks.svm.grid import COSTS, choose_costs, cross_validate, solve
from pirl_plugin.benchmarks.svm.problem import Floats, Ints, Problem, SVMSettings
from pirl_plugin.speed.measuring import Row, Settings, Work, less, seconds_of

SPECTRA = {"slowly": 0.3, "quickly": 1.5}  # how they decay: the k-th variance is as k to the power of minus this


@dataclass(frozen=True)
class Sizes:
    """Images to learn from and to measure on, numbers of a feature, classes, and how many of them the plain way does.

    The plain way's time is that of ``plain_classes``, spread over the range of their frequencies, times what is left
    out: all twenty would take hours.
    """

    train: int
    test: int
    dims: int
    classes: int
    plain_classes: int


FULL = Sizes(5011, 4952, 2048, 20, 2)
QUICK = Sizes(900, 500, 300, 6, 2)


@dataclass(frozen=True)
class Task:
    """Features of unit length with labels: ``(N, D)`` and 1 or -1 in ``(N, C)`` for both splits."""

    train: Floats
    train_labels: Ints
    test: Floats
    test_labels: Ints


@dataclass(frozen=True)
class Outcome:
    """Of each class, the chosen cost and the average precision on the test images in percent."""

    costs: list[float]
    precisions: list[float]


def make_task(sizes: Sizes, decay: float, seed: int = 0) -> Task:
    """Features whose principal components' variances decay, and classes of 4 to 40 % of the images that they tell.

    Args:
        sizes: how many.
        decay: exponent of the variances.
        seed: of the draw.
    """
    rng, count = np.random.default_rng(seed), sizes.train + sizes.test
    components = rng.normal(size=(count, sizes.dims)) * np.arange(1, sizes.dims + 1) ** (-decay / 2)
    told = components @ rng.normal(size=(sizes.dims, sizes.classes))
    scores = told / told.std(axis=0) + rng.normal(size=told.shape)
    frequencies = np.geomspace(0.04, 0.4, sizes.classes)
    limits = [np.quantile(score, 1 - part) for score, part in zip(scores.T, frequencies, strict=True)]
    labels = np.where(scores > limits, 1, -1)
    basis, _ = np.linalg.qr(rng.normal(size=(sizes.dims, sizes.dims)))
    x = components / components.std() @ basis + 0.5  # features behind a ReLU are not centred either
    x /= np.linalg.norm(x, axis=1, keepdims=True) + 1e-5
    return Task(x[: sizes.train], labels[: sizes.train], x[sizes.train :], labels[sizes.train :])


def run(task: Task, classes: Iterable[int], settings: SVMSettings) -> Outcome:
    """The benchmark's protocol: choose each class's cost in 3-fold cross-validation, fit, measure."""
    costs, rows = COSTS["vissl"], np.arange(len(task.train))
    classes = list(classes)
    problems = [Problem(rows, task.train_labels[:, label].astype(np.int8), costs) for label in classes]
    chosen = choose_costs(cross_validate(task.train, problems, 3, settings, _quiet).precisions, costs)
    last = [dataclasses.replace(problem, costs=(cost,)) for problem, cost in zip(problems, chosen, strict=True)]
    found = [solution.scores(task.test)[:, 0] for solution in solve(task.train, last, settings)]
    precisions = [
        100 * average_precision(scores, task.test_labels[:, label])
        for scores, label in zip(found, classes, strict=True)
    ]
    return Outcome(chosen, precisions)


def rows(settings: Settings) -> Iterator[Row]:
    """One row for each spectrum; each side once, since they take minutes."""
    sizes = QUICK if settings.quick else FULL
    for name, decay in SPECTRA.items():
        yield _row(f"{name} decaying spectrum", make_task(sizes, decay), sizes, settings)


def _row(what: str, task: Task, sizes: Sizes, settings: Settings) -> Row:
    compared = np.linspace(0, sizes.classes - 1, sizes.plain_classes).round().astype(int).tolist()
    ways = {
        "ours": (range(sizes.classes), SVMSettings("newton", device=str(settings.device))),
        "theirs": (compared, SVMSettings("liblinear", num_jobs=1)),
    }
    found, seconds = dict[str, Outcome](), dict[str, float]()
    for side, way in ways.items():
        seconds[side] = seconds_of(lambda side=side, way=way: found.update({side: run(task, *way)}))  # type: ignore[misc]
    ours, theirs = found["ours"], found["theirs"]
    same = sum(ours.costs[label] == cost for label, cost in zip(compared, theirs.costs, strict=True))
    apart = np.mean([ours.precisions[label] for label in compared]) - np.mean(theirs.precisions)
    return less(
        f"SVM {sizes.train:,} + {sizes.test:,} x {sizes.dims:,}, {sizes.classes} classes, {what}",
        "LinearSVC, one after another",
        seconds["ours"],
        seconds["theirs"] * sizes.classes / len(compared),
        wanted=None if settings.quick else 15,
        detail=f"theirs from {len(compared)} classes: same cost in {same}, mAP apart by {apart:+.3f} points",
    )


def to_profile(settings: Settings) -> Work:
    """Ours at the small size."""
    task = make_task(QUICK, SPECTRA["quickly"])
    return lambda: run(task, range(QUICK.classes), SVMSettings("newton", device=str(settings.device)))


def _quiet(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    return items
