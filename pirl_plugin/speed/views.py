"""PIRL's ten views of an image, from the JPEG file to the batch, against Pillow and torchvision one view at a time."""

from __future__ import annotations

import atexit
import functools
import itertools
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pirl_plugin.data.collators import JigsawCollator
from pirl_plugin.data.datasets import FileDataset
from pirl_plugin.data.jigsaw_views import ImageAndJigsawPatches
from pirl_plugin.data.loading import KeyedViews, SampledViews
from pirl_plugin.data.photometric_fused import apply_programs
from pirl_plugin.functional.pending_colours import coloured, program_name, view_of
from pirl_plugin.speed.measuring import Row, Settings, Work, interleaved, more

_SUFFIXES = {".jpg", ".jpeg"}
_WORKERS, _BATCH = 2, 16
_VIEWS = ("image", "patches")
_MADE, _SIZE, _QUALITY = 48, (500, 375), 90  # generated files where none are given, as large as ImageNet's


class PlainViews(Dataset[tuple[Tensor, Tensor]]):
    """The published pipeline: one view after another through Pillow and torchvision, to normalised float tensors.

    The same crops, colours and patches in distribution as ``image_and_jigsaw_patches`` has by default.
    """

    def __init__(self, files: list[Path]) -> None:
        self.files = files
        self.crop = transforms.RandomResizedCrop(224)
        self.jigsaw_crop = transforms.RandomResizedCrop(255, scale=(0.6, 1.0))
        self.colours = transforms.Compose(
            [
                transforms.ColorJitter(0.4, 0.4, 0.4, 0.2),
                transforms.RandomApply([photometric], p=0.66),
                transforms.RandomGrayscale(0.2),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """An image view ``(3, 224, 224)`` and nine patches ``(9, 3, 64, 64)``."""
        with Image.open(self.files[index % len(self.files)]) as file:
            image = file.convert("RGB")
        crop = self.jigsaw_crop(image)
        patches = []
        for row, column in itertools.product(range(3), repeat=2):
            left, top = 85 * column + random.randint(0, 21), 85 * row + random.randint(0, 21)
            patches.append(self.colours(crop.crop((left, top, left + 64, top + 64))))
        random.shuffle(patches)
        return self.colours(self.crop(image)), torch.stack(patches)


def photometric(image: Image.Image) -> Image.Image:
    """Posterize, sharpness, solarize and autocontrast with random strengths."""
    image = ImageOps.posterize(image, random.randint(4, 8))
    image = ImageEnhance.Sharpness(image).enhance(random.uniform(0.1, 1.9))
    image = ImageOps.solarize(image, random.randint(0, 256))
    return ImageOps.autocontrast(image)


def rows(settings: Settings) -> Iterator[Row]:
    """Images per second of one process, and of a loader with its workers."""
    files = _files(settings)
    count = min(len(files), 16) if settings.quick else len(files)
    ours, plain = _ours(files), PlainViews(files)
    seconds = interleaved(
        {
            "ours": lambda: [ours[image_id, 0] for image_id in range(count)],
            "theirs": lambda: [plain[index] for index in range(count)],
        },
        settings.repeats,
    )
    yield more(
        "views of an image, 224 + 9 x 64, one core",
        "Pillow and torchvision, view by view",
        count / seconds["ours"],
        count / seconds["theirs"],
        wanted=4.5,
        unit="images/s",
        detail=f"{len(files)} JPEG files; ours stays uint8, the plain one ends in normalised float32, as published",
    )
    yield _of_loaders(files, settings)
    yield _without_colours(files, count, settings)
    if settings.device.type == "cuda":
        yield _colours_on(settings.device, files, settings)


def to_profile(settings: Settings) -> Work:
    """Views of sixteen images."""
    files = _files(settings)
    ours = _ours(files)
    return lambda: [ours[image_id % len(files), 0] for image_id in range(16)]


def _of_loaders(files: list[Path], settings: Settings) -> Row:
    """Whole epochs of loaders whose workers run already, collation included."""
    batches = 4 if settings.quick else 16
    images = batches * _BATCH
    repeated = (files * (images // len(files) + 1))[:images]
    ours = SampledViews(_dataset(repeated), ImageAndJigsawPatches(), JigsawCollator(), _BATCH, num_workers=_WORKERS)
    plain = DataLoader(PlainViews(repeated), _BATCH, shuffle=True, num_workers=_WORKERS, persistent_workers=True)
    sides: dict[str, Work] = {"ours": lambda: list(ours.iterator()), "theirs": lambda: list(plain)}
    seconds = interleaved(sides, settings.repeats)
    return more(
        f"loader with {_WORKERS} workers, collation included",
        "the same of the plain views",
        images / seconds["ours"],
        images / seconds["theirs"],
        wanted=4,
        unit="images/s",
        detail=f"epochs of {batches} batches of {_BATCH}; the first batch is waited for in each",
    )


def _without_colours(files: list[Path], count: int, settings: Settings) -> Row:
    """What is left to a loader's process when the training's device does the colours."""
    without, complete = _ours(files, "device"), _ours(files)
    seconds = interleaved(
        {
            "ours": lambda: [without[image_id, 0] for image_id in range(count)],
            "theirs": lambda: [complete[image_id, 0] for image_id in range(count)],
        },
        settings.repeats,
    )
    return more(
        "the same views, colours left to the device, one core",
        "colours in the loader",
        count / seconds["ours"],
        count / seconds["theirs"],
        unit="images/s",
        detail="transform.colours=device: the same pixels to the last bit",
    )


def _colours_on(device: torch.device, files: list[Path], settings: Settings) -> Row:
    """The colours of a batch whose pixels are on the device, against the loader's compiled kernel on one core."""
    batch = 16 if settings.quick else 64
    views = _ours(files, "device")
    pending = JigsawCollator()([views[image_id % len(files), 0][1:] for image_id in range(batch)])["input"]
    on_device = {name: x if view_of(name, pending) else x.to(device) for name, x in pending.items()}
    pairs = [
        (pending[name].flatten(0, -4).numpy(), pending[program_name(name)].flatten(0, -3).numpy()) for name in _VIEWS
    ]
    seconds = interleaved(
        {
            "ours": lambda: coloured(on_device, device),
            "theirs": lambda: [apply_programs(pixels, programs) for pixels, programs in pairs],
        },
        settings.repeats,
        device=device,
    )
    return more(
        f"colours of a batch of {batch} images on {device.type}",
        "the loader's compiled kernel, one core",
        batch / seconds["ours"],
        batch / seconds["theirs"],
        unit="images/s",
        detail="pixels are on the device already; the programs are sent",
    )


def _ours(files: list[Path], colours: Literal["loader", "device"] = "loader") -> KeyedViews:
    return KeyedViews(_dataset(files), ImageAndJigsawPatches(colours=colours), with_programs=True)


def _dataset(files: list[Path]) -> FileDataset:
    """Files of any folders: a path that is absolute takes the place of the root."""
    return FileDataset(Path(), [str(file) for file in files])


def _files(settings: Settings) -> list[Path]:
    """The given folder's JPEG files; where none is given, files that are made, and deleted when the program ends.

    Raises:
        ValueError: a folder without such files.
    """
    if settings.images is None:
        return _made()
    found = sorted(path.resolve() for path in settings.images.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise ValueError(f"there is no JPEG file (.jpg, .jpeg) in {settings.images}.")
    return found


@functools.cache
def _made() -> list[Path]:
    folder = tempfile.TemporaryDirectory(prefix="pirl_bench_")
    atexit.register(folder.cleanup)
    return [_make(Path(folder.name) / f"{number}.jpg", number) for number in range(_MADE)]


def _make(path: Path, seed: int) -> Path:
    """A picture of soft blobs with grain, about as large a file as a photograph of its size (100 kB)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize(_SIZE, Image.Resampling.BICUBIC)).astype(np.float64)
    grain = rng.normal(0, 12, (*pixels.shape[:2], 1))
    Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(path, quality=_QUALITY)
    return path.resolve()
