"""The training of a torchvision detector: steps, messages, and checkpoints to go on from."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.nn.precise_bn import update_bn_stats
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pirl_plugin.atomic import replacing
from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.benchmarks.detection.batches import TrainingImages, TrainingSample, loader
from pirl_plugin.benchmarks.detection.c4 import parameter_groups
from pirl_plugin.benchmarks.detection.presets import DetectionProtocol
from pirl_plugin.benchmarks.detection.schedule import learning_rate
from pirl_plugin.benchmarks.detection.voc import Examples

log = logging.getLogger(__name__)

CHECKPOINT = "detector.pt"
SECONDS_BETWEEN_CHECKPOINTS = 60.0
_MESSAGES = 20  # of a whole training


@dataclass
class Progress:
    """How far a training is; what the checkpoint holds besides weights.

    Attributes:
        iteration: steps done.
        unreadable: images that another one stood in for.
        seconds: spent on steps, over all runs.
        losses: ``[iteration, mean loss since the last entry]``.
    """

    iteration: int = 0
    unreadable: int = 0
    seconds: float = 0.0
    losses: list[list[float]] = field(default_factory=list)


class Training:
    """A training that can be interrupted: steps, checkpoints, messages.

    Args:
        detector: to be trained, on the device.
        examples: to be trained on.
        settings: the protocol.
        context: device, workers, seed, folder.
        identity: of the training; a checkpoint of another one is not used.
    """

    def __init__(
        self,
        detector: nn.Module,
        examples: Examples,
        settings: DetectionProtocol,
        context: BenchmarkContext,
        identity: str,
    ) -> None:
        self.detector, self.settings, self.context, self.identity = detector, settings, context, identity
        self.images = TrainingImages(examples, settings, context.seed)
        groups = parameter_groups(detector, settings)
        self.optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)
        self.progress = Progress()
        self._recent: list[float] = []

    def run(self) -> None:
        """Trains to the last iteration, from the checkpoint where there is one."""
        self._resume()
        start, end = self.progress.iteration, self.settings.iterations
        if start >= end:
            return
        began = saved = time.monotonic()
        for batch in self.context.progress(self._batches(start, end), end - start, "detector"):
            losses = self.step(batch)
            now = time.monotonic()
            self.progress.seconds += now - began
            self._tell(losses)
            if now - saved >= SECONDS_BETWEEN_CHECKPOINTS and self.progress.iteration < end:
                self._save()
                saved = time.monotonic()
            began = time.monotonic()
        self._precise_batch_norm()
        self._save()

    def step(self, batch: list[TrainingSample]) -> dict[str, float]:
        """One optimiser step; its random numbers are a function of the seed and of the iteration alone.

        Returns:
            The parts of the loss.

        Raises:
            ValueError: the loss is not finite.
        """
        iteration = self.progress.iteration
        rate = learning_rate(self.settings, iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.detector.train()
        losses = self._losses(batch, iteration)
        total = torch.stack(list(losses.values())).sum()
        values = {name.removeprefix("loss_"): float(loss.detach()) for name, loss in losses.items()}
        if not np.isfinite(sum(values.values())):
            raise ValueError(
                f"the loss is not finite at iteration {iteration} ({_in_short(values)}; learning rate {rate:.3g}): "
                "try a smaller learning rate."
            )
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.progress.iteration += 1
        self.progress.unreadable += sum(sample.unreadable for sample in batch)
        self._recent.append(sum(values.values()))
        return values

    def _losses(self, batch: list[TrainingSample], iteration: int) -> dict[str, Tensor]:
        device = self.context.device
        images = [sample.image.to(device).float() / 255 for sample in batch]
        targets = [{key: value.to(device) for key, value in sample.target.items()} for sample in batch]
        seed = int(np.random.SeedSequence([self.context.seed, iteration]).generate_state(1)[0])
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)  # of the sampling of anchors and proposals
            return self.detector(images, targets)

    def _batches(self, start: int, end: int) -> DataLoader[Any]:
        size = self.settings.batch_size
        places = [range(step * size, (step + 1) * size) for step in range(start, end)]
        return loader(self.images, places, self.context.num_workers)

    def _precise_batch_norm(self) -> None:
        first, count = self.settings.iterations, self.settings.precise_bn
        if count == 0:
            return
        log.info("Batch norm statistics over %d batches ...", count)
        self.detector.train()
        update_bn_stats(_OneArgument(self, first), iter(self._batches(first, first + count)), count)

    def _tell(self, losses: Mapping[str, float]) -> None:
        done, total = self.progress.iteration, self.settings.iterations
        if done % max(1, total // _MESSAGES) and done != total:
            return
        mean = float(np.mean(self._recent))
        self._recent.clear()
        self.progress.losses.append([done, round(mean, 4)])
        left = in_words(self.progress.seconds / done * (total - done))
        rate = self.optimizer.param_groups[0]["lr"]
        what = f"loss {mean:.3f} (last step: {_in_short(losses)}), learning rate {rate:.2g}"
        log.info("detector %d/%d: %s, %s left", done, total, what, left)

    def _save(self) -> None:
        if self.context.run_dir is None:
            return
        content = {
            "identity": self.identity,
            "progress": asdict(self.progress),
            "recent": list(self._recent),
            "detector": self.detector.state_dict(),
            "optimizer": self.optimizer.state_dict() if self.progress.iteration < self.settings.iterations else None,
        }
        with replacing(Path(self.context.run_dir) / CHECKPOINT) as file:
            torch.save(content, file)

    def _resume(self) -> None:
        path = Path(self.context.run_dir) / CHECKPOINT if self.context.run_dir is not None else None
        if path is None or not path.is_file():
            return
        content = torch.load(path, map_location=self.context.device, weights_only=True)
        if content["identity"] != self.identity:
            log.warning("%s is of other weights, data or settings: the training starts anew.", path)
            return
        self.detector.load_state_dict(content["detector"])
        if content["optimizer"] is not None:  # a finished training does not need its momenta
            self.optimizer.load_state_dict(content["optimizer"])
        self.progress = Progress(**content["progress"])
        self._recent = list(content["recent"])
        log.info("Going on from iteration %d of %d.", self.progress.iteration, self.settings.iterations)


class _OneArgument(nn.Module):
    """A detector in training as a module of one batch, for fvcore's ``update_bn_stats``."""

    def __init__(self, training: Training, first: int) -> None:
        super().__init__()
        self.detector = training.detector
        self._losses, self._iteration = training._losses, first

    def forward(self, batch: list[TrainingSample]) -> dict[str, Tensor]:
        self._iteration += 1
        with torch.no_grad():
            return self._losses(batch, self._iteration - 1)


def in_words(seconds: float) -> str:
    """A duration for messages."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _in_short(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
