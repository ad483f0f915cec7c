"""What is registered, as data and as a table: the logic of ``tools/list.py``."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pirl_plugin.config import CONFIG_FOLDER, folders
from pirl_plugin.registry import REGISTRIES, ours, summary
from pirl_plugin.schema import PROVIDED, ConfigError, Problem, describe, did_you_mean, metadata, parameters


@dataclass(frozen=True)
class ParameterInfo:
    """One constructor parameter, which is one key of the component's configuration."""

    name: str
    type: str
    default: str | None
    """``None``: there is no default."""
    provided: bool
    """The surrounding code passes it, so that a configuration need not hold it."""

    def __str__(self) -> str:
        value = " (given by the surrounding code)" if self.provided else " (required)"
        return f"{self.name}: {self.type}" + (value if self.default is None else f" = {self.default}")


@dataclass(frozen=True)
class ComponentInfo:
    """One registered name."""

    kind: str
    name: str
    summary: str
    defined_in: str
    parameters: list[ParameterInfo] = field(default_factory=list)


@dataclass(frozen=True)
class MethodInfo:
    """One pretraining method: a YAML in ``method/`` and what its ``about`` says."""

    name: str
    paper: str
    year: int | None
    needs: str
    path: str
    kind: str = "method"


def methods(*roots: Path) -> list[MethodInfo]:
    """The methods whose YAMLs lie in ``method/`` of the configuration folders, by name.

    A variant's ``about`` is that of the method it starts from, with its own over it.

    Args:
        *roots: folders to look in, the first that has a name counts; none: ours and the plugins'.
    """
    roots = roots or folders()
    found: dict[str, MethodInfo] = {}
    for root in roots:
        for path in sorted((root / "method").glob("*.yaml")):
            about = _about(path.stem, roots)
            year = about.get("year")
            # a plugin's folder has the same name as ours: its package tells them apart
            place = path.relative_to(root.parent if root == CONFIG_FOLDER else root.parents[1]).as_posix()
            info = MethodInfo(
                name=path.stem,
                paper=str(about.get("paper", "")),
                year=None if year is None else int(year),
                needs=str(about.get("needs", "")),
                path=place,
            )
            found.setdefault(path.stem, info)
    return [found[name] for name in sorted(found)]


def methods_as_text(infos: Iterable[MethodInfo]) -> str:
    """A plain-text table of methods: a line each."""
    rows = [(info.name, info.paper, str(info.year or ""), info.needs, info.path) for info in infos]
    table = [("method", "paper", "year", "needs", "YAML"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
    )


def _about(method: str, roots: Iterable[Path]) -> dict[str, Any]:
    """``about`` of a method's YAML, over that of the methods that it starts from."""
    roots = list(roots)
    paths = [path for root in roots if (path := root / "method" / f"{method}.yaml").is_file()]
    content = yaml.safe_load(paths[0].read_text(encoding="utf-8")) or {}
    inherited: dict[str, Any] = {}
    for entry in content.get("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            inherited |= _about(entry, roots)
    return inherited | (content.get("about") or {})


def components(kinds: Iterable[str] = (), host: bool = False) -> list[ComponentInfo]:
    """Registered components, sorted by kind (in the order of ``REGISTRIES``) and name.

    Args:
        kinds: which kinds; all of them where it is empty.
        host: also list what comes with classy-vision itself.

    Raises:
        ConfigError: there is no such kind.
    """
    kinds = list(kinds)
    unknown = [kind for kind in kinds if kind not in REGISTRIES]
    if unknown:
        message, known = "Unknown kind {!r}. Available: {}.{}", ("methods", *REGISTRIES)
        raise ConfigError(
            Problem("kind", message.format(kind, ", ".join(known), did_you_mean(kind, known))) for kind in unknown
        )
    return [
        ComponentInfo(kind, name, summary(cls), f"{cls.__module__}.{cls.__qualname__}", _parameters(cls))
        for kind in REGISTRIES
        if kind in kinds or not kinds
        for name, cls in sorted((REGISTRIES[kind] if host else ours(kind)).items())
    ]


def as_text(infos: Iterable[ComponentInfo], with_parameters: bool = True) -> str:
    """A plain-text table: a paragraph for each kind, a line for each name, a line for each parameter."""
    infos = list(infos)
    width = max((len(info.name) for info in infos), default=0)
    lines: list[str] = []
    kind = ""
    for info in infos:
        if info.kind != kind:
            kind = info.kind
            lines += ["", kind] if lines else [kind]
        lines.append(f"  {info.name:{width}}  {info.summary}".rstrip())
        if with_parameters:
            lines += [f"      {parameter}" for parameter in info.parameters]
    return "\n".join(lines) if lines else "Nothing is registered."


def _parameters(cls: type) -> list[ParameterInfo]:
    try:
        known = parameters(cls)
    except (NameError, TypeError, ValueError):  # a host class whose annotations cannot be resolved
        known = {}
    return [
        ParameterInfo(
            name=name,
            type="any" if annotation is Any else describe(annotation),
            default=None if parameter.default is inspect.Parameter.empty else _literal(parameter.default),
            provided=bool(metadata(annotation, type(PROVIDED))),
        )
        for name, (annotation, parameter) in known.items()
    ]


def _literal(value: Any) -> str:
    """A default as YAML would write it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else repr(value)
