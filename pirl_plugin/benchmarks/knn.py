"""Nearest-neighbour classification of frozen features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Len

from pirl_plugin.benchmarks.changes import changed_views, noted, recorded_name
from pirl_plugin.benchmarks.context import Benchmark, BenchmarkContext, Result
from pirl_plugin.benchmarks.features import EMBEDDING, train_and_test
from pirl_plugin.benchmarks.top_k import top_k_accuracy
from pirl_plugin.functional.knn import knn_votes
from pirl_plugin.registry import register_benchmark
from pirl_plugin.schema import PositiveFloat, PositiveInt, checked


@register_benchmark("knn")
@checked
class KNN(Benchmark):
    """Weighted k nearest neighbours by cosine: top-1 and, for more than five classes, top-5 (Wu et al. 2018).

    Nothing is trained. The protocol's name in the records is ``weighted_knn``, with a star for another size of image
    than 224 or another view, which ``extra.changed`` names; the headline is the largest k's top-1. Wu et al. use
    k = 200, temperature 0.07 and the 128-d embedding.

    Args:
        k: numbers of neighbours, all from one search; above the training set's size they are cut to it.
        temperature: of the weights ``exp(cos / temperature)``.
        features: ``trunk``, average-pooled, or the image head's ``embedding``.
        layer: of the trunk; without effect on the embedding.
    """

    multi_process = True

    def __init__(
        self,
        k: Annotated[Sequence[PositiveInt], Len(1)] = (20, 200),
        temperature: PositiveFloat = 0.07,
        features: Literal["trunk", "embedding"] = "trunk",
        layer: Literal["conv1", "res2", "res3", "res4", "res5"] = "res5",
    ) -> None:
        self.k, self.temperature = sorted(set(k)), temperature
        self.name = EMBEDDING if features == "embedding" else layer
        self.features = features

    def run(self, context: BenchmarkContext) -> Iterator[Result]:
        """Yields top-1 (and top-5) for each k, in percent of the readable test images."""
        train, test, classes, notes = train_and_test(context, [self.name], "avg")
        available = len(train.labels)
        cut = {asked: min(asked, available) for asked in self.k}
        scores = knn_votes(
            test.of[self.name], train.of[self.name], train.labels, sorted(set(cut.values())), self.temperature, classes
        )
        changed = changed_views(context, self.evaluation_view(context.image_size))
        for asked, used in cut.items():
            setting: dict[str, Any] = {"k": asked, "temperature": self.temperature, "features": self.features}
            if self.features == "trunk":
                setting["layer"] = self.name
            extra = {**notes, **noted(changed)}
            if used < asked:
                extra["note"] = f"k = {asked} was cut to the {available} training images"
            for top in (1, 5) if classes > 5 else (1,):
                yield Result(
                    setting,
                    f"top{top}",
                    top_k_accuracy(scores[used], test.labels, top),
                    recorded_name("weighted_knn", changed),
                    headline=top == 1 and asked == max(self.k),
                    extra=extra,
                )
