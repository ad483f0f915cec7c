"""YAML that a run has left in its folder, read without trusting who put it there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

_LARGEST = 1 << 20  # bytes; a configuration has a few thousand


def read_plain_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A mapping of plain values.

    A few lines whose anchors stand for one another can mean more values than there is memory: no configuration of ours
    has any.

    Raises:
        OSError: the file cannot be read.
        ValueError: no YAML, no mapping, too large, or with anchors.
    """
    file = Path(path)
    if file.stat().st_size > _LARGEST:
        raise ValueError(f"{str(file)!r} is too large for a configuration ({file.stat().st_size} bytes).")
    try:
        text = file.read_text(encoding="utf-8")
        if "&" in text and any(getattr(event, "anchor", None) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("it has anchors, which no configuration needs")
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {str(file)!r}: {' '.join(str(error).split())[:200]}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} holds a {type(content).__name__}, not a mapping.")
    return {str(key): value for key, value in content.items()}
