"""One run at a time in a run folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger(__name__)

NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class FolderInUseError(ValueError):
    """Another process makes a run in this folder."""


@contextlib.contextmanager
def locked(run_dir: Path, name: str = NAME) -> Iterator[None]:
    """Keeps other processes out of a run folder while the block runs; the folder is made if need be.

    Those that ask for the same ``name``: it is that of the file which says who holds the lock.

    The operating system holds the lock for this very process: it ends with it, in whatever way it ends, also on another
    machine of a network file system that knows POSIX locks.

    Raises:
        FolderInUseError: another process holds it; says which one, on which machine.
        OSError: the folder cannot be written.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(os.open(run_dir / name, os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="utf-8") as file:
        before = _holder(file.read())
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise FolderInUseError(
                    f"{run_dir} is in use by {before or 'another process'}: wait for it or end it, or set run_dir to "
                    "another folder."
                ) from error
            log.warning("%s: this file system has no locks; see to it that no other run uses the folder.", run_dir)
        else:
            if before:
                log.info("The run of %s has ended without finishing; its folder is taken over.", before)
        content = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.strftime("%Y-%m-%d %H:%M:%S")}
        _overwrite(file.fileno(), json.dumps(content) + "\n")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a full disk is no reason to hide what went wrong
                _overwrite(file.fileno(), "")


def is_in_use(run_dir: Path, name: str = NAME) -> bool:
    """Whether another process holds the lock of a run folder; never ask for one that this process holds itself.

    Where nobody says that he holds it, it is not tried: that could keep a run out that starts just now.
    """
    try:
        with open(run_dir / name, encoding="utf-8") as file:
            if not file.read():
                return False
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    return False


def _overwrite(handle: int, text: str) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, text.encode(), 0)


def _holder(text: str) -> str:
    """Who holds a lock, or held it and died, as its file says; empty where nobody did."""
    try:
        content = json.loads(text)
        return f"process {content['pid']} on {content['host']} (since {content['time']})"
    except (ValueError, KeyError, TypeError):
        return ""
