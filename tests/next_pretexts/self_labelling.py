"""Self-labelling (Asano et al., arXiv:1911.05371): labels that share the images evenly, made between the epochs.

The hook is the package's own ``cluster_assignment``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

import torch
from classy_vision.losses import register_loss
from torch import Tensor

from pirl_plugin.distributed import all_gather, broadcast_
from pirl_plugin.losses.cross_entropy import CrossEntropy
from pirl_plugin.schema import PROVIDED, PositiveFloat, PositiveInt, checked


@register_loss("self_labels")
@checked
class SelfLabels(CrossEntropy):
    """Cross entropy of each crop with its image's label, which Sinkhorn and Knopp's iteration gives before each epoch.

    Args:
        num_images: images in the training set.
        num_labels: K, the size of the view's scores.
        sharpness: of the scores in the assignment (the paper's lambda).
        iterations: of the assignment.
        view: name of the scores ``(B, V, K)``.
    """

    needed_hooks: ClassVar[tuple[str, ...]] = ("cluster_assignment",)

    labels: Tensor
    scores: Tensor

    def __init__(
        self,
        num_images: Annotated[PositiveInt, PROVIDED],
        num_labels: PositiveInt = 128,
        sharpness: PositiveFloat = 25.0,
        iterations: PositiveInt = 50,
        view: str = "image",
    ) -> None:
        super().__init__(view)
        self.stored_view, self.sharpness, self.iterations = view, sharpness, iterations
        self.register_buffer("scores", torch.zeros(num_images, num_labels))
        self.register_buffer("labels", torch.zeros(num_images, dtype=torch.int64))
        self.register_buffer("labelled_epoch", torch.tensor(-1))

    def forward(self, output: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Loss of one batch of image ids ``(B,)``."""
        return self.cross_entropy(output, self.labels[target].unsqueeze(1).expand(output[self.view].shape[:2]))

    @property
    def needs_first_pass(self) -> bool:
        """Whether no image has scores yet."""
        return not bool(self.scores.any())

    def synchronize(self) -> None:
        """Gives every rank rank 0's state; collective."""
        for buffer in self.buffers():
            broadcast_(buffer)

    def start_epoch(self, epoch: int, images_seen: int) -> None:
        """Labels all images, unless the epoch is entered again in its middle."""
        if int(self.labelled_epoch) == epoch:
            return
        shares = (self.scores.double().log_softmax(dim=1) * self.sharpness).exp()
        for _ in range(self.iterations):
            shares = shares / shares.sum(dim=0, keepdim=True).clamp_min(1e-300)
            shares = shares / shares.sum(dim=1, keepdim=True).clamp_min(1e-300)
        self.labels.copy_(shares.argmax(dim=1))
        self.labelled_epoch.fill_(epoch)

    @torch.no_grad()
    def after_step(self, ids: Tensor, embeddings: Tensor, images_seen: int) -> None:
        """Keeps the newest scores of a step's images, the mean over their crops; collective."""
        self.scores[all_gather(ids)] = all_gather(embeddings.float().mean(dim=1))
