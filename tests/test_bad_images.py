"""What image files hold in practice: each odd kind is read rightly, each broken kind gives one clear reason."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from pirl_plugin.data.reading import UnreadableImageError, read_image


def noise(height: int = 24, width: int = 32, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pixels(path: Path) -> np.ndarray:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_plain_png_keeps_every_pixel(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), noise())


def test_jpeg_pixels_are_those_of_the_full_decoder(tmp_path):
    Image.fromarray(noise(256, 320)).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        np.testing.assert_array_equal(pixels(tmp_path / "a.jpg"), np.asarray(image))


@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_greyscale_has_three_equal_channels(tmp_path, extension):
    Image.fromarray(noise()[..., 0]).save(tmp_path / f"a.{extension}")
    got = pixels(tmp_path / f"a.{extension}")
    assert got.shape == (24, 32, 3)
    np.testing.assert_array_equal(got[..., 0], got[..., 2])
    if extension == "png":
        np.testing.assert_array_equal(got[..., 1], noise()[..., 0])


def test_black_and_white(tmp_path):
    Image.fromarray(noise()[..., 0] > 127).save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png")[..., 0], np.where(noise()[..., 0] > 127, 255, 0))


def test_cmyk(tmp_path):
    ink = np.zeros((8, 8, 4), dtype=np.uint8)
    ink[..., 0] = 255  # full cyan: no red
    Image.fromarray(ink, mode="CMYK").save(tmp_path / "a.jpg", quality=100)
    np.testing.assert_allclose(pixels(tmp_path / "a.jpg")[4, 4], [0, 255, 255], atol=3)


def test_palette_and_animation_give_the_first_frame(tmp_path):
    red, blue = (Image.new("RGB", (10, 8), colour) for colour in ("red", "blue"))
    red.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "a.png")
    red.save(tmp_path / "a.gif", save_all=True, append_images=[blue, blue])
    red.save(tmp_path / "a.webp", save_all=True, append_images=[blue], lossless=True)
    for name in ("a.png", "a.gif", "a.webp"):
        np.testing.assert_array_equal(pixels(tmp_path / name), np.full((8, 10, 3), [255, 0, 0]))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_parts_become_white_and_opaque_parts_stay(tmp_path, mode):
    values = np.full((4, 4, len(mode)), 50, dtype=np.uint8)
    values[..., -1] = 255
    values[0, 0, -1] = 0
    Image.fromarray(values, mode=mode).save(tmp_path / "a.png")
    got = pixels(tmp_path / "a.png")
    assert got[0, 0].tolist() == [255, 255, 255]
    assert (got.reshape(-1, 3)[1:] == 50).all()


def test_transparent_colour_of_a_palette(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    got = pixels(tmp_path / "a.png")
    assert got[0, 0].tolist() == [255, 255, 255]
    assert got[1, 1].tolist() == [10, 20, 30]


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_16_bits_are_scaled_not_clipped(tmp_path, extension):
    values = np.array([[0, 256, 300], [32896, 65278, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{extension}")
    np.testing.assert_array_equal(pixels(tmp_path / f"a.{extension}")[..., 0], np.array([[0, 1, 1], [128, 254, 255]]))


def test_16_bit_colour(tmp_path):
    """A PNG written by hand (Pillow writes none): one row of two 16-bit RGB pixels, high bytes 1..6."""
    row = b"\0" + b"".join(struct.pack(">H", value * 256 + 128) for value in range(1, 7))
    data = png(struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0), row)
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), [[[1, 2, 3], [4, 5, 6]]])


def png(header: bytes, rows: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 100.4, 200], [0, 100, 200]), ([-1, 0, 1], [0, 128, 255])],
)
def test_float_greyscale(tmp_path, values, expected):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "a.tif")
    assert pixels(tmp_path / "a.tif")[0, :, 0].tolist() == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    """The upright picture is made by hand for each of the eight ways in which a camera may be held."""
    stored = noise(4, 6)
    upright = {
        1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1), 7: stored[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(stored),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), upright[orientation])


def test_damaged_exif_is_no_reason_to_lose_the_image(tmp_path):
    Image.new("RGB", (8, 8), "white").save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert pixels(tmp_path / "a.jpg").min() == 255


def whole(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, format=kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("zero.jpg", b"", "empty (0 bytes)"),
        ("text.jpg", b"hello, this is text", "not an image; it begins with b'hello"),
        ("half.jpg", whole("JPEG")[:-600], "truncated"),
        ("half.png", whole("PNG")[:3000], "truncated"),
        ("half.bmp", whole("BMP")[:3000], "truncated"),
        ("head.jpg", whole("JPEG")[:30], ""),
        ("crc.png", whole("PNG").replace(b"IDAT", b"IDAX"), ""),
    ],
)
def test_broken_files_say_why(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableImageError) as caught:
        read_image(tmp_path / name)
    assert reason in caught.value.reason
    assert caught.value.path == str(tmp_path / name)
    assert str(caught.value).count("\n") == 0


def test_vanished_file(tmp_path):
    with pytest.raises(UnreadableImageError, match="does not exist"):
        read_image(tmp_path / "gone.jpg")


def test_a_folder_with_the_name_of_an_image(tmp_path):
    (tmp_path / "a.jpg").mkdir()
    with pytest.raises(UnreadableImageError):
        read_image(tmp_path / "a.jpg")


def test_decompression_bomb_is_refused_before_decoding(tmp_path):
    """A header that promises 60000 x 60000 pixels in a file of some bytes."""
    (tmp_path / "bomb.png").write_bytes(png(struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0), b"\0"))
    with pytest.raises(UnreadableImageError, match="3600000000 pixels.*bomb"):
        read_image(tmp_path / "bomb.png")


def test_own_limit_holds_where_pillow_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=600).size == (30, 20)
    with pytest.raises(UnreadableImageError, match="30 x 20 pixels, more than the 599"):
        read_image(tmp_path / "a.png", max_pixels=599)


def test_no_warnings_leak(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow warns from here on
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "a.png").size == (4, 4)


def test_truncated_files_stay_errors_where_another_library_allows_them(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    (tmp_path / "half.jpg").write_bytes(whole("JPEG")[:-600])
    with pytest.raises(UnreadableImageError, match="truncated"):
        read_image(tmp_path / "half.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
