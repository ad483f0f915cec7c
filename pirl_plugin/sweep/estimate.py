"""What a plan will take, roughly: time, disk and memory of each run and in sum. What is not known is ``?``."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pirl_plugin.plain_yaml import read_plain_yaml
from pirl_plugin.registry import build
from pirl_plugin.sweep.plan import Run
from pirl_plugin.text import aligned

_IMAGES = {"imagenet": 1281167}  # where the data set's name says it
_BYTES = 4


@dataclass(frozen=True)
class Estimate:
    """Seconds, and bytes of checkpoints and of memory without activations; None where it is not known."""

    seconds: float | None = None
    disk: float | None = None
    memory: float | None = None


def estimate(run: Run, config: Mapping[str, Any], store: Path) -> Estimate:
    """Of one run, from its configuration and from finished runs of the same method and trunk in the store."""
    if run.benchmark is not None:
        return Estimate(seconds=_benchmark_seconds(run, store))
    images = config["dataset"].get("num_images") or _IMAGES.get(config["dataset"]["name"])
    parameters, bank = _parameters(config), _bank(config["loss"], images)
    speed = _images_per_second(config, store)
    seconds = config["num_epochs"] * images / speed if images and speed else None
    if parameters is None or bank is None:
        return Estimate(seconds)
    kept = (config.get("checkpoint") or {}).get("keep", 2)
    # weights and momentum are saved; memory holds the gradient, too
    return Estimate(seconds, kept * (2 * parameters * _BYTES + bank), 3 * parameters * _BYTES + bank)


def table(runs: Sequence[Run], estimates: Sequence[Estimate]) -> str:
    """A line for each run, and the sum of what is known."""
    rows = [(run.label, *_texts(found)) for run, found in zip(runs, estimates, strict=True)]
    total = Estimate(_sum(e.seconds for e in estimates), _sum(e.disk for e in estimates))
    said = "rough: time as in finished runs of the same method and trunk, memory without activations and data"
    lines = [("run", "hours", "disk GB", "memory GB"), *rows, ("sum of what is known", *_texts(total))]
    return f"{aligned(lines)}\n{said}"


def _texts(found: Estimate) -> tuple[str, str, str]:
    scaled = ((found.seconds, 3600), (found.disk, 1e9), (found.memory, 1e9))
    hours, disk, memory = ("?" if value is None else f"{value / unit:.2f}" for value, unit in scaled)
    return hours, disk, memory


def _sum(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None


def _parameters(config: Mapping[str, Any]) -> int | None:
    try:
        with torch.device("meta"):  # shapes without memory
            model = build(
                "model", config["model"] or {"name": "ssl_model"}, trunk=config["trunk"], heads=config["heads"]
            )
    except (ValueError, TypeError, KeyError, RuntimeError, ImportError, NotImplementedError):
        return None  # a head that wants to know of the data set, or of an optional package
    return sum(p.numel() for p in model.parameters())


def _bank(loss: Mapping[str, Any], images: int | None) -> float | None:
    if not loss.get("memory_bank"):
        return 0.0
    width = 2 if loss["memory_bank"].get("dtype") == "bfloat16" else _BYTES
    return images * loss.get("dim", 128) * width if images else None


def _images_per_second(config: Mapping[str, Any], store: Path) -> float | None:
    found = []
    for file in store.glob("*/metrics.jsonl"):
        try:
            other = read_plain_yaml(file.parent / "config.yaml")
            last = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
            if (other["method"], other["trunk"]) == (config["method"], config["trunk"]):
                found.append(float(last["images_per_second"]))
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return statistics.median(found) if found else None


def _benchmark_seconds(run: Run, store: Path) -> float | None:
    found = []
    for file in store.glob(f"{run.method}-*/benchmarks/{run.benchmark}-*/outcome.json"):
        try:
            outcome = json.loads(file.read_text(encoding="utf-8"))
            found += [float(outcome["seconds"])] if outcome["state"] == "finished" else []
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return statistics.median(found) if found else None
