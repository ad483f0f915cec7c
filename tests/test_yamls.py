"""Every YAML in ``benchmark_configs/`` is composed, checked and built, and every command in its header is right."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from pirl_plugin import config as configs
from pirl_plugin.benchmarks.runner import problems_of
from pirl_plugin.commands import sweep as sweep_command
from pirl_plugin.models.ssl_model import is_pixels
from pirl_plugin.registry import build, check
from pirl_plugin.sweep import Sweep, plan
from pirl_plugin.tasks import SSLPretrainingTask, checks

TINY = ["dataset=generated_scenes", "dataset.num_images=64"]
FILES = sorted(path.relative_to(configs.CONFIG_FOLDER) for path in configs.CONFIG_FOLDER.rglob("*.y*ml"))
# what a benchmark needs to be told besides its name
BENCHMARK = ["weights=random", "trunk=resnet18_narrow", "image_size=32"]


@functools.cache
def composed(name: str, *overrides: str) -> dict[str, Any]:
    checks_of = {"benchmark": problems_of, "sweep": sweep_command.problems_of}
    return configs.load(name, overrides, checks_of.get(name))


def a_few_images(folder: Path, count: int = 3) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.jpg" for index in range(count)]
    for index, path in enumerate(paths):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


# -- one builder for each group ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:num_negatives")
def builds_method(option: str, tmp_path: Path) -> None:
    config = composed("train", f"method={option}", *TINY)
    assert config["method"] == option
    task = SSLPretrainingTask.from_config(config)
    assert task.config["loss"].get("num_images", 64) == 64
    assert check("task", task.config) == []
    _, views, _ = task.datasets["train"][(0, 0)]
    assert {task.base_model.head_of(view) for view, x in views.items() if is_pixels(x)} == set(config["heads"])
    assert checks.needed_views(task.base_loss, task.hooks) in (
        None,
        {view for view, x in views.items() if is_pixels(x)},
    )


OWN_RATES = {"byol_32": 0.5, "simsiam_32": 0.5, "swav_32": 0.5}
"""Small variants with a learning rate of their own; why stands in each."""


def builds_scale(option: str, tmp_path: Path) -> None:
    """What it says holds in every method's small variant but for the one that is not trained."""
    scale = yaml.safe_load((configs.CONFIG_FOLDER / "scale" / f"{option}.yaml").read_text())
    optimizer = scale.pop("optimizer")
    for method in configs.groups()["method"]:
        config = composed("train", f"method={method}", *TINY)
        if method.endswith(("_32", "_64")) and config["num_epochs"]:
            assert {key: config[key] for key in scale} == scale, method
            expected = {**optimizer, "lr": OWN_RATES.get(method, optimizer["lr"])}
            assert {key: config["optimizer"][key] for key in optimizer} == expected, method


def builds_dataset(option: str, tmp_path: Path) -> None:
    overrides, expected = {
        "image_folder": lambda: images_in(tmp_path, tmp_path),
        "imagenet": lambda: images_in(tmp_path, tmp_path / "train" / "n01440764"),
        "places205": lambda: images_in(tmp_path, tmp_path / "train" / "abbey"),
        "inaturalist2018": lambda: images_in(tmp_path, tmp_path / "train" / "2820"),
        "cifar10": lambda: images_in(tmp_path, tmp_path / "train" / "cat"),
        "file_list": lambda: listed(tmp_path),
        "voc": lambda: devkit(tmp_path),
        "voc2007": lambda: devkit(tmp_path),
        "voc2012": lambda: devkit(tmp_path, "VOC2012"),
        "voc0712": lambda: (devkit(tmp_path)[0], 3 + devkit(tmp_path, "VOC2012")[1]),
        "generated_scenes": lambda: (["dataset.num_images=5"], 5),
    }[option]()
    dataset = build("dataset", composed("train", f"dataset={option}", *overrides)["dataset"])
    assert len(dataset) == expected
    image, image_id = dataset[expected - 1]
    assert (image.mode, image_id) == ("RGB", expected - 1)


def images_in(root: Path, folder: Path) -> tuple[list[str], int]:
    return [f"dataset.root={root}"], len(a_few_images(folder))


def listed(folder: Path) -> tuple[list[str], int]:
    paths = a_few_images(folder / "listed")
    file = folder / "list.txt"
    file.write_text("".join(f"listed/{path.name}\n" for path in paths))
    return [f"dataset.path={file}"], len(paths)


def devkit(folder: Path, year: str = "VOC2007") -> tuple[list[str], int]:
    root = folder / "VOCdevkit" / year
    paths = a_few_images(root / "JPEGImages")
    sets, annotations = root / "ImageSets" / "Main", root / "Annotations"
    sets.mkdir(parents=True)
    annotations.mkdir()
    (sets / "trainval.txt").write_text("".join(f"{path.stem}\n" for path in paths))
    for path in paths:
        (annotations / f"{path.stem}.xml").write_text(
            f"<annotation><filename>{path.name}</filename><size><width>50</width><height>40</height><depth>3</depth>"
            "</size><object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>20</xmax>"
            "<ymax>20</ymax></bndbox></object></annotation>"
        )
    return [f"dataset.root={folder / 'VOCdevkit'}"], len(paths)


def builds_trunk(option: str, tmp_path: Path) -> None:
    config = composed("train", f"trunk={option}")["trunk"]
    with torch.device("meta"):  # shapes without memory: a ResNet-50 x 4 has 375 million parameters
        trunk = build("model", config)
    depth = int(re.match(r"resnet(\d+)", option).group(1))  # type: ignore[union-attr]
    assert config["depth"] == depth
    assert trunk.channels["res5"] == 512 * (1 if depth < 50 else 4) * config["width"]


def builds_optimizer(option: str, tmp_path: Path) -> None:
    more = ["optimizer.milestones=[1]"] if option == "sgd_multistep" else []
    optimizer = build("optimizer", composed("train", f"optimizer={option}", *more)["optimizer"])
    schedule = optimizer.lr_scheduler(256, 2)
    assert schedule(0.99) < schedule(0.4)


def builds_loss(option: str, tmp_path: Path) -> None:
    """By itself: on top of a method it would get that method's own settings."""
    config = yaml.safe_load((configs.CONFIG_FOLDER / "loss" / f"{option}.yaml").read_text())
    facts = {"num_images": 40000, "num_classes": 4, "labels": torch.arange(40000) % 4}
    loss = build("loss", config, **facts)
    assert config["name"] == option
    if option == "pirl_nce":
        rows = loss.memory_bank.rows
        assert rows.shape == (40000, 128)
        assert torch.isfinite(loss({"image": rows[:2], "patches": rows[2:4]}, torch.tensor([0, 1])))


def builds_benchmark(option: str, tmp_path: Path) -> None:
    config = composed("benchmark", f"benchmark={option}", *BENCHMARK)["benchmark"]
    assert option.startswith(config["name"])  # presets of a benchmark carry its name in front
    assert callable(build("benchmark", config).run)


def builds_sweep(option: str, tmp_path: Path) -> None:
    """Its plan holds the pretraining of every method, and every benchmark of each."""
    config = composed("sweep", f"sweep={option}")
    roots = {name: f"{name}_folder" for name in config.get("roots") or {}}
    sweep = Sweep(**{**config, "roots": roots, "seeds": [0]})
    runs = plan(sweep, sweep_command.load)
    pretrained = [run for run in runs if run.benchmark is None]
    assert {run.method for run in pretrained} == set(sweep.methods)
    assert len(runs) == len(pretrained) * (1 + len(sweep.benchmarks))


NAMES = {"slurm": "submitit", "submitit_local": "submitit", "single_threaded": "local"}


def builds_launcher(option: str, tmp_path: Path) -> None:
    config = composed("sweep", f"launcher={option}")["launcher"]
    assert config["name"] == NAMES.get(option, option)
    assert build("launcher", config).capacity >= 1


BUILDERS: dict[str, Callable[[str, Path], None]] = {
    "method": builds_method,
    "scale": builds_scale,
    "dataset": builds_dataset,
    "trunk": builds_trunk,
    "optimizer": builds_optimizer,
    "loss": builds_loss,
    "benchmark": builds_benchmark,
    "sweep": builds_sweep,
    "launcher": builds_launcher,
}
ROOTS = {"train.yaml": ("train", []), "benchmark.yaml": ("benchmark", BENCHMARK), "sweep.yaml": ("sweep", [])}


def header_commands(text: str) -> list[list[str]]:
    """Command and arguments of each command line in a YAML's comments."""
    lines = [line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")]
    found = [re.match(r"(?:python|torchrun( --\w+=\d+)+) tools/(\w+)\.py (?P<arguments>.*)", line) for line in lines]
    return [[match.group(2), *shlex.split(match.group("arguments"))] for match in found if match]


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:num_negatives")
@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_yaml_is_composed_checked_and_built(file: Path, tmp_path: Path) -> None:
    if len(file.parts) == 1:
        name, overrides = ROOTS[file.name]  # a KeyError is a YAML that nothing tests
        assert composed(name, *overrides)
    else:
        group, option = file.parts[0], file.with_suffix("").name
        assert len(file.parts) == 2, "options lie directly in their group's folder"
        assert option in configs.groups()[group]
        BUILDERS[group](option, tmp_path)


def test_every_yaml_is_reached() -> None:
    reached = {Path(f"{group}/{option}.yaml") for group, options in configs.groups().items() for option in options}
    assert reached | {Path(name) for name in ROOTS} == set(FILES)
    assert set(configs.groups()) == set(BUILDERS)


@pytest.mark.parametrize("option", configs.groups()["method"])
def test_a_methods_header_says_how_to_run_it(option: str) -> None:
    text = (configs.CONFIG_FOLDER / "method" / f"{option}.yaml").read_text()
    commands = header_commands(text.partition("defaults:")[0])
    assert commands, "no command in the header"
    for name, *overrides in commands:
        assert f"method={option}" in overrides
        assert composed(name, *overrides)["method"] == option
    assert len(text.splitlines()) <= 70, "more than a screen"


def test_commands_are_found_in_headers() -> None:
    text = "# X:\n#   torchrun --nproc=8 --n=2 tools/train.py method=a b=c\n# python tools/train.py method=d\nx: 1\n"
    assert header_commands(text) == [["train", "method=a", "b=c"], ["train", "method=d"]]
    assert header_commands("# nothing to run, see tools/train.py\n") == []
