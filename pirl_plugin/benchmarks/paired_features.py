"""Features of images and of their transformed views, by the same frozen network."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.benchmarks.features import EMBEDDING
from pirl_plugin.data.collators import ViewCollator
from pirl_plugin.data.loading import KeyedViews, WithUnreadable, make_loader
from pirl_plugin.functional.pending_colours import coloured
from pirl_plugin.models.normalize import Normalize
from pirl_plugin.models.ssl_model import main_embedding
from pirl_plugin.registry import build

IMAGE, TRUNK = "image", "trunk"
IMAGE_ITSELF = ""  # name of the untransformed view, which no transform can give to one of its own


class ImageAndTransformed:
    """Transform: the evaluation view under the name ``IMAGE_ITSELF``, and some views of another transform."""

    def __init__(self, evaluation: Any, transform: Any, views: Sequence[str]) -> None:
        self.evaluation, self.transform, self.views = evaluation, transform, views

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> dict[str, Tensor]:
        """All views of one image; the generator is the transform's alone."""
        transformed = coloured(self.transform(image, rng))
        return {IMAGE_ITSELF: self.evaluation(image, rng)[IMAGE], **{name: transformed[name] for name in self.views}}


@torch.no_grad()
def collect(
    context: BenchmarkContext,
    dataset: Any,
    transform: Mapping[str, Any],
    views: Sequence[str],
    kinds: Sequence[str],
    own_statistics: bool,
) -> dict[tuple[str, str], Tensor]:
    """Features of the images themselves and of their transformed views.

    The views depend on the run's seed and the image alone. Images that cannot be read are left out.

    Args:
        context: the weights and how to run them.
        dataset: the images.
        transform: configuration of what makes the transformed views.
        views: names of those to use.
        kinds: ``trunk`` (pooled res5, the mean over patches) and/or ``embedding`` (the view's own head).
        own_statistics: each view passes the trunk with batch norm statistics of its own, taken over the same images, in
            batches of ``context.batch_size``; else with the weights' running ones.

    Returns:
        ``{(kind, view): (N, D) float32}`` on the device; the view of the images themselves is ``IMAGE_ITSELF``.
    """
    names = (IMAGE_ITSELF, *views)
    loader = _loader(context, dataset, ImageAndTransformed(context.transform, build("transform", transform), views))
    trunks = dict.fromkeys(names, context.trunk)
    if own_statistics and _batch_norms(context.trunk):
        trunks = {name: copy.deepcopy(context.trunk) for name in names}
        _measure_statistics(context, trunks, loader)
    rows: dict[tuple[str, str], list[Tensor]] = {(kind, name): [] for kind in kinds for name in names}
    for batch in context.progress(loader, len(loader), "images and transformed views"):
        readable = (batch["asked"] == batch["target"]).to(context.device)
        for name, pooled in _pooled(context, trunks, batch).items():
            if TRUNK in kinds:
                flat = pooled.mean(dim=1) if pooled.ndim == 3 else pooled
                rows[TRUNK, name].append(flat[readable])
            if EMBEDDING in kinds:
                head = context.model.heads[name or IMAGE]  # type: ignore[union-attr, index]
                rows[EMBEDDING, name].append(main_embedding(head(pooled))[readable])  # type: ignore[operator]
    return {key: torch.cat(parts) for key, parts in rows.items()}


def _loader(context: BenchmarkContext, dataset: Any, transform: ImageAndTransformed) -> DataLoader[Any]:
    size, step = len(dataset), context.batch_size
    keys = [[(i, 0) for i in range(start, min(start + step, size))] for start in range(0, size, step)]
    collate = WithUnreadable(ViewCollator(), with_asked=True)
    views = KeyedViews(dataset, transform, context.seed)
    return make_loader(views, keys, collate, context.num_workers, pin_memory=context.device.type == "cuda")


def _pooled(context: BenchmarkContext, trunks: Mapping[str, nn.Module], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Pooled trunk features of each view, float32: ``(B, C)`` of images, ``(B, P, C)`` of patches."""
    normalize = Normalize().to(context.device)
    found = {}
    with torch.autocast(context.device.type, torch.bfloat16, enabled=context.precision == "bf16"):
        for name, pixels in batch["input"].items():
            x, trunk = normalize(pixels.to(context.device)), trunks[name]
            pooled = trunk(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if x.ndim == 5 else trunk(x)
            found[name] = pooled.float()
    return found


def _measure_statistics(context: BenchmarkContext, trunks: Mapping[str, nn.Module], loader: DataLoader[Any]) -> None:
    """Replaces the running statistics of each view's trunk by the mean over the view's batches."""
    norms = [norm for trunk in trunks.values() for norm in _batch_norms(trunk)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's name for the mean over all batches
        norm.train()
    for index, batch in enumerate(context.progress(loader, len(loader), "statistics of each view")):
        if index == 0 or len(batch["target"]) == context.batch_size:  # a short last batch would weigh as much as others
            _pooled(context, trunks, batch)
    for norm in norms:
        norm.eval()


def _batch_norms(trunk: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in trunk.modules() if isinstance(module, nn.BatchNorm2d)]
