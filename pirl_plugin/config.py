"""From a command line to a checked plain dictionary: Hydra composes, the constructors' signatures check.

Nothing is rewritten on the way: the composed YAML is what is built. Unknown keys are let through to the check on
purpose, which then reports all of them at once with their paths and the nearest valid names.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import benchmark_configs
from pirl_plugin import registry
from pirl_plugin.schema import ConfigError, Problem, did_you_mean

CONFIG_FOLDER = Path(benchmark_configs.__file__).parent


def groups() -> dict[str, list[str]]:
    """Configuration groups and their options, as they lie in ``benchmark_configs/``."""
    folders = sorted(
        folder for folder in CONFIG_FOLDER.iterdir() if folder.is_dir() and not folder.name.startswith("_")
    )
    return {folder.name: sorted(file.stem for file in folder.glob("*.yaml")) for folder in folders}


def load(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Composes ``benchmark_configs/NAME.yaml`` with Hydra overrides, into a plain dictionary.

    Args:
        name: ``train``, ``benchmark``, ...
        overrides: ``trunk=resnet18``, ``optimizer.lr=0.1``, ...

    Raises:
        ConfigError: everything that is wrong with the overrides themselves.
    """
    parsed, problems = _parse(overrides)
    good = []
    for override in parsed:
        problem = _wrong_option(override)
        problems += [problem] if problem else []
        good += [] if problem else [_forced(override)]
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        try:
            config = OmegaConf.to_container(compose(name, good), resolve=True, throw_on_missing=False)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError([*problems, Problem("", " ".join(str(error).split()))]) from error
    if problems:
        raise ConfigError(problems)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def check(kind: str, config: Mapping[str, Any]) -> None:
    """Holds a composed configuration against the components it names, plugins imported first.

    Raises:
        ConfigError: every problem at once, each with its path.
    """
    problems = import_plugins(config.get("plugins") or [])
    problems += unset(config)
    missing = {problem.path for problem in problems}
    problems += [problem for problem in registry.check(kind, config) if problem.path not in missing]
    if problems:
        raise ConfigError(problems)


def unset(config: Mapping[str, Any]) -> list[Problem]:
    """A problem for each value that a YAML leaves to the user (``???``) and the user has not given."""
    return [Problem(path, f"must be set: {path}=...") for path in _missing(config)]


def import_plugins(modules: Sequence[str]) -> list[Problem]:
    """Imports the modules that register a user's own components; a problem for each that cannot be imported."""
    problems = []
    for index, module in enumerate(modules):
        try:
            importlib.import_module(module)
        except ImportError as error:
            problems.append(Problem(f"plugins[{index}]", f"cannot import {module!r}: {error}"))
    return problems


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines ``path: old -> new`` for every leaf that differs between two configurations."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = dict.fromkeys([*old, *new])
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}".lstrip("."))]
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def to_yaml(config: Mapping[str, Any]) -> str:
    """A plain dictionary as YAML, in its own order."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(config)))


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    parser, parsed, problems = OverridesParser.create(), [], []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            reason = str(error).splitlines()[0]
            problems.append(
                Problem(text, f"is not of the form key=value ({reason}). Quote values with special characters.")
            )
    return parsed, problems


def _wrong_option(override: Override) -> Problem | None:
    options = groups().get(override.key_or_group)
    choice = override.value()
    if options is None or override.is_delete() or (isinstance(choice, str) and choice in options):
        return None
    available = ", ".join(options)
    return Problem(
        override.key_or_group, f"no option {choice!r}. Available: {available}.{did_you_mean(str(choice), options)}"
    )


def _forced(override: Override) -> str:
    """Hydra refuses keys that no YAML mentions; ours are known by the constructors, so the check decides."""
    text = str(override.input_line)
    is_value = override.key_or_group not in groups() and not text.startswith(("+", "~"))
    return f"++{text}" if is_value else text


def _missing(config: Any, path: str = "") -> list[str]:
    """Paths whose value is still ``???``."""
    if isinstance(config, Mapping):
        return [found for key, value in config.items() for found in _missing(value, f"{path}.{key}".lstrip("."))]
    if isinstance(config, list):
        return [found for index, value in enumerate(config) for found in _missing(value, f"{path}[{index}]")]
    return [path] if config == "???" else []
