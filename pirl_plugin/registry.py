"""Names of components: classy-vision's registries where it has one, ours where it has none.

>>> build("memory_bank", {"name": "ema_memory_bank", "momentum": 0.5}, num_images=10, dim=4)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, TypeVar

from classy_vision.dataset import DATASET_REGISTRY
from classy_vision.dataset.transforms import TRANSFORM_REGISTRY
from classy_vision.heads import HEAD_REGISTRY
from classy_vision.hooks import HOOK_REGISTRY, ClassyHook
from classy_vision.losses import LOSS_REGISTRY
from classy_vision.models import MODEL_REGISTRY
from classy_vision.optim import OPTIMIZER_REGISTRY
from classy_vision.tasks import TASK_REGISTRY

from pirl_plugin.schema import (
    ConfigError,
    Problem,
    check_arguments,
    component_kind,
    did_you_mean,
    is_provided,
    join,
    missing_provided,
    parameters,
)

_Registered = TypeVar("_Registered", bound=type)

REGISTRIES: dict[str, MutableMapping[str, type]] = {
    "task": TASK_REGISTRY,
    "dataset": DATASET_REGISTRY,
    "transform": TRANSFORM_REGISTRY,
    "collator": {},
    "model": MODEL_REGISTRY,
    "head": HEAD_REGISTRY,
    "loss": LOSS_REGISTRY,
    "memory_bank": {},
    "optimizer": OPTIMIZER_REGISTRY,
    "hook": HOOK_REGISTRY,
    "benchmark": {},
    "launcher": {},
}


def _registers(kind: str) -> Callable[[str], Callable[[_Registered], _Registered]]:
    def register(name: str) -> Callable[[_Registered], _Registered]:
        def decorate(cls: _Registered) -> _Registered:
            taken = REGISTRIES[kind].get(name)
            if taken is not None:
                raise ValueError(f"{kind} {name!r} is registered already, by {taken.__module__}.{taken.__qualname__}.")
            REGISTRIES[kind][name] = cls
            return cls

        return decorate

    register.__doc__ = f"Class decorator: makes a {kind} known under ``name``."
    return register


register_collator = _registers("collator")
register_memory_bank = _registers("memory_bank")
register_benchmark = _registers("benchmark")
register_launcher = _registers("launcher")


def lookup(kind: str, name: str) -> type:
    """The class registered under ``name``.

    Raises:
        ConfigError: no such name; lists the names there are and suggests the nearest.
    """
    registry = REGISTRIES[kind]
    if name not in registry:
        available = ", ".join(sorted(ours(kind)) or sorted(registry))
        raise ConfigError(
            [Problem("", f"Unknown {kind} {name!r}. Available: {available}.{did_you_mean(name, registry)}")]
        )
    return registry[name]


def ours(kind: str) -> dict[str, type]:
    """Components of a kind that do not come with classy-vision itself: this package's and plugins'."""
    return {
        name: cls
        for name, cls in REGISTRIES[kind].items()
        if cls.__module__.partition(".")[0] not in ("classy_vision", "torchvision")
    }


def check(kind: str, config: Any, path: str = "") -> list[Problem]:
    """Every problem of a component's configuration ``{"name": ..., **arguments}``, nested components included."""
    if not isinstance(config, Mapping):
        return [Problem(path, f"must be a {kind} configuration with a 'name', got {config!r}.")]
    if "name" not in config:
        return [Problem(join(path, "name"), f"missing; it must name a {kind}: {', '.join(sorted(ours(kind)))}.")]
    if not isinstance(config["name"], str):
        return [Problem(join(path, "name"), f"must be the name of a {kind}, got {config['name']!r}.")]
    try:
        cls = lookup(kind, config["name"])
    except ConfigError as error:
        return [Problem(join(path, "name"), str(problem.message)) for problem in error.problems]
    if not _takes_keywords(cls):
        return []  # the host's own component with a parser of its own: it checks itself when built
    arguments = {key: value for key, value in config.items() if key != "name"}
    return check_arguments(cls, arguments, path, check)


def build(kind: str, config: Mapping[str, Any], **provided: Any) -> Any:
    """Builds a component from ``{"name": ..., **arguments}``; ``provided`` is what the surrounding code knows.

    A null in the configuration gives way to a provided value, anything else in it wins. The component gets those of the
    provided values that it takes.

    Raises:
        ConfigError: unknown name or wrong arguments, all of them at once.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(check(kind, config))
    known = {key: value for key, value in config.items() if not (value is None and key in provided)}
    problems = check(kind, known)
    if problems:
        raise ConfigError(problems)
    cls = lookup(kind, known.pop("name"))
    if not _takes_keywords(cls):
        return cls.from_config({"name": config["name"], **provided, **known})  # type: ignore[attr-defined]
    taken = {key: value for key, value in provided.items() if key in parameters(cls)}
    arguments = {**taken, **known}
    problems = missing_provided(cls, arguments)
    if problems:
        raise ConfigError(problems)
    return cls(**arguments)


def completed(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with every default of every component written out, nested components included.

    What only the surrounding code knows stays out. The result builds the same component.
    """
    cls = lookup(kind, config["name"])
    if not _takes_keywords(cls):
        return dict(config)
    complete = {"name": config["name"]}
    for key, (annotation, parameter) in parameters(cls).items():
        if key in config:
            value = config[key]
        elif parameter.default is not parameter.empty and not is_provided(annotation):
            value = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        else:
            continue
        nested = component_kind(annotation)
        complete[key] = _map_components(nested, value) if nested and value is not None else value
    return complete


def _map_components(kind: str, value: Any) -> Any:
    """Completes one component, a list of them or a mapping of them."""
    if isinstance(value, Mapping) and "name" in value:
        return completed(kind, value)
    if isinstance(value, Mapping):
        return {key: completed(kind, item) for key, item in value.items()}
    return [completed(kind, item) for item in value]


def working_hooks(hooks: Iterable[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    """Of the hooks' configurations, those whose work a model or a loss needs: the others only look on."""
    return [hook for hook in hooks or () if hasattr(lookup("hook", hook["name"]), "only_where_needed")]


class Configurable:
    """Mixin: ``from_config`` of a component whose constructor takes flat keyword arguments."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Any:
        """Builds from ``{"name": ..., **arguments}``, as classy-vision's ``build_*`` functions call it."""
        arguments = {key: value for key, value in config.items() if key != "name"}
        problems = check_arguments(cls, arguments, check_component=check) + missing_provided(cls, arguments)
        if problems:
            raise ConfigError(problems)
        return cls(**arguments)


def summary(cls: type) -> str:
    """First line of a component's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _takes_keywords(cls: type) -> bool:
    from_config = getattr(cls, "from_config", None)
    if from_config is None or issubclass(cls, Configurable):
        return True
    return getattr(from_config, "__func__", None) is ClassyHook.from_config.__func__  # type: ignore[attr-defined]
