"""Linear probes of frozen features: small data sets to convergence, large ones under the published protocols."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval, Len

from pirl_plugin import distributed
from pirl_plugin.benchmarks.changes import Changes, changed_views, changes, noted, recorded_name
from pirl_plugin.benchmarks.context import Benchmark, BenchmarkContext, Result
from pirl_plugin.benchmarks.linear.cached import fit_by_sgd, fit_to_convergence
from pirl_plugin.benchmarks.linear.probes import GridPoint
from pirl_plugin.benchmarks.linear.protocols import (
    PROTOCOLS,
    SCHEDULE_OF_CLASSES,
    Protocol,
    Schedule,
    equally_spaced,
)
from pirl_plugin.benchmarks.linear.streamed import Plan, StreamedProbes
from pirl_plugin.benchmarks.linear.targets import Outcome, Targets
from pirl_plugin.models.trunks import LAYERS
from pirl_plugin.registry import register_benchmark
from pirl_plugin.schema import (
    ConfigError,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Problem,
    checked,
)

log = logging.getLogger(__name__)

Layer = Literal["conv1", "res2", "res3", "res4", "res5"]
Part = Annotated[float, Interval(gt=0, lt=1)]

SMALL = "small"
BEST = "best_on_test"
_HELD_OUT = 0.1
_L2 = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)


@register_benchmark("linear")
@checked
class Linear(Benchmark):
    """Linear classifiers on frozen features: top-1 and, for more than five classes, top-5 of each layer; or mAP.

    Data sets with several classes an image (VOC) get binary cross entropy, without the difficult labels, and mAP (area
    under the interpolated precision-recall curve). The protocols, whose name is in every record:

    * ``small``: global average pooling, standardised features of the evaluation view, logistic regression fitted to
      convergence by L-BFGS, with the L2 penalty of the smallest loss on held-out parts of the TRAINING set (5-fold
      cross-validation up to 10,000 images, one tenth above) and a last fit on all of it. The seed only decides what is
      held out, so that runs hardly differ. For small images and data sets.
    * ``paper`` (the PIRL paper), ``vissl``, ``goyal19``: conv1 and res2 .. res5 pooled to about 9,000 numbers each,
      batch norm and a linear layer, SGD on augmented views for 28 (ImageNet), 14 (Places205) or 84 (iNaturalist 2018)
      epochs. They differ in momentum, weight decay, drops of the learning rate, batch norm and colours.
    * ``moco``, ``swav``: res5, globally pooled, one linear layer, 100 epochs of ImageNet.
    * ``goyal19_cached``: res5 of unaugmented images, extracted once; learning rate, weight decay and drops are those of
      ``paper``, but with Nesterov's momentum and 28 epochs for any data set. Comparable with nothing published.

    All layers, and all points of a grid, are trained in one pass, with one forward pass of the trunk a batch; what is
    reported is the state after the last epoch. Batch statistics are of the whole batch, on any number of processes. A
    number that differs from its protocol's adds a star to the name, ``paper*``, and ``extra.changed`` says which; so do
    smaller images, another view, binary cross entropy and the epochs for a data set that no number is published for.

    The streamed protocols leave their state in ``linear_state.pt`` of the run folder after each epoch, and the same
    command goes on from there. Under ``torchrun`` every process takes its part of each batch, with the same result.

    The headline is the deepest layer's first metric. Published tables give the best layer, chosen on the test images:
    the additional result with the layer ``best_on_test``.

    Args:
        layers: layers of the trunk; null: the protocol's.
        protocol: see above.
        pooling: ``avg`` (global) or ``grid`` (about 9,000 numbers); null: the protocol's, as with all that follow.
        l2: penalties to choose from (``small`` only).
        num_epochs: passes over the training images.
        schedule: the data set whose number of epochs is taken; null: by the number of classes, ImageNet's for others.
        batch_size: images of one step of SGD, over all processes.
        lr: learning rate for that batch; null: the protocol's, times ``batch_size`` / 256. Of several values, the best
            is chosen for each layer on held-out training images, together with the weight decay.
        weight_decay: of weights and biases; several as with ``lr``.
        momentum: of SGD.
        num_drops: how often the learning rate is divided by 10, at equally spaced points.
        held_out: part of the training images that chooses from several ``lr`` or ``weight_decay``, of each class alike.
        refit: train what was chosen once more, on all training images; else it stays without the held-out ones.
    """

    multi_process: ClassVar[bool] = True

    def __init__(
        self,
        layers: Annotated[Sequence[Layer], Len(1)] | None = None,
        protocol: Literal["small", "paper", "vissl", "goyal19", "moco", "swav", "goyal19_cached"] = "small",
        pooling: Literal["avg", "grid"] | None = None,
        l2: Annotated[Sequence[NonNegativeFloat], Len(1)] = _L2,
        num_epochs: PositiveInt | None = None,
        schedule: Schedule | None = None,
        batch_size: PositiveInt | None = None,
        lr: PositiveFloat | Annotated[list[PositiveFloat], Len(1)] | None = None,
        weight_decay: NonNegativeFloat | Annotated[list[NonNegativeFloat], Len(1)] | None = None,
        momentum: Annotated[float, Interval(ge=0, lt=1)] | None = None,
        num_drops: NonNegativeInt | None = None,
        held_out: Part = _HELD_OUT,
        refit: bool = True,
    ) -> None:
        self.protocol, self.l2 = protocol, l2
        self.num_epochs, self.schedule, self.held_out, self.refit = num_epochs, schedule, held_out, refit
        given = {
            "num_epochs": num_epochs,
            "schedule": schedule,
            "batch_size": batch_size,
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "num_drops": num_drops,
        }
        published = PROTOCOLS.get(protocol)
        choosing = {"held_out": held_out != _HELD_OUT, "refit": not refit}
        _refuse(protocol, published, given, l2, choosing)
        self.layers = sorted(set(layers or (published.layers if published else ("res5",))), key=LAYERS.index)
        self.pooling = pooling or (published.pooling if published else "avg")
        self.changes: Changes = {}
        if published is None:
            self._note("pooling", self.pooling, "avg")
            self._note("l2", list(l2), list(_L2))
            return
        self.numbers, self.points = self._settle(published, batch_size, _listed(lr), _listed(weight_decay))
        if momentum is not None:
            self._note("momentum", momentum, published.momentum)
            self.numbers = dataclasses.replace(self.numbers, momentum=momentum)
        if num_drops is not None:
            drops = equally_spaced(num_drops)
            if published.cosine or drops != published.drops:
                self.changes["num_drops"] = ["cosine" if published.cosine else len(published.drops), num_drops]
            self.numbers = dataclasses.replace(self.numbers, drops=drops, cosine=False)

    def run(self, context: BenchmarkContext) -> Iterator[Result]:
        """Yields the metrics of each layer, and of the best one, in percent of the readable test images."""
        targets = Targets.of(context)
        changed, found = self._found(context, targets)
        name = recorded_name(self.protocol, changed)
        metrics = list(found[self.layers[-1]].metrics)
        for layer, outcome in found.items():
            for metric, value in outcome.metrics.items():
                headline = metric == metrics[0] and layer == self.layers[-1]
                extra = {**outcome.extra, **noted(changed)}
                yield Result({"layer": layer}, metric, value, name, headline=headline, extra=extra)
        if len(found) > 1:
            best = max(found, key=lambda layer: found[layer].metrics[metrics[0]])
            note = {**noted(changed), "layer": best, "chosen": "on the test images, as published tables choose it"}
            for metric, value in found[best].metrics.items():
                yield Result({"layer": BEST}, metric, value, name, extra={**found[best].extra, **note})

    # -- settling the numbers ------------------------------------------------------------------------------------------

    def _settle(
        self, published: Protocol, batch_size: int | None, lrs: list[float] | None, decays: list[float] | None
    ) -> tuple[Protocol, list[GridPoint]]:
        """The numbers used; notes what differs from the published ones."""
        used = dataclasses.replace(published, pooling=self.pooling, batch_size=batch_size or published.batch_size)
        for name in ("pooling", "batch_size"):
            self._note(name, getattr(used, name), getattr(published, name))
        scaled = published.lr * used.batch_size / published.batch_size
        if lrs is None:
            lrs = [scaled]
        else:
            self._note("lr", lrs, [published.lr])
        if decays is None:
            decays = [published.weight_decay]
        else:
            self._note("weight_decay", decays, [published.weight_decay])
        return used, [GridPoint(lr, decay) for lr in lrs for decay in decays]

    def _note(self, name: str, used: Any, published: Any) -> None:
        self.changes |= changes({name: (published, used)})

    def _epochs(self, num_classes: int) -> tuple[int, Changes]:
        """Number of epochs, and the change where it is not the published one for this data set.

        Raises:
            ValueError: the protocol has no number for it.
        """
        published = self.numbers.published_epochs(num_classes)
        schedule = self.schedule or SCHEDULE_OF_CLASSES.get(num_classes, "imagenet")
        used = self.num_epochs or self.numbers.epochs.get(schedule, self.numbers.epochs.get("any"))
        if used is None:
            known = ", ".join(self.numbers.epochs)
            raise ValueError(
                f"the protocol {self.protocol} says how many epochs for {known} only: set benchmark.num_epochs."
            )
        return used, changes({"num_epochs": (published, used)})

    def _found(self, context: BenchmarkContext, targets: Targets) -> tuple[Changes, dict[str, Outcome]]:
        """What differs from the protocol, and what each layer gave."""
        if self.protocol == SMALL:
            return self.changes, fit_to_convergence(context, self.layers, self.pooling, self.l2, targets)
        num_epochs, of_epochs = self._epochs(targets.num_classes)
        if self.numbers.cached:
            (point,) = self.points
            found = fit_by_sgd(context, self.layers, self.numbers, num_epochs, point, targets)
            return {**self.changes, **of_epochs}, found
        changed = {**self.changes, **of_epochs, **self._changes_by_the_data(context, targets)}
        name = recorded_name(self.protocol, changed)
        if distributed.is_primary():
            log.info("Protocol %s, %d epochs, %s.", name, num_epochs, "; ".join(map(str, self.points)))
        plan = Plan(name, self.numbers, self.layers, num_epochs, self.points, self.held_out, self.refit)
        streamed = StreamedProbes(context, plan, targets).run()
        unstated = {"not_stated_by_the_source": list(self.numbers.unstated)} if self.numbers.unstated else {}
        return changed, {layer: Outcome(one.metrics, {**one.extra, **unstated}) for layer, one in streamed.items()}

    def _changes_by_the_data(self, context: BenchmarkContext, targets: Targets) -> Changes:
        of_views = changed_views(context, self.evaluation_view(context.image_size))
        return {**of_views, **changes({"loss": ("softmax", "binary" if targets.multi else "softmax")})}


def _listed(value: float | Sequence[float] | None) -> list[float] | None:
    if value is None:
        return None
    return [value] if isinstance(value, (int, float)) else list(dict.fromkeys(value))


def _refuse(
    protocol: str,
    published: Protocol | None,
    given: Mapping[str, Any],
    l2: Sequence[float],
    choosing: Mapping[str, bool],
) -> None:
    """Settings that would have no effect, and ones that cannot be.

    Raises:
        ConfigError: all of them.
    """
    problems = _nothing_to_choose(protocol, published, given, choosing)
    if published is None:
        problems += [
            Problem(name, f"has no effect with protocol={protocol}, which is fitted to convergence: leave it out.")
            for name, value in given.items()
            if value is not None
        ]
    else:
        if tuple(l2) != _L2:
            problems.append(Problem("l2", f"has no effect with protocol={protocol}: leave it out."))
        if published.cached:
            problems += [
                Problem(name, f"must be one number with protocol={protocol}: only the streamed ones take a grid.")
                for name in ("lr", "weight_decay")
                if len(_listed(given[name]) or [0]) > 1
            ]
        schedule = given["schedule"]
        if schedule is not None and not {schedule, "any"} & set(published.epochs):
            known = ", ".join(published.epochs)
            problems.append(
                Problem("schedule", f"the protocol {protocol} says how many epochs for {known} only, not {schedule}.")
            )
    if problems:
        raise ConfigError(problems)


def _nothing_to_choose(
    protocol: str, published: Protocol | None, given: Mapping[str, Any], choosing: Mapping[str, bool]
) -> list[Problem]:
    """Settings of the choice between the points of a grid, where there is no such choice."""
    if published is not None and any(len(_listed(given[name]) or [0]) > 1 for name in ("lr", "weight_decay")):
        return []
    why = f"protocol={protocol}" if published is None else "one lr and one weight_decay, which leave nothing to choose"
    return [Problem(name, f"has no effect with {why}: leave it out.") for name, is_set in choosing.items() if is_set]
