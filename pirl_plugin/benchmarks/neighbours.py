"""Which training images lie nearest to a test image: a number, and pictures to look at."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pirl_plugin import distributed
from pirl_plugin.atomic import write_text
from pirl_plugin.benchmarks.context import Benchmark, BenchmarkContext, Result
from pirl_plugin.benchmarks.features import EMBEDDING, LabelledFeatures, train_and_test
from pirl_plugin.registry import register_benchmark
from pirl_plugin.report.neighbours_figure import FILE, PICTURE, draw_neighbours
from pirl_plugin.schema import PositiveInt, checked

_CHUNK = 1 << 25  # similarities held at a time
_SIDE = 96  # pixels of an image in the picture


@register_benchmark("neighbours")
@checked
class Neighbours(Benchmark):
    """The training images nearest to each test image by cosine: how many show its class, and pictures of some.

    Nothing is trained. Writes ``neighbours.json`` and ``neighbours.png`` into the run's folder, which the report shows;
    the queries are spread evenly over the test images, the same ones for all weights.

    Args:
        k: neighbours of an image; above the training set's size it is cut to that.
        queries: test images in the picture.
        features: ``trunk``, average-pooled, or the image head's ``embedding``.
        layer: of the trunk; without effect on the embedding.
    """

    multi_process = True

    def __init__(
        self,
        k: PositiveInt = 6,
        queries: PositiveInt = 6,
        features: Literal["trunk", "embedding"] = "trunk",
        layer: Literal["conv1", "res2", "res3", "res4", "res5"] = "res5",
    ) -> None:
        self.k, self.queries, self.features = k, queries, features
        self.name = EMBEDDING if features == "embedding" else layer

    def run(self, context: BenchmarkContext) -> Iterator[Result]:
        """Yields the part of neighbours of the same class, in percent, mean over the readable test images."""
        train, test, _, notes = train_and_test(context, [self.name], "avg")
        rows, cosines = nearest(test.of[self.name], train.of[self.name], min(self.k, len(train.labels)))
        same = train.labels[rows] == test.labels[:, None]
        setting: dict[str, Any] = {"k": rows.shape[1], "features": self.features}
        if self.features == "trunk":
            setting["layer"] = self.name
        if context.run_dir is not None and distributed.is_primary():
            self._show(context, context.run_dir, (train, test), rows, cosines)
        value = 100 * float(same.double().mean())
        yield Result(setting, "same_class", value, "cosine", headline=True, extra=notes)

    def _show(
        self,
        context: BenchmarkContext,
        folder: Path,
        found: tuple[LabelledFeatures, LabelledFeatures],
        rows: Tensor,
        cosines: Tensor,
    ) -> None:
        """Writes the data and the picture."""
        train, test = found
        names = [str(name) for name in context.train.class_names]
        chosen = np.linspace(0, len(test.ids) - 1, min(self.queries, len(test.ids))).astype(int).tolist()
        queries = [
            {
                **_image(test, query, names),
                "neighbours": [
                    {**_image(train, int(row), names), "cosine": round(float(cosine), 4)}
                    for row, cosine in zip(rows[query], cosines[query], strict=True)
                ],
            }
            for query in chosen
        ]
        wanted = {("test", query["id"]) for query in queries}
        wanted |= {("train", one["id"]) for query in queries for one in query["neighbours"]}
        splits = {"train": context.train, "test": context.test}
        pictures = {key: _thumbnail(splits[key[0]][key[1]][0]) for key in sorted(wanted)}
        folder.mkdir(parents=True, exist_ok=True)
        draw_neighbours(queries, pictures, folder / PICTURE)
        write_text(json.dumps({"features": self.name, "queries": queries}, ensure_ascii=False) + "\n", folder / FILE)


def nearest(queries: Tensor, others: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows of the k vectors of largest cosine with each query, nearest first, and these cosines.

    Args:
        queries: ``(Q, D)``, of any norm.
        others: ``(N, D)``, of any norm.
        k: in ``[1, N]``.

    Returns:
        ``(Q, k)`` int64 and ``(Q, k)`` float32.
    """
    bank, unit = F.normalize(others.float(), dim=1).T, F.normalize(queries.float(), dim=1)
    parts = [(part @ bank).topk(k, dim=1) for part in unit.split(max(1, _CHUNK // len(others)))]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def _image(features: LabelledFeatures, row: int, names: list[str]) -> dict[str, Any]:
    return {"id": int(features.ids[row]), "class": names[int(features.labels[row])]}


def _thumbnail(picture: Image.Image) -> Image.Image:
    smaller = picture.copy()
    smaller.thumbnail((_SIDE, _SIDE))
    return smaller
