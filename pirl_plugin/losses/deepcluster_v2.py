"""The loss of DeepCluster-v2: each crop is classified into the cluster that its image was put in before the epoch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from classy_vision.losses import ClassyLoss, register_loss
from torch import Tensor, nn

from pirl_plugin.distributed import all_gather, all_gather_rows, all_reduce_mean, broadcast_, rank, world_size
from pirl_plugin.functional.kmeans import nearest, spherical_kmeans
from pirl_plugin.losses.swav_crops import LARGE, unit_crops, views_of
from pirl_plugin.registry import Configurable, build
from pirl_plugin.schema import PROVIDED, Component, NonNegativeInt, PositiveFloat, PositiveInt, checked

_NOT_ASSIGNED = -100


@register_loss("deepcluster_v2")
@checked
class DeepClusterV2Loss(Configurable, ClassyLoss):
    """Cross entropy of every crop with its image's cluster, mean over several clusterings (Caron et al. 2020, App. D).

    Nats, mean over the crops of the global batch whose image has a cluster. Before each epoch the hook
    ``cluster_assignment`` has the embeddings of the last one clustered by spherical k-means; the centroids, not
    trained, are the classifiers' prototypes until the next epoch. Clustering i looks at large crop i mod V.

    Args:
        num_images: images in the training set.
        dim: D, dimensions of an embedding.
        num_clusters: of each clustering; clipped to ``num_images`` with a warning.
        temperature: tau, dimensionless.
        kmeans_iterations: steps of k-means before an epoch.
        num_views: V, large crops of an image, in the output ``image``.
        small_view: name of the output with the small crops; null: there are none.
        memory_bank: configuration of the memory of each large crop; null: every image's newest embedding. It must hold
            a row of every image in every process, as ``ema_memory_bank`` does.

    Raises:
        ValueError: no clustering, or a memory bank without those rows.

    Attributes:
        memory: one bank for each large crop, part of the state dict.
        assignments: ``(clusterings, num_images)`` int64, part of the state dict; -100 where an image has not been seen.
        centroids: of each clustering, ``(K, D)``, unit norm, part of the state dict.
        assigned_epoch: 0-dim int64, part of the state dict: the epoch of the assignments, -1 before the first.
        last_statistics: 0-dim tensors, for logging: ``clusters_used``, the fraction of clusters that have images, and
            ``accuracy``, how often a large crop is nearest to its own cluster's centroid.
    """

    needed_hooks: ClassVar[tuple[str, ...]] = ("cluster_assignment",)
    stored_view: ClassVar[str] = LARGE

    assignments: Tensor
    assigned_epoch: Tensor
    written: Tensor

    def __init__(
        self,
        num_images: Annotated[PositiveInt, PROVIDED],
        dim: PositiveInt = 128,
        num_clusters: Sequence[PositiveInt] = (3000, 3000, 3000),
        temperature: PositiveFloat = 0.1,
        kmeans_iterations: NonNegativeInt = 10,
        num_views: PositiveInt = 2,
        small_view: str | None = None,
        memory_bank: Annotated[Mapping[str, Any], Component("memory_bank")] | None = None,
    ) -> None:
        super().__init__()
        if not num_clusters:
            raise ValueError("num_clusters must name at least one clustering's number of clusters, got none.")
        if max(num_clusters) > num_images:
            warnings.warn(
                f"num_clusters {list(num_clusters)} clipped to the number of images, {num_images}.", stacklevel=2
            )
        self.num_images, self.dim, self.num_views, self.small_view = num_images, dim, num_views, small_view
        self.temperature, self.kmeans_iterations = temperature, kmeans_iterations
        bank = memory_bank or {"name": "ema_memory_bank", "momentum": 0.0}
        self.memory = nn.ModuleList(
            [build("memory_bank", bank, num_images=num_images, dim=dim) for _ in range(num_views)]
        )
        if not all(getattr(each, "rows_by_image", True) for each in self.memory):
            raise ValueError(
                f"memory_bank must hold the rows of all images in every process, for k-means, got {bank['name']!r}: "
                "take ema_memory_bank; dtype=bfloat16 halves it."
            )
        for index, count in enumerate(num_clusters):
            self.register_buffer(f"centroids_{index}", torch.zeros(min(count, num_images), dim))
        self.num_clusterings = len(num_clusters)
        self.register_buffer("assignments", torch.full((len(num_clusters), num_images), _NOT_ASSIGNED))
        self.register_buffer("assigned_epoch", torch.tensor(-1))
        self.register_buffer("written", torch.zeros(num_images, dtype=torch.bool))
        self._ready = False
        self.last_statistics: dict[str, Tensor] = {}

    @property
    def views(self) -> list[str]:
        """Outputs of the model that enter the loss."""
        return views_of(self.small_view)

    @property
    def _banks(self) -> list[Any]:
        return list(self.memory)

    @property
    def centroids(self) -> list[Tensor]:
        """Of each clustering, ``(K, D)``."""
        return [getattr(self, f"centroids_{index}") for index in range(self.num_clusterings)]

    def forward(self, output: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Loss of one batch.

        Args:
            output: ``{"image": (B, V, D)}`` and the small crops, if any.
            target: image ids ``(B,)``.

        Raises:
            KeyError: the model gave no large or no small crops.
            RuntimeError: nothing has been clustered yet.
            ValueError: embeddings of another shape.
        """
        if not self._ready:
            raise RuntimeError("There are no clusters yet: the hook cluster_assignment makes them before each epoch.")
        self._banks[0].check_ids(target)
        with torch.autocast(target.device.type, enabled=False):
            large, small = unit_crops(output, self.small_view, self.num_views, self.dim)
            crops = torch.cat([large, small], dim=1)
            known = (self.assignments[0, target] != _NOT_ASSIGNED).sum() * crops.shape[1]
            count = all_reduce_mean(known.to(crops.dtype))  # so that the processes' mean is that of the global batch
            count = torch.where(count > 0, count, torch.ones_like(count))  # a mean over no crop would not be a number
            losses, hits = [], []
            for clusters, centroids in zip(self.assignments[:, target], self.centroids, strict=True):
                scores = crops @ centroids.to(crops.dtype).T
                wanted = clusters.unsqueeze(1).expand(scores.shape[:2])
                cost = F.cross_entropy(
                    scores.flatten(0, 1) / self.temperature,
                    wanted.flatten(),
                    ignore_index=_NOT_ASSIGNED,
                    reduction="sum",
                )
                losses.append(cost / count)
                found = scores[:, : self.num_views].detach().argmax(dim=2) == clusters.unsqueeze(1)
                hits.append(found.float().mean())
            self.last_statistics["accuracy"] = torch.stack(hits).mean()
            return torch.stack(losses).mean()

    # -- called by the hook cluster_assignment -------------------------------------------------------------------------

    @property
    def needs_first_pass(self) -> bool:
        """Whether the memory is still empty: all images are to be embedded once before training."""
        return not bool(self.written.any())

    def synchronize(self) -> None:
        """Gives every rank rank 0's memory; collective."""
        for bank in self._banks:
            bank.synchronize()
        for buffer in (self.assignments, self.assigned_epoch, *self.centroids):
            broadcast_(buffer)

    def start_epoch(self, epoch: int, images_seen: int) -> None:
        """Clusters the memory for an epoch, unless that has been done; collective, the same result on every rank.

        Args:
            epoch: 0-based.
            images_seen: not needed.
        """
        self._ready = True
        if int(self.assigned_epoch) != epoch:  # or it is entered again in its middle, with the checkpoint's clusters
            self._assign(epoch)
        self.last_statistics["clusters_used"] = self._fraction_used()

    def _assign(self, epoch: int) -> None:
        ids = self.written.nonzero().squeeze(1)
        if len(ids) == 0:
            raise RuntimeError("The memory is empty: write it with after_step before the first epoch.")
        own = ids.tensor_split(world_size())[rank()]
        for index, centroids in enumerate(self.centroids):
            rows = self._banks[index % self.num_views].rows
            generator = torch.Generator().manual_seed(epoch * self.num_clusterings + index)
            order = torch.randperm(len(ids), generator=generator).to(ids.device)
            first = ids[order[torch.arange(len(centroids), device=ids.device) % len(ids)]]
            centroids.copy_(spherical_kmeans(rows[own], rows[first], self.kmeans_iterations))
            self.assignments[index, ids] = all_gather_rows(nearest(rows[own], centroids))
        self.assigned_epoch.fill_(epoch)

    def _fraction_used(self) -> Tensor:
        assigned = self.assignments[:, self.assignments[0] != _NOT_ASSIGNED]
        of_each = zip(assigned, self.centroids, strict=True)
        return torch.stack([(a.bincount(minlength=len(c)) > 0).float().mean() for a, c in of_each]).mean()

    @torch.no_grad()
    def after_step(self, ids: Tensor, embeddings: Tensor, images_seen: int) -> None:
        """Writes the embeddings of an optimiser step's large crops to the memory; collective.

        Args:
            ids: of the step's images, ``(B,)``.
            embeddings: the model's output ``image`` for them, ``(B, V, D)``.
            images_seen: not needed.
        """
        for bank, crop in zip(self._banks, embeddings.unbind(1), strict=True):
            bank.update(ids, crop)
        self.written[all_gather(ids)] = True
