from __future__ import annotations

import numpy as np
import pytest

from pirl_plugin.functional.jigsaw import (
    cut_patches,
    draw_offsets,
    draw_permutation,
    largest_offset,
    patch_boxes,
)


def coordinates(size: int) -> np.ndarray:
    """An image whose pixel tells where it is: channel 0 is y, channel 1 is x."""
    y, x = np.mgrid[:size, :size]
    return np.stack([y, x, np.zeros_like(x)]).astype(np.uint8)


def test_boxes_by_hand():
    """A crop of 7 in 2 x 2 cells of 3 (one pixel left over), patches of 2: offsets 0 or 1 inside each cell."""
    boxes = patch_boxes(7, grid=2, patch_size=2, offsets=[[0, 0], [0, 1], [1, 0], [1, 1]])
    assert boxes.tolist() == [[0, 0, 2, 2], [4, 0, 6, 2], [0, 4, 2, 6], [4, 4, 6, 6]]


def test_published_geometry():
    """255 / 3 = 85-pixel cells, 64-pixel patches: corners at multiples of 85 for zero offsets, 21 further at most."""
    zero = np.zeros((9, 2), dtype=int)
    assert largest_offset(255, 3, 64) == 21
    assert patch_boxes(255, 3, 64, zero)[5].tolist() == [170, 85, 234, 149]
    assert patch_boxes(255, 3, 64, zero + 21)[8].tolist() == [191, 191, 255, 255]


def test_offsets_reach_both_ends_uniformly(rng: np.random.Generator):
    offsets = np.concatenate([draw_offsets(255, 3, 64, rng) for _ in range(1000)])
    counts = np.bincount(offsets.ravel(), minlength=22)
    assert (offsets.min(), offsets.max()) == (0, 21)
    expected = offsets.size / 22
    assert ((counts - expected) ** 2 / expected).sum() < 46.8  # chi-square, 21 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("jigsaw_size", "grid", "patch_size"), [(255, 3, 64), (36, 3, 10), (36, 3, 12), (17, 4, 3), (5, 1, 5)]
)
def test_patches_stay_in_their_cells_and_never_overlap(jigsaw_size, grid, patch_size, rng: np.random.Generator):
    for _ in range(50):
        boxes = patch_boxes(jigsaw_size, grid, patch_size, draw_offsets(jigsaw_size, grid, patch_size, rng))
        covered = np.zeros((jigsaw_size, jigsaw_size), dtype=int)
        for place, (left, top, right, bottom) in enumerate(boxes):
            cell = jigsaw_size // grid
            assert (top // cell, left // cell) == divmod(place, grid)
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1
        assert covered.sum() == grid * grid * patch_size**2


def test_cut_patches_copies_the_boxes(rng: np.random.Generator):
    boxes = patch_boxes(36, 3, 10, draw_offsets(36, 3, 10, rng))
    patches = cut_patches(coordinates(36), boxes)
    assert patches.shape == (9, 3, 10, 10)
    assert patches.dtype == np.uint8
    assert patches.flags.c_contiguous
    for patch, (left, top, right, bottom) in zip(patches, boxes, strict=True):
        assert patch[0, :, 0].tolist() == list(range(top, bottom))
        assert patch[1, 0, :].tolist() == list(range(left, right))


def test_permuted_patches_can_be_put_back(rng: np.random.Generator):
    boxes = patch_boxes(36, 3, 10, draw_offsets(36, 3, 10, rng))
    order = draw_permutation(9, rng)
    shuffled = cut_patches(coordinates(36), boxes[order])
    np.testing.assert_array_equal(shuffled[np.argsort(order)], cut_patches(coordinates(36), boxes))


def test_all_orders_are_equally_likely(rng: np.random.Generator):
    orders = [tuple(draw_permutation(4, rng)) for _ in range(4800)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7  # chi-square, 23 degrees of freedom, p = 0.001


def test_a_patch_larger_than_its_cell_is_refused():
    with pytest.raises(ValueError, match=r"patch_size must be <= jigsaw_size // grid = 85, got 96\."):
        draw_offsets(255, 3, 96, np.random.default_rng(0))


@pytest.mark.parametrize("offsets", [[[22, 0]] * 9, [[0, -1]] * 9])
def test_offsets_that_leave_the_cell_are_refused(offsets):
    with pytest.raises(ValueError, match=r"offsets must be in 0\.\.21"):
        patch_boxes(255, 3, 64, offsets)


def test_a_wrong_number_of_offsets_is_refused():
    with pytest.raises(ValueError, match=r"\(9, 2\), got \(4, 2\)"):
        patch_boxes(255, 3, 64, np.zeros((4, 2)))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)
