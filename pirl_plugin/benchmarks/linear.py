"""Linear probes of frozen features, all layers from one pass over the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Len
from torch import Tensor, nn

from pirl_plugin.benchmarks.context import Benchmark, BenchmarkContext, Result
from pirl_plugin.benchmarks.features import LabelledFeatures, train_and_test
from pirl_plugin.benchmarks.logistic import Standardizer, choose_l2, fit_logistic, held_out_parts
from pirl_plugin.benchmarks.top_k import top_k_accuracy
from pirl_plugin.models.trunks import LAYERS
from pirl_plugin.registry import register_benchmark
from pirl_plugin.schema import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, checked

_SMALL_SET = 10_000  # up to here 5-fold cross-validation chooses the penalty, above it one tenth of the images does
_L2_WITHOUT_A_CHOICE = 0.01  # where the training set is too small to hold anything out

Layer = Literal["conv1", "res2", "res3", "res4", "res5"]


@register_benchmark("linear")
@checked
class Linear(Benchmark):
    """Linear classifiers on frozen features: top-1 and, for more than five classes, top-5 of each layer.

    Features are cached: each image passes the trunk once, as the evaluation transform shows it. Two protocols, whose
    name is in every record:

    * ``small``: global average pooling, standardised features, multinomial logistic regression fitted to convergence
      by L-BFGS, with the L2 penalty of the smallest loss on held-out parts of the TRAINING set (5-fold cross-validation
      up to 10,000 images, one tenth above) and a last fit on all of it. The seed only decides what is held out, so that
      runs hardly differ. For small images and data sets.
    * ``goyal19_cached``: Goyal et al. 2019 with the numbers of the PIRL paper (App. C): average pooling to about 9,000
      numbers, batch norm without scale and shift, a linear layer, SGD with Nesterov momentum 0.9, batch 256, learning
      rate 0.01 divided by 10 at equally spaced points, weight decay 5e-4, 28 epochs. Unlike there, the training images
      are not augmented, so that it is not comparable with published numbers.

    Args:
        layers: layers of the trunk; the headline is the deepest one's top-1.
        protocol: see above.
        pooling: ``avg`` (global) or ``grid`` (about 9,000 numbers); null is the protocol's own.
        l2: penalties to choose from (``small`` only).
        num_epochs: passes over the training features (``goyal19_cached`` only, as all that follow).
        batch_size: images of one SGD step.
        lr: learning rate.
        weight_decay: of the weights and biases.
        momentum: Nesterov's.
        num_drops: how often the learning rate is divided by 10, at equally spaced points (the paper 2, VISSL 3).
    """

    def __init__(
        self,
        layers: Annotated[Sequence[Layer], Len(1)] = ("res5",),
        protocol: Literal["small", "goyal19_cached"] = "small",
        pooling: Literal["avg", "grid"] | None = None,
        l2: Annotated[Sequence[NonNegativeFloat], Len(1)] = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5),
        num_epochs: PositiveInt = 28,
        batch_size: PositiveInt = 256,
        lr: PositiveFloat = 0.01,
        weight_decay: NonNegativeFloat = 5e-4,
        momentum: PositiveFloat = 0.9,
        num_drops: NonNegativeInt = 2,
    ) -> None:
        self.layers = sorted(set(layers), key=LAYERS.index)
        self.protocol = protocol
        self.pooling = pooling or ("avg" if protocol == "small" else "grid")
        self.l2 = l2
        self.sgd = SGDSettings(num_epochs, batch_size, lr, weight_decay, momentum, num_drops)

    def run(self, context: BenchmarkContext) -> Iterator[Result]:
        """Yields top-1 (and top-5) of each layer, in percent of the readable test images."""
        train, test, classes, notes = train_and_test(context, self.layers, self.pooling)
        if self.protocol == "small":
            scores = self._converged(context, train, test, classes)
        else:
            scores = self._goyal19(context, train, test, classes)
        for layer, (of_layer, more) in scores.items():
            for top in (1, 5) if classes > 5 else (1,):
                yield Result(
                    {"layer": layer},
                    f"top{top}",
                    top_k_accuracy(of_layer, test.labels, top),
                    self.protocol,
                    headline=top == 1 and layer == self.layers[-1],
                    extra={**notes, "pooling": self.pooling, "dims": train.of[layer].shape[1], **more},
                )

    def _converged(
        self, context: BenchmarkContext, train: LabelledFeatures, test: LabelledFeatures, classes: int
    ) -> dict[str, tuple[Tensor, dict[str, Any]]]:
        generator = torch.Generator().manual_seed(context.seed)
        small = len(train.labels) <= _SMALL_SET
        held_out = held_out_parts(train.labels, 5 if small else 10, generator)
        held_out = held_out if small else held_out[:1]
        scores = {}
        for layer in context.progress(self.layers, len(self.layers), "linear classifiers"):
            standardize = Standardizer.fit(train.of[layer])
            x = standardize(train.of[layer])
            more: dict[str, Any] = {"held_out": sum(int(part.sum()) for part in held_out)}
            start, l2 = None, _L2_WITHOUT_A_CHOICE
            if held_out:
                choice, start = choose_l2(x, train.labels, classes, self.l2, held_out, standardize.variance)
                l2 = choice.l2
                more["held_out_loss"] = {f"{key:g}": round(value, 4) for key, value in choice.loss.items()}
                more["held_out_accuracy"] = {f"{key:g}": round(value, 2) for key, value in choice.accuracy.items()}
            classifier = fit_logistic(x, train.labels, classes, l2, standardize.variance, start)
            scores[layer] = (classifier(standardize(test.of[layer])), {**more, "l2": l2})
        return scores

    def _goyal19(
        self, context: BenchmarkContext, train: LabelledFeatures, test: LabelledFeatures, classes: int
    ) -> dict[str, tuple[Tensor, dict[str, Any]]]:
        channels: dict[str, int] = context.trunk.channels  # type: ignore[assignment]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            probes = {layer: LinearProbe(channels[layer], train.of[layer].shape[1], classes) for layer in self.layers}
        for probe in probes.values():
            probe.to(context.device)
        generator = torch.Generator().manual_seed(context.seed)
        epochs = range(self.sgd.num_epochs)
        optimizers = {layer: self.sgd.optimizer(probe) for layer, probe in probes.items()}
        for epoch in context.progress(epochs, len(epochs), "linear classifiers"):
            order = torch.randperm(len(train.labels), generator=generator).to(context.device)
            for ids in order.split(self.sgd.batch_size):
                if len(ids) == 1 < len(order):
                    continue  # one image has no batch statistics; the next epoch has it in another batch
                for layer, probe in probes.items():
                    for group in optimizers[layer].param_groups:
                        group["lr"] = self.sgd.lr_at(epoch)
                    optimizers[layer].zero_grad()
                    F.cross_entropy(probe(train.of[layer][ids]), train.labels[ids]).backward()
                    optimizers[layer].step()
        return {layer: (probe.scores(test.of[layer]), {}) for layer, probe in probes.items()}


@dataclass(frozen=True)
class SGDSettings:
    """Training of the ``goyal19_cached`` probes; see ``Linear``."""

    num_epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    momentum: float
    num_drops: int

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch: divided by 10 at ``num_drops`` equally spaced points."""
        return self.lr * 0.1 ** (epoch * (self.num_drops + 1) // self.num_epochs)

    def optimizer(self, probe: nn.Module) -> torch.optim.SGD:
        """SGD with Nesterov momentum over all of a probe's parameters."""
        return torch.optim.SGD(
            probe.parameters(), self.lr, momentum=self.momentum, weight_decay=self.weight_decay, nesterov=True
        )


class LinearProbe(nn.Module):
    """Batch norm per channel without scale and shift, then one linear layer (Goyal et al. 2019)."""

    def __init__(self, channels: int, dims: int, num_classes: int) -> None:
        super().__init__()
        self.channels = channels
        self.norm = nn.BatchNorm1d(channels, affine=False)
        self.linear = nn.Linear(dims, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, dims)``, each channel's positions side by side, to scores ``(B, num_classes)``."""
        return self.linear(self.norm(x.unflatten(1, (self.channels, -1))).flatten(1))

    @torch.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """Scores in evaluation mode, in pieces."""
        self.eval()
        return torch.cat([self(piece) for piece in x.split(4096)])
