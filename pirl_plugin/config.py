"""From a command line to a checked plain dictionary: Hydra composes, the constructors' signatures check.

Nothing is rewritten on the way: the composed YAML is what is built. Unknown keys are let through to the check on
purpose, which then reports all of them at once with their paths and the nearest valid names.
"""

from __future__ import annotations

import copy
import difflib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import benchmark_configs
from pirl_plugin import plugins, registry
from pirl_plugin.schema import ConfigError, Problem, did_you_mean, parameters

CONFIG_FOLDER = Path(benchmark_configs.__file__).resolve().parent

log = logging.getLogger(__name__)

# what people call things that have another name here
_SYNONYMS = {"learning_rate": "lr", "lambda": "lam", "epochs": "num_epochs", "workers": "num_workers"}


def folders() -> tuple[Path, ...]:
    """Where YAMLs are looked for: ``benchmark_configs/``, then the plugins' folders; installed plugins are imported."""
    plugins.load_installed()
    return (CONFIG_FOLDER, *(folder for folder in plugins.folders() if folder != CONFIG_FOLDER))


def groups() -> dict[str, list[str]]:
    """Configuration groups and their options, as they lie in ``benchmark_configs/`` and in the plugins' folders."""
    return _groups(folders())


@functools.cache
def _groups(roots: tuple[Path, ...]) -> dict[str, list[str]]:
    found: dict[str, dict[str, Path]] = {}
    for root in roots:
        for folder in sorted(item for item in root.iterdir() if item.is_dir() and not item.name.startswith("_")):
            for file in sorted(folder.glob("*.yaml")):
                first = found.setdefault(folder.name, {}).setdefault(file.stem, file)
                if first != file:
                    log.warning("%s is not used: %s=%s is %s already", file, folder.name, file.stem, first)
    return {group: sorted(options) for group, options in sorted(found.items())}


def load(
    name: str, overrides: Sequence[str], problems_of: Callable[[dict[str, Any]], list[Problem]] | None = None
) -> dict[str, Any]:
    """Composes ``benchmark_configs/NAME.yaml`` with overrides and checks it: a plain dictionary, ready to be built.

    Args:
        name: ``train``, ``benchmark``, ...
        overrides: ``trunk=resnet18``, ``optimizer.lr=0.1``, ..., in Hydra's syntax.
        problems_of: what is wrong with a composed configuration; default: as the configuration of a task. Values left
            to the user (``???``) and plugins are seen to here.

    Raises:
        ConfigError: every problem of the overrides and of the configuration at once, each with its path.
    """
    parsed, problems = _parse(overrides)
    for override in parsed:
        if override.key_or_group == "plugins" and not override.is_delete():
            problems += import_plugins(override.value())  # before composing: they may bring YAMLs with them
    config, more, doubtful = _compose(name, parsed)
    found = _check(config, problems_of or task_problems)
    problems += [*more, *(problem for problem in found if problem.path.partition(".")[0] not in doubtful)]
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return config


def task_problems(config: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the configuration of a task."""
    return registry.check("task", config)


def check(kind: str, config: Mapping[str, Any]) -> None:
    """Holds a composed configuration against the components it names, plugins imported first.

    Raises:
        ConfigError: every problem at once, each with its path.
    """
    problems = _check(config, functools.partial(registry.check, kind))
    if problems:
        raise ConfigError(problems)


def _check(config: Mapping[str, Any], problems_of: Callable[[Any], list[Problem]]) -> list[Problem]:
    problems = import_plugins(config.get("plugins")) + unset(config)
    said = {problem.path for problem in problems}
    found = [_with_hint(problem, config) for problem in problems_of(config) if problem.path not in said]
    return problems + found


def unset(config: Mapping[str, Any]) -> list[Problem]:
    """A problem for each value that a YAML leaves to the user (``???``) and the user has not given."""
    return [Problem(path, f"must be set: {path}=...") for path in _missing(config)]


def import_plugins(modules: Any) -> list[Problem]:
    """Imports the modules that register a user's own components; a problem for each that cannot be imported."""
    problems = []
    names = modules if isinstance(modules, list) else []  # that it must be a list of names, the signature says
    for index, module in enumerate(names):
        try:
            if isinstance(module, str):
                plugins.load(module)
        except Exception as error:  # a module of the user's: whatever goes wrong in it
            kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
            hint = " It must lie in a folder on PYTHONPATH." if isinstance(error, ModuleNotFoundError) else ""
            problems.append(Problem(f"plugins[{index}]", f"cannot import {module!r}: {kind}{error}.{hint}"))
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
    """Overrides that can be read, and a problem for each of the others."""
    parser, parsed, problems = OverridesParser.create(), [], []
    for text in overrides:
        key, equals, value = text.partition("=")
        quoted = f"""'{key}="{value}"'"""
        try:
            override = parser.parse_override(text)
        except HydraException:
            override = None
        if not equals and not text.startswith("~"):
            options = groups().get(text)
            hint = f" Available: {', '.join(options)}." if options else ""
            problems.append(Problem(text, f"has no value: write {text}=...{hint}"))
        elif not key.strip("+~ "):
            problems.append(Problem(text, "has no key: write key=value."))
        elif override is None:
            problems.append(Problem(key, f"cannot read {value!r}. Quote special characters: {quoted}."))
        elif override.is_sweep_override():
            problems.append(Problem(key, f"takes one value, got {value!r}. A list: {key}=[{value}]; text: {quoted}."))
        elif override.package is not None:
            problems.append(Problem(key, "a package (@) has no meaning here: leave it out."))
        elif override.key_or_group.partition(".")[0] == "hydra":
            problems.append(Problem(key, "Hydra's own settings have no effect here."))
        else:
            parsed.append(override)
    return parsed, problems


def _compose(name: str, overrides: Sequence[Override]) -> tuple[dict[str, Any], list[Problem], set[str]]:
    """Composed configuration, problems of single overrides, and the groups that stand for a choice nobody understood.

    Hydra composes the choices. The values follow one by one, so that each mistake is known by its own override.
    """
    choices = [override for override in overrides if _is_choice(override)]
    problems, good, doubtful = _choices(name, choices)
    try:
        config = copy.deepcopy(_chosen(name, tuple(good), folders()))
    except (HydraException, OmegaConfBaseException) as error:  # each by itself was right
        problems.append(Problem("", " ".join(str(error).split())))
        config, doubtful = copy.deepcopy(_chosen(name, (), folders())), {override.key_or_group for override in choices}
    for override in overrides:
        if _is_choice(override):
            continue
        before = copy.deepcopy(config)
        try:
            _set(config, override)
            OmegaConf.to_container(config, resolve=True)
        except (OmegaConfBaseException, LookupError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).partition("\n")[0].strip("'\"")
            problems.append(Problem(override.key_or_group, f"cannot be set by {override.input_line!r}: {reason}."))
            config = before
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}, problems, doubtful


def _choices(name: str, overrides: Sequence[Override]) -> tuple[list[Problem], list[str], set[str]]:
    """Problems of the choices of options, the choices to go on with, and the groups without any."""
    problems, good, doubtful = [], [], set()
    for override in overrides:
        group, choice = override.key_or_group, override.value()
        options = groups()[group]
        text = str(override.input_line)
        if not (override.is_delete() or (isinstance(choice, str) and choice in options)):
            given, near = "null" if choice is None else repr(choice), did_you_mean(str(choice), options)
            problems.append(Problem(group, f"no option {given}. Available: {', '.join(options)}.{near}"))
            # with the option that was probably meant, the rest of the command line can be checked too
            text = "".join(f"{group}={option}" for option in difflib.get_close_matches(str(choice), options, n=1))
        try:
            if text:
                _chosen(name, (text,), folders())
                good.append(text)
            else:
                doubtful.add(group)
        except (HydraException, OmegaConfBaseException) as error:
            doubtful.add(group)
            unused = "No match in the defaults list" in str(error)
            reason = f"this command takes no {group}" if unused else " ".join(str(error).split())
            problems.append(Problem(group, f"{reason}."))
    return problems, good, doubtful


@functools.cache
def _chosen(name: str, choices: tuple[str, ...], roots: tuple[Path, ...]) -> DictConfig:
    first, *others = roots
    quoted = ("'file://" + str(root).replace("\\", "\\\\").replace("'", "\\'") + "'" for root in others)
    search = [f"hydra.searchpath=[{','.join(quoted)}]"] if others else []
    with initialize_config_dir(str(first), version_base="1.3"):
        config = compose(name, [*choices, *search])
    OmegaConf.set_struct(config, False)  # keys that no YAML mentions are known by the constructors: the check decides
    return config


def _is_choice(override: Override) -> bool:
    """Whether it chooses a group's option; ``++method=NAME`` sets the value of that name, as a benchmark's label is."""
    return override.key_or_group in groups() and not override.is_force_add()


def _set(config: DictConfig, override: Override) -> None:
    key, value = override.key_or_group, override.value()
    if not override.is_delete():
        OmegaConf.update(config, key, value, merge=True, force_add=True)
        return
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig) or last not in node:
        raise KeyError("there is no such key to take out")
    del node[last]


def _with_hint(problem: Problem, config: Mapping[str, Any]) -> Problem:
    """Adds where a key of that name really is, to an unknown key that resembles none beside it."""
    group, _, name = problem.path.rpartition(".")
    if not problem.message.startswith("unknown key.") or "Did you mean" in problem.message:
        return problem
    hint = _belongs_to(group, name) if group in groups() else "" if group else _elsewhere(name, config)
    return Problem(problem.path, f"unknown key.{hint}{problem.message.removeprefix('unknown key.')}")


def _elsewhere(name: str, config: Mapping[str, Any]) -> str:
    """``lr`` at the top level is probably ``optimizer.lr``."""
    if did_you_mean(name, ["resume"]):
        return " A run resumes by itself: the same command, with the same run_dir."
    name = next((ours for theirs, ours in _SYNONYMS.items() if did_you_mean(name, [theirs])), name)
    paths = sorted((path for path in _paths(config) if path != name), key=lambda path: path.count("."))
    near = difflib.get_close_matches(name, [path.rpartition(".")[2] for path in paths], n=1)
    places = [repr(path) for path in paths if path.rpartition(".")[2] in near][:2]
    return f" Did you mean {' or '.join(places)}?" if places else ""


def _belongs_to(group: str, name: str) -> str:
    """``dataset.root`` without ``dataset=image_folder``: which components have that setting."""
    kind = {"trunk": "model"}.get(group, group)
    components = registry.ours(kind) if kind in registry.REGISTRIES else {}
    having = {option: difflib.get_close_matches(name, parameters(cls), n=1) for option, cls in components.items()}
    names = sorted(option for option, near in having.items() if near)
    if not names:
        return ""
    return f" {having[names[0]][0]!r} is a setting of {', '.join(names)}: choose one with {group}=... first."


def _paths(config: Any, path: str = "") -> list[str]:
    """Paths of all keys of nested mappings, outer ones first."""
    if not isinstance(config, Mapping):
        return [path]
    below = [found for key, value in config.items() for found in _paths(value, f"{path}.{key}".lstrip("."))]
    return ([path] if path else []) + below


def _missing(config: Any, path: str = "") -> list[str]:
    """Paths whose value is still ``???``."""
    if isinstance(config, Mapping):
        return [found for key, value in config.items() for found in _missing(value, f"{path}.{key}".lstrip("."))]
    if isinstance(config, list):
        return [found for index, value in enumerate(config) for found in _missing(value, f"{path}[{index}]")]
    return [path] if config == "???" else []
