"""Jigsaw patches: shuffled, beside an image view (PIRL), or by themselves as a puzzle whose order is to be told."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from classy_vision.dataset.transforms import register_transform
from PIL import Image

from pirl_plugin.data.crops import crop_resize, draw_crop_box, draw_resized_crop_box
from pirl_plugin.data.permutation_sets import permutation_set
from pirl_plugin.data.photometric import PhotometricSettings, draw_programs
from pirl_plugin.data.photometric_fused import apply_programs
from pirl_plugin.data.views import (
    AreaRange,
    ImageView,
    PhotometricTransform,
    PositiveRange,
    Views,
    generator_or_torch,
    ordered,
)
from pirl_plugin.functional.jigsaw import cut_patches, draw_offsets, draw_permutation, largest_offset, patch_boxes
from pirl_plugin.schema import NonNegativeInt, PositiveInt, checked


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
        shuffle_patches: bring the patches into a random order.
        num_permutations: orders to choose from, a set as ``jigsaw_puzzle`` has by default; null: all there are (PIRL;
            Fig. 7 limits them).
        rotate_crop: turn the crop by a random multiple of 90 degrees before it is cut (PIRL, Table 5: rotation and
            jigsaw).
        patch_flip: where the patches are flipped, with ``flip_probability``: each ``patch`` by itself (released
            implementation), the whole ``crop`` before it is cut (PyContrast), or ``none``. The paper does not say.
        patch_photometric: false leaves the patches' colours as they are (PyContrast).
        **image_view: of the image, and of the patches' colours: see ``ImageView``.

    Raises:
        ValueError: patches that do not fit into their cells; a range with its ends swapped; more permutations than
            there are, or a number of them without ``shuffle_patches``.
    """

    def __init__(
        self,
        jigsaw_size: PositiveInt = 255,
        jigsaw_scale: AreaRange = (0.6, 1.0),
        patch_size: PositiveInt = 64,
        grid: PositiveInt = 3,
        shuffle_patches: bool = True,
        num_permutations: PositiveInt | None = None,
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
        if num_permutations is not None and not shuffle_patches:
            raise ValueError(f"num_permutations = {num_permutations} needs shuffle_patches: true.")
        self.permutations = None if num_permutations is None else permutation_set(grid**2, num_permutations)
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
        return {**self.image_view(image, rng), **self.patches(image, rng)}

    def patches(self, image: Image.Image, rng: np.random.Generator) -> Views:
        """Augmented patches of one crop, ``{"patches": (grid**2, 3, s, s)}`` uint8, in shuffled order."""
        box = draw_crop_box(*image.size, self.jigsaw_scale, self.image_ratio, rng)
        flipped = rng.random() < self.crop_flip_probability
        offsets = draw_offsets(self.jigsaw_size, self.grid, self.patch_size, rng)
        boxes = patch_boxes(self.jigsaw_size, self.grid, self.patch_size, offsets)
        programs = draw_programs(self.patch_settings, len(boxes), rng)
        if self.shuffle_patches:
            boxes = boxes[self._draw_order(len(boxes), rng)]
        pixels = crop_resize(image, box, self.jigsaw_size, self.fast)
        if self.rotate_crop:
            pixels = np.rot90(pixels, int(rng.integers(4)), axes=(1, 2))
        patches = cut_patches(pixels[..., ::-1] if flipped else pixels, boxes)
        return self.view("patches", patches, programs)

    def _draw_order(self, count: int, rng: np.random.Generator) -> npt.NDArray[np.integer[Any]]:
        if self.permutations is None:
            return draw_permutation(count, rng)
        return self.permutations[rng.integers(len(self.permutations))]


@register_transform("jigsaw_puzzle")
@checked
class JigsawPuzzle(PhotometricTransform):
    """Patches in one of a set of orders, and which: ``{"patches": (grid**2, 3, s, s), "permutation": ()}`` (Jigsaw).

    The orders are a set that ``greedy_permutations`` builds and a cache in the user's folder keeps. The defaults are
    the released implementation's (VISSL).

    Args:
        num_permutations: orders to choose from.
        permutation_rule: how the set is built: largest mean or largest smallest Hamming distance.
        permutation_seed: of the set's first order.
        resize: length of the image's shorter side, pixels, before the crop; does nothing where ``jigsaw_scale`` is set.
        jigsaw_size: side of the crop that the patches are cut from, pixels.
        jigsaw_scale: null: a crop of ``jigsaw_size`` from the resized image. A range: a random crop of that area, as a
            fraction of the image's.
        jigsaw_ratio: range of that random crop's width / height.
        patch_size: side s of a patch, pixels; at most ``jigsaw_size // grid``.
        grid: patches per side, at most 3.
        colours_of: what is flipped and recoloured as one: the whole ``crop`` before it is cut, or each ``patch``. With
            ``colours: device`` only the latter: what arrives there is cut already.
        **photometric: see ``PhotometricTransform``.

    Raises:
        ValueError: patches that do not fit into their cells, a crop larger than the resized image, more permutations
            than there are, colours of the crop on the device.
    """

    def __init__(
        self,
        num_permutations: PositiveInt = 2000,
        permutation_rule: Literal["max_avg", "max_min"] = "max_avg",
        permutation_seed: NonNegativeInt = 0,
        resize: PositiveInt = 256,
        jigsaw_size: PositiveInt = 255,
        jigsaw_scale: AreaRange | None = None,
        jigsaw_ratio: PositiveRange = (3 / 4, 4 / 3),
        patch_size: PositiveInt = 64,
        grid: PositiveInt = 3,
        colours_of: Literal["crop", "patch"] = "crop",
        **photometric: Any,
    ) -> None:
        super().__init__(**photometric)
        largest_offset(jigsaw_size, grid, patch_size)  # raises where a patch does not fit
        if jigsaw_scale is None and jigsaw_size > resize:
            raise ValueError(f"jigsaw_size must be <= resize = {resize}, got {jigsaw_size}.")
        if self.colours == "device" and colours_of == "crop":
            raise ValueError(
                "colours=device gets patches that are cut already: use colours_of=patch or colours=loader."
            )
        self.jigsaw_size, self.patch_size, self.grid, self.resize = jigsaw_size, patch_size, grid, resize
        self.jigsaw_scale = None if jigsaw_scale is None else ordered("jigsaw_scale", jigsaw_scale)
        self.jigsaw_ratio = ordered("jigsaw_ratio", jigsaw_ratio)
        self.colours_of = colours_of
        self.permutations = permutation_set(grid**2, num_permutations, permutation_rule, permutation_seed)

    def __call__(self, image: Image.Image, rng: np.random.Generator | None = None) -> Views:
        """See the class; without a generator, torch's global random state decides."""
        rng = generator_or_torch(rng)
        if self.jigsaw_scale is None:
            box = draw_resized_crop_box(*image.size, self.resize, self.jigsaw_size, rng)
        else:
            box = draw_crop_box(*image.size, self.jigsaw_scale, self.jigsaw_ratio, rng)
        offsets = draw_offsets(self.jigsaw_size, self.grid, self.patch_size, rng)
        chosen = int(rng.integers(len(self.permutations)))
        boxes = patch_boxes(self.jigsaw_size, self.grid, self.patch_size, offsets)[self.permutations[chosen]]
        pixels = crop_resize(image, box, self.jigsaw_size, self.fast)
        if self.colours_of == "patch":
            programs = draw_programs(self.photometric, len(boxes), rng)
            views = self.view("patches", cut_patches(pixels, boxes), programs)
        else:
            crop = apply_programs(pixels[None], draw_programs(self.photometric, 1, rng), self.fast)[0]
            views = {"patches": torch.from_numpy(cut_patches(crop, boxes))}
        return {**views, "permutation": torch.tensor(chosen)}
