"""The checkpoints of a run folder: what they are called, and which of them may be gone on from."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pirl_plugin.weights.files import read_weights, sha256_of_file
from pirl_plugin.weights.sealed import verify_seal

log = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d+)\.pt")
_LEFT_OVERS = re.compile(r"\.step_.*\.tmp|step_\d+\.parts")
SET_ASIDE = ".damaged"
"""Added to the name of a checkpoint that cannot be gone on from."""

PARTS_FOLDER = "parts_folder"
"""Key of the folder of a checkpoint's parts in what ``read_checkpoint`` gives."""


class UnusableCheckpointError(ValueError):
    """A file that no run can go on from: damaged, of another step, or without the memory bank."""


def checkpoint_folder(run_dir: Path) -> Path:
    """Where a run's checkpoints lie."""
    return Path(run_dir) / "checkpoints"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """The file of a step."""
    return checkpoint_folder(run_dir) / f"step_{step:09d}.pt"


def parts_path(checkpoint: Path) -> Path:
    """The folder beside a checkpoint where the ranks' own parts of it lie, if it has such."""
    return checkpoint.with_suffix(".parts")


def checkpoints(run_dir: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    folder = checkpoint_folder(run_dir)
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Optimiser step that a checkpoint was written after."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"A checkpoint is named step_N.pt, got {path.name}.")
    return int(match.group(1))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A whole checkpoint of a run, every byte of it verified; ``PARTS_FOLDER`` names the folder of its parts, if any.

    Raises:
        UnusableCheckpointError: what is wrong with it, in one line.
    """
    try:
        verify_seal(path)
        content = read_weights(path, verify=False)
        step = _saved_step(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnusableCheckpointError(f"{_reason(error)}") from error
    if step != step_of(path):
        raise UnusableCheckpointError(f"it is the checkpoint of step {step} under the name of another")
    if not content.get("complete", True):
        raise UnusableCheckpointError("it was written without the memory bank (checkpoint.bank_every)")
    if content.get("parts"):
        _verify_parts(content["parts"], parts_path(path))
        content[PARTS_FOLDER] = str(parts_path(path))
    return content


def newest_usable(
    run_dir: Path, is_foreign: Callable[[Mapping[str, Any]], bool] = lambda content: False
) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that the run can go on from; None where there is none at all.

    Newer ones that are damaged or foreign are named in the log and get ``SET_ASIDE`` added to their names.

    Args:
        run_dir: folder of the run.
        is_foreign: whether a checkpoint's content is of another run than this folder's.

    Raises:
        UnusableCheckpointError: there are some, and none of them can be used.
    """
    refused: list[tuple[Path, str]] = []
    for path in reversed(checkpoints(run_dir)):
        try:
            content = read_checkpoint(path)
            if is_foreign(content):
                raise UnusableCheckpointError("it is of another run than this folder")
        except UnusableCheckpointError as error:
            if path.exists():  # else another process has just set it aside
                log.warning("%s cannot be used: %s.", path, error)
                refused.append((path, str(error)))
            continue
        for other, _ in refused:
            _set_aside(other)
        return path, content
    if refused:
        listed = "; ".join(f"{path.name}: {reason}" for path, reason in refused)
        raise UnusableCheckpointError(
            f"no checkpoint in {checkpoint_folder(run_dir)} can be used ({listed}). "
            "Put a good one back, or remove them to begin anew."
        )
    return None


def describe_parts(folder: Path) -> dict[str, Any]:
    """Sizes and checksums of the files in a folder of parts, by relative name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of_file(path)}
        for path in files
    }


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint: first the file, without which its parts mean nothing."""
    path.unlink(missing_ok=True)
    shutil.rmtree(parts_path(path), ignore_errors=True)


def remove_left_overs(run_dir: Path) -> None:
    """Removes what a process that was killed while it wrote has left."""
    folder = checkpoint_folder(run_dir)
    for path in list(folder.iterdir()) if folder.is_dir() else []:
        if not _LEFT_OVERS.fullmatch(path.name) or path.with_suffix(".pt").exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _verify_parts(parts: Mapping[str, Any], folder: Path) -> None:
    for name, expected in parts.items():
        path = folder / name
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise UnusableCheckpointError(f"its part {name!r} would lie outside {folder.name}")
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            raise UnusableCheckpointError(f"its part {folder.name}/{name} is missing or cut off")
        if sha256_of_file(path) != expected["sha256"]:
            raise UnusableCheckpointError(f"its part {folder.name}/{name} is damaged")


def _saved_step(content: Mapping[str, Any]) -> int:
    state = content["classy_state_dict"]
    if not isinstance(content["input_args"]["config"], Mapping):
        raise ValueError("it holds no configuration")
    return int(state["num_updates"]) // int(state["global_batch_size"])


def _set_aside(path: Path) -> None:
    try:
        os.replace(path, path.with_name(path.name + SET_ASIDE))
    except FileNotFoundError:
        pass  # another process was quicker
    except OSError as error:
        log.warning("%s stays where it is: %s", path, error)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it is no checkpoint of a run: it has no {error}"
    text = str(error) if not isinstance(error, OSError) else f"{error.strerror or error}"
    return text.rstrip(".")
