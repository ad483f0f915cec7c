"""Linear SVMs on frozen features, learned from a few images of each class (Goyal et al. 2019)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Len

from pirl_plugin.benchmarks.changes import Changes, changed_views, changes, noted, recorded_name
from pirl_plugin.benchmarks.context import Benchmark, BenchmarkContext, Result
from pirl_plugin.benchmarks.svm.data import SVMData, percent, squashed_view
from pirl_plugin.benchmarks.svm.grid import COSTS, cross_validate, nearest_to_one, solve
from pirl_plugin.benchmarks.svm.low_shot_samples import Negatives, draw_low_shot, sample_generator
from pirl_plugin.benchmarks.svm.problem import (
    MAX_ITER,
    Floats,
    Problem,
    SolverName,
    SVMSettings,
    refuse_without_effect,
)
from pirl_plugin.benchmarks.svm.voc07 import METRICS, Layer
from pirl_plugin.models.trunks import LAYERS
from pirl_plugin.registry import register_benchmark
from pirl_plugin.schema import PositiveFloat, PositiveInt, checked

_K, _SAMPLES, _FOLDS = (1, 2, 4, 8, 16, 32, 64, 96), 5, 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shots:
    """What is learned from at one k: a problem for each class of each sample that has positives and negatives.

    Attributes:
        samples: the sample that each problem belongs to.
        labels: its class.
        problems: the problems, with all costs.
        short: ``fewer_positives`` and ``fewer_negatives``: classes that have fewer than asked for, and how many.
    """

    samples: list[int]
    labels: list[int]
    problems: list[Problem]
    short: dict[str, dict[str, int]]

    def of_sample(self, sample: int) -> list[int]:
        """Indices of a sample's problems."""
        return [index for index, one in enumerate(self.samples) if one == sample]


@register_benchmark("voc07_low_shot_svm")
@checked
class VOC07LowShotSVM(Benchmark):
    """Linear SVMs from k images of each class: mean average precision over the classes, mean of five samples.

    For each class and each of five independent samples, k images that show it and (C - 1) k that do not; features of
    unit length, one SVM a class (squared hinge, L2, positives weighted twice). One cost serves all classes of a
    k; how it is chosen is the protocol:

    * ``held_out``: in each sample, by stratified 3-fold cross-validation (2-fold for k = 2) within the sample, the best
      mean over the classes: nothing but the sample's own images and labels is used. At k = 1 nothing can be held out,
      and the cost is the one nearest to 1.
    * ``vissl``: the cost of the best mean TEST average precision over classes and samples, as published numbers are
      made. The records say ``optimistic``: the test set has chosen.

    Each layer and k gives ``mAP``, area under the interpolated precision-recall curve, with the samples' values and
    their deviation; the headline is that of the deepest layer and the largest k that every class has. Images are
    squashed to 224 x 224, the layers average-pooled to about 9,000 numbers; difficult images are never drawn and are
    left out of the test. A star behind the protocol's name in the records says that something differs from the
    published settings (``extra.changed``).

    Args:
        layers: layers of the trunk.
        protocol: see above.
        k: positives of each class; where there are fewer (or fewer negatives), all are taken and
            ``extra.fewer_positives`` (``fewer_negatives``) says so.
        num_samples: independent samples.
        costs: costs to choose from; null is VISSL's 11.
        pooling: ``grid`` (about 9,000 numbers) or ``avg`` (global).
        negatives: ``uniform``: from all images without the class, as the released code; ``per_class``: k that show each
            other class.
        folds: of the cross-validation, at most (``held_out`` only).
        solver: ``newton`` or ``liblinear``, as ``voc07_svm``.
        max_iter: of liblinear, passes over the images at most.
        num_jobs: of liblinear, processes; null: one a core, as far as memory allows.
    """

    def __init__(
        self,
        layers: Annotated[Sequence[Layer], Len(1)] = ("res4", "res5"),
        protocol: Literal["held_out", "vissl"] = "held_out",
        k: Annotated[Sequence[PositiveInt], Len(1)] = _K,
        num_samples: PositiveInt = _SAMPLES,
        costs: Annotated[Sequence[PositiveFloat], Len(1)] | None = None,
        pooling: Literal["grid", "avg"] = "grid",
        negatives: Negatives = "uniform",
        folds: Annotated[int, Ge(2)] = _FOLDS,
        solver: SolverName = "newton",
        max_iter: PositiveInt = MAX_ITER,
        num_jobs: PositiveInt | None = None,
    ) -> None:
        self.layers = sorted(set(layers), key=LAYERS.index)
        self.protocol, self.pooling, self.negatives = protocol, pooling, negatives
        self.k, self.num_samples = sorted(set(k)), num_samples
        self.costs = tuple(map(float, costs)) if costs else COSTS["vissl"]
        refuse_without_effect(solver, max_iter, num_jobs)
        self.folds, self.max_iter, self.solver, self.num_jobs = folds, max_iter, solver, num_jobs

    def evaluation_view(self, image_size: int) -> dict[str, Any]:
        """See ``Benchmark.evaluation_view``: straight to the square, nothing cropped."""
        return squashed_view(image_size, resize_first=False)

    def run(self, context: BenchmarkContext) -> Iterator[Result]:
        """Yields the mean mAP of the samples for each layer and k, in percent of the readable test images."""
        data = SVMData.of(context, self.layers, self.pooling)
        if data.train.shape[1] < 2:
            raise ValueError("the dataset has a single class: low-shot negatives are drawn from the others.")
        of_all, headline_k = self._changes(context), largest_full(data, self.k)
        for layer in self.layers:
            train, test = data.points(layer)
            for k in self.k:
                shots = self._draw(data, k, context.seed)
                values, notes = self._measure(context, data, (train, test), shots, f"{layer}, k = {k}")
                asked = {"fewer_positives": k, "fewer_negatives": k * (len(data.class_names) - 1)}
                short = {what: [asked[what], classes] for what, classes in shots.short.items() if classes}
                changed = {**of_all, **short}
                notes.update(data.notes, dims=data.dims(layer), **shots.short, **noted(changed))
                log.info("%s, k = %d: mAP %.2f ± %.2f %%", layer, k, values.mean(), values.std())
                yield Result(
                    {"layer": layer, "k": k},
                    "mAP",
                    float(values.mean()),
                    recorded_name(self.protocol, changed),
                    headline=layer == self.layers[-1] and k == headline_k,
                    extra=notes,
                )

    def _draw(self, data: SVMData, k: int, seed: int) -> Shots:
        shots = Shots([], [], [], {"fewer_positives": {}, "fewer_negatives": {}})
        negatives = k * (len(data.class_names) - 1) if self.negatives == "uniform" else 0
        for label, name in enumerate(data.class_names):
            for what, sign, asked in (("fewer_positives", 1, k), ("fewer_negatives", -1, negatives)):
                available = int((data.train[:, label] == sign).sum())
                if available < asked:
                    shots.short[what][name] = available
            for sample in range(self.num_samples):
                generator = sample_generator(seed, sample, k, label)
                rows = draw_low_shot(data.train, label, k, self.negatives, generator)
                targets = data.train[rows, label]
                if len(np.unique(targets)) == 2:
                    shots.samples.append(sample)
                    shots.labels.append(label)
                    shots.problems.append(Problem(rows, targets, self.costs))
        if not shots.problems:
            raise ValueError("no class is shown by some training images and absent from others: nothing to learn.")
        return shots

    def _measure(
        self, context: BenchmarkContext, data: SVMData, points: tuple[Floats, Floats], shots: Shots, what: str
    ) -> tuple[Floats, dict[str, Any]]:
        """The samples' mAP, ``(S,)`` percent, and how it came about."""
        settings = SVMSettings(self.solver, self.max_iter, context.seed, self.num_jobs, str(context.device))
        train, test = points
        problems, notes = shots.problems, dict[str, Any]()
        chosen: list[float] | None = None
        if self.protocol == "held_out":
            chosen, notes = self._held_out_costs(context, train, shots, settings, what)
            problems = [
                dataclasses.replace(problem, costs=(chosen[sample],))
                for problem, sample in zip(problems, shots.samples, strict=True)
            ]
        scores = np.zeros((self.num_samples, len(problems[0].costs), *data.test.shape))
        solutions = solve(train, problems, settings, context.progress, what)
        unconverged = notes.get("fits_not_converged", 0)
        for sample, label, solution in zip(shots.samples, shots.labels, solutions, strict=True):
            scores[sample, :, :, label] = solution.scores(test).T
            unconverged += solution.unconverged
        found = {
            metric: np.array([[np.nanmean(percent(x, data.test, rule)) for x in of_sample] for of_sample in scores])
            for metric, rule in METRICS.items()
        }
        best = int(np.argmax(found["mAP"].mean(axis=0)))  # of one cost where they were chosen before
        values = {metric: table[:, best] for metric, table in found.items()}
        notes |= {
            "samples": values["mAP"].round(3).tolist(),
            "std": round(float(values["mAP"].std()), 3),
            "mAP_11point": round(float(values["mAP_11point"].mean()), 3),
            "optimistic": chosen is None,
            "costs": chosen or [self.costs[best]] * self.num_samples,
            "solver": self.solver,
            "fits": notes.get("fits", 0) + sum(len(problem.costs) for problem in problems),
            "fits_not_converged": unconverged,
        }
        if chosen is None:
            notes["test_mAP_of_costs"] = dict(
                zip(map(str, self.costs), found["mAP"].mean(axis=0).round(3).tolist(), strict=True)
            )
        return values["mAP"], notes

    def _held_out_costs(
        self, context: BenchmarkContext, train: Floats, shots: Shots, settings: SVMSettings, what: str
    ) -> tuple[list[float], dict[str, Any]]:
        """The cost of each sample, and what to note."""
        validation = cross_validate(
            train, shots.problems, self.folds, settings, context.progress, f"{what}: cross-validation"
        )
        costs, precisions = [], []
        for sample in range(self.num_samples):
            rows = validation.precisions[shots.of_sample(sample)]
            rows = rows[~np.isnan(rows).any(axis=1)]
            mean = rows.mean(axis=0) if len(rows) else None
            costs.append(nearest_to_one(self.costs) if mean is None else self.costs[int(np.argmax(mean))])
            precisions.append(None if mean is None else round(100 * float(mean.max()), 2))
        notes = {
            "fits": validation.fits,
            "fits_not_converged": validation.unconverged,
            "cross_validated_mAP": precisions,
        }
        return costs, notes

    def _changes(self, context: BenchmarkContext) -> Changes:
        settings = {
            "num_samples": (_SAMPLES, self.num_samples),
            "costs": (COSTS["vissl"], self.costs),
            "pooling": ("grid", self.pooling),
            "negatives": ("uniform", self.negatives),
            "folds": (_FOLDS, self.folds if self.protocol == "held_out" else _FOLDS),
            "max_iter": (MAX_ITER, self.max_iter),
        }
        return changes(settings) | changed_views(context, self.evaluation_view(context.image_size))


def largest_full(data: SVMData, k: Sequence[int]) -> int:
    """The largest k that every class with a positive at all has positives for; the smallest where there is none."""
    positives = (data.train == 1).sum(axis=0)
    fewest = positives[positives > 0].min(initial=len(data.train))
    return max((one for one in k if one <= fewest), default=min(k))
