"""RankMe of frozen features: how many dimensions they really use, without labels and without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Len

from pirl_plugin.benchmarks.changes import changes, noted, recorded_name
from pirl_plugin.benchmarks.context import Benchmark, BenchmarkContext, Result
from pirl_plugin.benchmarks.features import EMBEDDING, extract
from pirl_plugin.benchmarks.training import Part
from pirl_plugin.functional.rankme import rankme
from pirl_plugin.registry import register_benchmark
from pirl_plugin.schema import PositiveInt, checked

_IMAGES = 25_600  # of the paper


@register_benchmark("rankme")
@checked
class RankMe(Benchmark):
    """Effective rank of the embedding and of pooled trunk features (Garrido et al. 2023); needs no labels.

    Each image counts once, as the evaluation view shows it. The paper measures the embedding (the projector's output)
    of 25,600 training images, and warns that its value compares different runs of one method, not different methods.
    Protocol ``garrido23`` stands for that number of images, ``garrido23*`` for fewer or more. The headline is the first
    of ``features`` that the weights have.

    Args:
        features: the image head's ``embedding`` and layers of the trunk, average-pooled. Weights without an image head
            are measured without the embedding.
        num_images: a random sample, drawn with the run's seed; larger than the dataset: all images.
        split: which images.
    """

    multi_process: ClassVar[bool] = True

    def __init__(
        self,
        features: Annotated[Sequence[Literal["embedding", "conv1", "res2", "res3", "res4", "res5"]], Len(1)] = (
            "embedding",
            "res5",
        ),
        num_images: PositiveInt = _IMAGES,
        split: Literal["train", "test"] = "train",
    ) -> None:
        self.names, self.num_images, self.split = list(dict.fromkeys(features)), num_images, split

    def run(self, context: BenchmarkContext) -> Iterator[Result]:
        """Yields RankMe, between 1 and ``min(N, D)``, of each feature.

        Raises:
            ValueError: only the embedding is asked for and the weights have none.
        """
        names = [name for name in self.names if name != EMBEDDING or _has_embedding(context)]
        if not names:
            raise ValueError("these weights have no image head, so no embedding: use features=[res5].")
        dataset = context.train if self.split == "train" else context.test
        if len(dataset) > self.num_images:
            dataset = Part(dataset, sample(len(dataset), self.num_images, context.seed))
        found = extract(context, dataset, names, "avg", self.split)
        changed = changes({"num_images": (_IMAGES, len(dataset))})
        for index, name in enumerate(names):
            count, dim = found.of[name].shape
            setting: dict[str, Any] = {"features": EMBEDDING} if name == EMBEDDING else _layer(name)
            yield Result(
                {**setting, "split": self.split, "num_images": len(dataset)},
                "rankme",
                rankme(found.of[name]),
                recorded_name("garrido23", changed),
                unit="",
                headline=index == 0,
                extra={
                    **noted(changed),
                    "N": count,
                    "D": dim,
                    "bound": min(count, dim),
                    "unreadable": found.unreadable,
                },
            )


def sample(total: int, count: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """``count`` of the ids ``0 .. total - 1``, each once, ascending; the same ones for the same arguments."""
    return np.sort(np.random.default_rng(np.random.SeedSequence([seed, total])).permutation(total)[:count])


def _layer(name: str) -> dict[str, Any]:
    return {"features": "trunk", "layer": name}


def _has_embedding(context: BenchmarkContext) -> bool:
    return context.model is not None and "image" in context.model.heads  # type: ignore[operator]
