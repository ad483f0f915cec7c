"""Streamed linear classifiers: one pass for everything, choices without the test images, resume, two processes."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from linear_worker import (
    CACHED,
    SCENARIOS,
    SIZE,
    Squares,
    context,
    kept,
    plan,
    run,
    run_cached,
    small_batches,
)
from PIL import Image
from ranks import run_ranks
from torch import nn

from pirl_plugin.benchmarks.linear.benchmark import Linear
from pirl_plugin.benchmarks.linear.probes import GridPoint
from pirl_plugin.benchmarks.linear.protocols import PROTOCOLS
from pirl_plugin.benchmarks.linear.streamed import StreamedProbes
from pirl_plugin.benchmarks.linear.targets import Targets
from pirl_plugin.benchmarks.training import LabelledBatches, augmented_view
from pirl_plugin.models.normalize import Normalize

FIVE = ["conv1", "res2", "res3", "res4", "res5"]


# -- one pass ----------------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """A trunk that counts its passes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.passes = inner, 0

    def features(self, x: torch.Tensor, layers: Iterable[str]) -> dict[str, torch.Tensor]:
        self.passes += 1
        return self.inner.features(x, layers)  # type: ignore[operator]


def test_all_layers_and_the_whole_grid_need_one_pass_of_the_trunk_a_batch():
    """40 images: 3 steps of 12 an epoch; 4 images are held out, so that 36 are 3 steps as well."""
    train, test = Squares(40), Squares(21, seed=1)
    one = context(train, test)
    counted = dataclasses.replace(one, trunk=Counted(one.trunk))
    points = [GridPoint(lr, decay) for lr in (0.1, 0.01) for decay in (0.0, 1e-3)]
    kept(counted, plan(small_batches("vissl"), points, FIVE, num_epochs=2))
    shapes, steps, held_out, of_test = 1, 2 * 2 * 3, 1, 2
    assert counted.trunk.passes == shapes + steps + held_out + of_test
    assert train.seen == 2 * 2 * 36 + 4
    assert test.seen == 21


def test_streamed_training_is_that_of_torch_s_own_modules():
    """Per layer BatchNorm2d, Linear and torch's SGD over the same batches; the fc of one layer after the other."""
    train, test = Squares(40), Squares(21, seed=1)
    one = context(train, test)
    protocol = small_batches("vissl")
    probes = kept(one, plan(protocol, [GridPoint(0.05, 0.01)], ["res2", "res5"], num_epochs=4))
    start = probes._grids(None)
    normalize = Normalize()
    for layer, side in (("res2", 16), ("res5", 2)):
        channels, dims = probes.shapes[layer]
        assert dims == channels * side**2
        norm, linear = nn.BatchNorm2d(channels), nn.Linear(dims, 4)
        with torch.no_grad():
            linear.weight.copy_(start[layer].parameters["weight"][0])
            linear.bias.copy_(start[layer].parameters["bias"][0])
        groups = [
            {"params": linear.parameters(), "weight_decay": 0.01},
            {"params": norm.parameters(), "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)
        batches = LabelledBatches(one, train, torch.from_numpy(train.labels), augmented_view(SIZE), 12, one.seed)
        for epoch in range(4):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * 0.1 ** [0, 0, 1, 2][epoch]  # three drops after 2, 4 and 6 sevenths of 4 epochs
            for images, labels in batches.epoch(epoch):
                with torch.no_grad():
                    maps = one.trunk.features(normalize(images), [layer])[layer]  # type: ignore[operator]
                optimizer.zero_grad()
                F.cross_entropy(linear(norm(maps).flatten(1)), labels).backward()
                optimizer.step()
        grid = probes.grids[layer]
        for name, value in (("weight", linear.weight), ("bias", linear.bias), ("scale", norm.weight)):
            torch.testing.assert_close(grid.parameters[name][0], value, atol=2e-5, rtol=1e-4)
        norm.eval()
        images = torch.stack([one.transform(test[i][0])["image"] for i in range(21)])
        scores = linear(norm(one.trunk.features(normalize(images), [layer])[layer]).flatten(1))  # type: ignore[operator]
        right = (scores.argmax(dim=1) == torch.from_numpy(test.labels)).double().mean()
        assert probes.outcomes[layer].metrics["top1"] == pytest.approx(100 * float(right))


@pytest.mark.parametrize("protocol", ["paper", "vissl", "goyal19", "moco", "swav"])
def test_every_protocol_learns_separable_classes_and_says_what_was_changed(protocol):
    train, test = Squares(96, classes=6, noise=20), Squares(30, classes=6, seed=1, noise=20)
    lr = {"moco": 1.0, "swav": 3.0}.get(protocol, 0.05)
    found = list(Linear(protocol=protocol, num_epochs=6, batch_size=16, lr=lr).run(context(train, test)))
    assert {result.protocol for result in found} == {f"{protocol}*"}
    published = PROTOCOLS[protocol].lr
    expected = {"batch_size": [256, 16], "image_size": [224, 16], "num_epochs": [None, 6], "lr": [[published], [lr]]}
    assert all(result.extra["changed"] == expected for result in found)
    (headline,) = [result for result in found if result.headline]
    assert (headline.setting, headline.metric) == ({"layer": "res5"}, "top1")
    best = max(result.value for result in found if result.metric == "top1")
    assert best > (45 if PROTOCOLS[protocol].pooling == "avg" else 90)  # chance is 17
    layers = [result.setting["layer"] for result in found if result.metric == "top5"]
    if PROTOCOLS[protocol].layers == ("res5",):
        assert layers == ["res5"]
    else:
        assert layers == [*FIVE, "best_on_test"]
        assert found[-2].value == best
        assert headline.extra["dims"] == 64 * 2 * 2


def test_bf16_is_honoured_for_the_trunk_and_the_probes_stay_float32():
    one = context(Squares(40, noise=20), Squares(21, seed=1, noise=20), precision="bf16")
    found = kept(one, plan(small_batches("paper"), num_epochs=2))
    exact = kept(dataclasses.replace(one, precision="float32"), plan(small_batches("paper"), num_epochs=2))
    assert {value.dtype for value in found.weights().values()} == {torch.float32}
    assert not torch.equal(found.weights()["res5.weight"], exact.weights()["res5.weight"])
    torch.testing.assert_close(found.weights()["res5.weight"], exact.weights()["res5.weight"], atol=0.02, rtol=0.1)


# -- choices -----------------------------------------------------------------------------------------------------------

GRID = [GridPoint(1e-6, 0.0), GridPoint(0.1, 0.0), GridPoint(1e9, 0.0)]


def test_the_choice_is_made_without_the_test_images():
    """The middle learning rate is right. Test labels turned round, on which it is the worst, change nothing of it."""
    train, honest = Squares(60, noise=20), Squares(20, seed=1, noise=20)
    turned = Squares(20, seed=1, noise=20)
    turned.labels = (honest.labels + 1) % 4
    of_honest, of_turned = (
        kept(context(train, test), plan(small_batches("paper"), GRID, ["res2"])) for test in (honest, turned)
    )
    for probes, right in ((of_honest, True), (of_turned, False)):
        extra = probes.outcomes["res2"].extra
        assert extra["lr"] == 0.1
        assert (probes.outcomes["res2"].metrics["top1"] > 80) is right
        assert extra["held_out"] == 6
        chosen = extra["held_out_top1"]
        assert chosen["lr=0.1,weight_decay=0"] == max(
            chosen["lr=0.1,weight_decay=0"], chosen["lr=1e-06,weight_decay=0"]
        )
    same = [probes.outcomes["res2"].extra["held_out_top1"] for probes in (of_honest, of_turned)]
    assert same[0] == same[1]
    for name, value in of_honest.weights().items():
        assert torch.equal(value, of_turned.weights()[name])


def test_what_chooses_is_not_learned_from():
    """Train images by id, stage by stage: the two parts of the choice share none and make up all."""
    train = Squares(60, noise=20)
    seen: list[int] = []
    whole = train.__getitem__

    class Watched(Squares):
        def __getitem__(self, image_id: int) -> tuple[Image.Image, int]:
            seen.append(image_id)
            return whole(image_id)

    watched = Watched(60, noise=20)
    stages: list[str] = []

    def progress(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
        stages.append(what)
        if what in ("held-out images", "Training, epoch 1 of 2", "training, epoch 1 of 2"):
            marks[what] = len(seen)
        yield from items

    marks: dict[str, int] = {}
    one = context(watched, Squares(8, seed=1), progress=progress)
    kept(one, plan(small_batches("paper"), GRID, ["res2"], num_epochs=2))
    learned, chose, refit = (
        set(seen[: marks["held-out images"]]),
        set(seen[marks["held-out images"] : marks["training, epoch 1 of 2"]]),
        set(seen[marks["training, epoch 1 of 2"] :]),
    )
    assert len(chose) == 6
    assert not learned & chose
    assert refit & chose, "the refit is on all images"
    assert [stage.partition(",")[0] for stage in stages] == ["choice"] * 2 + ["held-out images"] + ["training"] * 2 + [
        "test"
    ]


def test_refit_is_a_run_with_the_chosen_point_and_without_it_the_grid_s_own_is_kept():
    train, test = Squares(60, noise=20), Squares(20, seed=1, noise=20)
    refitted = kept(context(train, test), plan(small_batches("vissl"), GRID))
    alone = kept(context(train, test), plan(small_batches("vissl"), GRID[1:2]))
    assert refitted.outcomes["res5"].extra["lr"] == 0.1
    for name, value in alone.weights().items():
        assert torch.equal(value, refitted.weights()[name])
    without = kept(context(train, test), plan(small_batches("vissl"), GRID, refit=False))
    assert without.outcomes["res5"].extra["refitted_on_all"] is False
    torch.testing.assert_close(
        without.grids["res5"].parameters["weight"][0], without.chosen_from["res5"].parameters["weight"][1]
    )
    assert not torch.equal(without.weights()["res5.weight"], refitted.weights()["res5.weight"])


def test_diverged_classifiers_are_never_chosen_and_named_where_none_is_left(caplog):
    train, test = Squares(60, noise=20), Squares(20, seed=1, noise=20)
    broken = [GridPoint(1e38, 0.0), GridPoint(1e-7, 0.0)]
    with caplog.at_level(logging.WARNING, "pirl_plugin"):
        found = kept(context(train, test), plan(small_batches("paper"), broken, ["res5"], 2))
    assert found.outcomes["res5"].extra["lr"] == 1e-7
    assert found.outcomes["res5"].extra["held_out_top1"]["lr=1e+38,weight_decay=0"] == "diverged"
    assert "end of the grid" in caplog.text
    with pytest.raises(ValueError, match=r"res5 have diverged \(lr=1e\+38,weight_decay=0\): set a lower benchmark\.lr"):
        kept(context(train, test), plan(small_batches("paper"), broken[:1], ["res5"], 2))


def test_too_few_images_to_hold_any_out_are_refused():
    with pytest.raises(ValueError, match=r"cannot be held out.*benchmark\.held_out"):
        kept(context(Squares(4), Squares(4)), plan(small_batches("paper", 2), GRID))


# -- resume ------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopping(at: str) -> Any:
    def progress(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
        if what.lower().startswith(at):
            raise Stop
        return items

    return progress


@pytest.mark.parametrize("at", ["choice, epoch 3", "held-out", "training, epoch 1", "training, epoch 2", "test"])
def test_an_interrupted_run_goes_on_exactly(at, tmp_path, caplog):
    train, test = Squares(60, unreadable=1), Squares(20, seed=1)
    the_plan = plan(small_batches("vissl"), GRID[:2])
    whole = kept(context(train, test), the_plan)
    one = context(train, test, run_dir=tmp_path)
    with pytest.raises(Stop):
        kept(dataclasses.replace(one, progress=stopping(at)), the_plan)
    assert (tmp_path / "linear_state.pt").is_file()
    before = train.seen
    with caplog.at_level(logging.INFO, "pirl_plugin"):
        again = kept(one, the_plan)
    assert "Going on with" in caplog.text
    assert whole.outcomes["res5"].extra["unreadable_train"] == 1
    assert train.seen - before < 2 * 3 * 60
    for name, value in whole.weights().items():
        assert torch.equal(value, again.weights()[name])
    for layer, outcome in whole.outcomes.items():
        assert outcome == again.outcomes[layer]
    assert not (tmp_path / "linear_state.pt").exists()


def relabelled() -> Squares:
    """The same images, names and sizes, with the first two classes exchanged."""
    images = Squares(60)
    images.labels = np.array([1, 0, 2, 3])[images.labels]
    return images


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"weights_sha256": "other"},
        {"precision": "bf16"},
        {"train": Squares(60, seed=9)},
        {"train": relabelled()},
        {},
    ],
)
def test_the_state_of_another_run_is_not_taken(change, tmp_path, caplog):
    one = context(Squares(60), Squares(20, seed=1), run_dir=tmp_path)
    with pytest.raises(Stop):
        kept(dataclasses.replace(one, progress=stopping("training, epoch 2")), plan(small_batches("paper")))
    other = plan(small_batches("paper"), num_epochs=3 if change else 4)
    with caplog.at_level(logging.INFO, "pirl_plugin"):
        found = kept(dataclasses.replace(one, **change), other)
    assert "is of other settings" in caplog.text
    anew = kept(dataclasses.replace(one, **change, run_dir=None), other)
    for name, value in anew.weights().items():
        assert torch.equal(value, found.weights()[name])


def test_a_damaged_state_starts_anew(tmp_path, caplog):
    (tmp_path / "linear_state.pt").write_bytes(b"nothing")
    kept(context(Squares(20), Squares(8), run_dir=tmp_path), plan(small_batches("paper"), num_epochs=1))
    assert "cannot be read" in caplog.text


def test_progress_names_stage_epoch_and_accuracy(caplog, monkeypatch):
    one = context(Squares(40, noise=20), Squares(8))
    with caplog.at_level(logging.INFO, "pirl_plugin"):
        kept(one, plan(small_batches("paper"), num_epochs=2))
    lines = [record.getMessage() for record in caplog.records if "epoch" in record.getMessage()]
    assert lines[1].startswith("Training, epoch 2 of 2: conv1 loss ")
    assert "top-1" in lines[1]
    assert len(lines) == 2
    monkeypatch.setattr("pirl_plugin.benchmarks.linear.streamed._LONG_EPOCH", 20)
    caplog.clear()
    with caplog.at_level(logging.INFO, "pirl_plugin"):
        kept(one, plan(small_batches("paper", 2), num_epochs=1))
    lines = [record.getMessage().partition(": ")[0] for record in caplog.records]
    tenths = [f"Training, epoch 1 of 1, step {step} of 20" for step in range(2, 20, 2)]
    assert lines == [*tenths, "Training, epoch 1 of 1"]


# -- two processes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    run_ranks("linear_worker.py", folder)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", list(SCENARIOS))
def test_two_processes_are_one(two, name):
    one, (first, second) = run(name), (ranks[name] for ranks in two)
    for key, value in one["weights"].items():
        assert torch.equal(first["weights"][key], second["weights"][key])
        torch.testing.assert_close(first["weights"][key], value, atol=2e-5, rtol=1e-4)
    assert first["extra"] == second["extra"] == one["extra"]
    for layer, metrics in one["metrics"].items():
        assert first["metrics"][layer] == second["metrics"][layer] == pytest.approx(metrics, abs=1e-6)
    assert first["seen"] < 0.6 * one["seen"], "each does its part"


@pytest.mark.parametrize("name", CACHED)
def test_two_processes_are_one_with_cached_features(two, name):
    one, (first, second) = run_cached(name), (ranks[name] for ranks in two)
    assert one["top1"] > 30
    assert first["top1"] == second["top1"] == one["top1"]
    assert first["extra"] == second["extra"] == one["extra"]


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr("pirl_plugin.distributed.world_size", lambda: 5)
    one = context(Squares(20), Squares(8))
    with pytest.raises(ValueError, match=r"12 images does not divide into 5 processes.*benchmark\.batch_size"):
        StreamedProbes(one, plan(small_batches("paper")), Targets.of(one))
