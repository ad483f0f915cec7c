"""Decoded images: an array for our crops, a Pillow image for everyone else; JPEG files by the faster decoder."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pirl_plugin.data import reading
from pirl_plugin.data.decoded import DecodedImage, pixels_of
from pirl_plugin.data.reading import UnreadableImageError, read_image


def pixels(height: int = 24, width: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> Image.Image:
    return Image.fromarray(pixels(5, 6)).resize((width, height), Image.Resampling.BICUBIC)


def test_it_is_a_pillow_image():
    image, plain = DecodedImage(pixels()), Image.fromarray(pixels())
    assert (image.size, image.mode, image.width, image.height) == ((32, 24), "RGB", 32, 24)
    for one in (image.convert("L"), image.resize((7, 5)), image.crop((1, 2, 9, 8)), image.rotate(90), image.copy()):
        assert one.mode in ("L", "RGB")
    np.testing.assert_array_equal(np.asarray(image), pixels())
    np.testing.assert_array_equal(np.asarray(image.resize((9, 9))), np.asarray(plain.resize((9, 9))))
    np.testing.assert_array_equal(np.asarray(image.convert("HSV")), np.asarray(plain.convert("HSV")))


def test_it_can_be_sent_to_another_process():
    image = pickle.loads(pickle.dumps(DecodedImage(pixels())))
    np.testing.assert_array_equal(image.pixels, pixels())
    np.testing.assert_array_equal(np.asarray(image), pixels())


def test_drawing_on_it_leaves_the_array_alone():
    array = pixels()
    image = DecodedImage(array)
    ImageDraw.Draw(image).rectangle((0, 0, 31, 23), fill="red")
    assert (np.asarray(image) == [255, 0, 0]).all()
    np.testing.assert_array_equal(array, pixels())


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_pixels_of_any_image(mode):
    image = Image.fromarray(pixels()).convert(mode)
    np.testing.assert_array_equal(pixels_of(image), np.asarray(image.convert("RGB")))
    decoded = DecodedImage(pixels())
    assert pixels_of(decoded) is decoded.pixels


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of the faster decoder gave pixels."""
    calls: list[bool] = []
    decode = reading.simplejpeg.decode_jpeg

    def counted(data: bytes) -> Any:
        calls.append(False)
        decoded = decode(data)
        calls[-1] = True
        return decoded

    monkeypatch.setattr(reading.simplejpeg, "decode_jpeg", counted)
    return calls


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"subsampling": "4:2:0"},
        {"subsampling": "4:2:0", "quality": 20},
        {"progressive": True},
        {"keep_rgb": True},
        {"restart_marker_rows": 2},
        {"comment": b"a dog", "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0", "icc_profile": b"x" * 100},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(100, 131), (1, 1), (17, 3)])
def test_a_jpeg_files_pixels_are_pillows(tmp_path: Path, asked: list[bool], options: dict[str, Any], size):
    smooth(*size).save(tmp_path / "a.jpg", **options)
    with Image.open(tmp_path / "a.jpg") as image:
        np.testing.assert_array_equal(read_image(tmp_path / "a.jpg").pixels, np.asarray(image))
    assert asked == [True]


def test_of_damaged_files_it_says_what_pillow_says(tmp_path: Path, asked: list[bool]):
    """Pixels where Pillow forgives, an error where it does not; in some of them the faster decoder gives up first."""
    rng, path = np.random.default_rng(0), tmp_path / "a.jpg"
    smooth(64, 64).save(path, restart_marker_rows=1)
    sound = path.read_bytes()
    outcomes = set()
    for _ in range(200):
        damaged = bytearray(sound)
        damaged[rng.integers(2, len(sound))] ^= 1 << rng.integers(8)
        asked.clear()
        path.write_bytes(damaged[: rng.integers(len(sound) - 40, len(sound) + 100)])
        try:
            expected = np.asarray(Image.open(path).convert("RGB"))
        except Exception:
            with pytest.raises(UnreadableImageError):
                read_image(path)
            outcomes.add(("refused", asked == [True]))
        else:
            np.testing.assert_array_equal(read_image(path).pixels, expected)
            outcomes.add(("read", asked == [True]))
    assert outcomes == {("refused", False), ("read", False), ("read", True)}


def test_a_png_file_with_damaged_pixels_is_refused(tmp_path: Path):
    """Pillow loads a PNG file when it is asked for its orientation, and what fails then does not fail again."""
    Image.fromarray(pixels(24, 24)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:200] + bytes(400) + content[600:])
    with pytest.raises(UnreadableImageError):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_modes_are_left_to_pillow(tmp_path: Path, asked: list[bool], mode: str):
    smooth(20, 30).convert(mode).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        np.testing.assert_array_equal(read_image(tmp_path / "a.jpg").pixels, np.asarray(image.convert("RGB")))
    assert asked == []


def test_without_the_faster_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    smooth(100, 131).save(tmp_path / "a.jpg")
    with_it = read_image(tmp_path / "a.jpg").pixels
    monkeypatch.setattr(reading, "simplejpeg", None)
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg").pixels, with_it)
