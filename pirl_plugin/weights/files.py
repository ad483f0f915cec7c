"""Checkpoint files: read without running their code, written whole or not at all; and the trunk found inside."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.serialization import safe_globals

from pirl_plugin.atomic import replacing
from pirl_plugin.weights.finding import State, find_trunk
from pirl_plugin.weights.resnet_shape import COUNTER, infer_trunk, resnet_shape
from pirl_plugin.weights.sealed import is_sealed, verify_seal
from pirl_plugin.weights.stand_ins import STAND_INS

log = logging.getLogger(__name__)

METADATA = "__metadata__"
"""Key of a safetensors file's metadata in what ``read_weights`` gives; the format keeps it free of tensors."""

_ADVICE = "Where you trust the file, save the model's state_dict() from the program that wrote it."


def read_weights(path: str | os.PathLike[str], verify: bool = True) -> dict[str, Any]:
    """Content of a checkpoint on the CPU, read without running any code that the file may hold.

    Objects of other libraries that are known to lie beside weights, such as an ``argparse.Namespace``, come as empty
    stand-ins (``stand_ins``). A safetensors file's metadata, if any, is under ``METADATA``.

    Args:
        path: a safetensors file, or anything that ``torch.save`` wrote from plain containers and tensors.
        verify: hold the checksum of a run's checkpoint against its content; false where that has been done.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or a pickle that wants more than plain data; one line that says which.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {str(path)!r}: give the path of a checkpoint.")
    if verify and is_sealed(path):
        try:
            verify_seal(path)
        except ValueError as error:
            raise ValueError(f"cannot read {str(path)!r} as weights: {error}.") from error
    try:
        content = _read_safetensors(path) if _is_safetensors(path) else _read_pickle(path)
    except pickle.UnpicklingError as error:
        # torch appends advice to switch the check off: the one thing not to do with a file of unknown origin
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it refers to {culprit[1][:120]}" if culprit else "or it is damaged"
        raise ValueError(
            f"refused to read {str(path)!r}: it holds more than plain data and tensors ({reason}). {_ADVICE}"
        ) from error
    except MemoryError as error:
        raise ValueError(f"cannot read {str(path)!r}: it wants more memory than there is.") from error
    except Exception as error:  # damage can surface as any error of torch's, zip's or pickle's readers
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"cannot read {str(path)!r} as weights: {reason or type(error).__name__}.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, not a dictionary of weights.")
    return dict(content)


def _is_safetensors(path: Path) -> bool:
    """By its name, or by its first bytes: a length of eight bytes and a JSON object."""
    with open(path, "rb") as file:
        start = file.read(9)
    return path.suffix == ".safetensors" or (start[8:] == b"{" and not start.startswith(b"PK"))


def _read_safetensors(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dictionary)
    return {**tensors, METADATA: metadata} if metadata else tensors


def _read_pickle(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise ValueError(f"it is a TorchScript program. {_ADVICE[:-1]}")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            # torch.save stores entries as they are; unpacking others could fill any memory
            raise ValueError("its entries are compressed or overlap, unlike what torch.save writes")
    with safe_globals(STAND_INS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")
        return torch.load(path, map_location="cpu", weights_only=True)


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


def trunk_state(checkpoint: Mapping[str, Any]) -> State:
    """The state dict of the trunk inside a checkpoint; ``find_trunk`` also says what was left out."""
    return find_trunk(checkpoint).state


def training_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration of the run that wrote the checkpoint; empty where it holds none.

    A safetensors file of ours has ``method``, ``transform`` and ``trunk`` of it.

    Raises:
        ValueError: metadata of ours that somebody spoilt.
    """
    config = _at(checkpoint, "input_args", "config")
    if config is None:
        config = _from_metadata(checkpoint, "pretraining")
    return dict(config) if isinstance(config, Mapping) else {}


def described_trunk(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """The trunk's configuration in the checkpoint, or None where it holds none.

    Raises:
        ValueError: as ``training_config``.
    """
    trunk = training_config(checkpoint).get("trunk") or _from_metadata(checkpoint, "trunk")
    return dict(trunk) if isinstance(trunk, Mapping) else None


def trunk_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The trunk's configuration: as the checkpoint describes it, else from the shapes of its weights, which is logged.

    Raises:
        ValueError: no description and no ResNet, or a ResNet whose weights leave something open; says what to set.
    """
    described = described_trunk(checkpoint)
    if described is not None:
        return described
    found = find_trunk(checkpoint, quiet=True)
    trunk = infer_trunk(found.state)
    log.info("The weights (%s) are of a %s: from their shapes.", found.format, resnet_shape(found.state).name)
    return trunk


def _from_metadata(checkpoint: Mapping[str, Any], key: str) -> Any:
    text = _at(checkpoint, METADATA, key)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the metadata {key!r} of the weights is no JSON: {str(error)[:100]}.") from error


@dataclass(frozen=True)
class LoadReport:
    """Names of a trunk's entries that were loaded, and of the counters that the state lacked."""

    matched: list[str]
    missing: list[str]


def load_trunk(trunk: nn.Module, state: Mapping[str, Tensor]) -> LoadReport:
    """Loads all of a trunk, or nothing.

    An entry that the trunk does not have is an error: every entry of a ResNet-18 is in the state of a ResNet-34, but it
    would not be that network.

    Args:
        trunk: what to load into.
        state: its state dict; ``num_batches_tracked`` may lack, as in files of before torch 0.4.1.

    Raises:
        ValueError: nothing fits, something lacks or is left over, or a shape differs; names the first few.
    """
    own = trunk.state_dict()
    matched = [key for key in own if key in state]
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    needed = [key for key in missing if not key.endswith(COUNTER)]
    if not matched:
        raise ValueError(f"none of the trunk's {len(own)} entries is in the weights, which have {_some(list(state))}.")
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
        for key in matched
        if state[key].shape != own[key].shape
    ]
    problems = [f"missing: {_some(needed)}"] if needed else []
    problems += [f"not in the trunk: {_some(unexpected)}"] if unexpected else []
    problems += [f"other shapes: {_some(shapes)}"] if shapes else []
    if problems:
        raise ValueError(
            f"the weights do not fit the trunk: {'; '.join(problems)}. Is it another depth, width or stem?"
        )
    trunk.load_state_dict({key: state[key] for key in matched}, strict=False)
    return LoadReport(matched, missing)


def _some(names: list[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more if names else "nothing"


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree
