"""Checkpoint files that carry their own checksum, so that any changed or missing byte is found before they are used.

``torch.save`` writes a zip archive; the SHA-256 of it stands in the archive's comment, where every reader of zip files
expects something of the kind. A sealed file is therefore an ordinary checkpoint for ``torch.load``.
"""

from __future__ import annotations

import hashlib
import os
import struct
from pathlib import Path
from typing import IO, Any

import torch

from pirl_plugin.atomic import replacing

_MARK = b"pirl_plugin sha256="
_COMMENT = len(_MARK) + 64
_TAIL = 2 + _COMMENT  # the length of the comment ends a zip archive that has none, as two zero bytes


class _Hashed:
    """A file that is written from front to back, and the digest of what went into it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        self.digest.update(content)
        return self.file.write(content)

    def flush(self) -> None:
        self.file.flush()


def write_sealed(content: Any, path: str | os.PathLike[str]) -> str:
    """``torch.save`` with a checksum, whole or not at all; missing folders are made.

    Returns:
        The SHA-256, hexadecimal.

    Raises:
        OSError: it cannot be written; what was at ``path`` is as it was.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        hashed = _Hashed(file)
        try:
            torch.save(content, hashed)  # type: ignore[arg-type]  # it writes and flushes
        except RuntimeError as error:  # torch's zip writer hides what the file said
            cause = error.__context__
            raise (cause if isinstance(cause, OSError) else OSError(f"it cannot be written: {error}")) from error
        checksum = hashed.digest.hexdigest()
        file.seek(-2, os.SEEK_END)
        file.write(struct.pack("<H", _COMMENT) + _MARK + checksum.encode())
    return checksum


def verify_seal(path: str | os.PathLike[str]) -> str:
    """The checksum of a sealed file, after it was held against the content.

    Raises:
        OSError: the file cannot be read.
        ValueError: no checksum at its end, or another than that of the content.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        digest, left = hashlib.sha256(), size - _TAIL
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        tail = file.read()
    digest.update(b"\0\0")
    if size <= _TAIL or tail[: 2 + len(_MARK)] != struct.pack("<H", _COMMENT) + _MARK:
        raise ValueError("it ends without a checksum: cut off, or no checkpoint of a run")
    if tail[2 + len(_MARK) :] != digest.hexdigest().encode():
        raise ValueError("its checksum does not match its content: it is damaged")
    return digest.hexdigest()


def is_sealed(path: str | os.PathLike[str]) -> bool:
    """Whether the file ends with a checksum of ours, right or wrong."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(0, size - _COMMENT))
        return file.read(len(_MARK)) == _MARK
