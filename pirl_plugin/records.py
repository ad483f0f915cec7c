"""The record of one result, the facts about the machine that made it, and reading them back. Never imports torch."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pirl_plugin.atomic import write_text

_PACKAGES = (
    "pirl-plugin",
    "torch",
    "torchvision",
    "classy-vision",
    "hydra-core",
    "numpy",
    "pillow",
    "scikit-learn",
    "safetensors",
)

_HEADLINE, _ALL = "result.json", "results.jsonl"


@dataclass(frozen=True)
class Record:
    """One result, or one failure.

    Attributes:
        method: what was pretrained (``pirl``, ``npid``, ..., ``random``).
        benchmark: registered name of the benchmark.
        protocol: which variant of it; only equal protocols compare.
        dataset: name of the dataset measured on.
        setting: what tells this result from the others of the same run, e.g. ``{"layer": "res5"}``.
        metric: name of the metric.
        value: its value in ``unit``; None when failed.
        unit: unit of the value.
        seed: seed of the run.
        status: ``ok`` or ``failed``.
        reason: why it failed; None when ok.
        config_sha256: of the resolved configuration.
        weights_sha256: of the weights file; None for random weights.
        commit: of this package's source, None where it is not known.
        seconds: wall time of the whole benchmark.
        hardware: in words.
        extra: whatever else the benchmark has to say: chosen constants, images left out, notes.
    """

    method: str
    benchmark: str
    protocol: str
    dataset: str
    setting: dict[str, Any]
    metric: str
    value: float | None
    unit: str
    seed: int
    status: str = "ok"
    reason: str | None = None
    config_sha256: str | None = None
    weights_sha256: str | None = None
    commit: str | None = None
    seconds: float | None = None
    hardware: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in ("ok", "failed"):
            raise ValueError(f"status must be 'ok' or 'failed', got {self.status!r}.")
        if self.status == "ok" and (self.value is None or not math.isfinite(self.value)):
            raise ValueError(
                f"a result must be a finite number, got {self.metric} = {self.value!r}: record a failure instead."
            )
        if self.status == "failed" and (self.value is not None or not self.reason):
            raise ValueError("a failure has no value, and has a reason.")


def write_record(record: Record, path: str | os.PathLike[str]) -> None:
    """Writes one record as indented JSON, whole or not at all."""
    write_text(json.dumps(dataclasses.asdict(record), indent=2, ensure_ascii=False) + "\n", path)


def write_records(records: list[Record], path: str | os.PathLike[str]) -> None:
    """Writes one record a line (JSON lines), whole or not at all."""
    lines = [json.dumps(dataclasses.asdict(record), ensure_ascii=False) for record in records]
    write_text("".join(line + "\n" for line in lines), path)


def read_records(folder: str | os.PathLike[str]) -> list[Record]:
    """All records of a folder and the folders below it, in the order of their paths.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: a file that is not a record; names it.
    """
    return [record for run in result_folders(folder) for record in read_run(run)]


def result_folders(folder: str | os.PathLike[str]) -> list[Path]:
    """The folders with results among a folder and those below it, sorted.

    Raises:
        FileNotFoundError: no such folder.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {str(root)!r} to read results from.")
    return sorted({path.parent for path in root.rglob("result*.json*") if path.name in (_HEADLINE, _ALL)})


def read_run(run: Path) -> list[Record]:
    """Records of one run, its headline first.

    A run leaves ``result.json``, its headline, and, where it has several results, ``results.jsonl`` with all of them,
    which is read alone then; but a failure in ``result.json`` is of a later attempt, and all that counts.

    Raises:
        ValueError: a file that is not a record; names it.
    """
    headline, whole = run / _HEADLINE, run / _ALL
    first = [_parse(_text(headline), headline)] if headline.exists() else []
    if not whole.exists() or (first and first[0].status == "failed"):
        return first
    return [_parse(line, whole) for line in _text(whole).splitlines() if line.strip()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not a result record: {error}.") from error


def _parse(text: str, path: Path) -> Record:
    try:
        content = json.loads(text)
        known = {item.name for item in dataclasses.fields(Record)}
        more = {key: value for key, value in content.items() if key not in known}
        record = Record(**{key: value for key, value in content.items() if key in known})
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not a result record: {error}.") from error
    return dataclasses.replace(record, extra={**record.extra, **more}) if more else record


def config_sha256(config: Mapping[str, Any]) -> str:
    """SHA-256 of a plain configuration, whatever the order of its keys; where its output goes does not count."""
    kept = {key: value for key, value in config.items() if key != "run_dir"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def environment() -> dict[str, Any]:
    """What a result depends on besides its configuration: commit, versions, hardware."""
    return {
        "commit": commit(),
        "versions": _versions(),
        "hardware": {**_hardware(), "gpus": _gpus()},
        "command": sys.argv,
    }


def hardware_name() -> str:
    """The machine in words: its GPUs where torch has any, else its processor."""
    gpus = _gpus()
    if gpus:
        return ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
    facts = _hardware()
    return f"{facts['cores']} cores of {facts['cpu']}"


@functools.cache
def commit() -> str | None:
    """Commit of this package's source, ``-dirty`` when tracked files differ from it; None for an installed copy."""
    here = Path(__file__).resolve()
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:  # a checkout around it need not be ours
        return None
    head = _git(here.parent, "rev-parse", "HEAD")
    if head is None:
        return None
    return head + ("-dirty" if _git(here.parent, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def _hardware() -> dict[str, Any]:
    return {"cpu": _cpu_name(), "cores": _cores(), "memory_gib": memory_gib(), "system": platform.platform()}


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float | None:
    """Memory of the machine in GiB, None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> list[str]:
    """Names of the GPUs, when torch is loaded already: nothing else could have used them."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
