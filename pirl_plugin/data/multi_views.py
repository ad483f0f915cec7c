"""Several augmented crops of one image: what SimCLR, MoCo, BYOL, SwAV and their relatives compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from classy_vision.dataset.transforms import register_transform
from PIL import Image

from pirl_plugin.data.photometric import ByteArray, Programs
from pirl_plugin.data.views import AreaRange, ImageView, PhotometricTransform, Views, generator_or_torch, ordered
from pirl_plugin.schema import ConfigError, NonNegativeInt, PositiveInt, check_arguments, checked


@register_transform("image_views")
@checked
class ImageViews(ImageView):
    """Independent crops of an image, with small ones if wanted: ``{"image": (V, 3, S, S), "crops": (C, 3, s, s)}``.

    Args:
        num_views: V, crops of ``image_size`` pixels.
        second_view: photometric settings in which the second view differs from the first, such as
            ``{blur_probability: 0.1, solarize_probability: 0.2}`` (BYOL, Barlow Twins).
        view_names: names of the V views, each then a view of its own ``(3, S, S)``, such as ``[image, key]`` (MoCo);
            null: one view ``image`` that holds all of them.
        num_crops: C, small crops; 0: there is no view ``crops`` (SwAV: 6).
        crop_size: side s of a small crop, pixels.
        crop_scale: range of a small crop's area, as a fraction of the image's.
        **image_view: of every crop: see ``ImageView``.

    Raises:
        ValueError: another number of names than of views; settings of a second view that is not there.
    """

    def __init__(
        self,
        num_views: PositiveInt = 2,
        second_view: Mapping[str, Any] | None = None,
        view_names: list[str] | None = None,
        num_crops: NonNegativeInt = 0,
        crop_size: PositiveInt = 96,
        crop_scale: AreaRange = (0.05, 0.14),
        **image_view: Any,
    ) -> None:
        super().__init__(**image_view)
        if view_names is not None and len(set(view_names)) != num_views:
            raise ValueError(f"view_names must name {num_views} views, one name each, got {view_names}.")
        if second_view and num_views < 2:
            raise ValueError("second_view describes a view that num_views=1 does not make.")
        self.num_views, self.view_names, self.num_crops = num_views, view_names, num_crops
        self.crop_size, self.crop_scale = crop_size, ordered("crop_scale", crop_scale)
        how = sorted({"colours", "fast"} & set(second_view or {}))
        if how:
            raise ValueError(f"second_view.{how[0]}: set {how[0]} beside second_view, it is one for all views.")
        problems = check_arguments(PhotometricTransform, second_view or {}, "second_view")
        if problems:
            raise ConfigError(problems)
        self.second_photometric = ImageView(**{**image_view, **(second_view or {})}).photometric

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Views:
        """See the class; without a generator, torch's global random state decides."""
        rng = generator_or_torch(rng)
        settings = [self.second_photometric if index == 1 else self.photometric for index in range(self.num_views)]
        large = [self.draw_crop(image, rng, self.image_size, self.image_scale, one) for one in settings]
        small = [
            self.draw_crop(image, rng, self.crop_size, self.crop_scale, self.photometric) for _ in range(self.num_crops)
        ]
        crops = self._stacked("crops", small) if small else {}
        if self.view_names is None:
            return {**self._stacked("image", large), **crops}
        named = [self.view(name, *drawn) for name, drawn in zip(self.view_names, large, strict=True)]
        return {name: view for views in (*named, crops) for name, view in views.items()}

    def _stacked(self, name: str, drawn: Sequence[tuple[ByteArray, Programs]]) -> Views:
        pixels, programs = zip(*drawn, strict=True)
        return self.view(name, np.stack(pixels), np.stack(programs))
