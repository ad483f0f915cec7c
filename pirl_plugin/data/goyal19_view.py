"""The training view of Goyal et al. 2019's linear classifiers."""

from __future__ import annotations

import numpy as np
import torch
from classy_vision.dataset.transforms import register_transform
from PIL import Image

from pirl_plugin.data.views import AreaRange, ImageView, PositiveRange, Views
from pirl_plugin.schema import Fraction, NonNegativeFloat, PositiveInt, checked

# Principal components of ImageNet's colours, R, G, B, for values in [0, 1] (Krizhevsky et al. 2012; numbers of the
# released code of Goyal et al.): a column of the matrix belongs to each eigenvalue.
_EIGENVALUES = np.array([0.2175, 0.0188, 0.0045])
_EIGENVECTORS = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])


@register_transform("goyal19_view")
@checked
class Goyal19View(ImageView):
    """A crop, flipped, its colours jittered and its light shifted: ``{"image": (3, S, S)}`` uint8 (Goyal et al. 2019).

    Their code works on floats; here the view is rounded to bytes after each operation. The light is shifted last, which
    is why there is no ``colours: device``.

    Args:
        image_size: side S of the view, pixels.
        image_scale: range of the crop's area, as a fraction of the image's.
        image_ratio: range of the crop's width / height.
        brightness: factor uniform in 1 +- this; likewise ``contrast`` and ``saturation``, in random order.
        contrast: see brightness.
        saturation: see brightness.
        lighting: deviation of the three random factors of ImageNet's principal colour components, which are added.
        flip_probability: of a horizontal flip.
    """

    def __init__(
        self,
        image_size: PositiveInt = 224,
        image_scale: AreaRange = (0.08, 1.0),
        image_ratio: PositiveRange = (3 / 4, 4 / 3),
        brightness: NonNegativeFloat = 0.4,
        contrast: NonNegativeFloat = 0.4,
        saturation: NonNegativeFloat = 0.4,
        lighting: NonNegativeFloat = 0.1,
        flip_probability: Fraction = 0.5,
    ) -> None:
        super().__init__(
            image_size=image_size,
            image_scale=image_scale,
            image_ratio=image_ratio,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
            hue=0.0,
            photometric_probability=0.0,
            grayscale_probability=0.0,
            flip_probability=flip_probability,
        )
        self.lighting = lighting

    def image_view(self, image: Image.Image, rng: np.random.Generator, name: str = "image") -> Views:
        """One augmented crop, ``{name: (3, S, S)}`` uint8."""
        view = super().image_view(image, rng, name)[name]
        shift = 255 * _EIGENVECTORS @ (_EIGENVALUES * rng.normal(0.0, self.lighting, 3))
        shifted = view.float() + torch.from_numpy(shift).float().view(3, 1, 1)
        return {name: shifted.round().clamp(0, 255).to(torch.uint8)}
