from __future__ import annotations

import dataclasses
import platform

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import functional as tv

from pirl_plugin.data import photometric, photometric_fused
from pirl_plugin.data.photometric import Operation, PhotometricSettings, apply_program, draw_programs

# Pillow's own arithmetic is the same on every x86-64; other compilers may fuse its multiplications and additions.
LEVELS = 0 if platform.machine().lower() in ("x86_64", "amd64") else 1
STRENGTHS = {
    Operation.BRIGHTNESS: [0.0, 0.6, 0.999, 1.0, 1.37, 3.0],
    Operation.CONTRAST: [0.0, 0.6, 1.0, 1.37, 3.0],
    Operation.SATURATION: [0.0, 0.6, 1.0, 1.37, 3.0],
    Operation.HUE: [-0.5, -0.2, -0.001, 0.0, 0.1, 0.37, 0.5],
    Operation.POSTERIZE: [1, 4, 7, 8],
    Operation.SHARPNESS: [0.0, 0.1, 1.0, 1.9],
    Operation.SOLARIZE: [0, 1, 128, 255, 256],
    Operation.BLUR: [0.1, 0.5, 1.3, 2.0, 7.7],
}
CASES = [(operation, strength) for operation in Operation for strength in STRENGTHS.get(operation, [0.0])]
IDS = [f"{operation.name}-{strength}" for operation, strength in CASES]


def images() -> list[np.ndarray]:
    """Noise, few levels, a small range of levels, smooth colours, constant, black and white, and the smallest sizes."""
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 256, (37, 23, 3), dtype=np.uint8)
    smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((48, 40), Image.Resampling.BICUBIC)
    return [
        noise,
        noise // 64 * 64,
        noise // 8 + 90,
        np.asarray(smooth),
        np.full((8, 8, 3), (10, 200, 30), dtype=np.uint8),
        np.zeros((8, 8, 3), dtype=np.uint8),
        np.full((8, 8, 3), 255, dtype=np.uint8),
        np.where(noise > 127, 255, 0).astype(np.uint8),
        *(rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((1, 1), (1, 9), (2, 2), (2, 9), (9, 2), (3, 3))),
    ]


def program(*rows: tuple[int, float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32).reshape(-1, 2)


def channels_first(image: np.ndarray) -> np.ndarray:
    """A batch of one, ``(1, 3, H, W)``."""
    return image.transpose(2, 0, 1)[None]


def reference(image: Image.Image, operation: Operation, strength: float) -> Image.Image:
    """torchvision's functional operations on a Pillow image; Pillow's own where torchvision has none of it."""
    return {
        Operation.NONE: lambda: image,
        Operation.BRIGHTNESS: lambda: tv.adjust_brightness(image, strength),
        Operation.CONTRAST: lambda: tv.adjust_contrast(image, strength),
        Operation.SATURATION: lambda: tv.adjust_saturation(image, strength),
        Operation.HUE: lambda: tv.adjust_hue(image, strength),
        Operation.POSTERIZE: lambda: tv.posterize(image, int(strength)),
        Operation.SHARPNESS: lambda: tv.adjust_sharpness(image, strength),
        Operation.SOLARIZE: lambda: ImageOps.solarize(image, int(strength)),
        Operation.AUTOCONTRAST: lambda: tv.autocontrast(image),
        Operation.EQUALIZE: lambda: tv.equalize(image),
        Operation.GRAYSCALE: lambda: tv.to_grayscale(image, num_output_channels=3),
        Operation.BLUR: lambda: image.filter(ImageFilter.GaussianBlur(strength)),
        Operation.FLIP: lambda: tv.hflip(image),
    }[operation]()


@pytest.mark.parametrize(("operation", "strength"), CASES, ids=IDS)
def test_plain_operation_is_torchvisions(operation: Operation, strength: float):
    strength = float(np.float32(strength))
    for image in images():
        expected = np.asarray(reference(Image.fromarray(image), operation, strength))
        np.testing.assert_array_equal(apply_program(image, program((operation, strength))), expected)


@pytest.mark.parametrize(
    ("operation", "strength", "pixels", "expected"),
    [
        (Operation.BRIGHTNESS, 0.5, [[100, 151, 200]], [[50, 75, 100]]),  # truncated
        (Operation.BRIGHTNESS, 2.0, [[100, 151, 200]], [[200, 255, 255]]),
        (Operation.CONTRAST, 0.5, [[100, 100, 100], [201, 201, 201]], [[125, 125, 125], [176, 176, 176]]),  # mean 151
        (Operation.SATURATION, 0.0, [[255, 0, 0]], [[76, 76, 76]]),  # 0.299 * 255 = 76.2
        (Operation.GRAYSCALE, 0.0, [[0, 255, 0]], [[150, 150, 150]]),  # 0.587 * 255 = 149.7
        (Operation.HUE, 1 / 3, [[255, 0, 0]], [[0, 255, 0]]),  # a third of a turn: red becomes green
        (Operation.POSTERIZE, 4, [[0xAB, 0x0F, 0xF0]], [[0xA0, 0x00, 0xF0]]),
        (Operation.SOLARIZE, 128, [[127, 128, 255]], [[127, 127, 0]]),
        (Operation.AUTOCONTRAST, 0.0, [[50, 0, 7], [101, 255, 7], [60, 9, 7]], [[0, 0, 7], [255, 255, 7], [50, 9, 7]]),
        (Operation.FLIP, 0.0, [[1, 2, 3], [4, 5, 6]], [[4, 5, 6], [1, 2, 3]]),
    ],
)
@pytest.mark.parametrize("fast", [False, True])
def test_operations_by_hand(operation, strength, pixels, expected, fast):
    image = np.array([pixels], dtype=np.uint8)  # one row
    view = photometric_fused.apply_programs(channels_first(image), program((operation, strength))[None], fast)[0]
    np.testing.assert_allclose(view.transpose(1, 2, 0), [expected], atol=LEVELS if fast else 0)


def test_sharpness_by_hand():
    """A lone 130 among zeros: smoothed, 5/13 * 130 = 50 at it and 10 beside it. Factor 0 gives just that."""
    image = np.zeros((5, 5, 3), dtype=np.uint8)
    image[2, 2] = 130
    expected = np.zeros((5, 5), dtype=np.uint8)
    expected[1:4, 1:4] = 10
    expected[2, 2] = 50
    for fast in (False, True):
        rows = program((Operation.SHARPNESS, 0.0))[None]
        view = photometric_fused.apply_programs(channels_first(image), rows, fast)[0]
        np.testing.assert_array_equal(view[0], expected)


@pytest.mark.parametrize(("operation", "strength"), CASES, ids=IDS)
def test_fused_operation_is_the_plain_one(operation: Operation, strength: float):
    assert photometric_fused.FUSED_AVAILABLE
    for image in images():
        rows = program((operation, strength))
        fused = photometric_fused.apply_programs(channels_first(image), rows[None])[0].transpose(1, 2, 0)
        np.testing.assert_allclose(fused.astype(int), apply_program(image, rows).astype(int), atol=LEVELS, rtol=0)


@pytest.mark.parametrize("turns", [-0.5, -0.13, 0.0, 0.2, 0.5])
def test_fused_hue_on_a_grid_of_all_colours(turns: float):
    levels = np.append(np.arange(0, 255, 5), [1, 2, 254, 255])
    colours = np.stack(np.meshgrid(levels, levels, levels)).reshape(1, 3, 1, -1).astype(np.uint8)
    rows = program((Operation.HUE, turns))[None]
    fused = photometric_fused.apply_programs(colours, rows).astype(int)
    np.testing.assert_allclose(fused, photometric.apply_programs(colours, rows).astype(int), atol=LEVELS, rtol=0)


def test_fused_programs_are_the_plain_ones():
    """Whole programs with every operation in them, on smooth and on noisy images."""
    settings = PhotometricSettings(equalize_probability=0.5, blur_probability=0.5)
    programs = draw_programs(settings, 100, np.random.default_rng(5))
    for image in images():
        batch = np.repeat(channels_first(image), len(programs), axis=0)
        fused = photometric_fused.apply_programs(batch, programs)
        plain = photometric.apply_programs(batch, programs)
        if LEVELS == 0:
            np.testing.assert_array_equal(fused, plain)
        else:  # a level of difference can be spread by solarize and autocontrast
            assert (np.abs(fused.astype(int) - plain) > 1).mean() < 0.01


def test_fused_takes_readonly_and_strided_images_and_leaves_them_alone():
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 9), dtype=np.uint8)
    programs = draw_programs(PhotometricSettings(), 2, np.random.default_rng(1))
    mirrored = image[..., ::-1]
    before = image.copy()
    image.flags.writeable = False
    np.testing.assert_array_equal(
        photometric_fused.apply_programs(mirrored, programs), photometric.apply_programs(mirrored, programs)
    )
    np.testing.assert_array_equal(image, before)


def test_without_numba_the_plain_path_is_taken(monkeypatch: pytest.MonkeyPatch):
    image = channels_first(images()[0])
    programs = draw_programs(PhotometricSettings(), 1, np.random.default_rng(1))
    monkeypatch.setattr(photometric_fused, "FUSED_AVAILABLE", False)
    monkeypatch.setattr(photometric_fused, "_run", None)
    np.testing.assert_array_equal(
        photometric_fused.apply_programs(image, programs, fast=True), photometric.apply_programs(image, programs)
    )


@pytest.mark.parametrize("fast", [False, True])
def test_unknown_codes_are_refused(fast: bool):
    with pytest.raises(ValueError, match="99|unknown operation code"):
        photometric_fused.apply_programs(np.zeros((1, 3, 4, 4), np.uint8), program((99, 0.0))[None], fast)


def drawn(settings: PhotometricSettings, num_views: int = 20000, seed: int = 0) -> tuple[np.ndarray, dict]:
    """Codes ``(N, P)`` and, per operation, the strengths of the views that have it."""
    programs = draw_programs(settings, num_views, np.random.default_rng(seed))
    codes, strengths = programs[..., 0].astype(int), programs[..., 1]
    return codes, {operation: strengths[codes == operation] for operation in Operation}


def test_released_settings_draw_the_released_distribution():
    codes, strengths = drawn(PhotometricSettings())
    share = {operation: len(values) / len(codes) for operation, values in strengths.items()}
    for operation in (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.SATURATION, Operation.HUE):
        assert share[operation] == 1
    group = (Operation.POSTERIZE, Operation.SHARPNESS, Operation.SOLARIZE, Operation.AUTOCONTRAST)
    assert share[group[0]] == pytest.approx(0.66, abs=0.015)
    together = np.stack([(codes == operation).any(axis=1) for operation in group])
    assert (together == together[0]).all()
    assert share[Operation.GRAYSCALE] == pytest.approx(0.2, abs=0.015)
    assert share[Operation.FLIP] == pytest.approx(0.5, abs=0.015)
    assert share[Operation.EQUALIZE] == share[Operation.BLUR] == 0
    gray, flip = (codes == Operation.GRAYSCALE).any(axis=1), (codes == Operation.FLIP).any(axis=1)
    assert abs(np.corrcoef([gray, flip, together[0]]) - np.eye(3)).max() < 0.03


def test_jitter_happens_as_a_whole_or_not_at_all():
    codes, _ = drawn(PhotometricSettings(jitter_probability=0.8))
    happened = codes[:, :4] != Operation.NONE
    assert (happened.all(axis=1) == happened.any(axis=1)).all()
    assert happened.all(axis=1).mean() == pytest.approx(0.8, abs=0.015)


def test_strengths_fill_their_ranges():
    _, strengths = drawn(PhotometricSettings(blur_probability=1.0))
    ranges = {
        Operation.BRIGHTNESS: (0.6, 1.4),
        Operation.CONTRAST: (0.6, 1.4),
        Operation.SATURATION: (0.6, 1.4),
        Operation.HUE: (-0.2, 0.2),
        Operation.SHARPNESS: (0.1, 1.9),
        Operation.BLUR: (0.1, 2.0),
    }
    for operation, (low, high) in ranges.items():
        values = np.sort(strengths[operation])
        assert low - 1e-6 <= values[0]
        assert values[-1] <= high + 1e-6
        uniform = np.linspace(low, high, len(values))
        assert np.abs(values - uniform).max() < 0.02 * (high - low)  # Kolmogorov-Smirnov distance
    for operation, low, high in ((Operation.POSTERIZE, 4, 8), (Operation.SOLARIZE, 0, 256)):
        values, counts = np.unique(strengths[operation], return_counts=True)
        assert values.tolist() == list(range(low, high + 1))
        expected = counts.sum() / len(counts)
        freedom = len(counts) - 1
        assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


def test_jitter_comes_in_every_order_equally_often():
    codes, _ = drawn(PhotometricSettings(), num_views=4800)
    orders, counts = np.unique(codes[:, :4], axis=0, return_counts=True)
    assert len(orders) == 24
    assert ((counts - 200) ** 2 / 200).sum() < 49.7  # chi-square, 23 degrees of freedom, p = 0.001


def test_views_are_drawn_independently():
    programs = draw_programs(PhotometricSettings(), 9, np.random.default_rng(0))
    strengths = np.take_along_axis(programs[:, :4, 1], programs[:, :4, 0].argsort(axis=1), axis=1)
    assert len(np.unique(strengths[:, 0])) == 9
    many = draw_programs(PhotometricSettings(), 20000, np.random.default_rng(0))
    brightness = many[..., 1][many[..., 0] == Operation.BRIGHTNESS]
    contrast = many[..., 1][many[..., 0] == Operation.CONTRAST]
    assert abs(np.corrcoef(brightness[:-1], brightness[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(brightness, contrast)[0, 1]) < 0.03


def test_same_seed_same_programs():
    first = draw_programs(PhotometricSettings(), 9, np.random.default_rng(7))
    np.testing.assert_array_equal(first, draw_programs(PhotometricSettings(), 9, np.random.default_rng(7)))
    assert not np.array_equal(first, draw_programs(PhotometricSettings(), 9, np.random.default_rng(8)))
    assert first.dtype == np.float32


def test_one_setting_leaves_the_other_draws_alone():
    released = draw_programs(PhotometricSettings(), 50, np.random.default_rng(7))
    paper = draw_programs(PhotometricSettings(equalize_probability=1.0), 50, np.random.default_rng(7))
    changed = (released != paper).any(axis=(0, 2))
    assert changed.sum() == 1
    assert (paper[:, changed, 0] == Operation.EQUALIZE).all()


def test_solarize_by_itself_leaves_all_other_draws_alone():
    """At grey level 128, independent of everything else that is drawn (BYOL, Barlow Twins)."""
    plain = draw_programs(PhotometricSettings(), 20000, np.random.default_rng(7))
    with_it = draw_programs(PhotometricSettings(solarize_probability=0.2), 20000, np.random.default_rng(7))
    np.testing.assert_array_equal(plain[:, :-1], with_it[:, :-1])
    happened = with_it[:, -1, 0] == Operation.SOLARIZE
    assert happened.mean() == pytest.approx(0.2, abs=0.015)
    assert (with_it[happened, -1, 1] == 128).all()
    assert (plain[:, -1, 0] == Operation.NONE).all()
    for operation in (Operation.GRAYSCALE, Operation.FLIP, Operation.POSTERIZE):
        other = (with_it[:, :-1, 0] == operation).any(axis=1)
        assert abs(np.corrcoef(happened, other)[0, 1]) < 0.03


def test_flip_only_and_nothing_at_all():
    codes, _ = drawn(PhotometricSettings.flip_only(0.25))
    assert set(np.unique(codes)) == {Operation.NONE, Operation.FLIP}
    assert (codes == Operation.FLIP).any(axis=1).mean() == pytest.approx(0.25, abs=0.015)
    codes, _ = drawn(PhotometricSettings.flip_only(0.0))
    assert set(np.unique(codes)) == {Operation.NONE}


def test_zero_width_switches_a_jitter_off():
    _, strengths = drawn(PhotometricSettings(hue=0.0))
    assert len(strengths[Operation.HUE]) == 0
    assert len(strengths[Operation.CONTRAST]) == 20000


def test_wide_brightness_stops_at_black():
    _, strengths = drawn(PhotometricSettings(brightness=1.5))
    assert strengths[Operation.BRIGHTNESS].min() == pytest.approx(0, abs=0.001)
    assert strengths[Operation.BRIGHTNESS].max() == pytest.approx(2.5, abs=0.001)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hue", 0.6),
        ("brightness", -0.1),
        ("flip_probability", 1.1),
        ("posterize_bits", (0, 8)),
        ("posterize_bits", (8, 4)),
        ("solarize_threshold", (0, 257)),
    ],
)
def test_settings_out_of_range_are_refused(field: str, value: object):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(PhotometricSettings(), **{field: value})
