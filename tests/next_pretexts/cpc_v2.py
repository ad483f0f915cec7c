"""CPC v2 (Henaff et al., arXiv:1905.09272): the patches further down, predicted from those above."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from classy_vision.dataset.transforms import register_transform
from classy_vision.heads import ClassyHead, register_head
from classy_vision.losses import ClassyLoss, register_loss
from PIL import Image
from torch import Tensor, nn

from pirl_plugin.data.views import ImageView, Views, generator_or_torch
from pirl_plugin.registry import Configurable
from pirl_plugin.schema import PROVIDED, PositiveFloat, PositiveInt, checked


@register_transform("overlapping_patches")
@checked
class OverlappingPatches(ImageView):
    """A grid of overlapping patches of one crop: ``{"patches": (n * n, 3, s, s)}``, row by row.

    Args:
        patch_size: s, pixels.
        patch_stride: from one patch to the next, pixels.
        **image_view: see ``ImageView``.
    """

    def __init__(self, patch_size: PositiveInt = 64, patch_stride: PositiveInt = 32, **image_view: Any) -> None:
        super().__init__(**image_view)
        self.patch_size, self.patch_stride = patch_size, patch_stride

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Views:
        """See the class; without a generator, torch's global random state decides."""
        crop = self.image_view(image, generator_or_torch(rng))["image"]
        grid = crop.unfold(1, self.patch_size, self.patch_stride).unfold(2, self.patch_size, self.patch_stride)
        return {"patches": grid.permute(1, 2, 0, 3, 4).flatten(0, 1).contiguous()}


@register_head("patch_prediction")
@checked
class PatchPrediction(Configurable, ClassyHead):
    """Each row of patches, predicted from the rows above it: ``{"": mean, "wanted": ..., "predicted": ...}``.

    Args:
        in_dim: channels of the trunk; the model provides it.
        rows: n, rows and columns of the grid.
        dim: size of a patch's embedding.
        unique_id: name under which classy-vision knows the head; the model gives the view's.
    """

    def __init__(
        self,
        in_dim: Annotated[PositiveInt, PROVIDED],
        rows: PositiveInt = 7,
        dim: PositiveInt = 128,
        unique_id: Annotated[str, PROVIDED] = "patch_prediction",
    ) -> None:
        super().__init__(unique_id, dim)
        self.rows = rows
        self.patch = nn.Linear(in_dim, dim)
        self.context = nn.Conv2d(dim, dim, kernel_size=(2, 3))
        self.prediction = nn.Conv2d(dim, dim, kernel_size=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``(B, n * n, in_dim)`` to ``(B, dim)``, and wanted and predicted ``(B, (n - 1) * n, dim)``."""
        patches = self.patch(x).unflatten(1, (self.rows, self.rows)).permute(0, 3, 1, 2)
        above = F.pad(patches[:, :, :-1], (1, 1, 1, 0))  # a place sees its own row and the one above, for the next
        predicted = self.prediction(self.context(above).relu())
        embeddings = {"wanted": patches[:, :, 1:], "predicted": predicted}
        return {"": patches.mean(dim=(2, 3)), **{name: e.flatten(2).mT for name, e in embeddings.items()}}


@register_loss("patch_infonce")
@checked
class PatchInfoNCE(Configurable, ClassyLoss):
    """InfoNCE of each predicted patch with the wanted one against all others of the batch, nats.

    Args:
        temperature: tau, dimensionless.
        view: name of the patches.
    """

    def __init__(self, temperature: PositiveFloat = 0.1, view: str = "patches") -> None:
        super().__init__()
        self.temperature, self.views = temperature, [view]

    def forward(self, output: Mapping[str, Tensor], target: Tensor) -> Tensor:
        """Loss of one batch; the image ids are not needed."""
        (view,) = self.views
        names = (f"{view}/predicted", f"{view}/wanted")
        predicted, wanted = (F.normalize(output[name].flatten(0, 1).float(), dim=1) for name in names)
        return F.cross_entropy(predicted @ wanted.T / self.temperature, torch.arange(len(wanted)).to(wanted.device))
