"""Linear classifiers of features that are computed once, of the evaluation view: to convergence, or by SGD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.benchmarks.features import Features, extract
from pirl_plugin.benchmarks.linear.logistic import Standardizer, choose_l2, fit_logistic, held_out_parts
from pirl_plugin.benchmarks.linear.probes import GridPoint, ProbeGrid
from pirl_plugin.benchmarks.linear.protocols import Protocol
from pirl_plugin.benchmarks.linear.targets import Outcome, Targets, metrics_of
from pirl_plugin.models.trunks import LAYERS

_SMALL_SET = 10_000  # up to here 5-fold cross-validation chooses the penalty, above it one tenth of the images does
_L2_WITHOUT_A_CHOICE = 0.01  # where the training set is too small to hold anything out
_ROWS = 4096  # of one pass through a classifier


def fit_to_convergence(
    context: BenchmarkContext, layers: Sequence[str], pooling: str, l2: Sequence[float], targets: Targets
) -> dict[str, Outcome]:
    """Logistic regression of each layer, with the penalty of the smallest loss on held-out training images."""
    train, test, notes = _features(context, layers, pooling, targets)
    found = {}
    for layer in context.progress(layers, len(layers), "linear classifiers"):
        labels = targets.train[train.ids].to(context.device)
        scores, more = converged_scores(context.seed, train.of[layer], labels, test.of[layer], targets.num_classes, l2)
        metrics = metrics_of(scores, targets.test[test.ids].to(context.device), targets.tops)
        found[layer] = Outcome(metrics, {**notes, "pooling": pooling, "dims": train.of[layer].shape[1], **more})
    return found


def converged_scores(
    seed: int, x: Tensor, labels: Tensor, test_x: Tensor, num_classes: int, penalties: Sequence[float]
) -> tuple[Tensor, dict[str, Any]]:
    """Scores of the test features, and how the penalty was chosen.

    Args:
        seed: decides what is held out, and nothing else.
        x: training features ``(N, D)``.
        labels: see ``logistic.fit_logistic``.
        test_x: ``(M, D)``.
        num_classes: C.
        penalties: to choose from.

    Returns:
        ``(M, C)``, and notes for the record.
    """
    small = len(labels) <= _SMALL_SET
    held_out = held_out_parts(labels, 5 if small else 10, torch.Generator().manual_seed(seed))
    held_out = held_out if small else held_out[:1]
    standardize = Standardizer.fit(x)
    standard = standardize(x)
    more: dict[str, Any] = {"held_out": sum(int(part.sum()) for part in held_out)}
    start, l2 = None, _L2_WITHOUT_A_CHOICE
    if held_out:
        choice, start = choose_l2(standard, labels, num_classes, penalties, held_out, standardize.variance)
        l2 = choice.l2
        more["held_out_loss"] = {f"{key:g}": round(value, 4) for key, value in choice.loss.items()}
        if choice.accuracy:
            more["held_out_accuracy"] = {f"{key:g}": round(value, 2) for key, value in choice.accuracy.items()}
    classifier = fit_logistic(standard, labels, num_classes, l2, standardize.variance, start)
    return classifier(standardize(test_x)), {**more, "l2": l2}


def fit_by_sgd(
    context: BenchmarkContext,
    layers: Sequence[str],
    protocol: Protocol,
    num_epochs: int,
    point: GridPoint,
    targets: Targets,
) -> dict[str, Outcome]:
    """SGD over the cached features, each epoch in an order of its own."""
    train, test, notes = _features(context, layers, protocol.pooling, targets)
    labels = targets.train[train.ids].to(context.device)
    channels: dict[str, int] = context.trunk.channels  # type: ignore[assignment]
    grids = {
        layer: ProbeGrid(
            channels[layer],
            train.of[layer].shape[1],
            targets.num_classes,
            protocol,
            [point],
            seed=len(LAYERS) * context.seed + LAYERS.index(layer),
            device=context.device,
            shared_batches=False,
        )
        for layer in layers
    }
    generator = torch.Generator().manual_seed(context.seed)
    for epoch in context.progress(range(num_epochs), num_epochs, "linear classifiers"):
        order = torch.randperm(len(labels), generator=generator).to(context.device)
        for rows in order.split(protocol.batch_size):
            if len(rows) == 1 < len(order):
                continue  # one image has no batch statistics; the next epoch has it in another batch
            for layer, grid in grids.items():
                grid.train_step(train.of[layer][rows], labels[rows], protocol.lr_factor(epoch, num_epochs))
    found = {}
    for layer, grid in grids.items():
        scores = torch.cat([grid.scores(piece)[0] for piece in test.of[layer].split(_ROWS)])
        metrics = metrics_of(scores, targets.test[test.ids].to(context.device), targets.tops)
        more: dict[str, Any] = {"pooling": protocol.pooling, "dims": train.of[layer].shape[1], "num_epochs": num_epochs}
        more |= {"batch_size": protocol.batch_size, "lr": point.lr, "weight_decay": point.weight_decay}
        found[layer] = Outcome(metrics, {**notes, **more})
    return found


def _features(
    context: BenchmarkContext, layers: Sequence[str], pooling: str, targets: Targets
) -> tuple[Features, Features, dict[str, Any]]:
    train = extract(context, context.train, layers, pooling, "train")
    test = extract(context, context.test, layers, pooling, "test")
    notes = {
        "num_train": len(train.ids),
        "num_test": len(test.ids),
        "num_classes": targets.num_classes,
        "unreadable_train": train.unreadable,
        "unreadable_test": test.unreadable,
    }
    return train, test, notes
