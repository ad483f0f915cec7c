"""``python tools/show_views.py``: what the network sees, as a picture."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pirl_plugin import config as configs
from pirl_plugin.commands.running import exit_code, log_to
from pirl_plugin.registry import build
from pirl_plugin.report.views_figure import draw_views

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0, or 2 for a mistake in the command."""
    parser = argparse.ArgumentParser(
        prog="show_views.py",
        description="Draw the views of some images: one row an image, the original, then each view.",
        epilog="example: python tools/show_views.py method=pirl dataset=image_folder dataset.root=DIR --out views.png",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train.py")
    parser.add_argument("--out", type=Path, default=Path("views.png"), help="picture to write (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=6, help="number of images (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: show_views(arguments.overrides, arguments.out, arguments.rows), arguments.debug)


def show_views(overrides: Sequence[str], out: Path, rows: int) -> None:
    """Draws the views that training draws in its first epoch, of images spread evenly over the dataset."""
    if rows < 1:
        raise ValueError(f"--rows must be >= 1, got {rows}.")
    config = configs.load("train", overrides)
    log_to(None)
    logging.getLogger("pirl_plugin").setLevel(logging.INFO)
    dataset, transform = build("dataset", config["dataset"]), build("transform", config["transform"])
    chosen = np.linspace(0, len(dataset) - 1, min(rows, len(dataset))).astype(int).tolist()
    originals = [dataset[image_id][0] for image_id in chosen]
    samples = [  # seeded as in training, epoch 0
        transform(image, np.random.default_rng([config["seed"], 0, image_id]))
        for image, image_id in zip(originals, chosen, strict=True)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_views(samples, originals, out, title=f"{config['method']}: {len(chosen)} of {len(dataset)} images")
    log.info("Picture of %d images: %s", len(chosen), out)
