"""A folder of good images with broken ones among them: an epoch completes, all are counted, ids are stable.

    python tests/soak/images.py --good 5000 --broken 1000

Trains epochs on the good images alone and with the broken ones among them, in turns, and compares the throughput; then
looks at which images were reported, and at which ids came back.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image

from soak.processes import SMALL, metrics


def jpeg(generator: np.random.Generator, size: int = 48) -> bytes:
    """A good image."""
    buffer = io.BytesIO()
    coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def png(generator: np.random.Generator) -> bytes:
    """Another good one."""
    buffer = io.BytesIO()
    Image.fromarray(generator.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def bomb(generator: np.random.Generator) -> bytes:
    """A few bytes that promise 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def other_size(content: bytes) -> bytes:
    """A JPEG whose header speaks of another number of lines than there are."""
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", 60000, 60000) + content[place + 4 :]


BROKEN: dict[str, Callable[[np.random.Generator], bytes | None]] = {
    "empty": lambda g: b"",
    "one byte": lambda g: b"\xff",
    "text": lambda g: b"this is no image\n" * 20,
    "web page": lambda g: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "zeros": lambda g: bytes(2000),
    "noise": lambda g: g.bytes(2000),
    "JPEG cut off": lambda g: jpeg(g)[: -int(g.integers(200, 400))],
    "JPEG header alone": lambda g: jpeg(g)[:30],
    "JPEG of a wrong size": lambda g: other_size(jpeg(g)),
    "PNG cut off": lambda g: png(g)[:700],
    "PNG with a wrong checksum": lambda g: png(g).replace(b"IDAT", b"IDAX"),
    "PNG with damaged pixels": lambda g: png(g)[:200] + bytes(400) + png(g)[600:],
    "decompression bomb": bomb,
    "BMP cut off": lambda g: (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 5000, 0, 0, 54, 40, 40, 40, 1, 24, 0, 0, 0, 0, 0, 0)
    ),
    "GIF header alone": lambda g: b"GIF89a\x10\x00\x10\x00\x80\x00\x00",
    "WebP header alone": lambda g: b"RIFF\x24\x00\x00\x00WEBPVP8 ",
    "TIFF header alone": lambda g: b"II*\x00\x08\x00\x00\x00\xff\xff",
    "dangling link": lambda g: None,
}
"""Kinds of broken files, by what is in them; None: a link to nothing."""

REPEATS = 3
"""Epochs on each of the two folders; their median counts."""

NAMES = ["{}.jpg", "with space {}.jpg", "new\nline {}.jpg", "ümläut 图 {}.png", "UPPER {}.JPG"]


def write_good(root: Path, count: int) -> None:
    """Good images in three folders."""
    generator = np.random.default_rng(0)
    for index in range(count):
        folder = root / f"good {index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:05d}.jpg").write_bytes(jpeg(generator))


def write_broken(root: Path, count: int) -> list[str]:
    """Broken ones of all kinds, anywhere among the good; their relative names, and a loop of links beside them."""
    generator, names = np.random.default_rng(1), []
    kinds = list(BROKEN)
    for index in range(count):
        content = BROKEN[kinds[index % len(kinds)]](generator)
        folder = root / random.Random(index).choice(["good 0", "good 1", "brokén"])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / NAMES[index % len(NAMES)].format(f"{index:05d}x")
        if content is None:
            # a link that does not lead to a file is no image to begin with; one to a file that vanishes is
            path.write_bytes(b"")
        else:
            path.write_bytes(content)
        names.append(path.relative_to(root).as_posix())
    (root / "loop").symlink_to(root, target_is_directory=True)
    return sorted(names)


def epoch(root: Path, run_dir: Path, workers: int, batch_size: int) -> float:
    """Trains one epoch on a folder; seconds."""
    from pirl_plugin.commands.train import main as train

    rest = [a for a in SMALL if not a.startswith("dataset.")]
    hooks = "hooks=[{name:memory_bank_update},{name:metrics_jsonl},{name:unreadable_images,tolerated:0.5}]"
    arguments = ["dataset=image_folder", f"dataset.root='{root}'", f"num_workers={workers}", hooks]
    start = time.perf_counter()
    code = train([*rest, *arguments, f"batch_size={batch_size}", "num_epochs=1", f"run_dir='{run_dir}'", "log_every=5"])
    if code:
        raise RuntimeError(f"the training failed with code {code}.")
    return time.perf_counter() - start


def survey(folder: Path, good: int, broken: int, workers: int, batch_size: int) -> tuple[dict[str, float], list[str]]:
    """Figures and faults."""
    from pirl_plugin.data.datasets import ImageFolder
    from pirl_plugin.text import printable

    write_good(folder / "clean", good)
    write_good(folder / "mixed", good)
    names = write_broken(folder / "mixed", broken)
    epoch(folder / "clean", folder / "run_first", workers, batch_size)  # imports and kernels
    seconds: dict[str, list[float]] = {"clean": [], "mixed": []}
    for turn in range(REPEATS):
        for kind, taken in seconds.items():
            taken.append(epoch(folder / kind, folder / f"run_{kind}_{turn}", workers, batch_size))
    clean, mixed = map(statistics.median, seconds.values())
    run_dir, wrong = folder / "run_mixed_0", []
    dataset = ImageFolder(str(folder / "mixed"))
    if len(dataset) != good + broken:
        wrong.append(f"{len(dataset)} images found, not {good + broken}")
    lines = (run_dir / "unreadable_images.txt").read_text(encoding="utf-8").splitlines()
    reported = dict(line.split("\t", 1) for line in lines)
    steps = (good + broken) // batch_size
    # images that were asked for: all but those of the last, incomplete batch
    expected = {str(i): printable(name) for i, name in enumerate(dataset.names) if name in set(names)}
    if not reported.items() <= expected.items():
        wrong.append("an image was reported that is not broken, or under another id")
    if len(reported) < len(expected) - batch_size:
        wrong.append(f"{len(reported)} of {len(expected)} broken images reported")
    if metrics(run_dir)[-1]["step"] != steps:
        wrong.append("the epoch is not complete")
    for image_id in random.Random(0).sample(range(len(dataset)), min(300, len(dataset))):
        found = dataset[image_id][1]
        is_broken = dataset.names[image_id] in set(names)
        if (found == image_id) == is_broken:
            wrong.append(f"id {image_id} gave {found}")
    figures = {"broken": len(expected), "reported": len(reported), "kinds": min(len(BROKEN), broken)}
    rates = {"images/s, clean": good / clean, "images/s, mixed": (good + broken) / mixed}
    return {**figures, **rates}, wrong


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 0 where all were counted and the throughput is within 10 % of the clean folder's."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--good", type=int, default=5000)
    parser.add_argument("--broken", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=50, help="what divides both counts leaves no image out")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="pirl_images_") as scratch:
        figures, wrong = survey(Path(scratch), options.good, options.broken, options.workers, options.batch_size)
    print(json.dumps(figures, indent=1))
    if figures["images/s, mixed"] < 0.9 * figures["images/s, clean"]:
        wrong.append("more than 10 % slower than the clean folder")
    print("; ".join(wrong) or "the epoch completed, all broken images were reported, no id moved")
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
