"""Photometric programs over whole batches, on the CPU and on a GPU: Pillow's pixels, every one of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_photometric import CASES, IDS, LEVELS, channels_first, images, program

from pirl_plugin.data import photometric
from pirl_plugin.data.photometric import Operation, PhotometricSettings, draw_programs
from pirl_plugin.functional import photometric_batch
from pirl_plugin.functional.photometric_batch import apply_programs_batched

EVERYTHING = PhotometricSettings(equalize_probability=0.5, blur_probability=0.5, solarize_probability=0.3)
SIZES = [(1, 1), (2, 3), (1, 7), (7, 1), (2, 2), (3, 3), (5, 4), (31, 33)]


def batched(pixels: np.ndarray, programs: np.ndarray, **arguments: int) -> np.ndarray:
    return apply_programs_batched(torch.from_numpy(pixels.copy()), torch.from_numpy(programs), **arguments).numpy()


def assert_plain(pixels: np.ndarray, programs: np.ndarray, **arguments: int) -> None:
    """As on the plain path; elsewhere than on x86-64 solarize and autocontrast can spread a level of difference."""
    found, plain = batched(pixels, programs, **arguments), photometric.apply_programs(pixels, programs)
    if LEVELS == 0:
        np.testing.assert_array_equal(found, plain)
    else:
        assert (np.abs(found.astype(int) - plain) > LEVELS).mean() < 0.01


@pytest.mark.parametrize(("operation", "strength"), CASES, ids=IDS)
def test_an_operation_is_the_plain_one(operation: Operation, strength: float):
    for image in images():
        pixels = channels_first(image)
        assert_plain(pixels, program((operation, strength))[None])


@pytest.mark.parametrize("turns", [-0.5, -0.13, 0.0, 0.2, 0.5])
def test_hue_on_a_grid_of_all_colours(turns: float):
    levels = np.append(np.arange(0, 255, 5), [1, 2, 254, 255])
    colours = np.stack(np.meshgrid(levels, levels, levels)).reshape(1, 3, 1, -1).astype(np.uint8)
    assert_plain(colours, program((Operation.HUE, turns))[None])


@pytest.mark.parametrize("operation", [op for op in Operation if op is not Operation.NONE])
def test_each_image_has_a_strength_of_its_own(operation: Operation):
    rng = np.random.default_rng(2)
    low, high = {
        Operation.HUE: (-0.5, 0.5),
        Operation.POSTERIZE: (1, 8),
        Operation.SOLARIZE: (0, 256),
        Operation.BLUR: (0.1, 6.0),
    }.get(operation, (0.0, 3.0))
    strengths = rng.uniform(low, high, 24)
    if operation in (Operation.POSTERIZE, Operation.SOLARIZE):
        strengths = strengths.round()
    programs = np.stack([program((operation, strength)) for strength in strengths])
    assert_plain(rng.integers(0, 256, (24, 3, 19, 21), dtype=np.uint8), programs)


@pytest.mark.parametrize("size", SIZES)
def test_whole_programs_of_every_size(size: tuple[int, int]):
    rng = np.random.default_rng(4)
    pixels = rng.integers(0, 256, (60, 3, *size), dtype=np.uint8)
    assert_plain(pixels, draw_programs(EVERYTHING, 60, rng))


def test_whole_programs_on_all_kinds_of_images():
    programs = draw_programs(EVERYTHING, 40, np.random.default_rng(5))
    for image in images():
        assert_plain(np.repeat(channels_first(image), len(programs), axis=0), programs)


@pytest.mark.parametrize("chunk", [1, 3 * 9 * 8, 1000, 10**9])
def test_chunks_change_nothing(chunk: int):
    """An image, an image, four and all of them at a time."""
    rng = np.random.default_rng(6)
    pixels = rng.integers(0, 256, (11, 3, 9, 8), dtype=np.uint8)
    assert_plain(pixels, draw_programs(EVERYTHING, 11, rng), chunk=chunk)


def test_one_image_none_and_no_operations():
    rng = np.random.default_rng(7)
    pixels = rng.integers(0, 256, (1, 3, 6, 5), dtype=np.uint8)
    assert_plain(pixels, draw_programs(EVERYTHING, 1, rng))
    assert batched(pixels[:0], draw_programs(EVERYTHING, 0, rng)).shape == (0, 3, 6, 5)
    np.testing.assert_array_equal(batched(pixels, np.zeros((1, 0, 2), dtype=np.float32)), pixels)


def test_strided_images_are_left_as_they_are():
    rng = np.random.default_rng(8)
    image = torch.from_numpy(rng.integers(0, 256, (4, 9, 8, 3), dtype=np.uint8)).permute(0, 3, 1, 2)
    before, programs = image.clone(), draw_programs(EVERYTHING, 4, rng)
    views = apply_programs_batched(image, torch.from_numpy(programs))
    assert torch.equal(image, before)
    assert views.is_contiguous()
    np.testing.assert_array_equal(views.numpy(), batched(image.contiguous().numpy(), programs))


def test_a_wrong_rounding_would_be_seen(monkeypatch: pytest.MonkeyPatch):
    """Rounded where Pillow truncates: the tests above compare pixels closely enough to notice."""
    rng = np.random.default_rng(9)
    pixels = rng.integers(0, 256, (8, 3, 9, 8), dtype=np.uint8)
    programs = np.repeat(program((Operation.BRIGHTNESS, 0.7))[None], 8, axis=0)
    assert_plain(pixels, programs)

    def rounded(degenerate: float, x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return (degenerate + factor * (x.float() - degenerate)).round().clamp(0, 255).to(torch.uint8)

    monkeypatch.setattr(photometric_batch, "_blend", rounded)
    with pytest.raises(AssertionError):
        assert_plain(pixels, programs)


@pytest.mark.parametrize(
    ("shape", "programs", "message"),
    [
        ((2, 3, 4, 4), np.full((2, 1, 2), 99.0), "unknown operation code in a photometric program: 99"),
        ((2, 1, 4, 4), np.zeros((2, 1, 2)), r"images must be \(N, 3, H, W\) uint8, got \(2, 1, 4, 4\)"),
        ((2, 3, 4, 4), np.zeros((3, 1, 2)), r"programs must be \(2, num_operations, 2\), got \(3, 1, 2\)"),
    ],
)
def test_what_is_refused(shape: tuple[int, ...], programs: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        batched(np.zeros(shape, dtype=np.uint8), programs.astype(np.float32))


def test_programs_on_another_device_are_refused():
    programs = torch.empty((1, 2, 2), device="meta")
    with pytest.raises(ValueError, match="host's memory, got meta"):
        apply_programs_batched(torch.zeros((1, 3, 4, 4), dtype=torch.uint8), programs)


def test_the_host_looks_at_no_pixel():
    """Then it need not wait for the device that has them: here, one that has nothing at all."""
    programs = np.stack([program(*CASES[i:], *CASES[:i]) for i in range(len(CASES))])
    pixels = torch.empty((len(programs), 3, 6, 5), dtype=torch.uint8, device="meta")
    views = apply_programs_batched(pixels, torch.from_numpy(programs))
    assert (views.device, views.shape, views.dtype) == (pixels.device, pixels.shape, pixels.dtype)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_pixels_and_is_not_waited_for():
    rng = np.random.default_rng(10)
    for operation, strength in CASES:
        for image in images():
            pixels, rows = torch.from_numpy(channels_first(image).copy()), program((operation, strength))[None]
            expected = apply_programs_batched(pixels, torch.from_numpy(rows))
            assert torch.equal(apply_programs_batched(pixels.cuda(), torch.from_numpy(rows)).cpu(), expected)
    for size in SIZES:
        pixels = torch.from_numpy(rng.integers(0, 256, (60, 3, *size), dtype=np.uint8))
        programs = torch.from_numpy(draw_programs(EVERYTHING, 60, rng))
        on_device = pixels.cuda()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")  # raises where the host would wait
        try:
            found = apply_programs_batched(on_device, programs, chunk=500)
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        assert torch.equal(found.cpu(), apply_programs_batched(pixels, programs))
