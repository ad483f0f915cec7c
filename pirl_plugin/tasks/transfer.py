"""Batches to the GPU, beside the computation of the step before."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from classy_vision.generic.util import recursive_copy_to_gpu
from torch import Tensor

from pirl_plugin.functional.pending_colours import view_of


class Transfer:
    """Copies batches from page-locked memory by a stream of its own.

    The host prepares a step while the device still computes the one before. On the computation's own stream the copy
    would wait for that to end: 67 MB for 256 images with nine patches.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch on the device; the host waits for nothing.

        Programs of views that are still to be coloured, and the list of unreadable images, stay where they are: it is
        the host that reads them.
        """
        views: Mapping[str, Tensor] = batch["input"]
        programs = {name: x for name, x in views.items() if view_of(name, views)}
        to_move = {key: value for key, value in batch.items() if key != "unreadable"}
        to_move["input"] = {name: x for name, x in views.items() if name not in programs}
        with torch.cuda.stream(self._stream):
            moved: dict[str, Any] = recursive_copy_to_gpu(to_move, non_blocking=True)
        computation = torch.cuda.current_stream(self._stream.device)
        computation.wait_stream(self._stream)
        for tensor in _tensors(moved):
            tensor.record_stream(computation)  # its memory is not taken for the next copy while this step reads it
        moved["input"] = {name: programs.get(name, moved["input"].get(name)) for name in views}
        return {**moved, **{key: value for key, value in batch.items() if key == "unreadable"}}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
