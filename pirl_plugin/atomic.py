"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file to write into, which takes the place of ``path`` when the block ends without an error.

    Whatever happens, ``path`` holds either all of the new content or all of the old: the content goes to a temporary
    file in the same folder, is flushed to the disk and only then renamed. After an error the temporary file is removed.
    """
    target = Path(path)
    # on a shared file system two machines may write the same file in processes of the same number
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def write_text(text: str, path: str | os.PathLike[str]) -> None:
    """Writes UTF-8 text whole or not at all; names of files that are no UTF-8 keep their bytes."""
    with replacing(path) as file:
        file.write(text.encode(errors="surrogateescape"))


def _sync_folder(folder: Path) -> None:
    """Makes the new name itself last a power cut; not every file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):
        os.fsync(handle)
    os.close(handle)
