"""Converted weights in files, each whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import save
from torch import Tensor

from pirl_plugin.atomic import replacing
from pirl_plugin.weights.convert import ConversionReport
from pirl_plugin.weights.finding import State

# of the run's configuration: enough to build the trunk again and to choose the evaluation view; nothing that could
# name a place on the machine that trained it
_PRETRAINING = ("method", "trunk", "transform")


def metadata_of(report: ConversionReport, training: Mapping[str, Any], sha256: str) -> dict[str, str]:
    """What a safetensors file of ours says of itself beside the tensors.

    Args:
        report: of the conversion.
        training: configuration of the run that made the weights, as far as it is known.
        sha256: of the file that was converted.

    Returns:
        ``format`` (``pt``, as other libraries want it), ``producer``, ``source_format``, ``source_sha256``, and where
        they are known ``method`` and, as JSON, ``trunk`` and ``pretraining``.
    """
    pretraining = {key: training[key] for key in _PRETRAINING if training.get(key) is not None}
    known = {
        "format": "pt",
        "producer": "pirl_plugin",
        "source_format": report.format,
        "source_sha256": sha256,
        "method": str(training["method"]) if training.get("method") else None,
        "trunk": json.dumps(report.trunk) if report.trunk else None,
        "pretraining": json.dumps(pretraining) if pretraining else None,
    }
    return {key: value for key, value in known.items() if value is not None}


def write_weights(
    state: Mapping[str, Tensor], path: str | os.PathLike[str], target: str, metadata: Mapping[str, str]
) -> None:
    """Writes a converted trunk; the suffix says how: ``.safetensors``, ``.pkl`` (numpy arrays) or else ``torch.save``.

    Args:
        state: under the target's names.
        path: of the file; missing folders are made.
        target: ``detectron2`` wants its entries under ``model``, told that names are to be matched by their ends.
        metadata: for a safetensors file; other kinds have no room for it.

    Raises:
        ValueError: values that the kind of file cannot hold.
    """
    path = Path(path)
    # own memory: a view would take all that it is a view of into the file
    own = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    writer = _WRITERS.get(path.suffix, _write_torch)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        writer(own, file, target, metadata)


def _write_safetensors(state: State, file: IO[bytes], target: str, metadata: Mapping[str, str]) -> None:
    file.write(save(state, dict(metadata)))


def _write_pickle(state: State, file: IO[bytes], target: str, metadata: Mapping[str, str]) -> None:
    if any(value.dtype == torch.bfloat16 for value in state.values()):
        raise ValueError("numpy has no bfloat16: write a .pth file instead.")
    pickle.dump(_wrapped({name: value.numpy() for name, value in state.items()}, target), file, protocol=2)


def _write_torch(state: State, file: IO[bytes], target: str, metadata: Mapping[str, str]) -> None:
    torch.save(_wrapped(state, target), file)


def _wrapped(entries: dict[str, Any], target: str) -> dict[str, Any]:
    if target != "detectron2":
        return entries
    return {"model": entries, "__author__": "pirl_plugin", "matching_heuristics": True}


_WRITERS: dict[str, Callable[[State, IO[bytes], str, Mapping[str, str]], None]] = {
    ".safetensors": _write_safetensors,
    ".pkl": _write_pickle,
}
