"""``python tools/show_views.py``: what the network sees, as a picture."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from pirl_plugin import config as configs
from pirl_plugin.atomic import write_text
from pirl_plugin.commands.parser import Parser
from pirl_plugin.commands.running import exit_code, log_to
from pirl_plugin.functional.pending_colours import coloured
from pirl_plugin.registry import build
from pirl_plugin.report.views_figure import PICTURE, WORDS, draw_views, in_words

log = logging.getLogger(__name__)

_REPORT_DPI = 90


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit code is 0, or 2 for a mistake in the command."""
    parser = Parser(
        "show_views.py",
        "Draw the views of some images: one row an image, the original, then each view.",
        "example: python tools/show_views.py method=pirl dataset=image_folder dataset.root=DIR --out views.png",
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
    samples, originals, count = _views(config, rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_views(samples, originals, out, title=f"{config['method']}: {len(samples)} of {count} images")
    log.info("Picture of %d images: %s", len(samples), out)


def leave_views(run_dir: Path, rows: int = 2) -> None:
    """Draws what a pretraining sees into its folder, for the report; nothing where there is such a picture already.

    Raises:
        OSError: no configuration there, or no images where it says.
        ValueError: a configuration that cannot be built.
    """
    if (run_dir / WORDS).is_file():
        return
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    if not config["num_epochs"]:
        return  # it sees nothing
    samples, originals, count = _views(config, rows)
    draw_views(samples, originals, run_dir / PICTURE, dpi=_REPORT_DPI)
    content = {"method": config["method"], "views": in_words(samples[0], originals[0]), "of": count}
    write_text(json.dumps(content, ensure_ascii=False) + "\n", run_dir / WORDS)


def _views(config: Mapping[str, Any], rows: int) -> tuple[list[dict[str, Any]], list[Image.Image], int]:
    """The views of ``rows`` images, these images, and how many the dataset has."""
    dataset, transform = build("dataset", config["dataset"]), build("transform", config["transform"])
    chosen = np.linspace(0, len(dataset) - 1, min(rows, len(dataset))).astype(int).tolist()
    originals = [dataset[image_id][0] for image_id in chosen]
    samples = [  # seeded as in training, epoch 0
        coloured(transform(image, np.random.default_rng([config["seed"], 0, image_id])))
        for image, image_id in zip(originals, chosen, strict=True)
    ]
    return samples, originals, len(dataset)
