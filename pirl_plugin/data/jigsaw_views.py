"""Jigsaw patches: shuffled and each with colours of its own, beside an image view (PIRL)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import torch
from classy_vision.dataset.transforms import register_transform
from PIL import Image
from torch import Tensor

from pirl_plugin.data.crops import crop_resize, draw_crop_box
from pirl_plugin.data.photometric import PhotometricSettings, draw_programs
from pirl_plugin.data.photometric_fused import apply_programs
from pirl_plugin.data.views import AreaRange, ImageView, Views, generator_or_torch, ordered
from pirl_plugin.functional.jigsaw import cut_patches, draw_offsets, draw_permutation, largest_offset, patch_boxes
from pirl_plugin.schema import PositiveInt, checked


@register_transform("image_and_jigsaw_patches")
@checked
class ImageAndJigsawPatches(ImageView):
    """An augmented crop and shuffled jigsaw patches: ``{"image": (3, S, S), "patches": (grid**2, 3, s, s)}`` (PIRL).

    The two come from independent crops of the image. Each patch has a photometric program of its own, drawn from the
    same settings as the image's, as in the paper and in the released implementation.

    Args:
        jigsaw_size: side of the crop that the patches are cut from, pixels.
        jigsaw_scale: range of that crop's area, as a fraction of the image's.
        patch_size: side s of a patch, pixels; at most ``jigsaw_size // grid``.
        grid: patches per side.
        shuffle_patches: bring the patches into a uniformly random order.
        rotate_crop: turn the crop by a random multiple of 90 degrees before it is cut (PIRL, Table 5: rotation and
            jigsaw).
        patch_flip: where the patches are flipped, with ``flip_probability``: each ``patch`` by itself (released
            implementation), the whole ``crop`` before it is cut (PyContrast), or ``none``. The paper does not say.
        patch_photometric: false leaves the patches' colours as they are (PyContrast).
        **image_view: of the image, and of the patches' colours: see ``ImageView``.

    Raises:
        ValueError: patches that do not fit into their cells; a range with its ends swapped.
    """

    def __init__(
        self,
        jigsaw_size: PositiveInt = 255,
        jigsaw_scale: AreaRange = (0.6, 1.0),
        patch_size: PositiveInt = 64,
        grid: PositiveInt = 3,
        shuffle_patches: bool = True,
        rotate_crop: bool = False,
        patch_flip: Literal["patch", "crop", "none"] = "patch",
        patch_photometric: bool = True,
        **image_view: Any,
    ) -> None:
        super().__init__(**image_view)
        largest_offset(jigsaw_size, grid, patch_size)  # raises where a patch does not fit
        self.jigsaw_size, self.patch_size, self.grid = jigsaw_size, patch_size, grid
        self.jigsaw_scale = ordered("jigsaw_scale", jigsaw_scale)
        self.shuffle_patches, self.rotate_crop = shuffle_patches, rotate_crop
        flip_probability = self.photometric.flip_probability
        self.crop_flip_probability = flip_probability if patch_flip == "crop" else 0.0
        own_flip = flip_probability if patch_flip == "patch" else 0.0
        self.patch_settings = (
            dataclasses.replace(self.photometric, flip_probability=own_flip)
            if patch_photometric
            else PhotometricSettings.flip_only(own_flip)
        )

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Views:
        """``{"image": (3, S, S), "patches": (grid**2, 3, s, s)}``; without a generator, torch's state decides."""
        rng = generator_or_torch(rng)
        return {"image": self.image_view(image, rng), "patches": self.patches(image, rng)}

    def patches(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """Augmented patches of one crop, ``(grid**2, 3, s, s)`` uint8, in shuffled order."""
        box = draw_crop_box(*image.size, self.jigsaw_scale, self.image_ratio, rng)
        flipped = rng.random() < self.crop_flip_probability
        offsets = draw_offsets(self.jigsaw_size, self.grid, self.patch_size, rng)
        boxes = patch_boxes(self.jigsaw_size, self.grid, self.patch_size, offsets)
        programs = draw_programs(self.patch_settings, len(boxes), rng)
        if self.shuffle_patches:
            boxes = boxes[draw_permutation(len(boxes), rng)]
        pixels = crop_resize(image, box, self.jigsaw_size)
        if self.rotate_crop:
            pixels = np.rot90(pixels, int(rng.integers(4)))
        patches = cut_patches(pixels[:, ::-1] if flipped else pixels, boxes)
        return torch.from_numpy(apply_programs(patches, programs, self.fast))
