"""The loss of SwAV: each crop predicts the codes of the image's large crops. Codes and cross entropy are lightly's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from classy_vision.losses import ClassyLoss, register_loss
from torch import Tensor, nn

from pirl_plugin.distributed import broadcast_, rank, world_size
from pirl_plugin.losses.swav_crops import LARGE, unit_crops, views_of
from pirl_plugin.optional import optional
from pirl_plugin.registry import Configurable, build
from pirl_plugin.schema import Component, NonNegativeInt, PositiveFloat, PositiveInt, checked


@register_loss("swav")
@checked
class SwAVLoss(Configurable, ClassyLoss):
    """Cross entropy of every other crop's prototype scores with the code of each large crop (Caron et al. 2020, Eq. 1).

    Nats, mean over large crops, over the other crops and over the batch. A code is the large crop's assignment to the
    prototypes that Sinkhorn's iterations spread evenly over the global batch, and over a queue of earlier crops. The
    loss only reads prototypes and queue; the hook ``cluster_assignment`` keeps the prototypes at unit norm, holds them
    in the first epochs, and writes the queue.

    Args:
        dim: D, dimensions of an embedding.
        num_prototypes: K.
        temperature: tau of the predictions, dimensionless.
        epsilon: entropy regularisation of the codes.
        sinkhorn_iterations: normalisations over prototypes and over crops.
        num_views: V, large crops of an image, in the output ``image``.
        small_view: name of the output with the small crops; null: there are none.
        freeze_epochs: epochs at the start in which the prototypes stay as they are.
        queue: configuration of the queue of each large crop, such as ``{name: fifo_queue, size: 3840}``, for batches of
            less than some thousand images; null: codes come from the batch alone.
        queue_start_epoch: 0-based epoch from which the queue is used, once it is full; it is filled from the start.

    Attributes:
        prototypes: ``(K, D)``, a trained parameter, unit norm.
        queues: one for each large crop, part of the state dict; every process holds the embeddings of all.
        last_statistics: of the last call, 0-dim tensors, for logging: ``effective_prototypes``, the exponential of the
            entropy of the mean prediction: K where all are used alike, 1 where all images go to one (collapse).

    Raises:
        ImportError: lightly is not installed.
    """

    needed_hooks: ClassVar[tuple[str, ...]] = ("cluster_assignment",)
    needs_first_pass: ClassVar[bool] = False
    stored_view: ClassVar[str] = LARGE

    def __init__(
        self,
        dim: PositiveInt = 128,
        num_prototypes: PositiveInt = 3000,
        temperature: PositiveFloat = 0.1,
        epsilon: PositiveFloat = 0.05,
        sinkhorn_iterations: PositiveInt = 3,
        num_views: PositiveInt = 2,
        small_view: str | None = "crops",
        freeze_epochs: NonNegativeInt = 1,
        queue: Annotated[Mapping[str, Any], Component("memory_bank")] | None = None,
        queue_start_epoch: NonNegativeInt = 15,
    ) -> None:
        super().__init__()
        if num_views == 1 and small_view is None:
            raise ValueError("SwAV compares crops of an image: set num_views >= 2, or name a view of small crops.")
        self.dim, self.num_views, self.small_view, self.temperature = dim, num_views, small_view, temperature
        self.freeze_epochs, self.queue_start_epoch = freeze_epochs, queue_start_epoch
        self.of_scores = optional("lightly.loss", "methods", "The loss swav").SwaVLoss(
            temperature=temperature,
            sinkhorn_iterations=sinkhorn_iterations,
            sinkhorn_epsilon=epsilon,
            sinkhorn_gather_distributed=True,
        )
        self.prototypes = nn.Parameter(F.normalize(torch.randn(num_prototypes, dim), dim=1))
        count = 0 if queue is None else num_views
        self.queues = nn.ModuleList([build("memory_bank", queue or {}, dim=dim) for _ in range(count)])
        self.queue_in_use = False
        self._epoch = 0
        self._held: Tensor | None = None
        self.last_statistics: dict[str, Tensor] = {}

    @property
    def views(self) -> list[str]:
        """Outputs of the model that enter the loss."""
        return views_of(self.small_view)

    @property
    def _queues(self) -> list[Any]:
        return list(self.queues)

    def forward(self, output: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Loss of one batch; ``target``, the image ids, is not needed.

        Raises:
            KeyError: the model gave no large or no small crops.
            ValueError: embeddings of another shape.
        """
        with torch.autocast(target.device.type, enabled=False):
            large, small = unit_crops(output, self.small_view, self.num_views, self.dim)
            prototypes: Tensor = self.prototypes
            if self._held is not None:  # a gradient of zero, as DistributedDataParallel waits for one
                prototypes = prototypes.detach() + 0 * prototypes
            of_large = [crop @ prototypes.T for crop in large.unbind(1)]
            of_small = [crop @ prototypes.T for crop in small.unbind(1)]
            with torch.no_grad():
                self._keep_statistics(of_large[0])
                of_queue = self._queue_scores()
            return self.of_scores(of_large, of_small, of_queue).squeeze()

    def _queue_scores(self) -> list[Tensor] | None:
        """Scores of this process's share of the queues: together the processes see each row once."""
        if not self.queue_in_use:
            return None
        return [
            queue.rows[rank() :: world_size()].to(self.prototypes.dtype) @ self.prototypes.T for queue in self._queues
        ]

    def _keep_statistics(self, scores: Tensor) -> None:
        mean = (scores / self.temperature).softmax(dim=1).mean(dim=0)
        self.last_statistics = {"effective_prototypes": torch.special.entr(mean).sum().exp()}

    # -- called by the hook cluster_assignment -------------------------------------------------------------------------

    def synchronize(self) -> None:
        """Gives every rank rank 0's queue; collective."""
        for queue in self._queues:
            queue.synchronize()
        with torch.no_grad():
            broadcast_(self.prototypes)

    def start_epoch(self, epoch: int, images_seen: int) -> None:
        """Before an epoch, also one that is entered again in its middle.

        Args:
            epoch: 0-based.
            images_seen: images that training has taken so far, over all processes.
        """
        self._epoch = epoch
        self._held = self.prototypes.detach().clone() if epoch < self.freeze_epochs else None
        self._look_at_queue(images_seen)

    @torch.no_grad()
    def after_step(self, ids: Tensor, embeddings: Tensor, images_seen: int) -> None:
        """After an optimiser step.

        Args:
            ids: of the step's images, ``(B,)``; not needed.
            embeddings: the model's output ``image`` for them, ``(B, V, D)``.
            images_seen: see ``start_epoch``.
        """
        new = F.normalize(self.prototypes, dim=1) if self._held is None else self._held
        self.prototypes.copy_(new)
        for queue, crop in zip(self._queues, embeddings.unbind(1), strict=False):
            queue.update(ids, crop)
        self._look_at_queue(images_seen)

    def _look_at_queue(self, images_seen: int) -> None:
        # what is counted is restored with a checkpoint: a resumed run begins to use the queue at the same step
        full = all(images_seen >= len(queue.rows) for queue in self._queues)
        self.queue_in_use = bool(self._queues) and self._epoch >= self.queue_start_epoch and full
