"""Names of very many files in little memory, which worker processes share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np


class PackedNames(Sequence[str]):
    """An immutable sequence of file names in two blocks of memory instead of one Python object a name.

    A worker process that is forked shares them: reading a list of a million strings would copy all of its pages, since
    every access changes an object's reference count. A worker that is spawned gets them pickled in milliseconds.

    Args:
        names: without NUL characters, which no file name has.
    """

    def __init__(self, names: Iterable[str]) -> None:
        names = list(names)
        self.packed = "\0".join([*names, ""]).encode("utf-8", "surrogateescape")
        self._ends = np.flatnonzero(np.frombuffer(self.packed, dtype=np.uint8) == 0)
        if len(self._ends) != len(names):
            raise ValueError("a file name holds a NUL character.")

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """One name, or a list of those of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # raises IndexError, counts negative ones from the end
        start = int(self._ends[place - 1]) + 1 if place else 0
        return self.packed[start : int(self._ends[place])].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return iter(self.packed.decode("utf-8", "surrogateescape").split("\0")[:-1])
