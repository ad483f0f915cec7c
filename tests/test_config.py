"""Composing and checking: every mistake of a command line is found at once, by its path, and nothing else happens."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pirl_plugin import config as configs
from pirl_plugin import registry
from pirl_plugin.benchmarks.runner import problems_of
from pirl_plugin.schema import ConfigError

FOLDER = ["dataset=image_folder", "dataset.root=DIR"]


def problems(*overrides: str, name: str = "train") -> dict[str, str]:
    """Messages by path."""
    with pytest.raises(ConfigError) as caught:
        configs.load(name, overrides, problems_of if name == "benchmark" else None)
    return {problem.path: problem.message for problem in caught.value.problems}


# -- one mistake, one problem: the override, the path, and what the message must say -----------------------------------

MISTAKES = [
    # keys
    ("methd=pirl", "methd", ["unknown key", "Did you mean 'method'", "num_epochs"]),
    ("lerning_rate=3", "lerning_rate", ["unknown key", "Did you mean 'optimizer.lr'"]),
    ("temperature=0.2", "temperature", ["unknown key", "Did you mean 'loss.temperature'"]),
    ("momentum=0.2", "momentum", ["'optimizer.momentum' or 'loss.memory_bank.momentum'"]),
    ("loss.lamb=0.3", "loss.lamb", ["unknown key", "Did you mean 'lam'", "temperature"]),
    ("loss.memory_bank.momentun=0", "loss.memory_bank.momentun", ["unknown key", "Did you mean 'momentum'"]),
    ("heads.image.dims=3", "heads.image.dims", ["unknown key", "Did you mean 'dim'"]),
    ("hooks.0.x=1", "hooks[0].x", ["unknown key", "every_steps"]),
    ("dataset.root=DIR", "dataset.root", ["unknown key", "image_folder", "dataset=..."]),
    ("a.b.c=1", "a", ["unknown key"]),
    ("+foo=1", "foo", ["unknown key"]),
    ("++loss.foo=1", "loss.foo", ["unknown key"]),
    # names
    ("loss=pirl_nec", "loss", ["'pirl_nec'", "Available: ", "Did you mean 'pirl_nce'"]),
    ("loss.name=pirl_nec", "loss.name", ["'pirl_nec'", "Available: ", "Did you mean 'pirl_nce'"]),
    ("trunk=resnt18", "trunk", ["'resnt18'", "resnet50_w4", "Did you mean 'resnet18'"]),
    ("method=pirl_3", "method", ["'pirl_3'", "pirl_paper", "Did you mean 'pirl_32'"]),
    ("dataset=null", "dataset", ["no option null", "image_folder"]),
    ("optimizer=3", "optimizer", ["no option 3", "sgd_cosine"]),
    ("loss=[a,b]", "loss", ["no option ['a', 'b']"]),
    ("dataset.name=image_foldr", "dataset.name", ["'image_foldr'", "Did you mean 'image_folder'"]),
    ("hooks.1.name=memory_bank", "hooks[1].name", ["'memory_bank'", "Available: ", "'memory_bank_update'"]),
    ("collator.name=3", "collator.name", ["must be the name of a collator", "3"]),
    # values
    ("optimizer.lr=abc", "optimizer.lr", ["must be a number", "'abc'"]),
    ("loss.lam=2", "loss.lam", ["1", "got 2"]),
    ("loss.temperature=0", "loss.temperature", ["greater than 0", "got 0"]),
    ("num_epochs=1.5", "num_epochs", ["integer", "1.5"]),
    ("resume=true", "resume", ["A run resumes by itself", "Valid keys"]),
    ("num_epochs=true", "num_epochs", ["integer", "True"]),
    ("num_epochs=", "num_epochs", ["integer", "''"]),
    ("batch_size=0", "batch_size", ["1", "got 0"]),
    ("seed=-1", "seed", ["0", "got -1"]),
    ("seed.x=1", "seed", ["integer"]),
    ("loss.lam='0.3'", "loss.lam", ["number"]),
    ("device=gpu", "device", ["'cuda'", "'gpu'"]),
    ("precision=fp16", "precision", ["'float32' or 'bf16'", "'fp16'", "Did you mean 'bf16'"]),
    ("trunk.depth=19", "trunk.depth", ["18, 34, 50, 101 or 152", "19"]),
    ("transform.image_scale=[2,0.1]", "transform.image_scale[0]", ["1", "got 2"]),
    ("hooks=3", "hooks", ["must be a list", "3"]),
    ("heads=3", "heads", ["must be a mapping", "3"]),
    ("run_dir=3", "run_dir", ["must be a string", "3"]),
    ("plugins=nope", "plugins", ["must be a list", "'nope'"]),
    ("plugins=[3]", "plugins[0]", ["string", "3"]),
    ("plugins=[no_such_module]", "plugins[0]", ["cannot import 'no_such_module'", "PYTHONPATH"]),
    # what is not there
    ("dataset=image_folder", "dataset.root", ["must be set: dataset.root="]),
    ("optimizer=sgd_multistep", "optimizer.milestones", ["must be set: optimizer.milestones="]),
    ("~trunk", "trunk", ["missing", "model"]),
    ("~transform", "transform", ["missing", "transform"]),
    ("~nothing", "nothing", ["no such key to take out"]),
    # what is no override
    ("loss", "loss", ["no value", "write loss=", "pirl_nce"]),
    ("num_epochs", "num_epochs", ["no value", "write num_epochs="]),
    ("=3", "=3", ["no key", "key=value"]),
    ("dataset.root=a=b", "dataset.root", ["cannot read 'a=b'", """'dataset.root="a=b"'"""]),
    ("dataset.root=a(b", "dataset.root", ["cannot read 'a(b'", """'dataset.root="a(b"'"""]),
    ("trunk.width=1,2", "trunk.width", ["one value", "trunk.width=[1,2]"]),
    ("run_dir=${nowhere}", "run_dir", ["'nowhere' not found"]),
    ("seed=${seed}", "seed", ["Recursive"]),
    ("hooks.9.name=x", "hooks.9.name", ["out of range"]),
    ("hydra.run.dir=x", "hydra.run.dir", ["no effect"]),
    ("trunk@foo=resnet18", "trunk@foo", ["package", "leave it out"]),
]


@pytest.mark.parametrize(("override", "path", "said"), MISTAKES, ids=[mistake[0] for mistake in MISTAKES])
def test_a_mistake_is_named_by_its_path_with_what_is_allowed(override: str, path: str, said: list[str]) -> None:
    found = problems(override)
    assert list(found) == [path]
    for words in said:
        assert words in found[path], found[path]
    assert "\n" not in found[path]


def test_all_mistakes_of_a_command_line_are_in_one_message() -> None:
    overrides = ["lerning_rate=3", "optimizer.lr=abc", "loss.lam=2", "trunk=resnt18", "hooks.0.x=1", "=3", "loss"]
    overrides += ["dataset=image_folder", "dataset.rot=DIR", "loss.nam=4", "num_epochs=1,2", "~nothing", "seed=${seed}"]
    expected = {"lerning_rate", "optimizer.lr", "loss.lam", "trunk", "hooks[0].x", "=3", "loss", "dataset.root"}
    expected |= {"dataset.rot", "loss.nam", "num_epochs", "nothing", "seed"}
    assert set(problems(*overrides)) == expected


def test_a_wrong_option_does_not_make_its_settings_wrong() -> None:
    assert set(problems("dataset=image_foldr", "dataset.root=DIR")) == {"dataset"}
    assert set(problems("dataset=image_foldr", "dataset.rot=DIR")) == {"dataset", "dataset.root", "dataset.rot"}
    assert set(problems("dataset=zzz", "dataset.root=DIR", "loss.lam=2")) == {"dataset", "loss.lam"}


def test_mistakes_of_a_benchmark() -> None:
    random = ["weights=random", "trunk=resnet18", "image_size=64"]
    assert configs.load("benchmark", random, problems_of)["trunk"]["depth"] == 18
    assert "weights=..." in problems(name="benchmark")["weights"]
    assert set(problems("weigths=random", name="benchmark")) == {"weights", "weigths"}
    assert "trunk" in problems("weights=random", "image_size=64", name="benchmark")
    assert set(problems(*random, "loss=pirl_nce", name="benchmark")) == {"loss"}
    found = problems(*random, "benchmark.layers=[res6]", "benchmark.layer=3", "batch_size=x", name="benchmark")
    assert set(found) == {"benchmark.layers[0]", "benchmark.layer", "batch_size"}


@pytest.mark.parametrize(
    "overrides", [FOLDER, ["hooks=[]"], ["~hooks"], ["run_dir=x y"], ["+seed=1"], ["++batch_size=2"]]
)
def test_what_is_right_passes(overrides: list[str]) -> None:
    config = configs.load("train", overrides)
    assert registry.check("task", config) == []


def test_values_come_out_as_they_were_given() -> None:
    quoted = configs.load("train", ["dataset=image_folder", "dataset.root='my photos, (2)=a'", "optimizer.lr=1e-3"])
    assert quoted["dataset"]["root"] == "my photos, (2)=a"
    assert quoted["optimizer"]["lr"] == 0.001
    assert quoted["run_dir"] == "runs/pirl_64-image_folder-seed0"
    assert configs.load("train", ["seed=3", "run_dir=x-${seed}"])["run_dir"] == "x-3"
    assert configs.load("train", ["seed=3", "seed=4"])["seed"] == 4


def test_a_call_leaves_nothing_behind_for_the_next() -> None:
    before = configs.load("train", [])
    configs.load("train", ["seed=3", "hooks.0.every_steps=7", "~checkpoint"])
    assert configs.load("train", []) == before


def test_settings_of_a_method_win_over_its_groups_and_the_users_over_both() -> None:
    assert configs.load("train", ["method=pirl"])["loss"]["num_negatives"] == 32000
    chosen = configs.load("train", ["loss.num_negatives=5", "trunk=resnet34", "method=pirl"])
    assert chosen["loss"]["num_negatives"] == 5
    assert chosen["trunk"]["depth"] == 34


# -- plugins -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def plugin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    registry.REGISTRIES["collator"].pop("my_collator", None)
    for name in ("good_plugin", "bad_plugin", "broken_plugin"):
        sys.modules.pop(name, None)


def test_plugins_are_imported_before_the_check(plugin_folder: Path) -> None:
    (plugin_folder / "good_plugin.py").write_text(
        "from pirl_plugin.registry import register_collator\n"
        "@register_collator('my_collator')\n"
        "class MyCollator:\n"
        "    def __init__(self, size: int = 3) -> None: ...\n"
    )
    mine = ["collator.name=my_collator", "plugins=[good_plugin]"]
    assert "my_collator" in problems(mine[0])["collator.name"]
    assert configs.load("train", [*mine, "collator.size=4"])["collator"]["size"] == 4
    assert "Did you mean 'size'" in problems(*mine, "collator.sise=4")["collator.sise"]


def test_a_plugin_that_fails_is_a_problem_like_others(plugin_folder: Path) -> None:
    (plugin_folder / "bad_plugin.py").write_text("1 / 0\n")
    (plugin_folder / "broken_plugin.py").write_text("def f(:\n")
    found = problems("plugins=[bad_plugin,broken_plugin]", "loss.lam=7")
    assert set(found) == {"plugins[0]", "plugins[1]", "loss.lam"}
    assert "ZeroDivisionError" in found["plugins[0]"]
    assert "SyntaxError" in found["plugins[1]"]


def test_differences_name_every_leaf() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": None}, "e": 3}
    assert configs.differences(old, old) == []
    found = configs.differences(old, {"a": 1, "b": {"c": [1], "d": 4}, "f": 5})
    assert sorted(found) == ["b.c: [1, 2] -> [1]", "b.d: None -> 4", "e: 3 -> None", "f: None -> 5"]


# -- whatever is typed -------------------------------------------------------------------------------------------------

_KEYS = ["loss.lam", "loss.memory_bank", "loss.memory_bank.momentum", "trunk", "trunk.width", "dataset", "hooks"]
_KEYS += ["dataset.root", "hooks.0", "hooks.0.name", "heads.image.dim", "optimizer.lr", "seed", "run_dir", "plugins"]
_VALUES = ["1", "-1", "0.5", "null", "true", "abc", "[1,2]", "{a: 1}", "''", "resnet18", "pirl", "${seed}", "???"]
_VALUES += ["1,2", "nan", "inf", "1e400", "{name: health}", "[{name: health}]", "glob(*)", "range(1,3)", "str(1)"]
_TEXT = st.text(st.sampled_from("ab.=~+@{}[]()$'\":,\\/ -0é\n"), max_size=6)


@st.composite
def _overrides(draw: st.DrawFn) -> str:
    key, value = draw(st.sampled_from(_KEYS)), draw(st.sampled_from(_VALUES))
    sign = draw(st.sampled_from(["=", "=", "=", "", "=="]))
    prefix = draw(st.sampled_from(["", "", "", "+", "++", "~"]))
    at, noise = draw(st.integers(0, len(key))), draw(st.one_of(st.just(""), _TEXT))
    tail = draw(st.one_of(st.just(""), st.just(""), _TEXT))
    return prefix + key[:at] + noise + key[at:] + sign + value + tail


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(st.lists(_overrides(), min_size=1, max_size=3))
def test_whatever_is_typed_is_a_config_or_a_config_error(overrides: list[str]) -> None:
    try:
        found = registry.check("task", configs.load("train", overrides))
        assert found == []
    except ConfigError as error:
        said = [problem.message for problem in error.problems]
        assert said and all(said)  # noqa: PT018  (either outcome is right, anything else is not)
