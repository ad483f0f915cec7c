"""Linear classifiers trained while the images pass the frozen trunk: all layers, and a whole grid, in one pass."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pirl_plugin import distributed
from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.benchmarks.features import POOLINGS, pooled_features
from pirl_plugin.benchmarks.linear.probes import GridPoint, ProbeGrid
from pirl_plugin.benchmarks.linear.protocols import Protocol
from pirl_plugin.benchmarks.linear.state import SavedState
from pirl_plugin.benchmarks.linear.targets import Metrics, Outcome, Targets, held_out_mask, metrics_of
from pirl_plugin.benchmarks.linear.watch import Running, best_index, diverged, say_memory, say_where_at_the_end
from pirl_plugin.benchmarks.top_k import top_k_credits
from pirl_plugin.benchmarks.training import LabelledBatches, Part, augmented_view, rows_of_images
from pirl_plugin.models.normalize import Normalize
from pirl_plugin.models.trunks import LAYERS

log = logging.getLogger(__name__)

_LONG_EPOCH = 500  # steps, from which on each tenth of an epoch is logged


@dataclass(frozen=True)
class Plan:
    """What is trained, all numbers settled.

    Attributes:
        name: of the protocol, with what differs from it.
        protocol: the numbers used; its learning rate and weight decay give way to ``points``.
        layers: of the trunk, from shallow to deep.
        num_epochs: passes over the training images.
        points: learning rates and weight decays; of several the best is chosen for each layer.
        held_out: part of the training images that chooses, where there is a choice.
        refit: train the chosen classifiers anew on all training images.
    """

    name: str
    protocol: Protocol
    layers: Sequence[str]
    num_epochs: int
    points: Sequence[GridPoint]
    held_out: float = 0.1
    refit: bool = True


class StreamedProbes:
    """Trains, chooses where there is a choice, and measures.

    Args:
        context: weights, images and how to run.
        plan: what is trained.
        targets: labels of both splits.
    """

    def __init__(self, context: BenchmarkContext, plan: Plan, targets: Targets) -> None:
        self.context, self.plan, self.targets = context, plan, targets
        world_size = distributed.world_size()
        if plan.protocol.batch_size % world_size:
            raise ValueError(
                f"a batch of {plan.protocol.batch_size} images does not divide into {world_size} processes: "
                "set benchmark.batch_size to a multiple."
            )
        self.unreadable: set[int] = set()
        self.shapes = self._shapes()
        self.state = SavedState.of(context, plan, targets.train)
        self._normalize = Normalize().to(context.device)

    def run(self) -> dict[str, Outcome]:
        """Metrics on the test images, and what to note, by layer.

        Raises:
            ValueError: classifiers that have diverged, or a choice that cannot be made.
        """
        saved = self.state.read()
        if saved is not None and distributed.is_primary():
            log.info("Going on with %s after epoch %d of %d.", saved["stage"], saved["epoch"], self.plan.num_epochs)
        if len(self.plan.points) > 1 and (saved is None or saved["stage"] == "choice"):
            grids, notes, start = self._choose(saved)
        else:
            notes = saved["notes"] if saved is not None else {layer: {} for layer in self.plan.layers}
            chosen = {layer: GridPoint(**note["point"]) for layer, note in notes.items() if "point" in note}
            grids = self._grids(chosen or None)
            start = _load(grids, saved) if saved is not None else 0
            self.unreadable.update(saved["unreadable"] if saved is not None else ())
        self._train(self.context.train, self.targets.train, grids, start, "training", notes)
        measured, unreadable = self._measure(self.context.test, self.targets.test, grids, "test")
        for layer, (metrics,) in measured.items():
            if not all(map(math.isfinite, metrics.values())):
                raise diverged(layer, grids[layer].points)
        self.state.remove()
        more = {
            "num_train": len(self.targets.train) - len(self.unreadable),
            "num_test": len(self.targets.test) - unreadable,
            "num_classes": self.targets.num_classes,
            "unreadable_train": len(self.unreadable),
            "unreadable_test": unreadable,
        }
        return {
            layer: Outcome(measured[layer][0], {**more, **self._noted(grids, layer, notes)})
            for layer in self.plan.layers
        }

    # -- the parts -----------------------------------------------------------------------------------------------------

    def _choose(self, saved: Mapping[str, Any] | None) -> tuple[dict[str, ProbeGrid], dict[str, Any], int]:
        """Trains the whole grid on a part of the training images and chooses on the rest of them."""
        train, targets, plan = self.context.train, self.targets.train, self.plan
        generator = torch.Generator().manual_seed(self.context.seed)
        mask = held_out_mask(targets, plan.held_out, generator)
        if not mask.any() or mask.all():
            raise ValueError(
                f"of {len(targets)} training images a part of {plan.held_out:g} cannot be held out to choose with: "
                "set benchmark.held_out, or give one lr and one weight_decay."
            )
        learned, chooses = (torch.arange(len(targets))[part] for part in (~mask, mask))
        grids = self._grids(None)
        start = _load(grids, saved) if saved is not None else 0
        self._train(Part(train, learned), targets[learned], grids, start, "choice", {})
        measured, _ = self._measure(Part(train, chooses), targets[chooses], grids, "held-out images")
        chosen, notes = {}, {}
        for layer, of_points in measured.items():
            values = [next(iter(metrics.values())) for metrics in of_points]
            best = best_index(values, layer, plan.points)
            chosen[layer] = plan.points[best]
            notes[layer] = {
                "point": dataclasses.asdict(plan.points[best]),
                "held_out": len(chooses),
                f"held_out_{next(iter(of_points[0]))}": {
                    str(point): round(value, 2) if math.isfinite(value) else "diverged"
                    for point, value in zip(plan.points, values, strict=True)
                },
                "refitted_on_all": plan.refit,
            }
            if distributed.is_primary():
                log.info("%s: %s chosen on %d held-out images.", layer, chosen[layer], len(chooses))
                say_where_at_the_end(layer, chosen[layer], plan.points)
        if plan.refit:
            grids.clear()  # its memory is wanted for the next ones
            return self._grids(chosen), notes, 0
        return (
            {layer: grid.only(grid.points.index(chosen[layer])) for layer, grid in grids.items()},
            notes,
            plan.num_epochs,
        )

    def _train(
        self,
        dataset: Any,
        targets: Tensor,
        grids: Mapping[str, ProbeGrid],
        start: int,
        stage: str,
        notes: dict[str, Any],
    ) -> None:
        """The epochs from ``start`` on; the state is saved after each."""
        plan, size = self.plan, self.plan.protocol.batch_size // distributed.world_size()
        if start >= plan.num_epochs:
            return
        batches = LabelledBatches(self.context, dataset, targets, self._view(), size, self.context.seed)
        steps = batches.steps_per_epoch
        for epoch in range(start, plan.num_epochs):
            running = {layer: Running(len(grid.points), self.context.device) for layer, grid in grids.items()}
            factor = plan.protocol.lr_factor(epoch, plan.num_epochs)
            what = f"{stage}, epoch {epoch + 1} of {plan.num_epochs}"
            for step, (images, batch) in enumerate(self.context.progress(batches.epoch(epoch), steps, what), 1):
                features = self._features(images)
                for layer, grid in grids.items():
                    losses, scores = grid.train_step(features[layer], batch, factor)
                    running[layer].add(losses, scores, batch)
                if step == steps or (steps >= _LONG_EPOCH and step % (steps // 10) == 0):
                    said = "; ".join(running[layer].summary(grids[layer], layer) for layer in grids)
                    where = "" if step == steps else f", step {step} of {steps}"
                    if distributed.is_primary():
                        log.info("%s%s: %s", what.capitalize(), where, said)
            if stage == "training":  # the parts of a choice have ids of their own
                self.unreadable.update(*distributed.gather_objects(batches.unreadable))
            probes = {layer: grid.state_dict() for layer, grid in grids.items()}
            self.state.write(stage, epoch + 1, probes, notes, self.unreadable)

    def _measure(
        self, dataset: Any, targets: Tensor, grids: Mapping[str, ProbeGrid], what: str
    ) -> tuple[dict[str, list[Metrics]], int]:
        """Metrics of each classifier by layer, on the evaluation view, and how many images could not be read."""
        of_images = targets.to(self.context.device)

        def rows(images: Tensor, ids: Tensor) -> Tensor:
            features = self._features(images)
            labels = of_images[ids.to(of_images.device)]
            found = []
            for layer, grid in grids.items():
                scores = grid.scores(features[layer])  # (G, B, C)
                if not self.targets.multi:
                    scores = torch.stack([top_k_credits(scores, labels, top) for top in self.targets.tops], dim=-1)
                found.append(scores)
            return torch.stack(found).movedim(2, 0).flatten(1)  # (B, layers * G * (C or number of tops))

        found, ids = rows_of_images(self.context, dataset, rows, what)
        count = len(next(iter(grids.values())).points)
        by_grid = found.unflatten(1, (len(grids), count, -1))
        truth = targets[ids]
        measured = {
            layer: [self._metrics(by_grid[:, row, point], truth) for point in range(count)]
            for row, layer in enumerate(grids)
        }
        return measured, len(dataset) - len(ids)

    def _metrics(self, rows: Tensor, truth: Tensor) -> Metrics:
        """From credits ``(N, tops)`` or scores ``(N, C)``; NaN where a classifier has diverged."""
        if not self.targets.multi:
            means = (100 * rows.double().mean(dim=0)).tolist()
            return {f"top{top}": mean for top, mean in zip(self.targets.tops, means, strict=True)}
        if bool(torch.isnan(rows).any()):
            return {"mAP": math.nan}
        return metrics_of(rows, truth)

    # -- small things --------------------------------------------------------------------------------------------------

    def _features(self, images: Tensor) -> Mapping[str, Tensor]:
        return pooled_features(self.context, self._normalize(images), self.plan.layers, self.plan.protocol.pooling)

    @torch.no_grad()
    def _shapes(self) -> dict[str, tuple[int, int]]:
        """Channels and pooled numbers of each layer, from one empty image."""
        size = self.context.image_size
        image = torch.zeros(1, 3, size, size, device=self.context.device)
        maps = self.context.trunk.features(image, self.plan.layers)  # type: ignore[operator]
        pool = POOLINGS[self.plan.protocol.pooling]
        return {layer: (x.shape[1], pool(x).shape[1]) for layer, x in maps.items()}

    def _grids(self, chosen: Mapping[str, GridPoint] | None) -> dict[str, ProbeGrid]:
        """New classifiers: all points of the grid, or one chosen for each layer."""
        points = {layer: [chosen[layer]] if chosen else list(self.plan.points) for layer in self.plan.layers}
        say_memory(self.shapes, self.targets.num_classes, points, self.plan.protocol, self.context.device)
        return {
            layer: ProbeGrid(
                *self.shapes[layer],
                self.targets.num_classes,
                self.plan.protocol,
                points[layer],
                seed=len(LAYERS) * self.context.seed + LAYERS.index(layer),
                device=self.context.device,
            )
            for layer in self.plan.layers
        }

    def _view(self) -> dict[str, Any]:
        size = self.context.image_size
        return {"name": "goyal19_view", "image_size": size} if self.plan.protocol.colours else augmented_view(size)

    def _noted(self, grids: Mapping[str, ProbeGrid], layer: str, notes: Mapping[str, Any]) -> dict[str, Any]:
        """What the record keeps of a layer's training."""
        protocol, (point,) = self.plan.protocol, grids[layer].points
        more = {key: value for key, value in notes.get(layer, {}).items() if key != "point"}
        return {
            "pooling": protocol.pooling,
            "dims": self.shapes[layer][1],
            "num_epochs": self.plan.num_epochs,
            "batch_size": protocol.batch_size,
            "lr": point.lr,
            "weight_decay": point.weight_decay,
            **more,
        }


def _load(grids: Mapping[str, ProbeGrid], saved: Mapping[str, Any]) -> int:
    for layer, grid in grids.items():
        grid.load_state_dict(saved["probes"][layer])
    return int(saved["epoch"])
