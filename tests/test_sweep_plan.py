"""The plan of a sweep: which runs there are, what they are called, and when two of them are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from pirl_plugin import registry
from pirl_plugin.commands.sweep import load as real_load
from pirl_plugin.schema import ConfigError, Problem
from pirl_plugin.sweep.plan import Run, identity, plan
from pirl_plugin.sweep.settings import Sweep, quoted


def load(command: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A configuration that says no more than the overrides do, the last of each key."""
    config: dict[str, Any] = dict(override.split("=", 1) for override in overrides)
    if command == "benchmark":
        config["benchmark"] = {"name": config["benchmark"]}
    if config.get("method") == "wrong" or config.get("benchmark") == {"name": "wrong"}:
        raise ConfigError([Problem("lr", "must be positive.")])
    return config


def runs(**settings: Any) -> list[Run]:
    return plan(Sweep(**{"name": "test", "methods": ["pirl"], "benchmarks": ["knn"], **settings}), load)


def labels(found: Sequence[Run]) -> list[str]:
    return [run.label for run in found]


def test_methods_variants_seeds_and_benchmarks_in_order():
    found = runs(methods=["pirl", "npid"], benchmarks=["knn", "linear"], seeds=[0, 1], variants={"a": [], "b": ["x=1"]})
    assert len(found) == 2 * 2 * 2 * (1 + 2)
    assert labels(found)[:4] == [
        "pirl (a), seed 0",
        "pirl (a), seed 0: knn",
        "pirl (a), seed 0: linear",
        "pirl (a), seed 1",
    ]
    place = {run.id: index for index, run in enumerate(found)}
    assert all(place[run.needs] < place[run.id] for run in found if run.needs)
    assert [run.needs for run in found[:4]] == [None, found[0].id, found[0].id, None]


def test_overrides_go_from_the_general_to_the_special():
    trained, measured = runs(
        pretraining=["a=1", "b=1"],
        method_settings={"pirl": ["b=2"], "npid": ["b=9"]},
        variants={"v": ["c=3"]},
        train={"optimizer": {"lr": 0.1}},
        benchmarking=["device=cpu"],
        benchmark_settings={"knn": ["benchmark=knn", "k=3"]},
        measure={"num_workers": 4},
        seeds=[7],
    )
    assert trained.overrides == ("method=pirl", "a=1", "b=1", "optimizer.lr=0.1", "b=2", "c=3", "seed=7")
    assert measured.overrides == (
        "device=cpu",
        "num_workers=4",
        "benchmark=knn",
        "k=3",
        "seed=7",
        "++method='pirl (v)'",
    )


def test_a_benchmark_without_settings_is_the_option_of_its_name():
    assert runs(benchmarks=["linear"])[1].overrides[0] == "benchmark=linear"


def test_identity_does_not_depend_on_where_and_on_how_it_is_made():
    base = {"method": "pirl", "lr": 0.1, "run_dir": "a", "device": "cpu", "num_workers": 0}
    watching = [{"name": "progress"}, {"name": "health", "every_steps": 2}]
    assert identity(base) == identity({**base, "run_dir": "b", "device": "cuda", "num_workers": 8, "hooks": watching})
    assert identity(base) == identity(dict(reversed(base.items())))
    assert identity(base) != identity({**base, "lr": 0.2})
    assert len(identity(base)) == 12


@pytest.mark.parametrize(
    ("hook", "other"),
    [
        ({"name": "momentum_update", "momentum": 0.99}, {"name": "momentum_update", "momentum": 0.9}),
        ({"name": "momentum_update", "schedule": "cosine"}, {"name": "momentum_update"}),
        ({"name": "memory_bank_update", "view": "momentum/key"}, {"name": "memory_bank_update"}),
    ],
)
def test_a_hook_that_works_decides_what_a_run_finds(hook, other):
    first, second = ({"method": "moco", "hooks": [registry.completed("hook", found)]} for found in (hook, other))
    assert identity(first) != identity(second)
    assert identity(first) == identity({**first, "hooks": [*first["hooks"], {"name": "progress"}]})


def test_variants_that_differ_in_a_working_hook_are_two_trainings():
    variants = {"slow": [], "fast": ["hooks.1.momentum=0.9"]}
    found = plan(Sweep("test", ["byol_32"], [], variants=variants, pretraining=["dataset=generated_scenes"]), real_load)
    assert labels(found) == ["byol_32 (slow), seed 0", "byol_32 (fast), seed 0"]


def test_a_benchmark_is_another_one_when_its_weights_are():
    first, second = runs(), runs(pretraining=["lr=0.2"])
    assert first[0].id != second[0].id
    assert first[1].id != second[1].id
    assert first[1].overrides == second[1].overrides


def test_the_same_run_is_there_once():
    found = runs(methods=["pirl", "pirl"], variants={"one": ["a=1"]})
    assert len(found) == 2
    same = runs(variants={"one": ["a=1"], "also one": ["a=1"]})
    assert labels(same)[0] == "pirl (one), seed 0"
    assert len([run for run in same if run.benchmark is None]) == 1


def test_folders_are_distinct_stay_inside_and_need_no_quoting():
    found = runs(variants={"../../etc": ["a=1"], "lam=0.5; rm": ["a=2"]}, benchmarks=["knn", "../x"])
    folders = [run.folder for run in found]
    assert len(set(folders)) == len(folders)
    for folder in folders:
        assert ".." not in folder.split("/")
        assert not set(folder) & set(" ;'\"\\")
    assert found[1].folder.startswith(found[0].folder + "/benchmarks/")


def test_every_mistake_is_reported_at_once_with_its_run():
    with pytest.raises(ConfigError) as error:
        runs(methods=["wrong", "pirl"], benchmarks=["wrong", "knn"], seeds=[0, 1])
    assert [problem.path for problem in error.value.problems] == ["method wrong: lr", "benchmark wrong: lr"]


def test_roots_take_the_place_of_their_names():
    found = runs(pretraining=["dataset.root=<photos>"], roots={"photos": "my photos"})
    assert "dataset.root=my photos" in found[0].overrides
    with pytest.raises(
        ConfigError, match=r"roots\.photos: must be set, the folder of a dataset of this sweep: roots\.photos=DIR"
    ):
        runs(pretraining=["dataset.root=<photos>"], roots={"photos": None})


def test_settings_from_the_command_line_become_overrides():
    sweep = Sweep(
        name="x",
        methods=["pirl"],
        benchmarks=[],
        train={"a": {"b": True, "c": None}, "d": [1, "two words"], "e": "plain", "f": "it's"},
    )
    assert sweep.train == ["a.b=true", "a.c=null", "d=[1,'two words']", "e=plain", "f='it\\'s'"]
    assert quoted("runs/a-b_c.pt") == "runs/a-b_c.pt"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"methods": []}, "methods"), ({"seeds": [-1]}, "seeds"), ({"seeds": []}, "seeds"), ({"benchmarks": "knn"}, "b")],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        runs(**settings)


def test_a_parameter_that_came_later_leaves_old_identities_as_they_are():
    before = {"method": "pirl", "transform": {"name": "image_and_jigsaw_patches", "grid": 3}}
    limited = {**before["transform"], "num_permutations": 100}  # type: ignore[dict-item]
    assert identity({**before, "transform": {**limited, "num_permutations": None}}) == identity(before)
    assert identity({**before, "transform": limited}) != identity(before)


def test_a_new_release_repeats_no_finished_run() -> None:
    """Fails when a parameter is added or a default changes: then either ``_LATER`` or ``FREE_KEYS`` knows it, or it
    changes what runs find, and this hash changes with it."""
    assert identity(real_load("train", ["method=pirl_32", "dataset=generated_scenes", "seed=0"])) == "7acb7371e3f1"


def test_a_benchmark_is_composed_once_for_all_methods():
    """Composing takes most of a plan's time."""
    asked = []

    def counted(command: str, overrides: Sequence[str]) -> dict[str, Any]:
        asked.append(command)
        return load(command, overrides)

    sweep = Sweep(name="test", methods=["pirl", "npid", "moco"], benchmarks=["knn", "linear"])
    found = plan(sweep, counted)
    assert (asked.count("train"), asked.count("benchmark")) == (3, 2)
    assert len({run.id for run in found}) == 9
    separate = [run for method in sweep.methods for run in runs(methods=[method], benchmarks=["knn", "linear"])]
    assert [run.id for run in found] == [run.id for run in separate]
