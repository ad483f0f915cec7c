"""Whether the features of an image and of its transformed version are the same: the analysis of PIRL's Fig. 4."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image

from pirl_plugin.atomic import write_text
from pirl_plugin.benchmarks.context import Benchmark, BenchmarkContext, Result
from pirl_plugin.benchmarks.features import EMBEDDING
from pirl_plugin.benchmarks.paired_features import IMAGE, IMAGE_ITSELF, TRUNK, collect
from pirl_plugin.benchmarks.rankme import sample
from pirl_plugin.benchmarks.training import Part
from pirl_plugin.functional.invariance import PairDistances, pair_distances
from pirl_plugin.functional.pending_colours import coloured
from pirl_plugin.models.ssl_model import is_pixels
from pirl_plugin.registry import build, completed, register_benchmark
from pirl_plugin.report.invariance_figure import draw_invariance
from pirl_plugin.schema import Component, PositiveInt, checked

_PROTOCOLS = {"view": "view_statistics", "running": "running_statistics"}
# the photometric part of this package's PIRL recipes for small images
_SMALL = {"image_scale": [0.2, 1.0], "hue": 0.1, "jitter_probability": 0.8, "photometric_probability": 0.0}


@register_benchmark("invariance")
@checked
class Invariance(Benchmark):
    """Distances between f(I) and g(I^t) of the same image, against those of different images (PIRL, Fig. 4).

    I is the evaluation view, I^t the transformed one; both pass the network in evaluation mode, and their embeddings
    are scaled to unit length. All pairs of the images are compared. The headline is the AUC: how probably a pair of the
    same image is nearer than a pair of different images, 50 % where the network sees no connection.

    Pretraining normalises each view's batches by themselves, but keeps one running average for all views, which is then
    a mixture that is right for none (small patches look unlike images). By default each view is therefore measured with
    statistics of its own, taken over the same images before.

    Heads f and g exist only for the views that a method was pretrained with. Pooled trunk features (res5, the mean over
    patches) exist for all weights, random and supervised ones too: compare methods by these, and with the same
    ``transform``. Writes ``invariance.json`` (histograms) and ``invariance.png`` and ``.svg`` into the run's folder.

    Args:
        features: ``embedding`` (the heads' output), ``trunk``, or ``auto``: the trunk, and the embedding where the
            weights have heads for both views too; the headline is the trunk's.
        transform: makes I^t: its views other than ``image``; its ``image`` where it has no other. Default: that of the
            pretraining where it has such views, else image_and_jigsaw_patches as PIRL uses it at the images' size.
        batch_norm: the trunk's statistics: of each ``view``, or the ``running`` ones of the weights. The name of the
            protocol says which.
        num_images: a random sample of the split, drawn with the run's seed; larger than the split: all of it.
        split: which images.
    """

    def __init__(
        self,
        features: Literal["auto", "embedding", "trunk"] = "auto",
        transform: Annotated[dict[str, Any], Component("transform")] | None = None,
        batch_norm: Literal["view", "running"] = "view",
        num_images: PositiveInt = 2000,
        split: Literal["train", "test"] = "test",
    ) -> None:
        self.features, self.transform, self.batch_norm = features, transform, batch_norm
        self.num_images, self.split = num_images, split

    def run(self, context: BenchmarkContext) -> Iterator[Result]:
        """Yields for each kind of features and each transformed view the AUC, retrieval and mean distances.

        Raises:
            ValueError: the embedding is asked for and the weights lack a head, or fewer than two readable images.
        """
        config = transform_for(context, self.transform)
        dataset = context.train if self.split == "train" else context.test
        if len(dataset) > self.num_images:
            dataset = Part(dataset, sample(len(dataset), self.num_images, context.seed))
        views = transformed_views(config)
        kinds = self._kinds(context, views)
        found = collect(context, dataset, config, views, kinds, own_statistics=self.batch_norm == "view")
        panels = []
        for kind, view in found:
            if view != IMAGE_ITSELF:
                distances = pair_distances(found[kind, IMAGE_ITSELF], found[kind, view])
                panels.append({"features": kind, "view": view, **as_plain(distances)})
        count = len(next(iter(found.values())))
        facts = {"num_images": count, "split": self.split, "batch_norm": self.batch_norm, "transformed_by": config}
        if context.run_dir is not None:
            _write(context.run_dir, {**facts, "panels": panels})
        headlined = next(panel for panel in panels if panel["features"] == kinds[-1])
        sampled = {"split": self.split, "num_images": len(dataset), "transform": fingerprint(config)}
        for panel in panels:
            setting = {"features": panel["features"], "view": panel["view"], **sampled}
            spread = {f"distance_{name}": panel[name] for name in ("same_std", "different_std")}
            extra = {**facts, **spread, "chance_of_own_image": 100 / count, "unreadable": len(dataset) - count}
            for metric, value, unit in numbers(panel):
                headline = panel is headlined and metric == "auc"
                yield Result(setting, metric, value, _PROTOCOLS[self.batch_norm], unit, headline, extra)

    def _kinds(self, context: BenchmarkContext, views: Sequence[str]) -> list[str]:
        """Kinds of features to measure, the headline's last."""
        heads = set(getattr(context.model, "heads", ()))
        missing = [name for name in (IMAGE, *views) if name not in heads]
        if self.features == EMBEDDING and missing:
            raise ValueError(
                f"features=embedding needs a head for each of {', '.join(dict.fromkeys((IMAGE, *views)))}, these "
                f"weights have {', '.join(sorted(heads)) or 'none'}: use features=trunk, or another transform."
            )
        if self.features == "auto":
            return [TRUNK] if missing else [EMBEDDING, TRUNK]
        return [self.features]


def transform_for(context: BenchmarkContext, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Configuration of the transform, with all defaults: the given one, the pretraining's, or PIRL's.

    Where a pretraining had its views coloured is left out: it changes no pixel, and shall not tell results apart.
    """
    own = context.pretraining.get("transform")
    if given is not None:
        chosen = given
    else:
        chosen = own if own and transformed_views(own) != [IMAGE] else jigsaw_at(context.image_size)
    return {key: value for key, value in completed("transform", chosen).items() if key != "colours"}


def jigsaw_at(size: int) -> dict[str, Any]:
    """PIRL's transform for images of a size: that of the paper at 224 pixels; of ``pirl_64`` and ``pirl_32`` there."""
    cell = round(size * 255 / 224 / 3)
    small = size <= 128
    patch = max(1, cell - 2 if small else round(size * 64 / 224))
    sizes = {"image_size": size, "jigsaw_size": 3 * cell, "patch_size": patch}
    return {"name": "image_and_jigsaw_patches", **sizes, **(_SMALL if small else {})}


def transformed_views(config: Mapping[str, Any]) -> list[str]:
    """Names of a transform's views that show a transformed image; pretexts also give answers, such as a rotation."""
    views = coloured(build("transform", config)(Image.new("RGB", (64, 64)), np.random.default_rng(0)))
    return [name for name, view in views.items() if name != IMAGE and is_pixels(view)] or [IMAGE]


def fingerprint(config: Mapping[str, Any]) -> str:
    """A short hash of a transform's name and settings: results under different transforms are told apart by it."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:6]


def as_plain(distances: PairDistances) -> dict[str, Any]:
    """Numbers and lists, for JSON; distances of single images are left to the histograms."""
    plain: dict[str, Any] = {key: value for key, value in vars(distances).items() if isinstance(value, float)}
    plain["same_std"] = float(distances.same.std(correction=0))
    for name in ("edges", "same_histogram", "different_histogram"):
        plain[name] = [round(value, 9) for value in getattr(distances, name).tolist()]
    return plain


def numbers(panel: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Metric, value and unit of the results of one kind of features."""
    return [
        ("auc", 100 * panel["auc"], "%"),
        ("own_image_top1", 100 * panel["retrieval"], "%"),
        ("distance_same", panel["same_mean"], ""),
        ("distance_different", panel["different_mean"], ""),
        ("distance_gap", panel["different_mean"] - panel["same_mean"], ""),
        ("cosine_same", panel["same_cosine"], ""),
        ("cosine_different", panel["different_cosine"], ""),
    ]


def _write(run_dir: Path, content: Mapping[str, Any]) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps(content) + "\n", run_dir / "invariance.json")
    for suffix in ("png", "svg"):
        draw_invariance(content["panels"], run_dir / f"invariance.{suffix}")
