"""What every command shares: logging, exit codes, one clear line on a user's mistake."""

from __future__ import annotations

import logging
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from pirl_plugin.distributed import is_launched_primary
from pirl_plugin.schema import ConfigError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
PREEMPTED = 75
"""A run that was told to stop (SIGTERM, SIGUSR1) and has written its checkpoint: the same command goes on."""

UNEXPECTED = "not foreseen: --debug shows where, and so does log.txt of the run"
"""In the message of an error that we have no words of our own for."""

# what a mistake of ours looks like; any other exception is a plugin's or a test's own
_UNEXPECTED = (RuntimeError, TypeError, LookupError, AttributeError, AssertionError)


class Preempted(Exception):
    """The run was told to stop, and its state is saved; says where."""

    orderly = True


def exit_code(action: Callable[[], object], debug: bool = False) -> int:
    """Runs a command's work and turns what it raises into a message and an exit code.

    Returns:
        0; 2 for a configuration that cannot be built; 1 for what went wrong later; 130 for Ctrl-C; 75 for a run that
        was told to stop.
    """
    try:
        action()
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        _say_once(f"interrupted{error}")
        return INTERRUPTED
    except Preempted as error:
        _say_once(f"stopped by {error}")
        return PREEMPTED
    except ConfigError as error:
        if debug:
            raise
        count = len(error.problems)
        print(f"error: {count} problem{'s' if count > 1 else ''} in the configuration", file=sys.stderr)
        for problem in error.problems:
            print(f"  {problem}", file=sys.stderr)
        return USAGE
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return OK
        if debug:
            raise
        logging.getLogger("pirl_plugin").debug("Traceback:", exc_info=True)
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except (MemoryError, *_UNEXPECTED) as error:
        if debug:
            raise
        if _is_out_of_memory(error):
            reason = str(error).partition("\n")[0]
            print(f"error: out of memory: lower batch_size. {reason}".strip(), file=sys.stderr)
            return FAILED
        logging.getLogger("pirl_plugin").debug("Traceback:", exc_info=True)
        reason = " ".join(str(error).split())[:300]
        print(f"error: {type(error).__name__}: {reason} ({UNEXPECTED})", file=sys.stderr)
        return FAILED
    return OK


def _is_out_of_memory(error: BaseException) -> bool:
    # torch's allocator for the CPU has no exception of its own
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _nobody_reads() -> bool:
    """Whether standard output has been closed, by ``| head``; what is left for it then goes nowhere."""
    try:
        descriptor = sys.stdout.fileno()
    except OSError:  # no file at all
        return False
    looking = select.poll()
    looking.register(descriptor, 0)
    if not any(event & select.POLLERR for _, event in looking.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return True


def _say_once(text: str) -> None:
    """For what all processes of a run end with alike."""
    if is_launched_primary():
        print(text, file=sys.stderr)


def log_to(folder: Path | None) -> None:
    """Our own messages to the terminal, everything to ``folder/log.txt``; nothing but warnings without a folder."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.setLevel(logging.WARNING if folder is None else logging.INFO)
    terminal = logging.StreamHandler()
    terminal.setLevel(logging.INFO)  # a mistake's traceback goes to the file alone
    terminal.setFormatter(logging.Formatter("%(message)s"))
    terminal.addFilter(lambda record: record.name.startswith("pirl_plugin") or record.levelno >= logging.WARNING)
    root.addHandler(terminal)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / "log.txt", encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger("pirl_plugin").setLevel(logging.DEBUG)
        root.addHandler(file)
    logging.captureWarnings(True)
