"""Runs a command's ``main`` inside the test process, and gives back what a user would see of it."""

from __future__ import annotations

import contextlib
import io
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pirl_plugin.run_lock import NAME


@dataclass(frozen=True)
class Outcome:
    """Exit code and what was printed."""

    code: int
    out: str
    err: str


def run(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> Outcome:
    """The outcome of one command; logging is afterwards as it was before."""
    out, err = io.StringIO(), io.StringIO()
    with _logging_restored(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(arguments))
        except SystemExit as end:  # argparse
            code = end.code if isinstance(end.code, int) else 1
    return Outcome(code, out.getvalue(), err.getvalue())


def signalled(tool: Path, arguments: Sequence[str], number: signal.Signals, ready: Callable[[], object]) -> Outcome:
    """The outcome of a tool in a process of its own that gets a signal as soon as ``ready``."""
    process = subprocess.Popen(
        [sys.executable, str(tool), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell ignores the signal in what it runs in the background, and that would be inherited
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        give_up = time.monotonic() + 240
        while not ready() and process.poll() is None and time.monotonic() < give_up:
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=90)
    finally:
        process.kill()
    return Outcome(process.returncode, out, err)


@contextlib.contextmanager
def _logging_restored() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("pirl_plugin")
    before = list(root.handlers), root.level, ours.level
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in before[0]:
                handler.close()
        root.handlers, root.level = before[0], before[1]
        root.setLevel(before[1])
        ours.setLevel(before[2])
        logging.captureWarnings(False)


_HOLDER = """
import fcntl, json, os, sys, time
file = open(sys.argv[1], "r+" if os.path.exists(sys.argv[1]) else "w+")
fcntl.lockf(file, fcntl.LOCK_EX)
file.write(json.dumps({"host": "elsewhere", "pid": 4711, "time": "today"})); file.flush()
print("locked", flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def locked_elsewhere(folder: Path, name: str = NAME) -> Iterator[None]:
    """A run folder in use by a process without our libraries, so that it starts at once; killed at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(folder / name)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        yield
    finally:
        holder.kill()
        holder.wait()
