"""Features kept in files between benchmarks of the same weights on the same images."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pirl_plugin import distributed
from pirl_plugin.atomic import replacing
from pirl_plugin.benchmarks.context import BenchmarkContext

log = logging.getLogger(__name__)

_LARGEST = 4 * 2**30  # bytes of one layer's features: what is larger is extracted again, not written without asking


@dataclass
class Kept:
    """What a cache holds: features by name, and the ids of their rows; None where it holds nothing."""

    of: dict[str, Tensor] = field(default_factory=dict)
    ids: Tensor | None = None


@dataclass(frozen=True)
class FeaturesCache:
    """One file for each layer, its name a hash of all that the features depend on.

    Attributes:
        folder: where the files lie; None keeps nothing.
        key: hash of weights, images, view, pooling and precision.
    """

    folder: Path | None
    key: str = ""

    @classmethod
    def of(cls, context: BenchmarkContext, dataset: Any, pooling: str) -> FeaturesCache:
        """The cache of a context's features; one that keeps nothing where the images or the view are not known."""
        fingerprint = getattr(dataset, "fingerprint", None)
        if context.cache_dir is None or fingerprint is None or not context.view:
            return cls(None)
        facts = {
            "weights": _sha256(context.model or context.trunk),
            "images": fingerprint,
            "view": dict(context.view),
            "pooling": pooling,
            "precision": context.precision,
            "device": context.device.type,
        }
        return cls(context.cache_dir, hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32])

    def read(self, names: Sequence[str], device: torch.device) -> Kept:
        """Those of the named features that are kept, on the device: of the same images, all of them."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name in names:
            path = self._path(name)
            if path is None or not path.is_file():
                continue
            try:
                content = load_file(path)
                found[name] = content["features"].to(device), content["ids"]
            except (SafetensorError, OSError, KeyError) as error:
                log.warning("%s cannot be read (%s): extracting again.", path, error)
        # ranks that see different files must not part ways: one of them would wait for ever
        rows = {name: hashlib.sha256(ids.numpy().tobytes()).hexdigest() for name, (_, ids) in found.items()}
        everywhere = distributed.gather_objects(rows)
        common = [name for name in found if all(rows[name] == others.get(name) for others in everywhere)]
        alike = [name for name in common if rows[name] == rows[common[0]]]
        return Kept({name: found[name][0] for name in alike}, found[alike[0]][1] if alike else None)

    def write(self, features: Mapping[str, Tensor], ids: Tensor) -> None:
        """Keeps features, but for those that are very large."""
        for name, x in features.items():
            path = self._path(name)
            if path is None or not distributed.is_primary() or x.numel() * x.element_size() > _LARGEST:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                file.write(save({"features": x.cpu().contiguous(), "ids": ids}))

    def _path(self, name: str) -> Path | None:
        return self.folder / f"{name}-{self.key}.safetensors" if self.folder is not None else None


def _sha256(module: nn.Module) -> str:
    """Hash of a network's weights, names and shapes included."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
