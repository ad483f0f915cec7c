"""Checks a component's configuration against its constructor's annotations, before anything is built.

A constructor's signature is the only schema there is: its parameter names are the valid keys, its defaults the defaults,
its annotations the types and ranges. ``Annotated`` metadata adds what a type cannot say:

* ``annotated_types`` constraints (``Ge``, ``Le``, ...) give ranges; the aliases below name the usual ones;
* ``Component(kind)`` says that the value is itself a component's configuration, ``{"name": ..., **arguments}``;
* ``PROVIDED`` says that the surrounding code passes the value, so that a configuration need not hold it.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import pydantic
from annotated_types import Ge, Gt, Interval

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Interval(ge=0, le=1)]

_STRICT = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True)
_Class = TypeVar("_Class", bound=type)


@dataclass(frozen=True)
class Component:
    """Annotation metadata: the value is the configuration of a component of this kind (see ``pirl_plugin.registry``)."""

    kind: str


@dataclass(frozen=True)
class _Provided:
    pass


PROVIDED = _Provided()


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a configuration."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path or '(top level)'}: {self.message}"


class ConfigError(ValueError):
    """A configuration that cannot be built; holds every problem found, not only the first."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the nearest of ``names``, or an empty string where none is near."""
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def join(path: str, key: str | int) -> str:
    """Appends a key to a dotted path: ``join("loss", "lam")`` is ``"loss.lam"``, ``join("hooks", 0)`` is ``"hooks[0]"``."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key


@functools.cache
def parameters(callable_: Callable[..., Any]) -> dict[str, tuple[Any, inspect.Parameter]]:
    """Annotation and ``inspect.Parameter`` of each named parameter, ``self`` and catch-alls left out."""
    target = callable_.__init__ if inspect.isclass(callable_) else callable_  # type: ignore[misc]
    target = inspect.unwrap(target)
    hints = typing.get_type_hints(target, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            found[name] = (hints.get(name, Any), parameter)
    return found


def metadata(annotation: Any, kind: type) -> list[Any]:
    """All ``Annotated`` metadata of type ``kind`` anywhere in an annotation."""
    here = [item for item in getattr(annotation, "__metadata__", ()) if isinstance(item, kind)]
    return here + [item for part in typing.get_args(annotation) for item in metadata(part, kind)]


def check_value(annotation: Any, value: Any, path: str) -> list[Problem]:
    """Holds one value against an annotation; the type must match as it is, nothing is converted except int to float."""
    if inspect.isclass(annotation) and annotation.__module__ not in ("builtins", "typing"):
        return [] if isinstance(value, annotation) else [Problem(path, f"must be a {annotation.__name__}, got {value!r}.")]
    try:
        _adapter(annotation).validate_python(value)
    except pydantic.ValidationError as error:
        return [_problem(item, path, value) for item in _of_the_likeliest_branch(error.errors())]
    return []


def check_arguments(
    callable_: Callable[..., Any],
    arguments: Mapping[str, Any],
    path: str = "",
    check_component: Callable[[str, Any, str], list[Problem]] | None = None,
) -> list[Problem]:
    """Every problem of ``arguments`` as keyword arguments of ``callable_``.

    Args:
        callable_: a class (its ``__init__`` is meant) or a function, annotated.
        arguments: the keyword arguments, as read from a configuration.
        path: dotted path of ``arguments`` in the whole configuration, for the messages.
        check_component: how to check a nested component, ``(kind, config, path) -> problems``; without it nested
            components are only checked to be mappings or lists.
    """
    known = parameters(callable_)
    problems = []
    for key in arguments:
        if key not in known:
            valid = ", ".join(known) or "none"
            problems.append(Problem(join(path, key), f"unknown key.{did_you_mean(key, known)} Valid keys: {valid}."))
    for name, (annotation, parameter) in known.items():
        if name in arguments:
            kinds = metadata(annotation, Component)
            if kinds and check_component is not None and arguments[name] is not None:
                problems += _check_components(kinds[0].kind, arguments[name], annotation, join(path, name), check_component)
            else:
                problems += check_value(annotation, arguments[name], join(path, name))
        elif parameter.default is parameter.empty and not metadata(annotation, _Provided):
            problems.append(Problem(join(path, name), f"missing; it must be {describe(annotation)}."))
    return problems


def checked(cls: _Class) -> _Class:
    """Class decorator: the constructor holds its arguments against its own annotations and raises ``ConfigError``."""
    original = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs).arguments  # a wrong keyword is Python's own TypeError
        given = {name: value for name, value in bound.items() if name in parameters(cls)}
        problems = [
            problem
            for name, value in given.items()
            for problem in check_value(parameters(cls)[name][0], value, name)
        ]
        if problems:
            raise ConfigError(problems)
        original(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


def describe(annotation: Any) -> str:
    """A short human name of an annotation, for messages and tables."""
    if metadata(annotation, Component):
        return f"a {metadata(annotation, Component)[0].kind} configuration ({{'name': ...}})"
    text = str(annotation) if typing.get_origin(annotation) else getattr(annotation, "__name__", str(annotation))
    if typing.get_origin(annotation) is Annotated:
        inner, *extra = typing.get_args(annotation)
        bounds = ", ".join(_bound(item) for item in extra if _bound(item))
        return f"{describe(inner)} {bounds}".strip()
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(repr(choice) for choice in typing.get_args(annotation))
    if type(None) in typing.get_args(annotation):
        return " or ".join("null" if part is type(None) else describe(part) for part in typing.get_args(annotation))
    return text.replace("typing.", "")


def _bound(item: Any) -> str:
    pairs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    return ", ".join(f"{sign} {getattr(item, key)}" for key, sign in pairs if getattr(item, key, None) is not None)


@functools.cache
def _adapter_of_hashable(annotation: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(annotation, config=_STRICT)


def _adapter(annotation: Any) -> pydantic.TypeAdapter[Any]:
    try:
        return _adapter_of_hashable(annotation)
    except TypeError:  # unhashable metadata
        return pydantic.TypeAdapter(annotation, config=_STRICT)


def _of_the_likeliest_branch(errors: list[Any]) -> list[Any]:
    """A union reports its branches one by one; a range error says more than "not null either"."""
    ranged = [error for error in errors if not error["type"].endswith("_type") and error["type"] != "none_required"]
    return ranged[:1] or errors[:1]


def _problem(error: Any, path: str, value: Any) -> Problem:
    for key in error["loc"]:
        if isinstance(key, int) or (isinstance(value, Mapping) and key in value):
            path = join(path, key)
    message = error["msg"].replace("Input should be", "must be").replace("a valid integer", "an integer").replace("a valid ", "a ")
    got = error["input"]
    hint = ""
    if error["type"] == "literal_error":
        hint = did_you_mean(str(got), [choice.strip("' ") for choice in error["ctx"]["expected"].replace(" or ", ",").split(",")])
    return Problem(path, f"{message}, got {got!r}.{hint}")


def _check_components(
    kind: str, value: Any, annotation: Any, path: str, check_component: Callable[[str, Any, str], list[Problem]]
) -> list[Problem]:
    """Checks one component, a list of them or a mapping of them, as the annotation's outer shape says."""
    shapes = [typing.get_origin(part) or part for part in (annotation, *typing.get_args(annotation))]
    is_component = any(metadata_here(annotation)) or any(any(metadata_here(p)) for p in typing.get_args(annotation) if _is_optional(annotation))
    if is_component:
        return check_component(kind, value, path)
    if list in shapes:
        if not isinstance(value, list):
            return [Problem(path, f"must be a list, got {value!r}.")]
        return [p for index, item in enumerate(value) for p in check_component(kind, item, join(path, index))]
    if not isinstance(value, Mapping):
        return [Problem(path, f"must be a mapping, got {value!r}.")]
    return [p for key, item in value.items() for p in check_component(kind, item, join(path, key))]


def metadata_here(annotation: Any) -> list[Any]:
    """``Component`` metadata of the annotation itself, not of what it contains."""
    return [item for item in getattr(annotation, "__metadata__", ()) if isinstance(item, Component)]


def _is_optional(annotation: Any) -> bool:
    return type(None) in typing.get_args(annotation)
