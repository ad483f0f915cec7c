"""One benchmark from one configuration: builds everything, runs it, writes the records."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from pirl_plugin import distributed, records
from pirl_plugin.atomic import write_text
from pirl_plugin.benchmarks.context import Benchmark, BenchmarkContext, Result
from pirl_plugin.benchmarks.weights_under_test import RANDOM, Weights, frozen_networks, read_trunk
from pirl_plugin.data.loading import number_of_workers
from pirl_plugin.records import Record
from pirl_plugin.registry import REGISTRIES, build, check, lookup
from pirl_plugin.schema import ConfigError, Problem, did_you_mean

log = logging.getLogger(__name__)

_DEFAULTS: dict[str, Any] = {
    "transform": None,
    "image_size": None,
    "trunk": None,
    "plugins": None,
    "train_split": None,
    "test_split": None,
    "method": None,
    "dataset_name": None,
    "device": "auto",
    "precision": "float32",
    "batch_size": 256,
    "num_workers": None,
    "seed": 0,
    "run_dir": None,
    "cache_dir": None,
}
_REQUIRED = ("benchmark", "weights", "dataset")
_SPLITS = ("train", "test")
_CHOICES = {"device": ("auto", "cpu", "cuda"), "precision": ("float32", "bf16")}


def run_benchmark(config: Mapping[str, Any]) -> list[Record]:
    """Runs one benchmark and returns its records, the headline first.

    With a ``run_dir`` it writes ``config.yaml`` and ``environment.json`` there before, ``result.json`` (the headline)
    and ``results.jsonl`` (all of them) after. A failure is recorded with its reason, and raised.

    Args:
        config: ``benchmark`` (its configuration), ``weights`` (a file, or ``random``) and ``dataset`` (its
            configuration; the splits are put into it) must be there. May be there: ``transform`` (null: the
            benchmark's evaluation view), ``image_size`` of that view in pixels (null: the one that the weights were
            trained at), ``trunk`` (null: the checkpoint's), ``train_split`` and ``test_split`` (null: the dataset's),
            ``method`` and ``dataset_name`` (null: derived), ``plugins`` (imported by the command), ``device``,
            ``precision``, ``batch_size``, ``num_workers`` (null: none on a CPU, a GPU's share of the cores but one),
            ``seed``, ``run_dir``, ``cache_dir`` (for features; null: ``features`` beside ``run_dir``).

    Raises:
        ConfigError: a configuration that cannot be run, all problems at once; nothing is written.
        ValueError: weights or data that the benchmark cannot use.
    """
    problems = problems_of(config)
    if problems:
        raise ConfigError(problems)
    full = {**_DEFAULTS, **config}
    _refuse_processes(full["benchmark"]["name"])
    run_dir = Path(full["run_dir"]) if full["run_dir"] else None
    writes = run_dir is not None and distributed.is_launched_primary()
    if run_dir is not None and writes:
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in ("result.json", "results.jsonl"):  # of an earlier run: not what config.yaml says from now on
            (run_dir / name).unlink(missing_ok=True)
        write_text(yaml.safe_dump(full, sort_keys=False, allow_unicode=True), run_dir / "config.yaml")
        write_text(json.dumps(records.environment(), indent=2) + "\n", run_dir / "environment.json")
    start = time.perf_counter()
    facts: dict[str, Any] = {
        "method": full["method"] or "unknown",
        "dataset": _recorded_name(full),
        "weights_sha256": None,
    }
    try:
        device = _device(full["device"])
        with distributed.process_group(device):
            results, more = _results(full, device, run_dir, facts)
        found = [_record(full, facts, result, time.perf_counter() - start, more) for result in results]
    except Exception as error:
        failed = _failure(full, facts, error, time.perf_counter() - start)
        if run_dir is not None and writes:
            records.write_record(failed, run_dir / "result.json")
        raise
    found.sort(key=lambda record: not record.extra.pop("headline"))
    if run_dir is not None and writes:
        records.write_records(found, run_dir / "results.jsonl")
        records.write_record(found[0], run_dir / "result.json")
    return found


def _refuse_processes(name: str) -> None:
    if distributed.launched_processes() > 1 and not getattr(lookup("benchmark", name), "multi_process", False):
        raise ConfigError([Problem("benchmark", f"{name} runs in one process: start it without torchrun.")])


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
        if value is None and key in ("image_size", "num_workers"):
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            problems.append(Problem(key, f"must be a whole number >= {least}, got {value!r}."))
    if config.get("weights") == RANDOM:
        if config.get("trunk") is None:
            problems.append(Problem("trunk", "missing; random weights do not say: trunk=resnet18, for example."))
        if config.get("image_size") is None and config.get("transform") is None:
            problems.append(Problem("image_size", "missing; random weights do not say: image_size=64, for example."))
    return problems


def dataset_name(config: Mapping[str, Any]) -> str:
    """A name of the dataset: as configured, else a published dataset's own, its folder's, or the component's.

    A folder that happens to be called as a published dataset is does not pass as it.
    """
    name, root = config["dataset"]["name"], config["dataset"].get("root")
    if config.get("dataset_name"):
        return str(config["dataset_name"])
    folder = Path(root).resolve().name if root and not _is_official(name) else ""
    return f"{folder}-folder" if _is_official(folder) else folder or str(name)


def _is_official(name: str) -> bool:
    """Whether it is the name of a dataset that numbers are published on."""
    return hasattr(REGISTRIES["dataset"].get(name), "official")


def _results(
    config: dict[str, Any], device: torch.device, run_dir: Path | None, facts: dict[str, Any]
) -> tuple[list[Result], dict[str, Any]]:
    """Builds and runs; fills ``facts`` as they become known, so that a failure's record has them too."""
    weights = read_trunk(str(config["weights"]), config["trunk"])
    facts["weights_sha256"] = weights.sha256
    facts["method"] = config["method"] or (
        RANDOM if weights.state is None else weights.pretraining.get("method", "unknown")
    )
    benchmark: Benchmark = build("benchmark", config["benchmark"])
    context = _context(config, device, run_dir, weights, benchmark)
    facts["dataset"] = _recorded_name(config, _official_name(context))
    results = list(benchmark.run(context))
    if not results:
        raise ValueError(f"the benchmark {config['benchmark']['name']!r} gave no result.")
    return results, {"trunk": weights.trunk, "transform": dict(context.view), **weights.note}


def _recorded_name(config: dict[str, Any], official: str | None = None) -> str:
    """The dataset's name for the records, with the splits where they are not those that it is made for."""
    if config["dataset_name"]:
        return str(config["dataset_name"])
    name, splits = official or dataset_name(config), _splits(config)
    return name if splits == _own_splits(config) else f"{name} ({splits[0]} to {splits[1]})"


def _official_name(context: BenchmarkContext) -> str | None:
    """A published dataset's own name for the records, of whichever split is only a part of it; None for others."""
    names = [getattr(split, "record_name", None) for split in (context.train, context.test)]
    return next((name for name in names if name and name.endswith("-partial")), names[1])


def _context(
    config: dict[str, Any], device: torch.device, run_dir: Path | None, weights: Weights, benchmark: Benchmark
) -> BenchmarkContext:
    trunk, model = frozen_networks(weights, config["seed"])
    image_size = config["image_size"] or weights.image_size
    view = config["transform"] or benchmark.evaluation_view(image_size)
    train, test = (build("dataset", {**config["dataset"], "split": split}) for split in _splits(config))
    beside = run_dir.parent / "features" if run_dir is not None else None
    return BenchmarkContext(
        trunk=trunk.to(device),
        model=model.to(device) if model is not None else None,
        train=train,
        test=test,
        transform=build("transform", view),
        view=view,
        image_size=image_size,
        trunk_config=weights.trunk,
        pretraining=weights.pretraining,
        weights_sha256=weights.sha256,
        device=device,
        batch_size=config["batch_size"],
        num_workers=number_of_workers(config["num_workers"], device.type == "cuda"),
        seed=config["seed"],
        precision=config["precision"],
        run_dir=run_dir,
        cache_dir=Path(config["cache_dir"]) if config["cache_dir"] else beside,
    )


def _splits(config: dict[str, Any]) -> tuple[str, str]:
    """The splits to learn from and to measure on: as configured, else the dataset's own."""
    train, test = _own_splits(config)
    return config["train_split"] or train, config["test_split"] or test


def _own_splits(config: dict[str, Any]) -> tuple[str, str]:
    train, test = getattr(lookup("dataset", config["dataset"]["name"]), "benchmark_splits", _SPLITS)
    return train, test


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
