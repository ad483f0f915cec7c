"""One benchmark from one configuration: builds everything, runs it, writes the records."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from pirl_plugin import records
from pirl_plugin.atomic import write_text
from pirl_plugin.benchmarks.context import BenchmarkContext, Result
from pirl_plugin.records import Record
from pirl_plugin.registry import build, check
from pirl_plugin.schema import ConfigError, Problem, did_you_mean
from pirl_plugin.weights import files

RANDOM = "random"
_DEFAULTS: dict[str, Any] = {
    "transform": None,
    "image_size": None,
    "trunk": None,
    "plugins": None,
    "train_split": "train",
    "test_split": "test",
    "method": None,
    "dataset_name": None,
    "device": "auto",
    "precision": "float32",
    "batch_size": 256,
    "num_workers": 0,
    "seed": 0,
    "run_dir": None,
}
_REQUIRED = ("benchmark", "weights", "dataset")
_CHOICES = {"device": ("auto", "cpu", "cuda"), "precision": ("float32", "bf16")}


@dataclass(frozen=True)
class Weights:
    """What a weights file (or ``random``) stands for.

    Attributes:
        trunk: configuration of the trunk.
        state: its weights; None for random ones.
        config: configuration of the training run, as far as the file holds it.
        checkpoint: the file's content.
        sha256: of the file; None for random weights.
        note: what was left out of the file.
    """

    trunk: dict[str, Any]
    state: dict[str, torch.Tensor] | None
    config: dict[str, Any]
    checkpoint: dict[str, Any]
    sha256: str | None
    note: dict[str, Any]


def run_benchmark(config: Mapping[str, Any]) -> list[Record]:
    """Runs one benchmark and returns its records, the headline first.

    With a ``run_dir`` it writes ``config.yaml`` and ``environment.json`` there before, ``result.json`` (the headline)
    and ``results.jsonl`` (all of them) after. A failure is recorded with its reason, and raised.

    Args:
        config: ``benchmark`` (its configuration), ``weights`` (a file, or ``random``) and ``dataset`` (its
            configuration; the splits are put into it) must be there. May be there: ``transform`` (null: the evaluation
            view), ``image_size`` of that view in pixels (null: the one that the weights were trained at), ``trunk``
            (null: the checkpoint's), ``train_split``, ``test_split``, ``method`` and ``dataset_name`` (null: derived),
            ``plugins`` (imported by the command), ``device``, ``precision``, ``batch_size``, ``num_workers``, ``seed``,
            ``run_dir``.

    Raises:
        ConfigError: a configuration that cannot be run, all problems at once; nothing is written.
        ValueError: weights or data that the benchmark cannot use.
    """
    problems = problems_of(config)
    if problems:
        raise ConfigError(problems)
    full = {**_DEFAULTS, **config}
    run_dir = Path(full["run_dir"]) if full["run_dir"] else None
    if run_dir is not None:
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in ("result.json", "results.jsonl"):  # of an earlier run: not what config.yaml says from now on
            (run_dir / name).unlink(missing_ok=True)
        write_text(yaml.safe_dump(full, sort_keys=False, allow_unicode=True), run_dir / "config.yaml")
        write_text(json.dumps(records.environment(), indent=2) + "\n", run_dir / "environment.json")
    start = time.perf_counter()
    facts: dict[str, Any] = {
        "method": full["method"] or "unknown",
        "dataset": dataset_name(full),
        "weights_sha256": None,
    }
    try:
        results, more = _results(full, run_dir, facts)
        found = [_record(full, facts, result, time.perf_counter() - start, more) for result in results]
    except Exception as error:
        failed = _failure(full, facts, error, time.perf_counter() - start)
        if run_dir is not None:
            records.write_record(failed, run_dir / "result.json")
        raise
    found.sort(key=lambda record: not record.extra.pop("headline"))
    if run_dir is not None:
        records.write_records(found, run_dir / "results.jsonl")
        records.write_record(found[0], run_dir / "result.json")
    return found


def problems_of(config: Mapping[str, Any]) -> list[Problem]:
    """Everything wrong in a benchmark configuration, found without building anything."""
    known = (*_REQUIRED, *_DEFAULTS)
    problems = [
        Problem(key, f"unknown key.{did_you_mean(key, known)} Valid keys: {', '.join(known)}.")
        for key in config
        if key not in known
    ]
    problems += [Problem(key, "missing.") for key in _REQUIRED if config.get(key) is None]
    for key, kind in (
        ("benchmark", "benchmark"),
        ("dataset", "dataset"),
        ("transform", "transform"),
        ("trunk", "model"),
    ):
        if config.get(key) is not None:
            problems += check(kind, config[key], key)
    for key, choices in _CHOICES.items():
        if key in config and config[key] not in choices:
            problems.append(Problem(key, f"must be one of {', '.join(choices)}, got {config[key]!r}."))
    for key, least in (("batch_size", 1), ("num_workers", 0), ("seed", 0), ("image_size", 1)):
        value = config.get(key, least)
        if value is None and key == "image_size":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            problems.append(Problem(key, f"must be a whole number >= {least}, got {value!r}."))
    if config.get("weights") == RANDOM:
        if config.get("trunk") is None:
            problems.append(Problem("trunk", "missing; random weights do not say: trunk=resnet18, for example."))
        if config.get("image_size") is None and config.get("transform") is None:
            problems.append(Problem("image_size", "missing; random weights do not say: image_size=64, for example."))
    return problems


def read_trunk(weights: str, trunk: Mapping[str, Any] | None) -> Weights:
    """What the weights are and which trunk they are for.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not weights, no trunk in them, or a trunk that neither they nor the caller describe.
    """
    if weights == RANDOM:
        return Weights(dict(trunk or {}), None, {}, {}, None, {})
    checkpoint = files.read_weights(weights)
    found = files.find_trunk(checkpoint)
    described = trunk or files.trunk_config(checkpoint)
    if described is None:
        raise ValueError(
            f"{weights!r} ({found.format}) does not say which trunk it is for: set trunk, e.g. trunk=resnet50."
        )
    note: dict[str, Any] = {"weights_format": found.format}
    if found.dropped:
        note["weights_left_out"] = found.dropped
    images_seen = (checkpoint.get("classy_state_dict") or {}).get("num_updates")
    if images_seen is not None:
        note["images_seen"] = int(images_seen)  # of the pretraining, for curves
    return Weights(
        dict(described), found.state, files.training_config(checkpoint), checkpoint, files.sha256_of_file(weights), note
    )


def evaluation_transform(training: Mapping[str, Any], image_size: int | None = None) -> dict[str, Any]:
    """The evaluation view: of ``image_size``, else of the training's image view, else of 224 pixels.

    Images up to 128 pixels are resized to that size as a whole, larger ones to 256 / 224 of it and cropped.
    """
    size = image_size or int((training.get("transform") or {}).get("image_size") or 224)
    return {"name": "eval_view", "resize": size if size <= 128 else round(size * 256 / 224), "crop": size}


def dataset_name(config: Mapping[str, Any]) -> str:
    """A name of the dataset for people: as configured, else its folder's name, else the component's."""
    dataset = config["dataset"]
    root = dataset.get("root")
    return str(config.get("dataset_name") or (Path(root).resolve().name if root else "") or dataset["name"])


def _results(
    config: dict[str, Any], run_dir: Path | None, facts: dict[str, Any]
) -> tuple[list[Result], dict[str, Any]]:
    """Builds and runs; fills ``facts`` as they become known, so that a failure's record has them too."""
    device = _device(config["device"])
    weights = read_trunk(str(config["weights"]), config["trunk"])
    facts["weights_sha256"] = weights.sha256
    facts["method"] = config["method"] or (RANDOM if weights.state is None else weights.config.get("method", "unknown"))
    trunk, model = _models(weights, config["seed"])
    transform = config["transform"] or evaluation_transform(weights.config, config["image_size"])
    train, test = (
        build("dataset", {**config["dataset"], "split": config[f"{part}_split"]}) for part in ("train", "test")
    )
    context = BenchmarkContext(
        trunk=trunk.to(device),
        model=model.to(device) if model is not None else None,
        train=train,
        test=test,
        transform=build("transform", transform),
        device=device,
        batch_size=config["batch_size"],
        num_workers=config["num_workers"],
        seed=config["seed"],
        precision=config["precision"],
        run_dir=run_dir,
    )
    results = list(build("benchmark", config["benchmark"]).run(context))
    if not results:
        raise ValueError(f"the benchmark {config['benchmark']['name']!r} gave no result.")
    return results, {"trunk": weights.trunk, "transform": transform, **weights.note}


def _models(weights: Weights, seed: int) -> tuple[nn.Module, nn.Module | None]:
    """The trunk with its weights, and the model with the image head where the checkpoint holds one; frozen."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trunk = build("model", weights.trunk)
    if weights.state is None:
        return _frozen(trunk), None
    files.load_trunk(trunk, weights.state)
    state = (weights.checkpoint.get("classy_state_dict") or {}).get("base_model")
    head = ((state or {}).get("model") or {}).get("heads", {}).get("image")
    if head is None:
        return _frozen(trunk), None
    config = (weights.config.get("heads") or {}).get("image") or {"name": "linear"}
    model = build("model", {"name": "ssl_model", "trunk": weights.trunk, "heads": {"image": config}})
    model.set_classy_state({"model": {"trunk": weights.state, "heads": {"image": head}}})
    return _frozen(model.trunk), _frozen(model)


def _frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False).eval()


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda was asked for, but torch sees no GPU: use device=cpu or install a CUDA build.")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _common(config: dict[str, Any], facts: dict[str, Any], seconds: float) -> dict[str, Any]:
    return {
        **facts,
        "benchmark": config["benchmark"]["name"],
        "seed": config["seed"],
        "config_sha256": records.config_sha256(config),
        "commit": records.commit(),
        "seconds": round(seconds, 3),
        "hardware": records.hardware_name(),
    }


def _record(
    config: dict[str, Any], facts: dict[str, Any], result: Result, seconds: float, more: dict[str, Any]
) -> Record:
    return Record(
        **_common(config, facts, seconds),
        protocol=result.protocol,
        setting=result.setting,
        metric=result.metric,
        value=result.value,
        unit=result.unit,
        extra={**result.extra, **more, "headline": result.headline},
    )


def _failure(config: dict[str, Any], facts: dict[str, Any], error: Exception, seconds: float) -> Record:
    arguments = config["benchmark"]
    return Record(
        **_common(config, facts, seconds),
        protocol=str(arguments.get("protocol") or ""),
        setting={key: value for key, value in arguments.items() if key != "name"},
        metric="",
        value=None,
        unit="",
        status="failed",
        reason=f"{type(error).__name__}: {error}",
    )
