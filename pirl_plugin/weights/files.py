"""Checkpoint files: read without running their code, written whole or not at all; and the trunk found inside."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pirl_plugin.atomic import replacing

State = dict[str, Tensor]


def read_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Content of a checkpoint on the CPU, read without running any code that the file may hold.

    Args:
        path: ``.safetensors``, or anything that ``torch.save`` wrote from plain containers and tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or a pickle that wants more than plain data; one line that says which.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {str(path)!r}: give the path of a checkpoint.")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch appends advice to switch the check off: the one thing not to do with a file of unknown origin
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it refers to {culprit[1]}" if culprit else "or it is damaged"
        raise ValueError(
            f"refused to read {str(path)!r}: it holds more than plain data and tensors ({reason})."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot read {str(path)!r} as weights: {' '.join(str(error).split())[:160]}.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, not a dictionary of weights.")
    return dict(content)


def write_atomically(content: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` to a temporary file beside ``path``, flushed, then renamed; missing folders are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(content, file)


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class FoundTrunk:
    """A trunk's weights under torchvision's names, the name of the format, and the entries that were left out."""

    state: State
    format: str
    dropped: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class TrunkFormat:
    """One kind of checkpoint: how to know it and how to get the trunk out of it."""

    name: str
    detect: Callable[[Mapping[str, Any]], bool]
    extract: Callable[[Mapping[str, Any]], tuple[State, list[str]]]


def find_trunk(checkpoint: Mapping[str, Any]) -> FoundTrunk:
    """The trunk inside a checkpoint of any format in ``FORMATS``.

    Raises:
        ValueError: none of them; says what was found instead.
    """
    for known in FORMATS:
        if known.detect(checkpoint):
            state, dropped = known.extract(checkpoint)
            return FoundTrunk(state, known.name, dropped)
    found = ", ".join(str(key) for key in list(checkpoint)[:5]) or "nothing"
    raise ValueError(
        f"no trunk found in the checkpoint: its keys are {found}. Formats: {', '.join(f.name for f in FORMATS)}."
    )


def trunk_state(checkpoint: Mapping[str, Any]) -> State:
    """The state dict of the trunk inside a checkpoint; ``find_trunk`` also says what was left out."""
    return find_trunk(checkpoint).state


def training_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration of the run that wrote the checkpoint; empty where it holds none."""
    config = _at(checkpoint, "input_args", "config")
    return dict(config) if isinstance(config, Mapping) else {}


def trunk_config(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The trunk's configuration in the checkpoint, or None where it holds none."""
    return training_config(checkpoint).get("trunk")


@dataclass(frozen=True)
class LoadReport:
    """Names of a trunk's entries that were loaded, that the state lacked, and that only the state had."""

    matched: list[str]
    missing: list[str]
    unexpected: list[str]


def load_trunk(trunk: nn.Module, state: Mapping[str, Tensor], allow_unexpected: bool = False) -> LoadReport:
    """Loads all of a trunk, or nothing.

    Args:
        trunk: what to load into.
        state: its state dict; ``num_batches_tracked`` may lack, as in files of before torch 0.4.1.
        allow_unexpected: ignore entries that the trunk does not have. By default they are an error: every entry of a
            ResNet-18 is in the state of a ResNet-34, but it would not be that network.

    Raises:
        ValueError: nothing fits, something lacks or is left over, or a shape differs; names the first few.
    """
    own = trunk.state_dict()
    matched = [key for key in own if key in state]
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    needed = [key for key in missing if not key.endswith("num_batches_tracked")]
    if not matched:
        raise ValueError(f"none of the trunk's {len(own)} entries is in the weights, which have {_some(list(state))}.")
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in matched
        if state[key].shape != own[key].shape
    ]
    problems = [f"missing: {_some(needed)}"] if needed else []
    problems += [f"not in the trunk: {_some(unexpected)}"] if unexpected and not allow_unexpected else []
    problems += [f"other shapes: {_some(shapes)}"] if shapes else []
    if problems:
        raise ValueError(
            f"the weights do not fit the trunk: {'; '.join(problems)}. Is it another depth, width or stem?"
        )
    trunk.load_state_dict({key: state[key] for key in matched}, strict=False)
    return LoadReport(matched, missing, unexpected)


def _some(names: list[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more if names else "nothing"


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


_OURS = ("classy_state_dict", "base_model", "model", "trunk")


def _without_classifier(checkpoint: Mapping[str, Any]) -> tuple[State, list[str]]:
    dropped = [key for key in checkpoint if key.startswith("fc.")]
    return {key: value for key, value in checkpoint.items() if key not in dropped}, dropped


FORMATS: list[TrunkFormat] = [
    TrunkFormat(
        "pirl_plugin checkpoint",
        lambda checkpoint: isinstance(_at(checkpoint, *_OURS), Mapping),
        lambda checkpoint: (dict(_at(checkpoint, *_OURS)), []),
    ),
    TrunkFormat(
        "torchvision state dict",
        lambda checkpoint: isinstance(checkpoint.get("conv1.weight"), Tensor) and "layer1.0.conv1.weight" in checkpoint,
        _without_classifier,
    ),
]
