"""The weights that a benchmark measures: read from a file, or random, and put into frozen networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pirl_plugin.models.ssl_model import takes_map
from pirl_plugin.registry import REGISTRIES, build
from pirl_plugin.weights import files
from pirl_plugin.weights.convert import grouped

RANDOM = "random"


@dataclass(frozen=True)
class Weights:
    """What a weights file (or ``random``) stands for.

    Attributes:
        trunk: configuration of the trunk.
        state: its weights; None for random ones.
        pretraining: configuration of the training run, as far as the file holds it.
        checkpoint: the file's content.
        sha256: of the file; None for random weights.
        note: what was left out of the file.
    """

    trunk: dict[str, Any]
    state: dict[str, torch.Tensor] | None
    pretraining: dict[str, Any]
    checkpoint: dict[str, Any]
    sha256: str | None
    note: dict[str, Any]

    @property
    def image_size(self) -> int:
        """Side of the image view that the weights were trained at, pixels; 224 where it is not known."""
        trained_at = (self.pretraining.get("transform") or {}).get("image_size")
        return int(self.pretraining.get("evaluation_size") or trained_at or 224)


def read_trunk(weights: str, trunk: Mapping[str, Any] | None) -> Weights:
    """What the weights are and which trunk they are for.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not weights, no trunk in them, or a trunk that neither they, their shapes nor the caller tell.
    """
    if weights == RANDOM:
        return Weights(dict(trunk or {}), None, {}, {}, None, {})
    checkpoint = files.read_weights(weights)
    found = files.find_trunk(checkpoint)
    described = trunk or files.trunk_config(checkpoint)
    note: dict[str, Any] = {"weights_format": found.format}
    if found.note:
        note["weights_choice"] = found.note
    if found.dropped:
        note["weights_left_out"] = grouped(found.dropped)
    images_seen = _at(checkpoint, "classy_state_dict", "num_updates")
    if images_seen is not None:
        note["images_seen"] = int(images_seen)  # of the pretraining, for curves
    return Weights(
        dict(described), found.state, files.training_config(checkpoint), checkpoint, files.sha256_of_file(weights), note
    )


def frozen_networks(weights: Weights, seed: int) -> tuple[nn.Module, nn.Module | None]:
    """The trunk with its weights, and the model around it with the heads of the checkpoint that embed images, or None.

    Args:
        weights: what to build.
        seed: of random weights.

    Raises:
        ValueError: a head of the checkpoint is not registered.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = build("model", weights.trunk)
    if weights.state is None:
        return _frozen(trunk), None
    files.load_trunk(trunk, weights.state)
    heads = _at(weights.checkpoint, "classy_state_dict", "base_model", "model", "heads") or {}
    # a file that says nothing of its heads has the image head of PIRL and NPID
    known = weights.pretraining.get("heads") or {"image": {"name": "linear"}}
    saved = {view: config for view, config in known.items() if view in heads}
    for config in saved.values():
        _check_known(config["name"], weights.pretraining.get("plugins"))
    described = {view: config for view, config in saved.items() if _embeds(config["name"])}
    if not described:
        return _frozen(trunk), None
    model = build("model", {"name": "ssl_model", "trunk": weights.trunk, "heads": described})
    kept = {view: heads[view] for view in described}
    model.set_classy_state({"model": {"trunk": weights.state, "heads": kept}})
    return _frozen(model.trunk), _frozen(model)


def _check_known(head: str, plugins: Any) -> None:
    if head not in REGISTRIES["head"]:
        named = ",".join(plugins or ["my_package"])
        raise ValueError(
            f"the weights have a head {head!r}, which nothing here has registered: name the package that brings it, "
            f"plugins=[{named}]."
        )


def _embeds(head: str) -> bool:
    """Whether a head gives one vector for an image, not an answer for each of its places."""
    return not takes_map(REGISTRIES["head"][head])


def _frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


def _at(tree: Any, *keys: str) -> Any:
    """A leaf of nested mappings; None where anything on the way is missing or of another kind."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
