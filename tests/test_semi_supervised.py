"""Fine-tuning on few labels: the published numbers, rates by hand, slow references, resume, two processes."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn

from pirl_plugin.benchmarks import BenchmarkContext, SemiSupervised, run_benchmark
from pirl_plugin.benchmarks.finetuning.recipes import RECIPES, Recipe, changed_numbers, changed_recipe, published_recipe
from pirl_plugin.benchmarks.finetuning.semi_supervised import LIST_NAME, STATE_NAME, fitting_batch
from pirl_plugin.benchmarks.finetuning.subsets import random_ids
from pirl_plugin.benchmarks.finetuning.training import Classifier, FineTuning, make_optimizer
from pirl_plugin.benchmarks.training import LabelledBatches, Part, augmented_view
from pirl_plugin.data.datasets import ImageFolder
from pirl_plugin.data.generated_scenes import GeneratedScenes
from pirl_plugin.records import read_records
from pirl_plugin.registry import build

ROOT = Path(__file__).resolve().parents[1]
VIEW = {"name": "eval_view", "resize": 16, "crop": 16}
TRUNK = {"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "small"}
FAST = Recipe(3, 8, 0.005, 0.01, (2,), nesterov=True, weight_decay=0.01)  # larger rates: rounding grows into chaos


# -- the published numbers ---------------------------------------------------------------------------------------------


def rates(protocol: str, fraction: float, epochs: list[int]) -> list[tuple[float, float]]:
    recipe = published_recipe(protocol, fraction)
    factors = [recipe.multiplier(epoch) for epoch in epochs]
    return [(recipe.trunk_lr * factor, recipe.head_lr * factor) for factor in factors]


@pytest.mark.parametrize(
    ("protocol", "fraction", "epochs", "batch_size", "expected"),
    [
        (
            "paper",
            0.01,
            70,
            256,
            {0: (0.01, 0.01), 29: (0.01, 0.01), 30: (1e-3, 1e-3), 60: (1e-4, 1e-4), 69: (1e-4, 1e-4)},
        ),
        ("paper", 0.1, 70, 256, {0: (0.01, 0.01), 30: (1e-3, 1e-3), 60: (1e-4, 1e-4)}),
        ("vissl", 0.01, 70, 256, {0: (0.05, 0.05), 30: (5e-3, 5e-3), 69: (5e-3, 5e-3)}),
        ("vissl_pirl", 0.1, 70, 256, {0: (0.01, 0.01), 30: (1e-3, 1e-3), 69: (1e-3, 1e-3)}),
        ("simclr", 0.01, 60, 4096, {0: (0.8, 0.8), 30: (0.4, 0.4)}),
        ("simclr", 0.1, 30, 4096, {0: (0.8, 0.8), 15: (0.4, 0.4)}),
        ("swav", 0.01, 20, 256, {0: (0.02, 5.0), 12: (0.004, 1.0), 16: (0.0008, 0.2)}),
        ("swav", 0.1, 20, 256, {0: (0.01, 0.2), 11: (0.01, 0.2), 12: (0.002, 0.04), 16: (0.0004, 0.008)}),
        ("barlow_twins", 0.01, 20, 256, {0: (0.002, 0.5), 10: (0.001, 0.25)}),
    ],
)
def test_the_rates_of_each_protocol(protocol, fraction, epochs, batch_size, expected):
    recipe = published_recipe(protocol, fraction)
    assert (recipe.num_epochs, recipe.batch_size, recipe.weight_decay) == (epochs, batch_size, 0)
    for epoch, both in expected.items():
        assert rates(protocol, fraction, [epoch])[0] == pytest.approx(both), epoch


def test_only_pirls_own_protocols_sample_at_random_and_report_top5():
    of_pirl = {"paper", "vissl_pirl"}
    for name, by_fraction in RECIPES.items():
        assert set(by_fraction) == {0.01, 0.1}
        for recipe in by_fraction.values():
            assert (recipe.sampling, recipe.top) == (("random", 5) if name in of_pirl else ("balanced", 1))


def test_nearer_fraction_and_what_may_be_called_the_protocol():
    assert published_recipe("swav", 0.03) == RECIPES["swav"][0.01]
    assert published_recipe("swav", 0.04) == RECIPES["swav"][0.1]
    published = published_recipe("swav", 0.01)
    assert changed_numbers(published, "swav", 0.01) == {}
    assert changed_numbers(published, "swav", 12811 / 1281167) == {}
    assert changed_numbers(published, "swav", 0.02) == {"fraction": [[0.01, 0.1], 0.02]}
    assert changed_numbers(published, "swav", 0.1) == {"trunk_lr": [0.01, 0.02], "head_lr": [0.2, 5.0]}
    assert changed_numbers(changed_recipe(published, head_lr=4.0), "swav", 0.01) == {"head_lr": [5.0, 4.0]}
    assert changed_numbers(changed_recipe(published, head_lr=5.0), "swav", 0.01) == {}


def test_milestones_keep_their_place_and_rates_follow_the_batch_where_the_source_says_so():
    assert changed_recipe(RECIPES["paper"][0.01], num_epochs=7).milestones == (3, 6)
    assert changed_recipe(RECIPES["paper"][0.01], num_epochs=1).multiplier(0) == 1
    assert changed_recipe(RECIPES["paper"][0.01], num_epochs=7, milestones=(5,)).milestones == (5,)
    assert changed_recipe(RECIPES["vissl"][0.01], batch_size=64).multiplier(0) == 0.25
    assert changed_recipe(RECIPES["paper"][0.01], batch_size=64).multiplier(0) == 1
    with pytest.raises(ValueError, match="must ascend and lie within the 70 epochs"):
        changed_recipe(RECIPES["paper"][0.01], milestones=(60, 30))
    with pytest.raises(ValueError, match="must ascend and lie within the 70 epochs"):
        changed_recipe(RECIPES["paper"][0.01], milestones=(71,))
    with pytest.raises(ValueError, match="follows a cosine"):
        SemiSupervised(protocol="simclr", milestones=[3])


# -- groups, schedule, steps -------------------------------------------------------------------------------------------


def context(**changes: Any) -> BenchmarkContext:
    torch.manual_seed(0)
    trunk = build("model", TRUNK).requires_grad_(False).eval()
    scenes = {split: GeneratedScenes(num_images=32, size=32, split=split) for split in ("train", "test")}
    made = BenchmarkContext(
        trunk, scenes["train"], scenes["test"], build("transform", VIEW), view=VIEW, image_size=16, batch_size=7
    )
    return dataclasses.replace(made, **changes)


def finetuning(one: BenchmarkContext, recipe: Recipe = FAST, batch_size: int = 8) -> FineTuning:
    labels = torch.from_numpy(one.train.labels)
    view = augmented_view(one.image_size)
    return FineTuning(one, LabelledBatches(one, one.train, labels, view, batch_size, one.seed), recipe, 8)


def test_groups_hold_each_parameter_once_with_its_rate_and_decay():
    network = Classifier(build("model", TRUNK), 8, seed=0)
    optimizer = make_optimizer(network, FAST)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups)
    expected = {
        id(p): (0.01 if name.startswith("head.") else 0.005, 0.01 if p.ndim > 1 else 0.0)
        for name, p in network.named_parameters()
    }
    assert found == expected
    assert all(group["nesterov"] and group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_the_classifier_starts_small_and_seeded():
    trunk = build("model", TRUNK)
    first, again, other = (Classifier(trunk, 40, seed).head for seed in (0, 0, 1))
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    assert first.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not first.bias.any()


def plain_steps(
    one: BenchmarkContext, recipe: Recipe, factors: list[float], halves: int = 1
) -> tuple[nn.Module, list[float]]:
    """The same fine-tuning, written out: a copy for each process, SGD with Nesterov's momentum by hand.

    ``factors`` multiply the rates in each epoch. With two halves each copy normalises its own half of a batch,
    gradients are averaged at each step, and running statistics at the end of each epoch.
    """
    labels = torch.from_numpy(one.train.labels)
    batches = LabelledBatches(one, one.train, labels, augmented_view(one.image_size), recipe.batch_size, one.seed)
    copies = [Classifier(copy.deepcopy(one.trunk), 8, one.seed).train() for _ in range(halves)]
    momenta: dict[str, torch.Tensor] = {}
    losses = []
    for epoch, factor in enumerate(factors):
        total = 0.0
        for images, targets in batches.epoch(epoch):
            parts = zip(copies, images.chunk(halves), targets.chunk(halves), strict=True)
            values = [F.cross_entropy(network(x), y) for network, x, y in parts]
            total += sum(value.item() for value in values) / halves / batches.steps_per_epoch
            gradients = [torch.autograd.grad(v, list(n.parameters())) for v, n in zip(values, copies, strict=True)]
            with torch.no_grad():
                for index, (name, parameter) in enumerate(copies[0].named_parameters()):
                    g = sum(gradient[index] for gradient in gradients) / halves
                    if parameter.ndim > 1:
                        g = g + recipe.weight_decay * parameter
                    momenta[name] = 0.9 * momenta[name] + g if name in momenta else g
                    lr = factor * (recipe.head_lr if name.startswith("head.") else recipe.trunk_lr)
                    step = lr * (g + 0.9 * momenta[name])
                    for network in copies:
                        dict(network.named_parameters())[name].sub_(step)
        losses.append(total)
        with torch.no_grad():
            for same in zip(*(network.buffers() for network in copies), strict=True):
                mean = torch.stack([buffer.double() for buffer in same]).mean(dim=0)
                for buffer in same:
                    buffer.copy_(mean)
    return copies[0].eval(), losses


def test_agrees_with_the_steps_written_out():
    one = context()
    training = finetuning(one)
    network = training.run(None, {})
    expected, losses = plain_steps(one, FAST, [1.0, 1.0, 0.1])
    assert training.losses == pytest.approx(losses, rel=1e-4)
    assert len(set(training.losses)) == 3
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_the_frozen_trunk_stays_as_it_is_and_everything_else_trains():
    one = context()
    before = copy.deepcopy(one.trunk.state_dict())
    network = finetuning(one).run(None, {})
    assert all(torch.equal(value, before[name]) for name, value in one.trunk.state_dict().items())
    assert not any(parameter.requires_grad for parameter in one.trunk.parameters())
    for name, value in network.trunk.state_dict().items():
        assert not torch.equal(value, before[name]), name
    assert not network.training


def coloured_images(folder: Path, split: str, classes: int, per_class: int) -> ImageFolder:
    """Noise around a colour for each class."""
    for index in range(classes * per_class):
        rng = np.random.default_rng([index, len(split)])
        colour = np.array([(index % classes) * 200 // max(1, classes - 1), 100, 50])
        pixels = np.clip(colour + rng.integers(-20, 21, (20, 20, 3)), 0, 255).astype(np.uint8)
        path = folder / split / f"class{index % classes}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return ImageFolder(str(folder), split=split)


def test_it_learns_what_can_be_learnt(tmp_path):
    train, test = (coloured_images(tmp_path, split, 3, 8) for split in ("train", "test"))
    settings = {"num_epochs": 40, "batch_size": 8, "trunk_lr": 0.01, "head_lr": 0.1}
    (result,) = SemiSupervised(fraction=0.5, sampling="balanced", **settings).run(context(train=train, test=test))
    assert result.value > 80  # chance is 33


def test_a_diverging_run_says_so():
    wild = dataclasses.replace(FAST, trunk_lr=1e9, head_lr=1e9)
    with pytest.raises(ValueError, match="diverged in epoch 1: lower trunk_lr and head_lr"):
        finetuning(context(), wild).run(None, {})


def test_bfloat16_trains_close_to_float32_and_is_refused_where_the_cpu_computes_wrong_gradients():
    one = context(precision="bf16")
    training = finetuning(one)
    training.run(None, {})
    assert training.losses == pytest.approx(plain_steps(context(), FAST, [1.0, 1.0, 0.1])[1], rel=0.1)
    with pytest.raises(ValueError, match=r"sees a 1x1 input.*float32"):
        finetuning(dataclasses.replace(one, image_size=4))


# -- resume ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path, monkeypatch):
    one = context()
    whole = finetuning(one)
    expected = whole.run(None, {}).state_dict()

    first = finetuning(one)
    original = FineTuning._train_epoch

    def interrupted(self: FineTuning) -> None:
        if self.epoch == 2:
            raise KeyboardInterrupt
        original(self)

    monkeypatch.setattr(FineTuning, "_train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.run(tmp_path / "state.pt", {"images": "a"})
    monkeypatch.setattr(FineTuning, "_train_epoch", original)
    assert (tmp_path / "state.pt").is_file()
    second = finetuning(one)
    found = second.run(tmp_path / "state.pt", {"images": "a"}).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert second.losses == whole.losses
    assert not (tmp_path / "state.pt").exists()


def relabelled() -> Any:
    """The training images of ``context()``, the first two classes exchanged."""
    scenes = context().train
    scenes.labels = np.where(scenes.labels < 2, 1 - scenes.labels, scenes.labels)
    return scenes


@pytest.mark.parametrize(
    "change",
    [
        lambda one: (one, FAST, {"images": "b"}),
        lambda one: (one, dataclasses.replace(FAST, head_lr=0.2), {"images": "a"}),
        lambda one: (dataclasses.replace(one, trunk=build("model", TRUNK)), FAST, {"images": "a"}),
        lambda one: (dataclasses.replace(one, train=relabelled()), FAST, {"images": "a"}),
    ],
    ids=["images", "recipe", "weights", "labels"],
)
def test_the_state_of_another_fine_tuning_is_not_taken_up(tmp_path, caplog, change):
    one = context()
    training = finetuning(one)
    own = training._key({"images": "a"})
    training._train_epoch()
    torch.save({"key": own, **training._state()}, tmp_path / "state.pt")
    other, recipe, facts = change(one)
    fresh = finetuning(other, recipe)
    fresh._take_up(tmp_path / "state.pt", fresh._key(facts))
    assert fresh.epoch == 0
    assert "another fine-tuning" in caplog.text
    same = finetuning(one)
    same._take_up(tmp_path / "state.pt", same._key({"images": "a"}))
    assert same.epoch == 1


# -- the benchmark -----------------------------------------------------------------------------------------------------


def test_results_their_names_and_what_is_written(tmp_path):
    one = context(run_dir=tmp_path)
    settings = {"fraction": 0.5, "num_epochs": 2, "batch_size": 8}
    results = {result.metric: result for result in SemiSupervised(**settings).run(one)}
    assert [metric for metric, result in results.items() if result.headline] == ["top5"]
    names = (tmp_path / LIST_NAME).read_text().splitlines()
    assert names == [one.train.file_name(image_id) for image_id in random_ids(32, 0.5, 0)]
    result = results["top1"]
    assert result.setting == {"fraction": 0.5, "sampling": "random"}
    assert result.protocol == "paper*"
    assert {key: result.extra["changed"][key] for key in ("num_epochs", "batch_size", "fraction", "image_size")} == {
        "num_epochs": [70, 2],
        "batch_size": [256, 8],
        "fraction": [[0.01, 0.1], 0.5],
        "image_size": [224, 16],
    }
    assert (result.extra["num_train"], result.extra["num_test"], result.extra["num_classes"]) == (16, 32, 8)
    assert result.extra["recipe"]["num_epochs"] == 2
    assert result.extra["recipe"]["milestones"] == [1, 2]
    assert not (tmp_path / STATE_NAME).exists()
    json.dumps(result.extra)

    # the same images, from the list that was written
    listed = list(SemiSupervised(list_file=str(tmp_path / LIST_NAME), num_epochs=2, batch_size=8).run(one))
    assert [r.value for r in listed] == [r.value for r in results.values()]
    assert listed[0].setting == {"sampling": "list", "list": LIST_NAME}


def test_the_accuracy_is_that_of_the_network_on_the_test_images():
    one = context()
    results = {r.metric: r.value for r in SemiSupervised(fraction=1.0, num_epochs=3, batch_size=8).run(one)}
    recipe = changed_recipe(published_recipe("paper", 1.0), num_epochs=3, batch_size=8)
    part = Part(one.train, np.arange(32))
    batches = LabelledBatches(one, part, torch.from_numpy(part.labels), augmented_view(16), 8, one.seed)
    network = FineTuning(one, batches, recipe, 8).run(None, {})
    with torch.no_grad():
        scores = network(torch.stack([one.transform(one.test[i][0])["image"] for i in range(32)]))
    ranks = [int((row > row[label]).sum()) for row, label in zip(scores, one.test.labels, strict=True)]
    assert results["top1"] == pytest.approx(100 * np.mean([rank < 1 for rank in ranks]))
    assert results["top5"] == pytest.approx(100 * np.mean([rank < 5 for rank in ranks]))


EVALUATION_VIEW = {"name": "eval_view", "resize": 256, "crop": 224}


def named(tmp_path: Path, image_size: int = 224, view: dict[str, Any] | None = None, **arguments: Any) -> str:
    """Protocol in the records of a run on 224-pixel images whose training is left out."""
    one = context(image_size=image_size, view=view or EVALUATION_VIEW, run_dir=tmp_path)
    return next(iter(SemiSupervised(**arguments).run(one))).protocol


def test_the_protocols_name_has_a_star_for_everything_that_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(FineTuning, "__init__", lambda self, *a: setattr(self, "losses", [0.0]))
    monkeypatch.setattr(FineTuning, "run", lambda self, *a: Classifier(build("model", TRUNK), 8, 0).eval())
    monkeypatch.setattr("pirl_plugin.benchmarks.finetuning.semi_supervised.fitting_batch", lambda recipe, *a: recipe)
    assert named(tmp_path, fraction=0.1) == "paper"
    assert named(tmp_path, fraction=0.1, protocol="swav") == "swav"
    assert named(tmp_path, fraction=0.1, trunk_lr=0.01) == "paper"
    assert named(tmp_path, fraction=0.1, sampling="balanced") == "paper*"
    assert named(tmp_path, fraction=0.1, sampling="random", protocol="swav") == "swav*"
    assert named(tmp_path, fraction=0.2) == "paper*"
    assert named(tmp_path, fraction=0.1, image_size=96, view={**EVALUATION_VIEW, "resize": 96, "crop": 96}) == "paper*"
    assert named(tmp_path, fraction=0.1, view={**EVALUATION_VIEW, "resize": 232}) == "paper*"
    for change in (
        {"num_epochs": 71},
        {"batch_size": 255},
        {"trunk_lr": 0.02},
        {"head_lr": 0.02},
        {"weight_decay": 1e-4},
    ):
        assert named(tmp_path, fraction=0.1, **change) == "paper*", change
    list_file = str(tmp_path / LIST_NAME)  # 3 of 32 images: not 10 %
    assert named(tmp_path, list_file=list_file) == "paper*"


@pytest.mark.parametrize(
    ("batch_size", "images", "processes", "expected"), [(256, 1000, 8, 256), (256, 100, 8, 96), (8, 8, 2, 8)]
)
def test_a_batch_is_cut_to_the_labelled_images(batch_size, images, processes, expected):
    recipe = dataclasses.replace(FAST, batch_size=batch_size)
    assert fitting_batch(recipe, images, processes).batch_size == expected


def test_batches_that_cannot_be_shared_or_normalised_are_refused():
    with pytest.raises(ValueError, match="batch_size=8 is no multiple of the 3 processes"):
        fitting_batch(FAST, 100, 3)
    with pytest.raises(ValueError, match=r"1 labelled images.*too few for batch norm"):
        fitting_batch(FAST, 1, 1)


def test_an_unreadable_image_and_few_classes(tmp_path):
    for split in ("train", "test"):
        coloured_images(tmp_path, split, 3, 3)
        (tmp_path / split / "class1" / "4.png").write_bytes(b"nothing")
    train, test = (ImageFolder(str(tmp_path), split=split) for split in ("train", "test"))
    one = context(train=train, test=test)
    (result,) = SemiSupervised(fraction=0.01, sampling="balanced", num_epochs=1).run(one)
    assert (result.metric, result.headline) == ("top1", True)  # top-5 of 3 classes says nothing
    assert result.extra["num_train"] == 3
    assert result.extra["classes_without_images"] == 0
    assert (result.extra["num_test"], result.extra["unreadable_test"]) == (8, 1)


def test_splits_without_labels_are_refused(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    plain = ImageFolder(str(tmp_path))
    with pytest.raises(ValueError, match="no class labels"):
        list(SemiSupervised().run(context(train=plain, test=plain)))


SMALL = {
    "name": "semi_supervised",
    "fraction": 0.5,
    "num_epochs": 2,
    "batch_size": 8,
    "trunk_lr": 0.005,
    "head_lr": 0.01,
}
SCENES = {"name": "generated_scenes", "num_images": 32, "size": 32}


def test_random_and_supervised_rows(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    trunk = {"name": "resnet_trunk", "depth": 18}
    common = {"benchmark": {**SMALL, "num_epochs": 1}, "dataset": SCENES, "trunk": trunk, "image_size": 32}
    records = run_benchmark({**common, "weights": "random"})
    records += run_benchmark({**common, "weights": str(tmp_path / "resnet18.pth"), "method": "supervised"})
    assert [(record.method, record.metric) for record in records] == [
        (method, metric) for method in ("random", "supervised") for metric in ("top5", "top1")
    ]


def test_what_the_processes_share(monkeypatch):
    """Gradients at each of the 4 steps; running statistics, which are then the mean, and 2 numbers to report, once."""
    shared: list[torch.Tensor] = []

    def mean_with_a_rank_of_zeros(x: torch.Tensor) -> torch.Tensor:
        shared.append(x)
        return x / 2

    training = finetuning(context())
    size = sum(parameter.numel() for parameter in training.network.parameters())
    statistics = [b for b in training.network.trunk.buffers() if b.is_floating_point()]
    monkeypatch.setattr("pirl_plugin.distributed.is_distributed", lambda: True)
    monkeypatch.setattr("pirl_plugin.distributed.all_reduce_mean", mean_with_a_rank_of_zeros)
    training._train_epoch()
    constants = sum(b.numel() for b in training.network.normalize.buffers())
    sizes = [x.numel() for x in shared]
    assert sizes == [size] * 4 + [sum(b.numel() for b in statistics) + constants, 2]
    torch.testing.assert_close(torch.cat([b.reshape(-1) for b in statistics]), shared[4][constants:] / 2)


def test_two_processes_are_two_halves_with_averaged_gradients(tmp_path):
    """The command under torchrun against ``plain_steps`` with a copy for each half of the batch."""
    settings = [f"benchmark.{key}={value}" for key, value in SMALL.items() if key != "name"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(ROOT / "tools" / "benchmark.py"), "benchmark=semi_supervised", *settings]
    command += ["weights=random", "trunk=resnet18_small", "trunk.width=0.125", "image_size=16"]
    command += ["dataset.num_images=32", "dataset.size=32", "benchmark.fraction=1.0", f"run_dir={tmp_path / 'run'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    one = context()
    recipe = changed_recipe(published_recipe("paper", 1.0), 2, 8, 0.005, 0.01)
    network, losses = plain_steps(one, recipe, [1.0, 0.1], halves=2)
    records = {record.metric: record for record in read_records(tmp_path / "run")}
    assert set(records) == {"top1", "top5"}
    assert records["top1"].extra["last_loss"] == pytest.approx(losses[-1], rel=1e-4)
    with torch.no_grad():
        scores = network(torch.stack([one.transform(one.test[i][0])["image"] for i in range(32)]))
    for top in (1, 5):
        ranks = [int((row > row[label]).sum()) for row, label in zip(scores, one.test.labels, strict=True)]
        right = 100 * np.mean([rank < top for rank in ranks])
        assert records[f"top{top}"].value == pytest.approx(right, abs=100 / 32 + 0.1)  # one image on the edge
    alone = plain_steps(one, recipe, [1.0, 0.1])[1][-1]
    assert records["top1"].extra["last_loss"] != pytest.approx(alone, rel=1e-3)  # the comparison can tell
    assert len((tmp_path / "run" / LIST_NAME).read_text().splitlines()) == 32
    assert done.stderr.count("of the training views right") == 2  # one process speaks
