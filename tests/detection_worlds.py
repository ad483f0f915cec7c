"""Small devkits, trunks and contexts that the detection tests share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.registry import build

TRUNK = {"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "medium"}
Objects = Sequence[
    tuple[str, tuple[int, int, int, int], bool]
]  # class, xmin ymin xmax ymax as in VOC's files, difficult


def trunk(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A frozen trunk in evaluation mode whose batch norms are no identities."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = build("model", {**TRUNK, **changes})
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)
            torch.nn.init.uniform_(module.weight, 0.8, 1.2, generator=generator)
            torch.nn.init.uniform_(module.bias, -0.1, 0.1, generator=generator)
    return made.requires_grad_(False).eval()


def devkit(root: Path, images: Mapping[str, Objects], split: str = "trainval", year: str = "VOC2007") -> str:
    """A VOC devkit of noise pictures, 50 x 40 pixels, with these objects and no lists of single classes."""
    base = root / "VOCdevkit" / year
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    (base / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in images))
    for number, (name, objects) in enumerate(images.items()):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(base / "JPEGImages" / f"{name}.jpg")
        items = "".join(
            f"<object><name>{label}</name><difficult>{int(hard)}</difficult><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for label, (x0, y0, x1, y1), hard in objects
        )
        (base / "Annotations" / f"{name}.xml").write_text(f"<annotation>{items}</annotation>")
    return str(root)


def scenes(count: int = 6, **changes: Any) -> Any:
    """Drawn scenes of two classes, 32 pixels."""
    arguments = {"num_images": count, "size": 32, "split": "train", "num_classes": 2, **changes}
    return build("dataset", {"name": "generated_scenes", **arguments})


def context(train: Any, test: Any = None, **changes: Any) -> BenchmarkContext:
    """What a benchmark is given, with the small trunk."""
    own = changes.pop("trunk", None) or trunk()
    return BenchmarkContext(
        trunk=own, train=train, test=test or train, transform=lambda *_: {}, trunk_config=TRUNK, **changes
    )
