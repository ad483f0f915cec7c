from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Interval
from hypothesis import given
from hypothesis import strategies as st

from pirl_plugin.schema import (
    PROVIDED,
    Component,
    ConfigError,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Problem,
    check_arguments,
    check_value,
    checked,
    describe,
    did_you_mean,
    join,
    missing_provided,
    parameters,
)


class Base:
    def __init__(self, size: PositiveInt = 3, hue: Fraction = 0.5) -> None:
        self.size, self.hue = size, hue


class Middle(Base):
    """Without a constructor of its own."""


@checked
class PassesOn(Middle):
    def __init__(self, grid: PositiveInt = 2, size: PositiveInt = 9, **base: Any) -> None:
        super().__init__(size=size, **base)
        self.grid = grid


Bank = Annotated[dict[str, Any], Component("memory_bank")]


@checked
class Sample:
    def __init__(
        self,
        num_images: Annotated[PositiveInt, PROVIDED],
        temperature: PositiveFloat = 0.07,
        lam: Fraction = 0.5,
        estimator: Literal["nce", "softmax", "infonce"] = "nce",
        layers: list[str] | None = None,
        memory_bank: Bank | None = None,
    ) -> None:
        self.num_images, self.temperature, self.lam, self.estimator = num_images, temperature, lam, estimator
        self.layers, self.memory_bank = layers, memory_bank


def messages(problems: list[Problem]) -> list[str]:
    return [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, 3),
        (float, 0.5),
        (float, 3),  # YAML writes 1 where 1.0 is meant
        (bool, True),
        (PositiveInt, 1),
        (NonNegativeInt, 0),
        (Fraction, 0),
        (Fraction, 1),
        (PositiveInt | None, None),
        (Literal["auto"] | PositiveInt, "auto"),
        (Literal["auto"] | PositiveInt, 8),
        (list[int], []),
        (dict[str, Any], {"a": None}),
        (Sequence[int], [1, 2]),
        (Any, object()),
        (Problem, Problem("", "")),
    ],
)
def test_accepts(annotation: Any, value: Any) -> None:
    assert check_value(annotation, value, "p") == []


@pytest.mark.parametrize(
    ("annotation", "value", "message"),
    [
        (int, True, "p: must be an integer, got True."),
        (int, 3.0, "p: must be an integer, got 3.0."),
        (int, "3", "p: must be an integer, got '3'."),
        (int, None, "p: must be an integer, got None."),
        (float, "0.5", "p: must be a number, got '0.5'."),
        (float, True, "p: must be a number, got True."),
        (bool, 1, "p: must be a boolean, got 1."),
        (str, 1, "p: must be a string, got 1."),
        (PositiveInt, 0, "p: must be greater than or equal to 1, got 0."),
        (PositiveFloat, 0, "p: must be greater than 0, got 0."),
        (Fraction, 1.5, "p: must be less than or equal to 1, got 1.5."),
        (PositiveInt | None, 0, "p: must be greater than or equal to 1, got 0."),
        (PositiveInt | None, "x", "p: must be an integer, got 'x'."),
        (int | str, 1.5, "p: must be an integer or a string, got 1.5."),
        (Literal["a", "b"], "c", "p: must be 'a' or 'b', got 'c'."),
        (Literal["auto"] | PositiveInt, 0, "p: must be 'auto' or greater than or equal to 1, got 0."),
        (Problem, "x", "p: must be a Problem, got 'x'."),
        (list[dict[str, int]], [{"a": 1}, {"b": "x"}], "p[1].b: must be an integer, got 'x'."),
        (dict[str, dict[str, int]], {"a": {"b": "x"}}, "p.a.b: must be an integer, got 'x'."),
        (int | list[int], [1, "x"], "p[1]: must be an integer, got 'x'."),
    ],
)
def test_refuses_with_path_what_is_allowed_and_what_was_got(annotation: Any, value: Any, message: str) -> None:
    assert messages(check_value(annotation, value, "p")) == [message]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_fraction_is_a_number_in_range(value: float) -> None:
    assert len(check_value(Fraction, value, "p")) == 1


def test_every_element_of_a_list_is_checked() -> None:
    assert messages(check_value(list[PositiveInt], [0, 1, "x"], "sizes")) == [
        "sizes[0]: must be greater than or equal to 1, got 0.",
        "sizes[2]: must be an integer, got 'x'.",
    ]


def test_a_misspelt_choice_is_suggested() -> None:
    (problem,) = check_value(Literal["nce", "softmax", "infonce"], "sofmax", "estimator")
    assert str(problem) == ("estimator: must be 'nce', 'softmax' or 'infonce', got 'sofmax'. Did you mean 'softmax'?")


def test_all_problems_at_once_each_with_its_path() -> None:
    found = messages(check_arguments(Sample, {"temprature": 0.1, "lam": 2, "estimator": "nc", "layers": [1]}, "loss"))
    assert len(found) == 4
    assert found[0].startswith("loss.temprature: unknown key. Did you mean 'temperature'? Valid keys: num_images, ")
    assert [line.partition(":")[0] for line in found[1:]] == ["loss.lam", "loss.estimator", "loss.layers[0]"]


def test_a_required_argument_that_is_missing() -> None:
    def function(depth: Literal[18, 50], width: PositiveInt) -> None: ...

    assert messages(check_arguments(function, {})) == [
        "depth: missing; it must be 18 | 50.",
        "width: missing; it must be int >= 1.",
    ]


def test_provided_may_be_left_out_or_null_but_not_wrong() -> None:
    assert check_arguments(Sample, {}) == []
    assert check_arguments(Sample, {"num_images": None}) == []
    assert messages(check_arguments(Sample, {"num_images": 0}, "loss")) == [
        "loss.num_images: must be greater than or equal to 1, got 0."
    ]


def test_provided_must_have_been_given_when_it_is_built() -> None:
    assert [problem.path for problem in missing_provided(Sample, {})] == ["num_images"]
    assert [problem.path for problem in missing_provided(Sample, {"num_images": None})] == ["num_images"]
    assert missing_provided(Sample, {"num_images": 4}) == []


def test_null_only_where_the_annotation_allows_it() -> None:
    assert check_arguments(Sample, {"layers": None, "memory_bank": None}) == []
    assert [problem.path for problem in check_arguments(Sample, {"lam": None})] == ["lam"]


def record(calls: list[tuple[str, Any, str]]) -> Any:
    def check(kind: str, value: Any, path: str) -> list[Problem]:
        calls.append((kind, value, path))
        return [Problem(path, "seen")]

    return check


@pytest.mark.parametrize(
    ("annotation", "value", "paths"),
    [
        (Bank, {"name": "x"}, ["p"]),
        (Bank | None, {"name": "x"}, ["p"]),
        (list[Bank], [{}, {}], ["p[0]", "p[1]"]),
        (list[Bank] | None, [{}], ["p[0]"]),
        (dict[str, Bank], {"image": {}, "patches": {}}, ["p.image", "p.patches"]),
        (Bank, "a string", ["p"]),  # refused by the component's own check, which knows what to say
    ],
)
def test_nested_components_are_checked_where_they_stand(annotation: Any, value: Any, paths: list[str]) -> None:
    def function(p: Any) -> None: ...

    function.__annotations__["p"] = annotation
    calls: list[tuple[str, Any, str]] = []
    problems = check_arguments(function, {"p": value}, check_component=record(calls))
    assert [problem.path for problem in problems] == paths
    assert {kind for kind, _, _ in calls} == {"memory_bank"}


@pytest.mark.parametrize(("annotation", "value"), [(list[Bank], {}), (dict[str, Bank], []), (Bank, None)])
def test_a_component_in_the_wrong_shape(annotation: Any, value: Any) -> None:
    def function(p: Any) -> None: ...

    function.__annotations__["p"] = annotation
    (problem,) = check_arguments(function, {"p": value}, check_component=record([]))
    assert problem.path == "p"
    assert problem.message.startswith("must be a ")


def test_checked_raises_everything_and_keeps_the_signature() -> None:
    with pytest.raises(ConfigError) as error:
        Sample(0, temperature=-1.0, lam=0.5)
    assert [problem.path for problem in error.value.problems] == ["num_images", "temperature"]
    assert list(parameters(Sample)) == ["num_images", "temperature", "lam", "estimator", "layers", "memory_bank"]
    assert Sample(4, 1).temperature == 1
    with pytest.raises(TypeError, match="temprature"):
        Sample(4, temprature=1)  # type: ignore[call-arg]


def test_checked_parent_and_child_check_their_own_arguments() -> None:
    @checked
    class Child(Sample):
        def __init__(self, depth: PositiveInt, lam: Fraction = 0.0) -> None:
            super().__init__(num_images=depth, lam=lam)

    assert Child(2).num_images == 2
    with pytest.raises(ConfigError, match="depth: must be greater"):
        Child(0)


def test_the_error_survives_a_worker_process() -> None:
    error = ConfigError([Problem("a", "wrong."), Problem("b", "too.")])
    again = pickle.loads(pickle.dumps(error))
    assert again.problems == error.problems
    assert str(again) == "a: wrong.\nb: too."
    assert str(ConfigError("Caught in DataLoader worker 0.")) == "Caught in DataLoader worker 0."


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (PositiveInt, "int >= 1"),
        (Annotated[PositiveInt, PROVIDED], "int >= 1"),
        (Fraction, "float >= 0, <= 1"),
        (PositiveFloat | None, "float > 0 or null"),
        (Literal["a", 1], "'a' | 1"),
        (Literal["auto"] | PositiveInt, "'auto' or int >= 1"),
        (list[PositiveInt], "list of int >= 1"),
        (Sequence[PositiveFloat], "list of float > 0"),
        (list[Annotated[float, Interval(gt=0, le=1)]], "list of float > 0, <= 1"),
        (dict[str, Any], "mapping"),
        (Bank | None, "a memory_bank configuration ({'name': ...}) or null"),
        (list[Bank], "list of a memory_bank configuration ({'name': ...})"),
        (dict[str, Bank], "mapping of a memory_bank configuration ({'name': ...})"),
        (Annotated[dict[str, Any], Component("optimizer")], "an optimizer configuration ({'name': ...})"),
    ],
)
def test_describe(annotation: Any, text: str) -> None:
    assert describe(annotation) == text


def test_join_and_did_you_mean() -> None:
    assert [join("", "loss"), join("loss", "lam"), join("hooks", 0)] == ["loss", "loss.lam", "hooks[0]"]
    assert did_you_mean("jigsaw_colator", ["jigsaw_collator", "other"]) == " Did you mean 'jigsaw_collator'?"
    assert did_you_mean("zzz", ["jigsaw_collator"]) == ""


@given(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers())))
def test_an_int_range_accepts_ints_in_it_and_nothing_else(value: Any) -> None:
    accepted = type(value) is int and value >= 1
    assert (check_value(PositiveInt, value, "p") == []) == accepted


def test_a_constructor_that_passes_keywords_on_takes_the_parameters_of_its_base() -> None:
    """Its own first, with its own default where both have one."""
    known = parameters(PassesOn)
    assert {name: parameter.default for name, (_, parameter) in known.items()} == {"grid": 2, "size": 9, "hue": 0.5}
    assert messages(check_arguments(PassesOn, {"hue": 2.0, "sice": 1, "grid": 0})) == [
        "sice: unknown key. Did you mean 'size'? Valid keys: grid, size, hue.",
        "grid: must be greater than or equal to 1, got 0.",
        "hue: must be less than or equal to 1, got 2.0.",
    ]
    made = PassesOn(hue=0.25)
    assert (made.grid, made.size, made.hue) == (2, 9, 0.25)
    assert parameters(Base) == parameters(Middle)
    with pytest.raises(TypeError, match="sice"):
        PassesOn(sice=1)
