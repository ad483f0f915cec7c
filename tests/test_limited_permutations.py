"""PIRL's patches in a limited set of orders (Fig. 7)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from pirl_plugin.data.jigsaw_views import ImageAndJigsawPatches
from pirl_plugin.functional.permutations import greedy_permutations

# cells of 4 pixels, nothing else random: a patch tells by its colour where it was
SETTINGS: dict[str, Any] = {
    "image_size": 12,
    "jigsaw_size": 12,
    "jigsaw_scale": (1.0, 1.0),
    "image_ratio": (1.0, 1.0),
    "patch_size": 4,
    "flip_probability": 0.0,
    "jitter_probability": 0.0,
    "photometric_probability": 0.0,
    "grayscale_probability": 0.0,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PIRL_PLUGIN_CACHE", str(tmp_path))


def orders(draws: int, **settings: Any) -> set[tuple[int, ...]]:
    """The orders that turn up in a number of draws."""
    cells = np.kron(np.arange(9, dtype=np.uint8).reshape(3, 3) * 20, np.ones((4, 4), np.uint8))
    image, view = Image.fromarray(np.stack([cells] * 3, axis=2)), ImageAndJigsawPatches(**SETTINGS, **settings)
    rng = np.random.default_rng(0)
    return {tuple((view.patches(image, rng)["patches"][:, 0, 2, 2] // 20).tolist()) for _ in range(draws)}


def test_the_orders_are_those_of_the_set():
    assert orders(200, num_permutations=5) == {tuple(order) for order in greedy_permutations(9, 5).tolist()}


def test_without_a_number_there_are_many_more():
    assert len(orders(200)) > 190


def test_one_order_is_always_the_same():
    assert len(orders(20, num_permutations=1)) == 1


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="num_permutations = 5 needs shuffle_patches"):
        ImageAndJigsawPatches(num_permutations=5, shuffle_patches=False)
    with pytest.raises(ValueError, match="4 patches have 24 orders"):
        ImageAndJigsawPatches(num_permutations=25, grid=2)
