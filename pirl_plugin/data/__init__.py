"""Images in, batches of views out. Importing this package registers its datasets, transforms and collators."""

from pirl_plugin.data import (
    collators,
    datasets,
    generated_scenes,
    loading,
    photometric,
    reading,
    scanning,
    squashed_view,
    views,
    voc,
)

__all__ = [
    "collators",
    "datasets",
    "generated_scenes",
    "loading",
    "photometric",
    "reading",
    "scanning",
    "squashed_view",
    "views",
    "voc",
]
