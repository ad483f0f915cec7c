from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from pirl_plugin.report.views_figure import draw_views, patch_mosaic


def test_mosaic_keeps_the_patches_in_reading_order():
    """Nine 4-pixel patches with gaps of 1: patch i starts at 5 times its row and column."""
    patches = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 4, 4), dtype=np.uint8)
    mosaic = patch_mosaic(patches)
    assert mosaic.shape == (14, 14, 3)
    for index in range(9):
        top, left = index // 3 * 5, index % 3 * 5
        assert (mosaic[top : top + 4, left : left + 4] == index).all()
    assert (mosaic[4] > 200).all()


def test_picture_shows_the_pixels(tmp_path):
    """A pure red view, a pure blue patch and a pure green original are all found in the file."""
    view = torch.zeros(3, 32, 32, dtype=torch.uint8)
    view[0] = 255
    patches = torch.zeros(9, 3, 10, 10, dtype=torch.uint8)
    patches[:, 2] = 255
    original = Image.new("RGB", (50, 40), (0, 255, 0))
    draw_views([{"image": view, "patches": patches}] * 2, [original] * 2, tmp_path / "views.png", title="Views")
    picture = np.asarray(Image.open(tmp_path / "views.png").convert("RGB")).reshape(-1, 3)
    for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0)):
        assert (picture == colour).all(axis=1).mean() > 0.1


def test_originals_must_match_the_samples(tmp_path):
    with pytest.raises(ValueError, match="got 0 and 1"):
        draw_views([], [Image.new("RGB", (2, 2))], tmp_path / "views.png")
