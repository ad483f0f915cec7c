"""Checks a component's configuration against its constructor's annotations, before anything is built.

A constructor's signature is the only schema there is: its parameter names are the valid keys, its defaults the
defaults, its annotations the types and ranges. ``Annotated`` metadata adds what a type cannot say:

* ``annotated_types`` constraints (``Ge``, ``Le``, ...) give ranges; the aliases below name the usual ones;
* ``Component(kind)`` says that the value is itself a component's configuration, ``{"name": ..., **arguments}``;
* ``PROVIDED`` says that the surrounding code passes the value, so that a configuration may leave it out or null.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """Annotation metadata: the value configures a component of this kind (see ``pirl_plugin.registry``)."""

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

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        # torch's DataLoader raises a worker's error again as ``type(error)(message)``
        self.problems = [Problem("", problems)] if isinstance(problems, str) else list(problems)
        super().__init__(problems if isinstance(problems, str) else "\n".join(map(str, self.problems)))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[Problem]]]:
        return type(self), (self.problems,)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the nearest of ``names``, or an empty string where none is near."""
    near = difflib.get_close_matches(str(name), list(names), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def join(path: str, key: str | int) -> str:
    """Appends a key to a path: ``join("loss", "lam")`` is ``"loss.lam"``, ``join("hooks", 0)`` is ``"hooks[0]"``."""
    if isinstance(key, int):
        return f"{path}[{key}]"
    return f"{path}.{key}" if path else key


@functools.cache
def parameters(callable_: Callable[..., Any]) -> dict[str, tuple[Any, inspect.Parameter]]:
    """Annotation and ``inspect.Parameter`` of each named parameter, ``self`` left out.

    A constructor with ``**kwargs`` hands them to the next one up the line of base classes: that one's parameters are
    parameters of this class too, its own first.
    """
    target = callable_.__init__ if inspect.isclass(callable_) else callable_  # type: ignore[misc]
    target = inspect.unwrap(target)
    hints = typing.get_type_hints(target, include_extras=True)
    found, passes_on = {}, False
    for name, parameter in inspect.signature(target).parameters.items():
        passes_on |= parameter.kind is parameter.VAR_KEYWORD
        if name != "self" and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            found[name] = (hints.get(name, Any), parameter)
    if passes_on and inspect.isclass(callable_):
        _, *bases = [cls for cls in callable_.__mro__ if "__init__" in vars(cls)]
        above = parameters(bases[0]) if bases else {}
        found |= {name: value for name, value in above.items() if name not in found}
    return found


def metadata(annotation: Any, kind: type) -> list[Any]:
    """All ``Annotated`` metadata of type ``kind`` anywhere in an annotation."""
    here = [item for item in getattr(annotation, "__metadata__", ()) if isinstance(item, kind)]
    return here + [item for part in typing.get_args(annotation) for item in metadata(part, kind)]


def component_kind(annotation: Any) -> str | None:
    """Kind of the component, or of those in a list or mapping, that an annotation asks for; None for others."""
    kinds = metadata(annotation, Component)
    return kinds[0].kind if kinds else None


def is_provided(annotation: Any) -> bool:
    """Whether the surrounding code passes this argument."""
    return bool(metadata(annotation, _Provided))


def check_value(annotation: Any, value: Any, path: str) -> list[Problem]:
    """Every problem of one value; its type must match as it is, nothing is converted except int to float."""
    # Python 3.10 calls Sequence[int] a class too
    is_class = inspect.isclass(annotation) and typing.get_origin(annotation) is None
    if is_class and annotation.__module__ not in ("builtins", "typing"):
        fits = isinstance(value, annotation)
        return [] if fits else [Problem(path, f"must be a {annotation.__name__}, got {value!r}.")]
    try:
        _adapter(annotation).validate_python(value)
    except pydantic.ValidationError as error:
        return _problems(error.errors(), path, value)
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
        here, provided = join(path, name), bool(metadata(annotation, _Provided))
        if name in arguments and not (provided and arguments[name] is None):
            kinds = metadata(annotation, Component)
            if kinds and check_component is not None and arguments[name] is not None:
                problems += _check_components(kinds[0].kind, arguments[name], annotation, here, check_component)
            else:
                problems += check_value(annotation, arguments[name], here)
        elif parameter.default is parameter.empty and not provided:
            problems.append(Problem(here, f"missing; it must be {describe(annotation)}."))
    return problems


def missing_provided(callable_: Callable[..., Any], arguments: Mapping[str, Any]) -> list[Problem]:
    """A problem for each ``PROVIDED`` parameter that nobody provided, to be held against before a call."""
    return [
        Problem(name, f"missing; the surrounding code did not give it: it must be {describe(annotation)}.")
        for name, (annotation, parameter) in parameters(callable_).items()
        if metadata(annotation, _Provided)
        and (arguments[name] is None if name in arguments else parameter.default is parameter.empty)
        and check_value(annotation, None, name)
    ]


def checked(cls: _Class) -> _Class:
    """Class decorator: the constructor holds its arguments against its own annotations and raises ``ConfigError``."""
    original = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs).arguments  # a wrong keyword is Python's own TypeError
        given = {name: value for name, value in bound.items() if name in parameters(cls)}
        problems = [
            problem for name, value in given.items() for problem in check_value(parameters(cls)[name][0], value, name)
        ]
        if problems:
            raise ConfigError(problems)
        original(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


def describe(annotation: Any) -> str:
    """A short human name of an annotation, for messages and tables."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if metadata_here(annotation):
        kind = metadata_here(annotation)[0].kind
        return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} configuration ({{'name': ...}})"
    if origin is Annotated:
        bounds = ", ".join(_bound(item) for item in parts[1:] if _bound(item))
        return f"{describe(parts[0])} {bounds}".strip()
    if origin is typing.Literal:
        return " | ".join(repr(choice) for choice in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else describe(part) for part in parts)
    if parts and origin in (list, Sequence):
        return f"list of {describe(parts[0])}"
    if parts and origin in (dict, Mapping):
        return "mapping" if parts[1] is Any else f"mapping of {describe(parts[1])}"
    text = str(annotation) if origin else getattr(annotation, "__name__", str(annotation))
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


def _problems(errors: Iterable[Any], path: str, value: Any) -> list[Problem]:
    """One problem for each place; what several branches of a union say about the same place is joined."""
    places: dict[tuple[Any, ...], list[Any]] = {}
    for error in errors:
        places.setdefault(_place(error["loc"], value), []).append(error)
    # int | list[int] and [1, "x"]: that element 1 is no integer says more than that the list is none
    deepest = [at for at in places if not any(other[: len(at)] == at and other != at for other in places)]
    return [Problem(functools.reduce(join, at, path), _message(places[at])) for at in deepest]


def _place(location: Iterable[Any], value: Any) -> tuple[Any, ...]:
    """The keys and indices of a pydantic location that are really in ``value``; the rest name branches of unions."""
    found = []
    for key in location:
        is_key = isinstance(value, Mapping) and key in value
        is_index = isinstance(value, (list, tuple)) and isinstance(key, int) and key < len(value)
        if is_key or is_index:
            found.append(key)
            value = value[key]
    return tuple(found)


def _message(errors: list[Any]) -> str:
    said = [error for error in errors if error["type"] != "none_required"] or errors  # "or null" helps nobody
    phrases, hint = [], ""
    for error in said:
        phrase = error["msg"].replace("Input should be", "must be").replace("a valid ", "a ").replace("a int", "an int")
        phrases.append(phrase)
        if error["type"] == "literal_error":
            expected = error["ctx"]["expected"].replace(" or ", ",").split(",")
            hint = did_you_mean(str(error["input"]), [choice.strip("' ") for choice in expected])
    first, *others = dict.fromkeys(phrases)
    allowed = " or ".join([first, *(other.removeprefix("must be ") for other in others)])
    return f"{allowed}, got {said[0]['input']!r}.{hint}"


def _check_components(
    kind: str, value: Any, annotation: Any, path: str, check_component: Callable[[str, Any, str], list[Problem]]
) -> list[Problem]:
    """Checks one component, a list of them or a mapping of them, as the annotation's outer shape says."""
    branches = typing.get_args(annotation) if _is_optional(annotation) else (annotation,)
    if any(metadata_here(branch) for branch in branches):
        return check_component(kind, value, path)
    if any(list in (branch, typing.get_origin(branch)) for branch in branches):
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
