"""Pretraining as it ships, stopped between two steps, so that single steps can be measured."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
from classy_vision.dataset import register_dataset
from PIL import Image

from pirl_plugin import config as configs
from pirl_plugin.data.datasets import ImageDataset
from pirl_plugin.hooks.progress import ProgressHook
from pirl_plugin.registry import build
from pirl_plugin.schema import PositiveInt, checked
from pirl_plugin.speed.measuring import Settings
from pirl_plugin.tasks import SSLPretrainingTask

FULL = ("method=pirl", "trunk=resnet50", "batch_size=32")
QUICK = (
    "method=pirl", "trunk=resnet18", "batch_size=4", "transform.image_size=96", "transform.jigsaw_size=99",
    "transform.patch_size=32", "loss.num_negatives=1000",
)  # fmt: skip


def sizes(settings: Settings) -> str:
    """What ``FULL`` or ``QUICK`` amount to, in words."""
    return "R18, B 4, 96 + 9x32, K 1,000" if settings.quick else "R50, B 32, 224 + 9x64, K 32,000"


@register_dataset("one_image_repeated")
@checked
class OneImageRepeated(ImageDataset):
    """As many images as one likes at no cost: noise of 500 x 375 pixels, without labels. Known to ``bench.py`` alone.

    Args:
        num_images: how often.
    """

    def __init__(self, num_images: PositiveInt) -> None:
        super().__init__()
        self.num_images = num_images
        self.image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, 3), dtype=np.uint8))

    def __len__(self) -> int:
        return self.num_images

    def read(self, image_id: int) -> Image.Image:
        """The image."""
        return self.image

    def file_name(self, image_id: int) -> str:
        """Its number."""
        return str(image_id)

    @property
    def fingerprint(self) -> str:
        """Of how many there are."""
        return hashlib.sha256(str(self.num_images).encode()).hexdigest()


@contextlib.contextmanager
def running(settings: Settings, images: int, overrides: Sequence[str] = ()) -> Iterator[SSLPretrainingTask]:
    """A run of ``method=pirl`` with all of its hooks but the progress, begun, whose batches are all the first one.

    Args:
        settings: device, and whether the sizes are small.
        images: in the dataset, and rows of the bank.
        overrides: further ones, as for ``tools/train.py``.
    """
    loggers = [logging.getLogger("pirl_plugin"), logging.getLogger()]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)  # lines of a run would stand between those of the table
    with tempfile.TemporaryDirectory() as folder:
        chosen = [
            *(QUICK if settings.quick else FULL), "dataset=generated_scenes", f"device={settings.device.type}",
            "num_workers=0", f"run_dir={folder}", "checkpoint=null", *overrides,
        ]  # fmt: skip
        config = configs.load("train", chosen)
        config["dataset"] = {"name": "one_image_repeated", "num_images": images}
        task: SSLPretrainingTask = build("task", config)
        task.hooks = [hook for hook in task.hooks if not isinstance(hook, ProgressHook)]
        task.prepare()
        task.on_start()
        task.on_phase_start()
        task.data_iterator = itertools.repeat(next(task.data_iterator))
        try:
            yield task
        finally:
            for hook in task.hooks:
                if hasattr(hook, "close"):
                    hook.close()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
