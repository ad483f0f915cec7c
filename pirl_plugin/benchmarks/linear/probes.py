"""Linear classifiers of one layer's features, trained side by side: one for each learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pirl_plugin import distributed
from pirl_plugin.benchmarks.linear.protocols import Protocol
from pirl_plugin.benchmarks.linear.targets import mean_loss
from pirl_plugin.benchmarks.training import average_gradients

_EPS = 1e-5
_RUNNING = 0.1  # weight of a batch in the running statistics


@dataclass(frozen=True)
class GridPoint:
    """What one classifier of a grid is trained with."""

    lr: float
    weight_decay: float

    def __str__(self) -> str:
        return f"lr={self.lr:g},weight_decay={self.weight_decay:g}"


class ProbeGrid:
    """Batch norm and G linear classifiers on the same features, each as if it were alone.

    All start from the same weights. The batch statistics are those of the global batch, so that the result does not
    depend on the number of processes; parameters and their momentum are float32, whatever the trunk computes in.

    Args:
        channels: of the feature map; a channel's positions lie side by side in a row of features and share statistics.
        dims: numbers in a row of features.
        num_classes: C.
        protocol: normalisation, initial weights, momentum.
        points: one classifier each.
        seed: of the initial weights.
        device: of all tensors.
        shared_batches: the ranks' batches are parts of one; false where every rank has the same whole ones.

    Attributes:
        parameters: ``weight (G, C, D)``, ``bias (G, C)`` and, of an affine norm, ``scale`` and ``shift (G, channels)``.
        velocities: momentum of each parameter.
        running: ``mean`` and ``var (channels,)`` for the evaluation.
    """

    def __init__(
        self,
        channels: int,
        dims: int,
        num_classes: int,
        protocol: Protocol,
        points: Sequence[GridPoint],
        seed: int = 0,
        device: torch.device | str = "cpu",
        shared_batches: bool = True,
    ) -> None:
        self.channels, self.protocol, self.points = channels, protocol, list(points)
        self.shared_batches = shared_batches
        generator = torch.Generator().manual_seed(seed)
        count, bound = len(self.points), dims**-0.5
        if protocol.init == "normal":
            weight, bias = torch.randn(num_classes, dims, generator=generator) * 0.01, torch.zeros(num_classes)
        else:
            weight = (2 * torch.rand(num_classes, dims, generator=generator) - 1) * bound
            bias = (2 * torch.rand(num_classes, generator=generator) - 1) * bound
        start = {"weight": weight, "bias": bias}
        if protocol.norm == "affine":
            start |= {"scale": torch.ones(channels), "shift": torch.zeros(channels)}
        self.parameters = {
            name: value.to(device).repeat(count, *[1] * value.ndim).requires_grad_() for name, value in start.items()
        }
        self.running = {"mean": torch.zeros(channels, device=device), "var": torch.ones(channels, device=device)}
        self.velocities = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        self._lr, self._decay = (
            torch.tensor([getattr(point, name) for point in self.points], device=device)
            for name in ("lr", "weight_decay")
        )

    def scores(self, x: Tensor) -> Tensor:
        """Scores in evaluation, ``(B, D)`` to ``(G, B, C)``, with the running statistics."""
        with torch.no_grad():
            return self._scores(self._normalized(x, self.running["mean"], self.running["var"]))

    def train_step(self, x: Tensor, targets: Tensor, lr_factor: float) -> tuple[Tensor, Tensor]:
        """One step of SGD of every classifier.

        Args:
            x: features of this process's part of the global batch, ``(B, D)``; all parts are of equal size.
            targets: see ``targets.mean_loss``.
            lr_factor: what the learning rates are multiplied by.

        Returns:
            Mean loss ``(G,)`` and scores ``(G, B, C)`` of this process's part, before the step.
        """
        if self.protocol.norm == "none":
            normalized = x
        else:
            mean, var, count = self._batch_statistics(x)
            self.running["mean"].lerp_(mean, _RUNNING)
            self.running["var"].lerp_(var * count / max(count - 1, 1), _RUNNING)
            normalized = self._normalized(x, mean, var)
        with torch.enable_grad():
            scores = self._scores(normalized)
            losses = mean_loss(scores, targets)
            losses.sum().backward()
        if self.shared_batches:
            average_gradients(self.parameters.values())
        self._sgd(lr_factor)
        return losses.detach(), scores.detach()

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """All that training goes on from."""
        parameters = {name: value.detach() for name, value in self.parameters.items()}
        return {"parameters": parameters, "velocities": self.velocities, "running": self.running}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes over what ``state_dict`` gave."""
        for part, own in (("parameters", self.parameters), ("velocities", self.velocities), ("running", self.running)):
            for name, value in own.items():
                value.copy_(state[part][name])

    @torch.no_grad()
    def only(self, index: int) -> ProbeGrid:
        """The grid of one of the classifiers, with a copy of its weights and statistics."""
        dims, classes = self.parameters["weight"].shape[2], self.parameters["weight"].shape[1]
        alone = ProbeGrid(
            self.channels, dims, classes, self.protocol, [self.points[index]], device=self.running["mean"].device
        )
        part = slice(index, index + 1)
        alone.load_state_dict(
            {
                "parameters": {name: value[part] for name, value in self.parameters.items()},
                "velocities": {name: value[part] for name, value in self.velocities.items()},
                "running": self.running,
            }
        )
        return alone

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Mean and biased variance of each channel over the global batch, and the numbers that they are of."""
        var, mean = torch.var_mean(x.unflatten(1, (self.channels, -1)), dim=(0, 2), correction=0)
        own = torch.stack([mean, var])[None]
        of_ranks = distributed.all_gather(own) if self.shared_batches else own  # (ranks, 2, channels): equal parts
        means, variances = of_ranks[:, 0], of_ranks[:, 1]
        mean = means.mean(dim=0)
        count = x.numel() // self.channels * len(of_ranks)
        return mean, variances.mean(dim=0) + (means - mean).square().mean(dim=0), count

    def _normalized(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        if self.protocol.norm == "none":
            return x
        factor = (var + _EPS).rsqrt()
        return ((x.unflatten(1, (self.channels, -1)) - mean[:, None]) * factor[:, None]).flatten(1)

    def _scores(self, x: Tensor) -> Tensor:
        """``(B, D)`` normalised to ``(G, B, C)``, one matrix product for all classifiers.

        Scale and shift of an affine norm go into weight and bias, so that the features stay one matrix for all.
        """
        weight, bias = self.parameters["weight"], self.parameters["bias"]
        if "scale" in self.parameters:
            of_channel = weight.unflatten(2, (self.channels, -1))
            bias = bias + torch.einsum("gcks,gk->gc", of_channel, self.parameters["shift"])
            weight = (of_channel * self.parameters["scale"][:, None, :, None]).flatten(2)
        count, classes, _ = weight.shape
        scores = torch.addmm(bias.flatten(), x, weight.flatten(0, 1).T)
        return scores.view(len(x), count, classes).transpose(0, 1)

    @torch.no_grad()
    def _sgd(self, lr_factor: float) -> None:
        """Momentum as torch's SGD has it: the learning rate multiplies the velocity, it is not part of it."""
        momentum = self.protocol.momentum
        for name, value in self.parameters.items():
            gradient, velocity = value.grad, self.velocities[name]
            assert gradient is not None
            per_classifier = (-1, *[1] * (value.ndim - 1))
            if name in ("weight", "bias"):  # of a batch norm nothing is decayed
                gradient.addcmul_(value, self._decay.view(per_classifier))
            velocity.mul_(momentum).add_(gradient)
            step = gradient.add_(velocity, alpha=momentum) if self.protocol.nesterov else velocity
            value.addcmul_(step, self._lr.view(per_classifier), value=-lr_factor)
            value.grad = None
