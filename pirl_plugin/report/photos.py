"""The report's pictures of pixels: nearest neighbours, and what each method sees."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pirl_plugin.report.neighbours_figure import FILE, PICTURE, in_words, read_neighbours
from pirl_plugin.report.sources import Source
from pirl_plugin.report.views_figure import PICTURE as VIEWS
from pirl_plugin.report.views_figure import WORDS


@dataclass(frozen=True)
class Photo:
    """A picture of pixels in the report.

    Attributes:
        name: of its file.
        caption: below it.
        alt: what it shows, for those who do not see it.
        address: the picture itself, as a ``data:`` address.
        width: pixels.
        height: pixels.
    """

    name: str
    caption: str
    alt: str
    address: str
    width: int
    height: int


def photo(file: Path, name: str, caption: str, alt: str, folder: Path) -> Photo:
    """A picture for the page, as JPEG, a fifth of the size; the file itself goes to ``folder/NAME.png``."""
    content, small = file.read_bytes(), io.BytesIO()
    with Image.open(io.BytesIO(content)) as picture:
        width, height = picture.size
        picture.convert("RGB").save(small, "JPEG", quality=85, optimize=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.png").write_bytes(content)
    address = f"data:image/jpeg;base64,{base64.b64encode(small.getvalue()).decode()}"
    return Photo(name, caption, alt, address, width, height)


def neighbours(sources: Sequence[Source], names: Mapping[Path, str], folder: Path) -> list[Photo]:
    """Queries and their nearest images, of the first run of each method.

    Args:
        sources: benchmark runs.
        names: what the report calls the method of each run, by folder.
        folder: where the report's figures go.
    """
    found: dict[str, Photo] = {}
    for source in sources:
        record = source.records[0]
        key = f"{names.get(source.folder, record.method)} on {record.dataset}"
        if key in found or not all((source.folder / name).is_file() for name in (PICTURE, FILE)):
            continue
        content = read_neighbours(source.folder)
        caption = f"{key}, seed {record.seed}; {content['features']} features, cosines below, solid frame: same class."
        alt = f"Test images and the training images nearest to them. {in_words(content['queries'])}"
        found[key] = photo(source.folder / PICTURE, f"neighbours-{len(found)}", caption, alt, folder)
    return list(found.values())


def views(pretrainings: Iterable[Path], folder: Path) -> list[Photo]:
    """What each method is trained on, a picture for each.

    Args:
        pretrainings: their folders.
        folder: where the report's figures go.
    """
    found: dict[str, Photo] = {}
    for pretraining in pretrainings:
        words, picture = pretraining / WORDS, pretraining / VIEWS
        if not (words.is_file() and picture.is_file()):
            continue
        content = json.loads(words.read_text(encoding="utf-8"))
        method, shown = str(content["method"]), "; ".join(content["views"])
        if method not in found:
            alt = f"Images and the views of them that {method} is trained on: {shown}."
            found[method] = photo(picture, f"views-{len(found)}", f"{method}: {shown}.", alt, folder)
    return list(found.values())
