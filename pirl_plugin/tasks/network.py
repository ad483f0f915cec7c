"""Model and loss of a run, built so that every process has the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from classy_vision.losses import ClassyLoss

from pirl_plugin.data.datasets import ImageDataset
from pirl_plugin.models.ssl_model import SSLModel
from pirl_plugin.registry import build
from pirl_plugin.tasks import checks

ComponentConfig = Mapping[str, Any]
_LOSS_SEED = 1 << 32  # added to the run's: a loss draws the same rows or prototypes whatever heads there are


@dataclass(frozen=True)
class Network:
    """A model, a loss, and the configurations of loss and heads that build them again without the dataset."""

    model: SSLModel
    loss: ClassyLoss
    filled_in: dict[str, Any]


def build_network(
    model: ComponentConfig,
    trunk: ComponentConfig,
    heads: Mapping[str, ComponentConfig],
    loss: ComponentConfig,
    dataset: ImageDataset,
    seed: int,
) -> Network:
    """Builds both from the run's seed, whatever the caller's random state, which stays as it is.

    Raises:
        ValueError: a model that is none of trunk and heads, or that brings its own; a loss or a head that wants to know
            of the dataset what is not known.
    """
    for part in ("trunk", "heads"):
        if model.get(part) is not None:
            raise ValueError(f"model.{part} is given by the task: set {part} beside model, not in it.")
    facts = checks.facts_of(dataset)
    heads = {view: checks.with_facts("head", head, facts) for view, head in heads.items()}
    loss = checks.with_facts("loss", loss, facts)
    checks.refuse_too_large_bank(loss)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        joined = build("model", model, trunk=trunk, heads=heads)
        if not isinstance(joined, SSLModel):
            raise ValueError(f"model {model['name']!r} is none that joins a trunk and heads: use ssl_model.")
        torch.manual_seed(seed + _LOSS_SEED)
        known = {name: fact for name, fact in facts.items() if fact is not None}
        return Network(joined, build("loss", loss, **known), {"heads": heads, "loss": loss})
