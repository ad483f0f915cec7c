"""Views that are still to be coloured: their programs stand beside them until they are on the device that does it.

The program of the view ``patches`` has the name ``patches_program``: ``(..., num_operations, 2)`` float32 for a view
``(..., 3, H, W)``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pirl_plugin.functional.photometric_batch import apply_programs_batched

_SUFFIX = "_program"


def program_name(view: str) -> str:
    """Name under which the program of a view stands beside it."""
    return f"{view}{_SUFFIX}"


def view_of(name: str, views: Mapping[str, Tensor]) -> str | None:
    """The view that an entry is the program of; None for an entry that is no program."""
    view = name.removesuffix(_SUFFIX)
    return view if view != name and view in views and views[name].is_floating_point() else None


def coloured(views: Mapping[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
    """Applies the programs that stand beside views, which then leave; all else comes back as it is.

    Args:
        views: of one image or of a batch, the programs in the host's memory.
        device: where to colour: views with a program are moved there, and the host does not wait for it. None: where
            they are.

    Returns:
        The views, by name, in their order.
    """
    programs = {view_of(name, views): x for name, x in views.items()}
    finished = {}
    for name, view in views.items():
        if view_of(name, views) is not None:
            continue
        if name in programs:
            pixels = view if device is None else view.to(device, non_blocking=True)
            flat = pixels.reshape(-1, *pixels.shape[-3:])
            rows = programs[name].reshape(-1, *programs[name].shape[-2:])
            view = apply_programs_batched(flat, rows).view(pixels.shape)
        finished[name] = view
    return finished
