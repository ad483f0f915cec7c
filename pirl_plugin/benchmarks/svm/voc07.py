"""Linear SVMs on frozen features, as on VOC07 classification (Goyal et al. 2019)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Len

from pirl_plugin.benchmarks.average_precision import Rule
from pirl_plugin.benchmarks.changes import Changes, changed_views, changes, noted, recorded_name
from pirl_plugin.benchmarks.context import Benchmark, BenchmarkContext, Result
from pirl_plugin.benchmarks.svm.data import SVMData, percent, squashed_view
from pirl_plugin.benchmarks.svm.grid import COSTS, choose_costs, cross_validate, solve
from pirl_plugin.benchmarks.svm.problem import (
    MAX_ITER,
    Floats,
    Problem,
    SolverName,
    SVMSettings,
    refuse_without_effect,
)
from pirl_plugin.models.trunks import LAYERS
from pirl_plugin.registry import register_benchmark
from pirl_plugin.schema import PositiveFloat, PositiveInt, checked

Layer = Literal["conv1", "res2", "res3", "res4", "res5"]

METRICS: dict[str, Rule] = {"mAP": "interpolated", "mAP_11point": "eleven_point"}
_FOLDS = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Protocol:
    """What the published variants differ in."""

    costs: tuple[float, ...]
    layers: tuple[str, ...]
    pooling: Literal["avg", "grid"]
    squashed: bool


PROTOCOLS = {
    "vissl": Protocol(COSTS["vissl"], ("res4", "res5"), "grid", squashed=True),
    "goyal19": Protocol(COSTS["goyal19"], ("res4", "res5"), "grid", squashed=True),
    "swav": Protocol(COSTS["vissl"], ("res5",), "avg", squashed=False),
}


@register_benchmark("voc07_svm")
@checked
class VOC07SVM(Benchmark):
    """One linear SVM a class on frozen features of each layer: mean average precision (VOC07 classification).

    Features of unit length, one SVM for each class (squared hinge, L2, positives weighted twice), its cost the
    one of the best average precision in 3-fold cross-validation on the training split. Images that show a class only in
    difficult objects are negatives in training and are left out of the test. For any dataset with labels: those with
    one label an image are taken class against class.

    Each layer gives ``mAP``, area under the interpolated precision-recall curve as in the published numbers, and
    ``mAP_11point``, the rule of VOC2007 itself; the headline is the deepest layer's mAP. Protocols:

    * ``vissl``: 11 costs from 0.01 to 1000; images with the shorter side at 256 and then squashed to 224 x 224; layers
      average-pooled to about 9,000 numbers.
    * ``goyal19``: the same with the 26 costs of the released code: powers of ten from 1e-7 to 100, of 1/2 from 4 to 19.
    * ``swav``: central 224 of 256, res5 averaged to one number a channel (2,048), as the numbers of SwAV and Barlow
      Twins were made; its costs are not documented and are those of ``vissl`` here.

    A star behind the protocol's name in the records says that something differs from it (``extra.changed``).

    Args:
        layers: layers of the trunk; null is res4 and res5, or res5 for ``swav``. Published numbers are the best of all.
        protocol: see above.
        costs: costs to choose from; null is the protocol's own.
        pooling: ``avg`` (global) or ``grid`` (about 9,000 numbers); null is the protocol's own.
        folds: of the cross-validation.
        solver: ``newton``: all classes and folds at once, on the device. ``liblinear``: the published protocols' own
            (scikit-learn's LinearSVC), one fit after another; the same objective, the same numbers within 0.1.
        max_iter: of liblinear, passes over the images at most.
        num_jobs: of liblinear, processes; null: one a core, as far as memory allows.
    """

    def __init__(
        self,
        layers: Annotated[Sequence[Layer], Len(1)] | None = None,
        protocol: Literal["vissl", "goyal19", "swav"] = "vissl",
        costs: Annotated[Sequence[PositiveFloat], Len(1)] | None = None,
        pooling: Literal["avg", "grid"] | None = None,
        folds: Annotated[int, Ge(2)] = _FOLDS,
        solver: SolverName = "newton",
        max_iter: PositiveInt = MAX_ITER,
        num_jobs: PositiveInt | None = None,
    ) -> None:
        self.protocol, self.published = protocol, PROTOCOLS[protocol]
        self.layers = sorted(set(layers or self.published.layers), key=LAYERS.index)
        self.costs = tuple(map(float, costs)) if costs else self.published.costs
        self.pooling = pooling or self.published.pooling
        refuse_without_effect(solver, max_iter, num_jobs)
        self.folds, self.max_iter, self.solver, self.num_jobs = folds, max_iter, solver, num_jobs

    def evaluation_view(self, image_size: int) -> dict[str, Any]:
        """See ``Benchmark.evaluation_view``: squashed or cropped, as the protocol has it."""
        return squashed_view(image_size, True) if self.published.squashed else super().evaluation_view(image_size)

    def run(self, context: BenchmarkContext) -> Iterator[Result]:
        """Yields mAP by both rules for each layer, in percent of the readable test images."""
        data = SVMData.of(context, self.layers, self.pooling)
        changed = self._changes(context)
        for layer in self.layers:
            scores, notes = self._scores(context, data, layer)
            notes.update(data.notes, dims=data.dims(layer), **noted(changed))
            for metric, rule in METRICS.items():
                found = percent(scores, data.test, rule)
                unmeasured = [name for name, one in zip(data.class_names, found, strict=True) if np.isnan(one)]
                extra = {**notes, "AP": by_class(data.class_names, found), "classes_not_in_the_test": unmeasured}
                headline = metric == "mAP" and layer == self.layers[-1]
                yield Result(
                    {"layer": layer},
                    metric,
                    float(np.nanmean(found)),
                    recorded_name(self.protocol, changed),
                    headline=headline,
                    extra=extra,
                )

    def _scores(self, context: BenchmarkContext, data: SVMData, layer: str) -> tuple[Floats, dict[str, Any]]:
        """Scores of the test images, ``(M, C)``, and how they came about."""
        train, test = data.points(layer)
        labels, problems = one_against_rest(data, self.costs)
        settings = SVMSettings(self.solver, self.max_iter, context.seed, self.num_jobs, str(context.device))
        validation = cross_validate(
            train, problems, self.folds, settings, context.progress, f"{layer}: cross-validation"
        )
        chosen = choose_costs(validation.precisions, self.costs)
        last = [dataclasses.replace(problem, costs=(cost,)) for problem, cost in zip(problems, chosen, strict=True)]
        scores, unconverged = np.zeros(data.test.shape), validation.unconverged
        solutions = solve(train, last, settings, context.progress, f"{layer}: SVMs")
        for label, solution in zip(labels, solutions, strict=True):
            scores[:, label] = solution.scores(test)[:, 0]
            unconverged += solution.unconverged
        names = [data.class_names[label] for label in labels]
        costs, best = dict(zip(names, chosen, strict=True)), validation.precisions.max(axis=1)
        log.info("%s: costs chosen by cross-validation: %s", layer, costs)
        return scores, {
            "costs": costs,
            "cross_validated_AP": by_class(names, 100 * best),
            "classes_not_cross_validated": [name for name, one in zip(names, best, strict=True) if np.isnan(one)],
            "classes_not_learned": [name for name in data.class_names if name not in costs],  # all scores are equal
            "solver": self.solver,
            "fits": validation.fits + len(last),
            "fits_not_converged": unconverged,
        }

    def _changes(self, context: BenchmarkContext) -> Changes:
        settings = {
            "costs": (self.published.costs, self.costs),
            "pooling": (self.published.pooling, self.pooling),
            "folds": (_FOLDS, self.folds),
            "max_iter": (MAX_ITER, self.max_iter),
        }
        return changes(settings) | changed_views(context, self.evaluation_view(context.image_size))


def one_against_rest(data: SVMData, costs: tuple[float, ...]) -> tuple[list[int], list[Problem]]:
    """The classes that can be learned and the problem of each; difficult images are negatives.

    Raises:
        ValueError: there is none.
    """
    rows = np.arange(len(data.train), dtype=np.int64)
    targets = np.ascontiguousarray(np.where(data.train == 1, 1, -1).astype(np.int8).T)
    labels = [label for label, of_class in enumerate(targets) if len(np.unique(of_class)) == 2]
    if not labels:
        raise ValueError("no class is shown by some training images and absent from others: there is nothing to learn.")
    return labels, [Problem(rows, targets[label], costs) for label in labels]


def by_class(names: Sequence[str], values: Iterable[float]) -> dict[str, float]:
    """``{class name: value}`` without NaN, rounded to hundredths."""
    return {name: round(float(value), 2) for name, value in zip(names, values, strict=True) if not np.isnan(value)}
