"""The plan of a sweep: a pure function from its settings to a graph of runs."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pirl_plugin.records import config_sha256
from pirl_plugin.registry import REGISTRIES, completed, working_hooks
from pirl_plugin.schema import ConfigError, Problem
from pirl_plugin.sweep.settings import Sweep, quoted

TRAIN, BENCHMARK = "train", "benchmark"
_ANY = "any"
_ROOT = re.compile(r"<(\w+)>")
Load = Callable[[str, Sequence[str]], dict[str, Any]]

# where a run is made and what it writes on the way changes nothing that it finds; of the hooks, see ``_deciding_hooks``
FREE_KEYS = (
    *("run_dir", "cache_dir", "device", "num_workers", "log_every", "hooks", "checkpoint", "compile", "plugins"),
    *("on_nonfinite", "patience"),
)
# parameters that came later, at the value that means what was done before: what was made then keeps its identity
_LATER = (("num_permutations", None), ("dtype", "float32"), ("colours", "loader"))


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        id: hash of everything that determines its result, that of the weights it measures included.
        command: ``train`` or ``benchmark``.
        overrides: of that command, but for its folder and weights.
        folder: relative to the store.
        method: name of the method.
        variant: label of the variant; empty where there is one only.
        seed: its seed.
        benchmark: name of the benchmark; None for pretraining.
        needs: id of the pretraining whose weights it measures; None for pretraining.
        multi_process: whether it can use several processes.
    """

    id: str
    command: str
    overrides: tuple[str, ...]
    folder: str
    method: str
    variant: str
    seed: int
    benchmark: str | None = None
    needs: str | None = None
    multi_process: bool = True

    @property
    def label(self) -> str:
        """A name for people."""
        variant = f" ({self.variant})" if self.variant else ""
        what = f": {self.benchmark}" if self.benchmark else ""
        return f"{self.method}{variant}, seed {self.seed}{what}"


def plan(sweep: Sweep, load: Load) -> list[Run]:
    """Every run of a sweep, each after the one that it needs; runs that would be the same are there once.

    Args:
        sweep: the settings.
        load: ``(command, overrides) -> configuration``, composed and checked.

    Raises:
        ConfigError: everything wrong in any run's configuration, each problem with the runs' labels.
    """
    _refuse_missing_roots(sweep)
    load = _once(load)
    runs: dict[str, Run] = {}
    problems: dict[Problem, None] = {}
    for method in sweep.methods:
        for variant, changes in sweep.variants.items():
            for seed in sweep.seeds:
                try:
                    trained = _pretraining(sweep, load, method, variant, changes, seed)
                except ConfigError as error:
                    problems |= dict.fromkeys(_of(error, f"method {method}"))
                    continue
                runs.setdefault(trained.id, trained)
                for benchmark in sweep.benchmarks:
                    try:
                        run = _benchmark(sweep, load, benchmark, trained)
                    except ConfigError as error:
                        problems |= dict.fromkeys(_of(error, f"benchmark {benchmark}"))
                        continue
                    runs.setdefault(run.id, run)
    if problems:
        raise ConfigError(problems)
    return list(runs.values())


def identity(config: Mapping[str, Any]) -> str:
    """Hash of what determines a run's result, 12 hexadecimal digits."""
    deciding = {key: value for key, value in config.items() if key not in FREE_KEYS}
    hooks = _deciding_hooks(config.get("hooks"))
    return config_sha256(_without_later({**deciding, "hooks": hooks} if hooks else deciding))[:12]


def _deciding_hooks(hooks: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    """The working hooks that are not at their defaults; a method that needs one is never without it.

    At the defaults a run keeps the identity that it had when no hook counted.
    """
    return [hook for hook in working_hooks(hooks) if dict(hook) != completed("hook", {"name": hook["name"]})]


def _without_later(config: Any) -> Any:
    if not isinstance(config, Mapping):
        return config
    return {key: _without_later(value) for key, value in config.items() if (key, value) not in _LATER}


def _pretraining(sweep: Sweep, load: Load, method: str, variant: str, changes: Sequence[str], seed: int) -> Run:
    settings = sweep.method_settings.get(method, ())
    chosen = (f"method={method}", *sweep.plugins, *sweep.pretraining, *sweep.train, *settings, *changes, f"seed={seed}")
    overrides = _with_roots(chosen, sweep.roots)
    run_id = identity(load(TRAIN, overrides))
    folder = _file_name("-".join(part for part in (method, variant, f"seed{seed}", run_id) if part))
    return Run(run_id, TRAIN, overrides, folder, method, variant, seed)


def _benchmark(sweep: Sweep, load: Load, benchmark: str, trained: Run) -> Run:
    settings = tuple(sweep.benchmark_settings.get(benchmark, ()))
    chosen = () if any(override.startswith("benchmark=") for override in settings) else (f"benchmark={benchmark}",)
    given = (*chosen, *sweep.plugins, *sweep.benchmarking, *sweep.measure, *settings, f"seed={trained.seed}")
    overrides = _with_roots(given, sweep.roots)
    if trained.variant:
        overrides += (f"++method={quoted(f'{trained.method} ({trained.variant})')}",)
    # composed with one name for all weights, once: what a benchmark measures changes nothing else in its configuration
    config = {**load(BENCHMARK, (*overrides, f"weights={_ANY}")), "weights": trained.id}
    run_id = identity(config)
    return dataclasses.replace(
        trained,
        id=run_id,
        command=BENCHMARK,
        overrides=overrides,
        folder=f"{trained.folder}/benchmarks/{_file_name(f'{benchmark}-{run_id}')}",
        benchmark=benchmark,
        needs=trained.id,
        multi_process=getattr(REGISTRIES["benchmark"].get(config["benchmark"]["name"]), "multi_process", False),
    )


def _once(load: Load) -> Load:
    """Each configuration composed once."""
    known: dict[tuple[str, ...], dict[str, Any]] = {}

    def loaded(command: str, overrides: Sequence[str]) -> dict[str, Any]:
        what = (command, *overrides)
        if what not in known:
            known[what] = load(command, overrides)
        return known[what]

    return loaded


def _of(error: ConfigError, what: str) -> list[Problem]:
    return [Problem(f"{what}: {problem.path}" if problem.path else what, problem.message) for problem in error.problems]


def _refuse_missing_roots(sweep: Sweep) -> None:
    chosen = [
        *(sweep.method_settings.get(method, ()) for method in sweep.methods),
        *(sweep.benchmark_settings.get(benchmark, ()) for benchmark in sweep.benchmarks),
        *sweep.variants.values(),
    ]
    everything = [*sweep.pretraining, *sweep.train, *itertools.chain.from_iterable(chosen)]
    if sweep.benchmarks:
        everything += [*sweep.benchmarking, *sweep.measure]
    missing = {name for override in everything for name in _ROOT.findall(override) if not sweep.roots.get(name)}
    if missing:
        text = "must be set, the folder of a dataset of this sweep: roots.{}=DIR."
        raise ConfigError(Problem(f"roots.{name}", text.format(name)) for name in sorted(missing))


def _with_roots(overrides: Sequence[str], roots: Mapping[str, str | None]) -> tuple[str, ...]:
    """Overrides with the datasets' folders in the place of ``<NAME>``."""
    return tuple(_ROOT.sub(lambda match: str(roots[match[1]]), override) for override in overrides)


def _file_name(text: str) -> str:
    """Letters, digits and a few signs: nothing that leaves the folder or needs quoting in a shell."""
    return re.sub(r"[^\w.=+-]+", "_", text).strip("._") or "run"
