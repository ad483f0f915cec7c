"""The training view of Goyal et al. (2019): colours and lighting."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from pirl_plugin.benchmarks.training import augmented_view
from pirl_plugin.data.loading import Transform
from pirl_plugin.registry import build


def without_jitter(lighting: float) -> Transform:
    colours = dict.fromkeys(("brightness", "contrast", "saturation"), 0.0)
    return build("transform", {"name": "goyal19_view", "image_size": 8, "lighting": lighting, **colours})


def test_lighting_shifts_all_pixels_alike_along_the_principal_colours():
    """A grey image without jitter: what is added is the same everywhere, of variance sum (255 * 0.5 * v_i * e_i)^2."""
    view = without_jitter(lighting=0.5)
    grey = Image.new("RGB", (16, 16), (128,) * 3)
    views = torch.stack([view(grey, np.random.default_rng(seed))["image"] for seed in range(400)]).float()
    assert float((views - views[:, :, :1, :1]).abs().max()) == 0
    shifts = views[:, :, 0, 0] - 128
    values, vectors = np.array([0.2175, 0.0188, 0.0045]), np.array([0.5675, 0.5808, 0.5836])
    others = np.array([[0.7192, 0.4009], [0.0045, 0.8140], [0.6948, 0.4203]])
    expected = 255 * 0.5 * np.sqrt((vectors * values[0]) ** 2 + (others * values[1:]) ** 2 @ np.ones(2))
    np.testing.assert_allclose(shifts.std(dim=0).numpy(), expected, rtol=0.12)
    assert np.corrcoef(shifts.T.numpy()).min() > 0.95, "the first component is brightness"


def test_without_colours_it_is_the_plain_training_view():
    plain = build("transform", augmented_view(8))
    ours = without_jitter(lighting=0.0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    for seed in range(5):
        assert torch.equal(*(view(image, np.random.default_rng(seed))["image"] for view in (plain, ours)))
