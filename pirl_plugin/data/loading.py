"""Batches of views: which images a step takes, on every process, and the workers that prepare them.

What a step gets is a pure function of (seed, epoch, step, global batch size): nothing depends on the number of workers,
nor on how many processes share the global batch. A run can therefore be resumed anywhere.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from classy_vision.dataset import ClassyDataset
from classy_vision.generic.distributed_util import get_rank, get_world_size
from PIL import Image
from torch.utils.data import DataLoader

from pirl_plugin.data.collators import ViewCollator
from pirl_plugin.data.datasets import ImageDataset
from pirl_plugin.functional.pending_colours import coloured
from pirl_plugin.signals import end_with_parent

Views = dict[str, torch.Tensor]
Transform = Callable[[Image.Image, np.random.Generator], Views]
Collator = Callable[[list[tuple[Views, int]]], dict[str, Any]]
_Key = tuple[int, int]
_Sample = tuple[int, Views, int]


def number_of_workers(asked: int | None, use_gpu: bool) -> int:
    """Worker processes: as asked, else beside a GPU the process's share of the cores but one, at most 16.

    None on a CPU, where the training itself needs the cores.
    """
    if asked is not None:
        return asked
    if not use_gpu:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


class GlobalBatchSampler:
    """Keys ``(image_id, epoch)`` of one process's part of each global batch of an epoch.

    One permutation per (seed, epoch) serves all processes. Step t's global batch is its t-th block of
    ``batch_size * world_size`` ids, of which rank r takes the r-th part: the ranks' batches side by side are the batch
    of one process with the whole batch size. Where several batches make one optimiser step, an epoch holds whole groups
    of them, so that no gradient is pending at its end. An incomplete last group is dropped; a dataset smaller than one
    group is repeated to fill it. A step here is one batch.

    Args:
        num_images: images in the dataset, ids ``0 .. num_images - 1``.
        batch_size: images per step and process.
        seed: seed of the run.
        epoch: 0-based epoch; may be set between iterations.
        start_step: first step to yield (to resume within an epoch); may be set between iterations.
        rank: this process.
        world_size: number of processes.
        accumulate_steps: batches of one optimiser step.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int = 0,
        epoch: int = 0,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate_steps: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1} (world_size is {world_size}), got {rank}.")
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"num_images and batch_size must be >= 1, got {num_images} and {batch_size}.")
        if accumulate_steps < 1:
            raise ValueError(f"accumulate_steps must be >= 1, got {accumulate_steps}.")
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.accumulate_steps = accumulate_steps
        self.epoch, self.start_step = epoch, start_step
        self.rank, self.world_size = rank, world_size

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch: whole groups of ``accumulate_steps``, at least one group."""
        group = self.batch_size * self.world_size * self.accumulate_steps
        return max(1, self.num_images // group) * self.accumulate_steps

    def __len__(self) -> int:
        return max(0, self.steps_per_epoch - self.start_step)

    def __iter__(self) -> Iterator[list[_Key]]:
        epoch = self.epoch
        order = np.random.default_rng(np.random.SeedSequence([self.seed, epoch])).permutation(self.num_images)
        global_size = self.batch_size * self.world_size
        order = np.resize(order, self.steps_per_epoch * global_size)  # drops the rest, or repeats to fill one group
        for step in range(self.start_step, self.steps_per_epoch):
            first = step * global_size + self.rank * self.batch_size
            yield [(image_id, epoch) for image_id in order[first : first + self.batch_size].tolist()]


class KeyedViews:
    """Samples ``(asked id, views, returned id)`` by key ``(image_id, epoch)``: all that a worker process needs.

    Args:
        dataset: the images.
        transform: ``(RGB image, generator) -> {view: uint8 tensor}``.
        seed: of the views.
        with_programs: hand on the programs of views that the transform leaves to be coloured on a device; else they are
            coloured here.
    """

    def __init__(self, dataset: ImageDataset, transform: Transform, seed: int = 0, with_programs: bool = False) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.with_programs = with_programs

    def __getitem__(self, key: _Key) -> _Sample:
        image_id, epoch = key
        image, returned_id = self.dataset[image_id]
        # The asked id seeds the views: an image that also stands in for an unreadable one does not come twice alike.
        generator = np.random.default_rng(np.random.SeedSequence([self.seed, epoch, image_id]))
        views = self.transform(image, generator)
        return image_id, views if self.with_programs else coloured(views), returned_id


class SampledViews(ClassyDataset):
    """A dataset's images as batches of random views, for classy-vision's tasks.

    Image ``i`` in epoch ``e`` gives the same views in any run of the same seed: the transform draws from a generator
    seeded with (seed, e, i).

    Args:
        dataset: the images.
        transform: ``(RGB image, generator) -> {view: uint8 tensor}``.
        collator: ``[(views, image_id), ...] -> batch``.
        batch_size: images per step and process.
        seed: seed of order and views.
        num_workers: worker processes; 0 prepares the batches in this process.
        pin_memory: page-locked batches, for copies to a GPU.
        prefetch_factor: batches that each worker prepares ahead.
        multiprocessing_context: ``fork``, ``spawn`` or ``forkserver``; None: the platform's own.
        accumulate_steps: an epoch's steps are a multiple of it: batches that make one optimiser step.
        with_programs: see ``KeyedViews``: whoever takes the batches calls ``coloured``.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Transform,
        collator: Collator,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        prefetch_factor: int = 4,
        multiprocessing_context: str | None = None,
        accumulate_steps: int = 1,
        with_programs: bool = False,
    ) -> None:
        super().__init__(dataset, batch_size, shuffle=True, transform=transform, num_samples=None)
        self.collator, self.seed, self.accumulate_steps = collator, seed, accumulate_steps
        # The loader gets no reference to this object: without a circle, its workers end as soon as it is let go.
        self.keyed_views = KeyedViews(dataset, transform, seed, with_programs)
        self.num_workers, self.pin_memory, self.prefetch_factor = num_workers, pin_memory, prefetch_factor
        self.multiprocessing_context = multiprocessing_context
        self._loader: DataLoader[Any] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: _Key) -> _Sample:
        """``(asked id, views, returned id)`` of ``key = (image_id, epoch)``."""
        return self.keyed_views[key]

    @property
    def steps_per_epoch(self) -> int:
        """Steps (batches) of an epoch with the present number of processes."""
        return self._sampler().steps_per_epoch

    def images_per_epoch(self, world_size: int | None = None) -> int:
        """Images that all processes together take in an epoch; ``world_size`` defaults to the present number."""
        sampler = self._sampler()
        sampler.world_size = world_size or sampler.world_size
        return sampler.steps_per_epoch * sampler.batch_size * sampler.world_size

    def set_num_workers(self, num_workers: int) -> None:
        """Number of worker processes from the next ``iterator`` on."""
        self.num_workers, self._loader = num_workers, None

    def iterator(self, *args: Any, current_phase_id: int = 0, start_step: int = 0, **kwargs: Any) -> EpochBatches:
        """Batches of one epoch; the worker processes live on from epoch to epoch.

        Args:
            current_phase_id: the epoch, 0-based (classy-vision's name).
            start_step: steps to skip, at no cost.
            *args: ignored.
            **kwargs: ``pin_memory`` counts, and another one than before starts the workers anew; what else the host
                passes is ignored.
        """
        sampler = self._sampler()
        sampler.epoch, sampler.start_step = current_phase_id, start_step
        pin_memory = self.pin_memory or bool(kwargs.get("pin_memory", False))
        if self._loader is None or self._loader.pin_memory != pin_memory:
            self._loader = make_loader(
                self.keyed_views,
                _SettableSampler(sampler),
                WithUnreadable(self.collator),
                self.num_workers,
                pin_memory,
                self.prefetch_factor,
                self.multiprocessing_context,
            )
        return EpochBatches(self._loader, sampler)

    def close(self) -> None:
        """Lets the worker processes go."""
        self._loader = None

    def _sampler(self) -> GlobalBatchSampler:
        return GlobalBatchSampler(
            len(self),
            self.batchsize_per_replica,
            self.seed,
            rank=get_rank(),
            world_size=get_world_size(),
            accumulate_steps=self.accumulate_steps,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loader": None}  # a loader does not travel to its own workers


class EpochBatches:
    """The batches of one epoch, from a loader that serves one epoch after the other."""

    def __init__(self, loader: DataLoader[Any], sampler: GlobalBatchSampler) -> None:
        self.loader, self.sampler = loader, sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.loader.batch_sampler.inner = self.sampler  # type: ignore[union-attr]
        return iter(self.loader)


class _SettableSampler:
    """A loader's batch sampler cannot be exchanged once the loader exists; what it hands on to can."""

    def __init__(self, inner: GlobalBatchSampler) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[list[_Key]]:
        return iter(self.inner)


class WithUnreadable:
    """Collates samples and adds which of the asked ids could not be read.

    Args:
        collator: ``[(views, image_id), ...] -> batch``.
        with_asked: also add all asked ids, as ``asked``, so that replaced rows can be told from others.
    """

    def __init__(self, collator: Collator, with_asked: bool = False) -> None:
        self.collator, self.with_asked = collator, with_asked

    def __call__(self, samples: Sequence[_Sample]) -> dict[str, Any]:
        """Batch of ``(asked id, views, returned id)`` samples, with ``unreadable`` added (int64, often empty)."""
        batch = self.collator([(views, returned_id) for _, views, returned_id in samples])
        missed = [asked_id for asked_id, _, returned_id in samples if asked_id != returned_id]
        batch["unreadable"] = torch.tensor(missed, dtype=torch.int64)
        if self.with_asked:
            batch["asked"] = torch.tensor([asked_id for asked_id, _, _ in samples], dtype=torch.int64)
        return batch


def evaluation_loader(
    dataset: ImageDataset,
    transform: Transform,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    collator: Collator | None = None,
) -> DataLoader[Any]:
    """Every image once, in the order of ids; the ranks' parts follow one another and the last batch may be smaller.

    Batches hold ``input`` (views), ``target`` (ids of the images returned; look labels up by them), ``asked`` (ids in
    order) and ``unreadable`` (asked ids whose image was replaced; there ``target`` differs from ``asked``).

    Args:
        dataset: the images.
        transform: ``(RGB image, generator) -> {view: uint8 tensor}``; the generator depends on the id alone.
        batch_size: images per batch.
        num_workers: worker processes.
        rank: this process.
        world_size: number of processes that share the dataset.
        pin_memory: page-locked batches, for copies to a GPU.
        collator: ``[(views, image_id), ...] -> batch``; default: all views, stacked.
    """
    collator = collator or ViewCollator()
    first, end = (len(dataset) * part // world_size for part in (rank, rank + 1))
    keys = [[(i, 0) for i in range(start, min(start + batch_size, end))] for start in range(first, end, batch_size)]
    views = KeyedViews(dataset, transform)
    return make_loader(views, keys, WithUnreadable(collator, with_asked=True), num_workers, pin_memory)


def make_loader(
    views: KeyedViews,
    batch_sampler: Any,
    collate: Callable[[Sequence[_Sample]], dict[str, Any]],
    num_workers: int,
    pin_memory: bool = False,
    prefetch_factor: int = 4,
    multiprocessing_context: str | None = None,
) -> DataLoader[Any]:
    """A torch loader with workers that live as long as the loader; none for ``num_workers=0``."""
    return DataLoader(
        views,  # type: ignore[arg-type]
        batch_sampler=batch_sampler,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=prefetch_factor if num_workers else None,
        persistent_workers=num_workers > 0,
        multiprocessing_context=multiprocessing_context if num_workers else None,
        worker_init_fn=_begin_worker,
        generator=torch.Generator().manual_seed(0),  # else each epoch's start draws from torch's global random state
    )


_LONGEST_STEP = 20  # seconds


def _begin_worker(worker_id: int) -> None:
    """One thread, and no longer than the training lives.

    Told to stop, as a cluster tells all processes of a job and Ctrl-C all of a terminal, it goes on for a while: the
    training finishes its step, for which it needs its data.
    """
    torch.set_num_threads(1)
    end_with_parent()
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_LONGEST_STEP))  # which ends the process
