"""What benchmarks that train share: augmented batches with their targets, gradients over processes, predictions."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pirl_plugin import distributed
from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.data.collators import ViewCollator
from pirl_plugin.data.loading import SampledViews, evaluation_loader
from pirl_plugin.registry import build


def augmented_view(image_size: int) -> dict[str, Any]:
    """Transform of supervised training: random resized crop (8 to 100 % of the area) and flip, colours as they are."""
    photometric = ("jitter", "photometric", "equalize", "grayscale", "blur")
    return {"name": "image_view", "image_size": image_size, **{f"{name}_probability": 0.0 for name in photometric}}


class Part:
    """Some images of a dataset, with ids of their own ``0 .. len - 1`` in the order given.

    An unreadable image is replaced by the next readable one of the PART, so that nothing from outside of it is seen.

    Args:
        dataset: the whole.
        ids: the part's images, ids of the whole, ``(n,)``, each once.

    Raises:
        ValueError: no images.
    """

    def __init__(self, dataset: Any, ids: Tensor | np.ndarray) -> None:
        self.dataset = dataset
        self.ids = np.asarray(ids, dtype=np.int64)
        if len(self.ids) == 0:
            raise ValueError("a part of a dataset needs at least one image, got none.")
        self.class_names = getattr(dataset, "class_names", [])
        for name in ("labels", "multi_labels"):
            whole = getattr(dataset, name, None)
            setattr(self, name, None if whole is None else np.asarray(whole)[self.ids])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, image_id: int) -> tuple[Image.Image, int]:
        total = len(self)
        if not 0 <= image_id < total:
            raise IndexError(f"Image id {image_id} is outside the part (valid 0..{total - 1}).")
        for own in itertools.chain(range(image_id, total), range(image_id)):
            image, found = self.dataset[int(self.ids[own])]
            if found == self.ids[own]:
                return image, own
        raise ValueError(f"None of the {total} images of this part can be read.")

    def file_name(self, image_id: int) -> str:
        """Name of the image for people."""
        return str(self.dataset.file_name(int(self.ids[image_id])))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the whole dataset's fingerprint and the ids."""
        return hashlib.sha256(self.dataset.fingerprint.encode() + self.ids.tobytes()).hexdigest()


def sha256_of(targets: Tensor) -> str:
    """Hash of training targets: images of the same names may have got other labels."""
    what = f"{targets.dtype} {tuple(targets.shape)}\n".encode()
    return hashlib.sha256(what + targets.cpu().contiguous().numpy().tobytes()).hexdigest()


class LabelledBatches:
    """Augmented training batches with their targets, the ranks' parts of each global batch side by side.

    Order and views depend on (seed, epoch, image) alone, so that any epoch can be repeated, on any number of processes.
    The last images of an epoch that fill no batch are left out; another order leaves others out in the next.

    Args:
        context: for the device and the loader's processes.
        dataset: the images.
        targets: one row an image, ``(N, ...)``: rows are looked up by the id of the image that was really read.
        view: transform configuration that makes the view ``image``.
        batch_size: images per step and process.
        seed: of order and views.

    Attributes:
        steps_per_epoch: batches that this and every other process gets in an epoch.
        unreadable: ids of the images that this process was to show and could not read so far.
    """

    def __init__(
        self,
        context: BenchmarkContext,
        dataset: Any,
        targets: Tensor,
        view: Mapping[str, Any],
        batch_size: int,
        seed: int = 0,
    ) -> None:
        if len(targets) != len(dataset):
            raise ValueError(f"one target for each of the {len(dataset)} images is needed, got {len(targets)}.")
        self.context, self.targets = context, targets.cpu()
        self.unreadable: set[int] = set()
        self._views = SampledViews(
            dataset,
            build("transform", view),
            ViewCollator(),
            batch_size,
            seed,
            context.num_workers,
            pin_memory=context.device.type == "cuda",
        )
        self.steps_per_epoch = self._views.steps_per_epoch

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``(images uint8 (B, 3, S, S), targets (B, ...))`` of each step of an epoch (0-based), on the device."""
        device = self.context.device
        for batch in self._views.iterator(current_phase_id=epoch):
            self.unreadable.update(batch["unreadable"].tolist())
            images = batch["input"]["image"].to(device, non_blocking=True)
            yield images, self.targets[batch["target"]].to(device, non_blocking=True)


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replaces each gradient by its mean over the ranks, all in one transfer; nothing happens with one process.

    Parameters without a gradient are passed over; they must be the same ones on every rank.
    """
    if not distributed.is_distributed():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return
    bucket = distributed.all_reduce_mean(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    for gradient, mean in zip(gradients, bucket.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def readable_batches(context: BenchmarkContext, dataset: Any, what: str) -> Iterator[tuple[Tensor, Tensor]]:
    """One deterministic pass over the readable images of this process's part, in the order of ids.

    Args:
        context: for the evaluation view, the batch size and the device.
        dataset: the images; the ranks' parts follow one another.
        what: name of the images for the progress bar.

    Yields:
        ``(images uint8 (B, 3, S, S) on the device, ids (B,) int64 on the CPU)``; what cannot be read is left out.
    """
    loader = evaluation_loader(
        dataset,
        context.transform,
        context.batch_size,
        context.num_workers,
        distributed.rank(),
        distributed.world_size(),
        pin_memory=context.device.type == "cuda",
    )
    for batch in context.progress(loader, len(loader), what):
        readable = batch["asked"] == batch["target"]  # a replaced image would be counted twice
        if readable.any():
            images = batch["input"]["image"].to(context.device, non_blocking=True)
            yield images[readable.to(context.device)], batch["target"][readable]


@torch.no_grad()
def rows_of_images(
    context: BenchmarkContext, dataset: Any, rows_of: Callable[[Tensor, Tensor], Tensor], what: str
) -> tuple[Tensor, Tensor]:
    """One row of numbers for each readable image, in the order of ids; the ranks share the work and all get all rows.

    Args:
        context: for the evaluation view, the batch size and the device.
        dataset: the images, at least one for each rank.
        rows_of: images ``(B, 3, S, S)`` uint8 on the device and their ids ``(B,)`` to ``(B, K)``.
        what: name of the images for the progress bar and for messages.

    Returns:
        ``(N, K)`` on the CPU and the ids ``(N,)`` int64 of its rows. Images that cannot be read are in neither.

    Raises:
        ValueError: none, or none of one rank's part, can be read.
    """
    rows, ids = [], []
    for images, of_images in readable_batches(context, dataset, what):
        rows.append(rows_of(images, of_images).cpu())
        ids.append(of_images)
    if not all(distributed.gather_objects(bool(rows))):
        raise ValueError(f"no image of {what} could be read, or not one for each process.")
    gathered = [distributed.all_gather_rows(torch.cat(part).to(context.device)).cpu() for part in (rows, ids)]
    return gathered[0], gathered[1]


def predict(
    context: BenchmarkContext, dataset: Any, forward: Callable[[Tensor], Tensor], what: str
) -> tuple[Tensor, Tensor]:
    """Scores of each readable image: ``rows_of_images`` with a function of the images alone.

    Args:
        context: see ``rows_of_images``.
        dataset: see ``rows_of_images``.
        forward: ``(B, 3, S, S)`` uint8 on the device to ``(B, C)``. The caller sets evaluation mode.
        what: see ``rows_of_images``.

    Returns:
        ``(N, C)`` on the CPU and the ids ``(N,)`` int64 of its rows.
    """
    return rows_of_images(context, dataset, lambda images, _: forward(images), what)
