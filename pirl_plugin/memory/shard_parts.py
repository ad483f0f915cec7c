"""Rows of a split memory bank in files, written by torch.distributed.checkpoint and readable by any number of ranks.

A rank writes its rows in pieces that are named after their first row, and reads the pieces that touch its own, one
after another: it never holds more than its rows and one piece.
"""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from pirl_plugin.distributed import is_distributed

_PIECE = 1 << 18  # rows: 67 MB in bfloat16 at D = 128
_NAME = re.compile(r"rows_(\d{12})")
_METADATA = ".metadata"


def save(shard: Tensor, first: int, folder: Path) -> None:
    """Writes this rank's rows, those from ``first`` on; collective."""
    pieces = {f"rows_{first + start:012d}": shard[start : start + _PIECE] for start in range(0, len(shard), _PIECE)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process, as meant
        dcp.save(pieces, storage_writer=dcp.FileSystemWriter(folder), no_dist=not is_distributed())


def load(shard: Tensor, first: int, num_images: int, folder: Path) -> None:
    """Fills this rank's rows, those from ``first`` on; each rank reads on its own.

    Raises:
        ValueError: what is wrong with the files; the rows may have changed then.
    """
    pieces = _pieces(folder, shard.shape[1])
    last, filled = first + len(shard), first
    total = max((start + count for start, count in pieces.items()), default=0)
    if total != num_images:
        raise ValueError(f"{str(folder)!r} holds a memory bank of {total} rows, this one has {num_images}.")
    for start, count in sorted(pieces.items()):
        begin, end = max(start, first), min(start + count, last)
        if begin >= end:
            continue
        if begin != filled:
            raise ValueError(
                f"{str(folder)!r} lacks the memory bank's rows {filled} to {begin - 1}, or has some twice."
            )
        piece = torch.empty((count, shard.shape[1]), dtype=shard.dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load({f"rows_{start:012d}": piece}, storage_reader=_Reader(folder), no_dist=True)
        shard[begin - first : end - first] = piece[begin - start : end - start]
        filled = end
    if filled != last:
        raise ValueError(f"{str(folder)!r} lacks the memory bank's rows {filled} to {last - 1}.")


def _pieces(folder: Path, dim: int) -> dict[int, int]:
    """First row and number of rows of every piece."""
    try:
        described = _Reader(folder).read_metadata().state_dict_metadata
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
        raise ValueError(f"cannot read the memory bank's rows in {str(folder)!r}: {error}.") from error
    pieces = {}
    for name, about in described.items():
        match = _NAME.fullmatch(name)
        if match is None or not isinstance(about, TensorStorageMetadata) or about.size[1:] != (dim,):
            raise ValueError(f"{str(folder)!r} holds {name!r}, which is no part of a memory bank of {dim} dimensions.")
        pieces[int(match[1])] = about.size[0]
    return pieces


class _Reader(dcp.FileSystemReader):
    """Reads the index of the files without running code that it may hold; the tensors are read so by torch itself."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / _METADATA, "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"its index is a {type(metadata).__name__}")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Builds only what an index of tensors is made of."""

    ALLOWED = {
        "torch": {"Size", "float32", "bfloat16"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
        "pathlib": {"PosixPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "WindowsPath"},  # their home in Python 3.13
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"its index refers to {module}.{name}")
        return super().find_class(module, name)
