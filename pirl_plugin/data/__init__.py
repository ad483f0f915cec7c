"""Images in, batches of views out. Importing this package registers its datasets, transforms and collators."""

from pirl_plugin.data import (
    benchmark_datasets,
    collators,
    datasets,
    generated_scenes,
    goyal19_view,
    imagenet_dataset,
    jigsaw_views,
    loading,
    multi_views,
    photometric,
    reading,
    scanning,
    squashed_view,
    views,
    voc,
    voc_datasets,
)

__all__ = [
    "benchmark_datasets",
    "collators",
    "datasets",
    "generated_scenes",
    "goyal19_view",
    "imagenet_dataset",
    "jigsaw_views",
    "loading",
    "multi_views",
    "photometric",
    "reading",
    "scanning",
    "squashed_view",
    "views",
    "voc",
    "voc_datasets",
]
