"""Whole views of the fast path are distributed as the published pipeline's, Pillow and torchvision view by view."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from pirl_plugin.data.jigsaw_views import ImageAndJigsawPatches
from pirl_plugin.data.reading import read_image
from pirl_plugin.speed.views import PlainViews

COUNT = 200
LIMIT = 1.95 * np.sqrt(2 / COUNT)  # of the two-sample Kolmogorov-Smirnov distance at p = 0.001
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture with coarse and fine structure, its left darker than its right, its top redder than its bottom."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 200, (6, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((240, 180), Image.Resampling.BICUBIC)).astype(np.float64)
    pixels += np.linspace(-30, 50, 240)[None, :, None] + rng.normal(0, 8, (180, 240, 1))
    pixels[..., 0] += np.linspace(40, 0, 180)[:, None]
    path = tmp_path_factory.mktemp("views") / "picture.png"
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
    return path


def measures(view: torch.Tensor) -> list[float]:
    """Numbers that tell colours, contrast, sharpness, posterisation, flips and the crop of a view ``(3, H, W)``."""
    x = view.double()
    grey = x.mean(dim=0)
    half = grey.shape[1] // 2
    return [
        *x.mean(dim=(1, 2)).tolist(),
        grey.std().item(),
        (x.amax(dim=0) - x.amin(dim=0)).mean().item(),
        (grey[:, 1:] - grey[:, :-1]).abs().mean().item(),
        float(len(view.unique())),
        (grey[:, half:].mean() - grey[:, :half].mean()).item(),
    ]


def of_both(image: torch.Tensor, patches: torch.Tensor) -> list[float]:
    return measures(image) + measures(patches[0]) + [float(patches.double().mean(dim=(1, 2, 3)).std())]


@pytest.fixture(scope="module")
def plain(file: Path) -> np.ndarray:
    random.seed(0)
    torch.manual_seed(0)
    pipeline = PlainViews([file])
    found = []
    for index in range(COUNT):
        image, patches = (x * STD.view(3, 1, 1) + MEAN.view(3, 1, 1) for x in pipeline[index])
        found.append(of_both(*((255 * x).round().to(torch.uint8) for x in (image, patches))))
    return np.array(found)


def distances(file: Path, plain: np.ndarray, **changes: float) -> np.ndarray:
    """Kolmogorov-Smirnov distance of each measure between the fast path's views and the plain ones."""
    transform, image = ImageAndJigsawPatches(**changes), read_image(file)
    views = (transform(image, np.random.default_rng(seed)) for seed in range(COUNT))
    fast = np.array([of_both(view["image"], view["patches"]) for view in views])
    found = []
    for ours, theirs in zip(fast.T, plain.T, strict=True):
        a, b = np.sort(ours), np.sort(theirs)
        both = np.concatenate([a, b])
        steps = np.abs(np.searchsorted(a, both, "right") - np.searchsorted(b, both, "right"))
        found.append(steps.max() / COUNT)
    return np.array(found)


def test_the_distributions_are_the_same(file, plain):
    assert distances(file, plain).max() < LIMIT


@pytest.mark.parametrize(
    "changes",
    [{"brightness": 0.8}, {"photometric_probability": 0.3}, {"flip_probability": 0.0}, {"image_scale": (0.7, 1.0)}],
    ids=lambda changes: next(iter(changes)),
)
def test_other_distributions_would_be_noticed(file, plain, changes):
    assert distances(file, plain, **changes).max() > LIMIT


def test_the_plain_pipeline_is_the_published_one(file):
    """Its crops are torchvision's own; without colours its patches lie in their cells of that crop."""
    pipeline = PlainViews([file])
    pipeline.colours = transforms.PILToTensor()
    pipeline.jigsaw_crop = pipeline.crop = transforms.Resize((255, 255))
    image, patches = pipeline[0]
    assert patches.shape == (9, 3, 64, 64)
    windows = image.unfold(1, 64, 1).unfold(2, 64, 1)  # (3, 192, 192, 64, 64)
    cells = set()
    for patch in patches:
        first = (windows[..., 0, 0] == patch[:, None, None, 0, 0]).all(dim=0)
        places = [(y, x) for y, x in first.nonzero().tolist() if torch.equal(windows[:, y, x], patch)]
        assert len(places) == 1
        (y, x) = places[0]
        assert y % 85 <= 21
        assert x % 85 <= 21
        cells.add((y // 85, x // 85))
    assert len(cells) == 9
