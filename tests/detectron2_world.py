"""Small detectors on drawn scenes for the tests of detectron2's engine; importing it skips them without detectron2."""
# ruff: noqa: E402  (what imports detectron2 comes after the question whether there is one)

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

detectron2 = pytest.importorskip(
    "detectron2", reason="detectron2 is not installed: it is on no package index, see docs/benchmarks.md, Detection"
)

import xml.etree.ElementTree as ElementTree

import numpy as np
from detectron2.modeling import build_model
from PIL import Image

from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.benchmarks.detection import detectron2_engine as engine
from pirl_plugin.benchmarks.detection import detectron2_preflight as preflight
from pirl_plugin.benchmarks.detection.detectron2_config import norm_name
from pirl_plugin.benchmarks.detection.detectron2_job import Job
from pirl_plugin.benchmarks.detection.presets import DetectionProtocol, published
from pirl_plugin.benchmarks.detection.schedule import with_overrides
from pirl_plugin.benchmarks.detection.voc import Examples
from pirl_plugin.models.trunks import ResNetTrunk
from pirl_plugin.registry import build

RESNET18 = {"name": "resnet_trunk", "depth": 18}
CLASSES = 8


def small(name: str = "paper", **changes: Any) -> DetectionProtocol:
    """A protocol that trains in a second: 64 pixels, few proposals."""
    few = {"rpn_pre_nms_train": 100, "rpn_post_nms_train": 20, "rpn_pre_nms_test": 100, "rpn_post_nms_test": 10}
    numbers = {"batch_size": 2, "iterations": 4, "min_size": 64, "rois_per_image": 8, **few, **changes}
    return with_overrides(published(name, "voc07"), **numbers)


def a_trunk(config: dict[str, Any] = RESNET18) -> ResNetTrunk:
    """With batch norms of which no entry is trivial."""
    return with_statistics(build("model", config)).requires_grad_(False)


def with_statistics(network: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.3, 0.9),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                tensor.data.uniform_(low, high, generator=generator)  # type: ignore[union-attr]
    return network.eval()


def scenes(count: int = 6, split: str = "train") -> Examples:
    return Examples(build("dataset", {"name": "generated_scenes", "num_images": count, "size": 64, "split": split}))


def a_context(trunk: nn.Module, run_dir: Path | None = None, **changes: Any) -> BenchmarkContext:
    return BenchmarkContext(trunk=trunk, train=None, test=None, transform=dict, run_dir=run_dir, **changes)


def a_job(trunk: nn.Module, settings: DetectionProtocol, folder: Path, config: dict[str, Any] = RESNET18) -> Job:
    nothing: Callable[..., Iterable[Any]] = lambda items, total, what: items  # noqa: E731
    return Job(trunk, config, scenes(), scenes(3, "test"), settings, "cpu", 1, 0, 0, folder, None, nothing)


def a_detector(job: Job, **planted: Any) -> tuple[Any, Any]:
    """Configuration and model as ``run`` makes them, with options planted; keys with __ for a dot."""
    cfg = engine.configuration(job, norm_name(job.settings, "cpu", 1), ("train", "test"))
    cfg.merge_from_list([part for key, value in planted.items() for part in (key.replace("__", "."), value)])
    return cfg, build_model(cfg)


def failed(checks: Iterable[preflight.Check]) -> set[str]:
    return {check.what for check in checks if not check.right}


def the_trunk() -> ResNetTrunk:
    """The same at each call."""
    torch.manual_seed(1)
    return a_trunk()


OBJECTS = {  # name, difficult, xmin, ymin, xmax, ymax
    "000001": [("dog", 0, 5, 4, 40, 30), ("cat", 1, 1, 1, 20, 20)],
    "000002": [("person", 0, 10, 10, 30, 40), ("person", 0, 7, 7, 7, 20)],  # the second one pixel wide
    "000003": [("cat", 0, 30, 8, 70, 60)],  # reaches out of the image
    "000004": [],
}


def a_devkit(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for name, objects in OBJECTS.items():
        pixels = rng.integers(0, 256, (50, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "JPEGImages" / f"{name}.jpg", quality=95)
        write_annotation(tmp_path / "Annotations" / f"{name}.xml", objects)
    for split in ("train", "test"):
        (tmp_path / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(OBJECTS) + "\n")
    return tmp_path


def write_annotation(file: Path, objects: list[tuple[Any, ...]]) -> None:
    root = ElementTree.Element("annotation")
    size = ElementTree.SubElement(root, "size")
    for side, value in (("width", 64), ("height", 50)):
        ElementTree.SubElement(size, side).text = str(value)
    for name, difficult, *corners in objects:
        item = ElementTree.SubElement(root, "object")
        for key, value in (("name", name), ("pose", "x"), ("truncated", 0), ("difficult", difficult)):
            ElementTree.SubElement(item, key).text = str(value)
        box = ElementTree.SubElement(item, "bndbox")
        for side, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
            ElementTree.SubElement(box, side).text = str(value)
    ElementTree.ElementTree(root).write(file)


def examples_of(devkit: Path, split: str = "train") -> Examples:
    return Examples(build("dataset", {"name": "voc", "root": str(devkit), "split": split}))
