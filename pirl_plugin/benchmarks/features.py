"""Features of frozen weights: each image passes the trunk once, for all layers together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pirl_plugin import distributed
from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.benchmarks.features_cache import FeaturesCache, Kept
from pirl_plugin.data.loading import evaluation_loader
from pirl_plugin.data.reading import UnreadableImageError
from pirl_plugin.models.normalize import Normalize
from pirl_plugin.models.ssl_model import main_embedding
from pirl_plugin.records import memory_gib

EMBEDDING = "embedding"
# (channels, side of the map) -> kernel, stride, padding: Goyal et al. 2019 for a ResNet-50 at 224 pixels
_GOYAL_POOLS = {
    (64, 112): (10, 10, 4),
    (256, 56): (16, 8, 0),
    (512, 28): (13, 5, 0),
    (1024, 14): (8, 3, 0),
    (2048, 7): (6, 1, 0),
}
_GOYAL_DIMS = 9000


@dataclass(frozen=True)
class Features:
    """Features of the readable images of a dataset.

    Attributes:
        of: ``{name: (N, D) float32}`` on the device, rows in the order of ``ids``.
        ids: ids of the images, ``(N,)`` int64 on the CPU, ascending.
        unreadable: number of images left out because they could not be read.
    """

    of: dict[str, Tensor]
    ids: Tensor
    unreadable: int


@dataclass(frozen=True)
class LabelledFeatures(Features):
    """Features, and the class of each image.

    Attributes:
        labels: ``(N,)`` int64 on the device.
    """

    labels: Tensor


def grid_pool(x: Tensor) -> Tensor:
    """Average pooling of a feature map to about 9,000 numbers, ``(B, C, H, W)`` to ``(B, C * s * s)``.

    A ResNet-50's maps at 224 pixels get the kernels, strides and padding of Goyal et al. 2019 (9,216 or 8,192 numbers);
    other maps an adaptive ``s x s`` grid with s the whole number nearest to ``sqrt(9000 / C)``, at most the map's side.
    """
    _, channels, height, width = x.shape
    pool = _GOYAL_POOLS.get((channels, height)) if height == width else None
    if pool is not None:
        return F.avg_pool2d(x, *pool).flatten(1)
    side = max(1, round((_GOYAL_DIMS / channels) ** 0.5))
    return F.adaptive_avg_pool2d(x, (min(side, height), min(side, width))).flatten(1)


def global_pool(x: Tensor) -> Tensor:
    """Global average pooling, ``(B, C, H, W)`` to ``(B, C)``."""
    return x.mean(dim=(2, 3))


POOLINGS = {"avg": global_pool, "grid": grid_pool}


def extract(context: BenchmarkContext, dataset: Any, names: Sequence[str], pooling: str, what: str) -> Features:
    """Pooled features of the trunk's layers, and the image head's embedding, of every readable image.

    Several processes extract a part each, and all get all of it. What ``context.cache_dir`` holds already is read.

    Args:
        context: the weights and how to run them.
        dataset: images; labels are not needed.
        names: layers of the trunk, and/or ``embedding``.
        pooling: ``avg`` or ``grid`` (see ``grid_pool``).
        what: name of the split, for the progress bar.

    Raises:
        ValueError: no readable image, features that are not finite, or ones that would not fit into memory.
    """
    cache = FeaturesCache.of(context, dataset, pooling)
    kept = cache.read(names, context.device)
    if kept.ids is not None and _are_readable_again(dataset, kept.ids):
        kept = Kept()
    missing = [name for name in names if name not in kept.of]
    if missing:
        found, ids = _extract(context, dataset, missing, pooling, what)
        if kept.ids is not None and not torch.equal(kept.ids, ids):  # another image could not be read this time
            kept = Kept()
            found, ids = _extract(context, dataset, names, pooling, what)
        cache.write(found, ids)
        kept.of.update(found)
        kept.ids = ids
    assert kept.ids is not None  # there is at least one name
    for name in names:
        if not bool(torch.isfinite(kept.of[name]).all()):
            raise ValueError(f"the {name} features of the {what} split are not finite: the weights have diverged.")
    return Features({name: kept.of[name] for name in names}, kept.ids, len(dataset) - len(kept.ids))


def _are_readable_again(dataset: Any, ids: Tensor) -> bool:
    """Whether any image that kept features leave out can be read now; images that are broken for good cannot."""
    left_out = sorted(set(range(len(dataset))).difference(ids.tolist()))
    return any(distributed.gather_objects(any(_is_readable(dataset, image_id) for image_id in left_out)))


def _is_readable(dataset: Any, image_id: int) -> bool:
    try:
        dataset.read(image_id)
    except UnreadableImageError:
        return False
    return True


def _extract(
    context: BenchmarkContext, dataset: Any, names: Sequence[str], pooling: str, what: str
) -> tuple[dict[str, Tensor], Tensor]:
    if len(dataset) < distributed.world_size():
        raise ValueError(f"the {what} split has fewer images than there are processes: start fewer.")
    loader = evaluation_loader(
        dataset,
        context.transform,
        context.batch_size,
        context.num_workers,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        pin_memory=context.device.type == "cuda",
    )
    normalize = Normalize().to(context.device)
    rows: dict[str, Tensor] = {}
    kept: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
    filled = 0
    for batch in context.progress(loader, len(loader), f"features of {what}"):
        readable = batch["asked"] == batch["target"]  # a replaced image would be counted twice
        found = pooled_features(context, normalize(batch["input"]["image"].to(context.device)), names, pooling)
        for name, x in found.items():
            if name not in rows:
                rows[name] = _allocate(len(dataset), x, name, context.device)
            rows[name][filled : filled + int(readable.sum())] = x[readable.to(x.device)]
        filled += int(readable.sum())
        kept.append(batch["target"][readable])
    ids = distributed.all_gather_rows(torch.cat(kept).to(context.device)).cpu()
    if len(ids) == 0:
        raise ValueError(f"no image of the {what} split could be read.")
    return {name: distributed.all_gather_rows(rows[name][:filled]) for name in names}, ids


def class_labels(dataset: Any, what: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Class of each image, ``(N,)`` int64.

    Raises:
        ValueError: the dataset has none.
    """
    labels = getattr(dataset, "labels", None)
    if labels is None:
        raise ValueError(
            f"the {what} split has no class labels, which this benchmark needs: use a folder with one sub-folder per "
            "class, or a list file with labels."
        )
    return np.asarray(labels, dtype=np.int64)


def number_of_classes(context: BenchmarkContext) -> int:
    """Classes of the two splits.

    Raises:
        ValueError: classes of one split that the other does not have, or does not call the same.
    """
    ours, theirs = (list(getattr(split, "class_names", []) or []) for split in (context.train, context.test))
    if ours != theirs:
        different = sorted(set(ours) ^ set(theirs))[:5]
        raise ValueError(
            f"the train and test splits have different classes, for example {different}: use matching splits."
        )
    labels = [class_labels(split, what) for split, what in ((context.train, "train"), (context.test, "test"))]
    return max(len(ours), *(int(part.max()) + 1 for part in labels))


def train_and_test(
    context: BenchmarkContext, names: Sequence[str], pooling: str
) -> tuple[LabelledFeatures, LabelledFeatures, int, dict[str, Any]]:
    """Features of both splits, the number of classes, and what to note about them.

    Raises:
        ValueError: splits without class labels, or with different classes.
    """
    classes = number_of_classes(context)
    train = _labelled(context, context.train, names, pooling, "train")
    test = _labelled(context, context.test, names, pooling, "test")
    notes = {
        "num_train": len(train.labels),
        "num_test": len(test.labels),
        "num_classes": classes,
        "unreadable_train": train.unreadable,
        "unreadable_test": test.unreadable,
    }
    return train, test, classes, notes


def _labelled(
    context: BenchmarkContext, dataset: Any, names: Sequence[str], pooling: str, what: str
) -> LabelledFeatures:
    labels = class_labels(dataset, what)
    found = extract(context, dataset, names, pooling, what)
    of_images = torch.from_numpy(labels)[found.ids].to(context.device)
    return LabelledFeatures(found.of, found.ids, found.unreadable, of_images)


@torch.no_grad()
def pooled_features(
    context: BenchmarkContext, images: Tensor, names: Sequence[str], pooling: str
) -> Mapping[str, Tensor]:
    """Features of normalised images, float32, by one pass through the trunk for all of them; see ``extract``."""
    layers = [name for name in names if name != EMBEDDING]
    if EMBEDDING in names and context.model is None:
        raise ValueError("these weights have no image head that gives an embedding: use features=trunk.")
    in_bf16 = context.precision == "bf16"
    if in_bf16:  # the layout that its convolutions are fastest in
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.autocast(context.device.type, torch.bfloat16, enabled=in_bf16):
        deepest = ["res5"] if EMBEDDING in names else []
        maps = context.trunk.features(images, list(dict.fromkeys(layers + deepest)))  # type: ignore[operator]
        found = {name: POOLINGS[pooling](maps[name].float()) for name in layers}
        if EMBEDDING in names:
            head = context.model.heads[context.model.head_of("image")]  # type: ignore[union-attr, operator, index]
            found[EMBEDDING] = main_embedding(head(global_pool(maps["res5"]))).float()  # type: ignore[operator]
    return found


def _allocate(count: int, x: Tensor, name: str, device: torch.device) -> Tensor:
    size = count * x.shape[1] * 4 / 2**30
    available = memory_gib() if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory / 2**30
    if available is not None and size > 0.6 * available:
        raise ValueError(
            f"the {name} features of {count} images ({x.shape[1]} numbers each) take {size:.1f} GiB of "
            f"{available:.1f}: use pooling=avg or fewer layers."
        )
    return torch.empty(-(-count // distributed.world_size()), x.shape[1], device=device)
