"""Collators: from a list of ``(views, image id)`` to one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pirl_plugin.functional.pending_colours import program_name
from pirl_plugin.registry import Configurable, register_collator

Sample = tuple[dict[str, Tensor], int]


def stack_views(samples: Sequence[Sample], names: Sequence[str]) -> dict[str, Any]:
    """Stacks the named views, batch first; the program of a view that is still to be coloured goes with it.

    Args:
        samples: pairs of views, each a tensor, and the image's id.
        names: the views that every sample must have; others are left out.

    Returns:
        ``{"input": {name: (B, *view)}, "target": ids (B,) int64}``.

    Raises:
        ValueError: no samples, a view that is missing, views of differing shapes.
    """
    if not samples:
        raise ValueError("A batch needs at least one sample, got none.")
    stacked = {}
    programs = [program_name(name) for name in names]
    for name in dict.fromkeys([*names, *(name for name in programs if name in samples[0][0])]):
        for views, image_id in samples:
            if name not in views:
                have = ", ".join(views) or "none"
                raise ValueError(
                    f"Image {image_id} has no view {name!r} (its views: {have}); select a transform that makes it."
                )
        first, first_id = samples[0][0][name], samples[0][1]
        for views, image_id in samples:
            if views[name].shape != first.shape:
                raise ValueError(
                    f"View {name!r} must have one shape in a batch, got {tuple(first.shape)} for image {first_id} "
                    f"and {tuple(views[name].shape)} for image {image_id}."
                )
        stacked[name] = torch.stack([views[name] for views, _ in samples])
    return {"input": stacked, "target": torch.tensor([image_id for _, image_id in samples], dtype=torch.int64)}


@register_collator("jigsaw_collator")
class JigsawCollator(Configurable):
    """Image and patches: ``{"input": {"image": (B, 3, S, S), "patches": (B, P, 3, s, s)}, "target": ids (B,)}``."""

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """See ``stack_views``; views of another rank or without three channels are refused as well."""
        batch = stack_views(samples, ("image", "patches"))
        image, patches = batch["input"]["image"], batch["input"]["patches"]
        for name, view, dimensions, channels in (("image", image, 4, 1), ("patches", patches, 5, 2)):
            if view.ndim != dimensions or view.shape[channels] != 3:
                wanted = "(3, H, W)" if name == "image" else "(P, 3, h, w)"
                raise ValueError(f"View {name!r} must have the shape {wanted}, got {tuple(view.shape[1:])}.")
        return batch


@register_collator("view_collator")
class ViewCollator(Configurable):
    """Any views, the same in all samples: ``{"input": {view: (B, *shape)}, "target": ids (B,)}``."""

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """See ``stack_views``."""
        names = {name: None for views, _ in samples for name in views}  # a dictionary keeps the order
        return stack_views(samples, list(names))
