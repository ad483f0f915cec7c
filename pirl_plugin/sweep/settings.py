"""What a sweep is: methods x variants x seeds, each pretrained once and measured by every benchmark."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from annotated_types import Len

from pirl_plugin.schema import Component, NonNegativeInt, checked

Overrides = Sequence[str]


@checked
class Sweep:
    """The settings of a sweep. Every override is written as on the command line of ``train.py`` or ``benchmark.py``.

    What is said of one method, benchmark or variant wins over what is said of all.

    Args:
        name: of the sweep.
        methods: names of the group ``method``, pretrained with every seed.
        benchmarks: names in ``benchmark_settings``, or of the group ``benchmark``; run on every pretrained trunk.
        seeds: of pretraining and benchmark alike.
        pretraining: overrides of every pretraining.
        benchmarking: overrides of every benchmark.
        method_settings: further overrides of single methods, by name.
        benchmark_settings: overrides of single benchmarks, by name; without ``benchmark=`` among them the name is also
            the option of the group.
        variants: overrides by label; each method is pretrained with each of them. Empty: one variant without a label.
        train: settings of every pretraining over those, for the command line: ``train.num_epochs=2``.
        measure: settings of every benchmark over those: ``measure.num_workers=4``.
        roots: folders of datasets; in an override ``<NAME>`` stands for the folder of that name.
        store: folder of the runs themselves; sweeps that name the same one share their pretrained weights.
        run_dir: folder of this sweep: plan, log, report.
        launcher: where the runs are made.
        plugins: modules that every run imports first, for the components and methods that they bring.
    """

    def __init__(
        self,
        name: str,
        methods: Annotated[Sequence[str], Len(1)],
        benchmarks: Sequence[str],
        seeds: Annotated[Sequence[NonNegativeInt], Len(1)] = (0,),
        pretraining: Overrides = (),
        benchmarking: Overrides = (),
        method_settings: Mapping[str, Overrides] | None = None,
        benchmark_settings: Mapping[str, Overrides] | None = None,
        variants: Mapping[str, Overrides] | None = None,
        train: Mapping[str, Any] | None = None,
        measure: Mapping[str, Any] | None = None,
        roots: Mapping[str, str | None] | None = None,
        store: str = "runs/store",
        run_dir: str = "runs/sweep",
        launcher: Annotated[Mapping[str, Any], Component("launcher")] | None = None,
        plugins: list[str] | None = None,
    ) -> None:
        self.name, self.methods, self.benchmarks, self.seeds = name, list(methods), list(benchmarks), list(seeds)
        self.pretraining, self.benchmarking = list(pretraining), list(benchmarking)
        self.method_settings, self.benchmark_settings = dict(method_settings or {}), dict(benchmark_settings or {})
        self.train, self.measure = _overrides(train or {}), _overrides(measure or {})
        self.variants: dict[str, Overrides] = dict(variants or {"": []})
        self.roots, self.store, self.run_dir = dict(roots or {}), store, run_dir
        self.launcher = dict(launcher or {"name": "local"})
        self.plugins = [f"plugins={_text(plugins)}"] if plugins else []


def _overrides(settings: Mapping[str, Any], path: str = "") -> list[str]:
    """``{"optimizer": {"lr": 0.1}}`` as ``["optimizer.lr=0.1"]``."""
    found = []
    for key, value in settings.items():
        at = f"{path}.{key}" if path else key
        found += _overrides(value, at) if isinstance(value, Mapping) else [f"{at}={_text(value)}"]
    return found


def _text(value: Any) -> str:
    """A value in Hydra's syntax."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(_text(item) for item in value)}]"
    return quoted(value) if isinstance(value, str) else str(value)


def quoted(text: str) -> str:
    """Text in Hydra's syntax: in quotes where it holds more than plain characters."""
    return text if re.fullmatch(r"[\w./+-]+", text) else "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
