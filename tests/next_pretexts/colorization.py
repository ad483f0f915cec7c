"""Colorization (Zhang et al., arXiv:1603.08511): the class of each place's colour, told from the grey image.

The loss is the package's own ``pretext_cross_entropy``. Colours are bins of YCbCr here, of Lab in the paper.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from classy_vision.dataset.transforms import register_transform
from classy_vision.heads import ClassyHead, register_head
from PIL import Image
from torch import Tensor, nn

from pirl_plugin.data.views import ImageView, Views, generator_or_torch
from pirl_plugin.registry import Configurable
from pirl_plugin.schema import PROVIDED, PositiveInt, checked

# luma and the two colour differences of ITU-R BT.601, rows of a matrix over R, G, B
YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


@register_transform("grey_and_colour")
@checked
class GreyAndColour(ImageView):
    """A grey crop and its colours: ``{"image": (3, S, S), "colour": (cells, cells) int64}``.

    Args:
        cells: places along a side, as many as the trunk's last map has.
        levels: bins of each colour difference; there are ``levels ** 2`` classes.
        **image_view: see ``ImageView``.
    """

    def __init__(self, cells: PositiveInt = 4, levels: PositiveInt = 4, **image_view: Any) -> None:
        super().__init__(**image_view)
        self.cells, self.levels = cells, levels

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Views:
        """See the class; without a generator, torch's global random state decides."""
        pixels = self.image_view(image, generator_or_torch(rng))["image"]
        luma, *differences = torch.einsum("kc,chw->khw", YCBCR, pixels.float())
        of_cells = F.adaptive_avg_pool2d(torch.stack(differences), self.cells)
        blue, red = ((of_cells + 128) * self.levels / 256).long().clamp(0, self.levels - 1)
        return {"image": luma.round().to(torch.uint8).expand_as(pixels).clone(), "colour": blue * self.levels + red}


@register_head("colour_classes")
@checked
class ColourClasses(Configurable, ClassyHead):
    """Scores of the colour classes at each place of the trunk's map.

    Args:
        in_dim: channels of the trunk; the model provides it.
        num_classes: ``levels ** 2`` of the transform.
        unique_id: name under which classy-vision knows the head; the model gives the view's.
    """

    takes_map: ClassVar[bool] = True

    def __init__(
        self,
        in_dim: Annotated[PositiveInt, PROVIDED],
        num_classes: PositiveInt = 16,
        unique_id: Annotated[str, PROVIDED] = "colour_classes",
    ) -> None:
        super().__init__(unique_id, num_classes)
        self.scores = nn.Conv2d(in_dim, num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_dim, h, w)`` to ``(B, h, w, num_classes)``."""
        return self.scores(x).permute(0, 2, 3, 1)
