"""Fine-tuning of a pretrained trunk with a linear classifier on it, on one process or several; can be resumed."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pirl_plugin import distributed
from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.benchmarks.finetuning.recipes import Recipe
from pirl_plugin.benchmarks.training import LabelledBatches, average_gradients, sha256_of
from pirl_plugin.models.normalize import Normalize
from pirl_plugin.models.trunks import ResNetTrunk, bfloat16_hazards
from pirl_plugin.weights.files import read_weights, write_atomically

log = logging.getLogger(__name__)


class Classifier(nn.Module):
    """A trunk and one linear layer on its pooled features.

    Args:
        trunk: taken as it is, made trainable.
        num_classes: C.
        seed: of the linear layer's weights, normal with deviation 0.01; its biases start at 0.
    """

    def __init__(self, trunk: nn.Module, num_classes: int, seed: int) -> None:
        super().__init__()
        self.normalize = Normalize()
        self.trunk = trunk.requires_grad_(True)
        self.head = nn.Linear(trunk.channels["res5"], num_classes)  # type: ignore[index, union-attr, arg-type]
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            self.head.weight.copy_(0.01 * torch.randn(self.head.weight.shape, generator=generator))
            self.head.bias.zero_()

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``(B, C)`` of images ``(B, 3, S, S)``, uint8 or already normalised floats."""
        return self.head(self.trunk(self.normalize(images)))


class FineTuning:
    """The state of a fine-tuning: network, optimiser, epoch.

    Epochs are pure functions of the state and the seed, on any number of workers. With several processes each
    normalises its own part of a batch; gradients are averaged at each step, running statistics after each epoch.

    Args:
        context: the pretrained weights, which stay as they are, and how to run them.
        batches: the labelled images.
        recipe: epochs, rates and schedule; its batch size is that of ``batches`` over all processes.
        num_classes: C.

    Raises:
        ValueError: bfloat16 on a CPU that would compute wrong gradients.
    """

    def __init__(self, context: BenchmarkContext, batches: LabelledBatches, recipe: Recipe, num_classes: int) -> None:
        _refuse_hazards(context)
        self.context, self.batches, self.recipe = context, batches, recipe
        self.network = Classifier(copy.deepcopy(context.trunk), num_classes, context.seed).to(context.device)
        self.optimizer = make_optimizer(self.network, recipe)
        self.epoch = 0
        self.losses: list[float] = []

    def run(self, file: Path | None, facts: Mapping[str, Any]) -> Classifier:
        """Trains to the end, from the last whole epoch in ``file`` where it is of the same fine-tuning.

        Args:
            file: where the state is kept after each epoch, and taken away at the end; None keeps nothing.
            facts: what the fine-tuning depends on besides weights, labels and recipe: a state of other facts is not
                taken up.

        Raises:
            ValueError: the loss is no longer finite.
        """
        key = self._key(facts)
        self._take_up(file, key)
        while self.epoch < self.recipe.num_epochs:
            self._train_epoch()
            if file is not None and distributed.is_primary():
                write_atomically({"key": key, **self._state()}, file)
        distributed.barrier()
        if file is not None and distributed.is_primary():
            file.unlink(missing_ok=True)
        return self.network.eval()

    def _train_epoch(self) -> None:
        recipe, epoch = self.recipe, self.epoch
        for group in self.optimizer.param_groups:
            group["lr"] = group["first_lr"] * recipe.multiplier(epoch)
        self.network.train()
        parameters = list(self.network.parameters())
        total = torch.zeros(2, device=self.context.device)  # loss, right answers; per image
        steps = self.batches.steps_per_epoch
        what = f"fine-tuning, epoch {epoch + 1} of {recipe.num_epochs}"
        for images, labels in self.context.progress(self.batches.epoch(epoch), steps, what):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.context.precision == "bf16"):
                scores = self.network(images)
            loss = F.cross_entropy(scores.float(), labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            average_gradients(parameters)
            self.optimizer.step()
            right = (scores.detach().argmax(dim=1) == labels).float().mean()
            total += torch.stack([loss.detach(), right]) / steps
        average_running_statistics(self.network)
        mean_loss, accuracy = distributed.all_reduce_mean(total).tolist()
        if not torch.isfinite(torch.tensor(mean_loss)):
            raise ValueError(f"the fine-tuning diverged in epoch {epoch + 1}: lower trunk_lr and head_lr.")
        self.losses.append(mean_loss)
        self.epoch += 1
        if self.epoch % max(1, recipe.num_epochs // 10) == 0 and distributed.is_primary():
            log.info("%s: loss %.3f nats, %.1f %% of the training views right", what, mean_loss, 100 * accuracy)

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "losses": self.losses,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def _take_up(self, file: Path | None, key: str) -> None:
        state = read_weights(file) if file is not None and file.is_file() else None
        epochs = distributed.gather_objects(state["epoch"] if state is not None and state["key"] == key else 0)
        if state is not None and epochs[0] == 0 and distributed.is_primary():
            log.warning("%s is of another fine-tuning: starting from the first epoch.", file)
        if state is None or min(epochs) == 0 or len(set(epochs)) > 1:
            return
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.losses = state["epoch"], list(state["losses"])
        if distributed.is_primary():
            log.info("Going on after epoch %d of %d, from %s", self.epoch, self.recipe.num_epochs, file)

    def _key(self, facts: Mapping[str, Any]) -> str:
        digest = hashlib.sha256()
        for name, tensor in self.network.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        known = {"recipe": vars(self.recipe), "processes": distributed.world_size(), **facts}
        known["targets"] = sha256_of(self.batches.targets)
        digest.update(json.dumps(known, sort_keys=True).encode())
        return digest.hexdigest()


def make_optimizer(network: Classifier, recipe: Recipe) -> torch.optim.SGD:
    """SGD with groups for trunk and head, each with and without decay; ``first_lr`` is the rate of the first epoch.

    Batch norms and biases have no weight decay.
    """
    groups = []
    for module, lr in ((network.trunk, recipe.trunk_lr), (network.head, recipe.head_lr)):
        for decays in (True, False):
            chosen = [parameter for parameter in module.parameters() if (parameter.ndim > 1) == decays]
            weight_decay = recipe.weight_decay if decays else 0.0
            groups.append({"params": chosen, "lr": lr, "first_lr": lr, "weight_decay": weight_decay})
    return torch.optim.SGD(groups, lr=recipe.trunk_lr, momentum=recipe.momentum, nesterov=recipe.nesterov)


@torch.no_grad()
def average_running_statistics(network: nn.Module) -> None:
    """Replaces each floating buffer by its mean over the ranks, so that all ranks go on with the same network."""
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    if not distributed.is_distributed() or not buffers:
        return
    mean = distributed.all_reduce_mean(torch.cat([buffer.reshape(-1) for buffer in buffers]))
    for buffer, part in zip(buffers, mean.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))


def _refuse_hazards(context: BenchmarkContext) -> None:
    trunk, size = context.trunk, context.image_size
    if context.precision != "bf16" or context.device.type != "cpu" or not isinstance(trunk, ResNetTrunk):
        return
    hazards = bfloat16_hazards(trunk, size, size)
    if hazards:
        raise ValueError(
            f"precision=bf16 would give wrong gradients on this CPU: {hazards[0]} sees a 1x1 input. Use "
            "precision=float32, or larger images."
        )
