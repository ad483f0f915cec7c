"""Detection protocols: the published numbers, the learning rate by hand, and what happens when they are scaled."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pirl_plugin.benchmarks.detection.presets import PROTOCOLS, published
from pirl_plugin.benchmarks.detection.schedule import (
    changed_numbers,
    learning_rate,
    scaled_to_batch,
    scaled_to_images,
    scaled_to_iterations,
    with_overrides,
)

# iterations, drops, learning rate, warm-up iterations and factor, batch norm, frozen stages, extra norm
TABLE = {
    ("paper", "voc07+12"): (25000, (17000,), 0.003, 1000, 1 / 3, "frozen", 2, False),
    ("paper", "voc07"): (12500, (9500,), 0.003, 1000, 1 / 3, "frozen", 2, False),
    ("paper_supervised", "voc07+12"): (25000, (17000,), 0.02, 100, 1 / 3, "frozen", 2, False),
    ("paper_supervised", "voc07"): (12500, (9500,), 0.02, 100, 1 / 3, "frozen", 2, False),
    ("vissl", "voc07+12"): (25000, (17000,), 0.002, 1000, 1 / 1000, "frozen", 2, False),
    ("vissl", "voc07"): (12500, (9500,), 0.002, 1000, 1 / 1000, "synchronised", 0, True),
    ("vissl_supervised", "voc07+12"): (25000, (17000,), 0.02, 100, 1 / 1000, "frozen", 2, False),
    ("vissl_supervised", "voc07"): (12500, (9500,), 0.02, 100, 1 / 1000, "synchronised", 0, True),
    ("moco", "voc07+12"): (24000, (18000, 22000), 0.02, 100, 1 / 1000, "synchronised", 0, True),
    ("moco", "voc07"): (9000, (6750, 8250), 0.02, 100, 1 / 1000, "synchronised", 0, True),
}


@pytest.mark.parametrize("key", TABLE, ids=str)
def test_the_protocols_numbers(key: tuple[str, str]) -> None:
    p = published(*key)
    told = (p.iterations, p.drops, p.lr, p.warmup_iterations, p.warmup_factor, p.batch_norm, p.freeze_at, p.extra_norm)
    assert told == TABLE[key]
    assert p.precise_bn == (200 if p.extra_norm else 0)
    assert (p.name, p.train_set) == key


def test_what_all_protocols_share() -> None:
    assert set(PROTOCOLS) == set(TABLE)
    for p in PROTOCOLS.values():
        assert (p.batch_size, p.momentum, p.weight_decay, p.weight_decay_norm, p.gamma) == (16, 0.9, 1e-4, 0, 0.1)
        assert p.train_min_sizes == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
        assert (p.test_min_size, p.train_max_size, p.test_max_size) == (800, 1333, 1333)
        assert (p.rpn_pre_nms_test, p.rpn_post_nms_test) == (6000, 1000)
        assert (p.anchor_sizes, p.anchor_ratios) == ((32, 64, 128, 256, 512), (0.5, 1, 2))
        assert (p.input_format, p.stride_in_1x1) == ("RGB", False)
        assert p.pixel_mean == (123.675, 116.28, 103.53)
        assert p.pixel_std == (58.395, 57.12, 57.375)


def test_an_unknown_protocol() -> None:
    with pytest.raises(ValueError, match="no detection protocol 'papr' for 'voc07'.*Did you mean 'paper'"):
        published("papr", "voc07")


@pytest.mark.parametrize(
    ("key", "iteration", "expected"),
    [
        (("paper", "voc07"), 0, 0.001),  # slope 1/3 of 0.003
        (("paper", "voc07"), 500, 0.002),  # half-way between 0.001 and 0.003
        (("paper", "voc07"), 1000, 0.003),
        (("paper", "voc07"), 9499, 0.003),
        (("paper", "voc07"), 9500, 0.0003),
        (("paper", "voc07"), 12499, 0.0003),
        (("paper_supervised", "voc07"), 0, 0.02 / 3),
        (("vissl", "voc07+12"), 0, 0.000002),
        (("vissl", "voc07+12"), 250, 0.0005015),  # 2e-6 + 1.998e-3 / 4
        (("vissl", "voc07+12"), 16999, 0.002),
        (("vissl", "voc07+12"), 17000, 0.0002),
        (("moco", "voc07+12"), 50, 0.01001),
        (("moco", "voc07+12"), 17999, 0.02),
        (("moco", "voc07+12"), 18000, 0.002),
        (("moco", "voc07+12"), 22000, 0.0002),
    ],
)
def test_learning_rate_by_hand(key: tuple[str, str], iteration: int, expected: float) -> None:
    assert learning_rate(published(*key), iteration) == pytest.approx(expected, rel=1e-12)


def test_a_warm_up_ends_where_the_schedule_is() -> None:
    """A drop inside the warm-up: from 0.5 at the start it leads to 0.1, the schedule's value at its end."""
    p = replace(published("paper", "voc07"), lr=1.0, warmup_factor=0.5, warmup_iterations=4, drops=(2,))
    assert [learning_rate(p, i) for i in range(5)] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])


def test_scaling_to_a_smaller_batch() -> None:
    p = scaled_to_batch(published("moco", "voc07+12"), 2)
    assert p.lr == pytest.approx(0.0025)
    assert (p.iterations, p.drops, p.warmup_iterations) == (192000, (144000, 176000), 800)
    assert p.iterations * p.batch_size == 24000 * 16
    for iteration in (0, 50, 18000, 23999):  # the same learning rate per image, at the same image
        assert learning_rate(p, 8 * iteration) == pytest.approx(
            learning_rate(published("moco", "voc07+12"), iteration) / 8
        )


def test_scaling_to_a_larger_batch() -> None:
    p = scaled_to_batch(published("paper", "voc07"), 32)
    assert p.lr == pytest.approx(0.006)
    assert (p.iterations, p.drops, p.warmup_iterations) == (6250, (4750,), 500)


def test_scaling_the_length() -> None:
    p = scaled_to_iterations(published("paper", "voc07+12"), 250)
    assert (p.iterations, p.drops, p.warmup_iterations, p.lr) == (250, (170,), 10, 0.003)
    shortest = scaled_to_iterations(published("moco", "voc07"), 1)
    assert (shortest.iterations, shortest.warmup_iterations) == (1, 0)
    assert math.isfinite(learning_rate(shortest, 0))


def test_scaling_the_images_scales_every_length() -> None:
    p = scaled_to_images(published("paper", "voc07"), 64)  # 0.08 of 800
    assert p.test_min_size == 64
    assert (p.train_min_sizes[0], p.train_min_sizes[-1], len(p.train_min_sizes)) == (38, 64, 11)
    assert (p.train_max_size, p.test_max_size) == (107, 107)
    assert p.anchor_sizes == pytest.approx((2.56, 5.12, 10.24, 20.48, 40.96))


def test_scaling_the_proposals() -> None:
    p = with_overrides(published("moco", "voc07"), proposals=50)
    numbers = (p.rpn_pre_nms_train, p.rpn_post_nms_train, p.rpn_pre_nms_test, p.rpn_post_nms_test)
    assert numbers == (600, 100, 300, 50)
    assert p.name == "moco*"


def test_batch_norm_statistics_come_from_no_more_batches_than_training() -> None:
    assert scaled_to_iterations(published("moco", "voc07"), 60).precise_bn == 60
    assert scaled_to_iterations(published("moco", "voc07"), 4000).precise_bn == 200
    assert scaled_to_iterations(published("paper", "voc07"), 60).precise_bn == 0


def test_a_changed_number_changes_the_name() -> None:
    original = published("paper", "voc07")
    assert with_overrides(original) is original or with_overrides(original) == original
    same = {"batch_size": 16, "iterations": 12500, "lr": 0.003, "min_size": 800}
    assert with_overrides(original, **same).name == "paper"
    for change in ({"batch_size": 8}, {"iterations": 10}, {"lr": 0.1}, {"min_size": 64}, {"rois_per_image": 64}):
        changed = with_overrides(original, **change)
        assert changed.name == "paper*"
        assert changed_numbers(changed)
    assert changed_numbers(original) == {}


def test_overrides_in_their_order() -> None:
    """Batch 4: learning rate 0.003 / 4; then 100 iterations, whatever the batch; sizes and anchors at a quarter."""
    p = with_overrides(published("paper", "voc07"), batch_size=4, iterations=100, min_size=200, rois_per_image=64)
    assert (p.batch_size, p.iterations, p.drops, p.warmup_iterations) == (4, 100, (76,), 8)
    assert p.lr == pytest.approx(0.00075)
    assert p.anchor_sizes == (8, 16, 32, 64, 128)
    assert changed_numbers(p)["batch_size"] == [16, 4]
    assert changed_numbers(p)["iterations"] == [12500, 100]
    given = with_overrides(published("paper", "voc07"), batch_size=4, lr=0.01, min_size=200, anchor_sizes=[10, 20])
    assert (given.lr, given.anchor_sizes) == (0.01, (10.0, 20.0))


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"iterations": 0}, {"min_size": 0}, {"proposals": 0}])
def test_impossible_scalings(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be >= 1"):
        with_overrides(published("paper", "voc07"), **change)
