"""Training with torchvision: it learns, goes on where it stopped, and says what goes wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detection_worlds import context, scenes, trunk

from pirl_plugin.benchmarks.detection import training
from pirl_plugin.benchmarks.detection.c4 import build_detector
from pirl_plugin.benchmarks.detection.evaluation import voc_average_precision
from pirl_plugin.benchmarks.detection.presets import published
from pirl_plugin.benchmarks.detection.schedule import learning_rate, with_overrides
from pirl_plugin.benchmarks.detection.torchvision_engine import detect, identity, train_and_detect
from pirl_plugin.benchmarks.detection.training import CHECKPOINT, Training
from pirl_plugin.benchmarks.detection.voc import Examples

TINY = with_overrides(
    published("moco", "voc07"), batch_size=2, iterations=6, lr=0.01, min_size=32, rois_per_image=8, proposals=10
)


class Interrupted(Exception):
    pass


def stopping_after(steps: int) -> Any:
    """A progress bar that breaks off, as a kill does, once so many batches were worked on."""

    def progress(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
        for done, item in enumerate(items):
            if done == steps and description == "detector":
                raise Interrupted
            yield item

    return progress


def state_after(run_dir: Path) -> dict[str, Any]:
    return torch.load(run_dir / CHECKPOINT, weights_only=True)


@pytest.mark.parametrize("stop", [1, 4])
def test_going_on_is_as_if_never_interrupted(stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, batch norm statistics, detections and the noted losses, bit for bit."""
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    monkeypatch.setattr(training, "_MESSAGES", 3)
    examples, folders = Examples(scenes()), [tmp_path / "whole", tmp_path / "parts"]
    for folder in folders:
        folder.mkdir()
    own = trunk()
    arguments = (own, {}, examples, examples, TINY)
    whole, notes = train_and_detect(*arguments, context(scenes(), trunk=own, run_dir=folders[0]))
    with pytest.raises(Interrupted):
        train_and_detect(*arguments, context(scenes(), trunk=own, run_dir=folders[1], progress=stopping_after(stop)))
    assert state_after(folders[1])["progress"]["iteration"] == stop
    torch.rand(3)  # nothing may hang on the global generator
    parts, notes_of_parts = train_and_detect(*arguments, context(scenes(), trunk=own, run_dir=folders[1]))
    assert notes["losses"] == notes_of_parts["losses"]
    assert len(notes["losses"]) == 3
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a.scores, b.scores)
        np.testing.assert_array_equal(a.boxes, b.boxes)
    before, after = (state_after(folder) for folder in folders)
    assert before["detector"].keys() == after["detector"].keys()
    assert all(torch.equal(value, after["detector"][name]) for name, value in before["detector"].items())
    assert before["optimizer"] is None  # of a finished training


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    examples, own = Examples(scenes()), trunk()
    first, _ = train_and_detect(own, {}, examples, examples, TINY, context(scenes(), trunk=own, run_dir=tmp_path))
    again = context(scenes(), trunk=own, run_dir=tmp_path, progress=stopping_after(0))
    second, notes = train_and_detect(own, {}, examples, examples, TINY, again)
    assert [d.scores.tolist() for d in first] == [d.scores.tolist() for d in second]
    assert notes["training_seconds"] > 0


@pytest.mark.parametrize("change", ["settings", "weights", "seed", "data"])
def test_a_checkpoint_of_something_else_is_not_used(
    change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    examples, own = Examples(scenes()), trunk()
    train_and_detect(own, {}, examples, examples, TINY, context(scenes(), trunk=own, run_dir=tmp_path))
    old = state_after(tmp_path)["identity"]
    settings = replace(TINY, lr=0.02) if change == "settings" else TINY
    other = trunk(1) if change == "weights" else own
    more = Examples(scenes(seed=1)) if change == "data" else examples
    with caplog.at_level(logging.WARNING):
        train_and_detect(
            other, {}, more, more, settings,
            context(scenes(), trunk=other, run_dir=tmp_path, seed=1 if change == "seed" else 0),
        )  # fmt: skip
    assert "the training starts anew" in caplog.text
    assert state_after(tmp_path)["identity"] != old


def test_it_learns_two_scenes_by_heart() -> None:
    """The loss falls and the training images' objects are found, which a detector of two steps does not."""
    scale = {"batch_size": 2, "iterations": 60, "lr": 0.05, "min_size": 64, "rois_per_image": 32, "proposals": 40}
    settings = with_overrides(published("moco", "voc07"), **scale, anchor_sizes=[12.0, 24.0, 40.0], precise_bn=10)
    settings = replace(settings, flip=0.0, train_min_sizes=(64,), anchor_ratios=(1.0,))
    dataset, own = scenes(2, size=64), trunk()
    examples = Examples(dataset)

    def ap50(iterations: int) -> tuple[float, list[list[float]]]:
        steps = replace(settings, iterations=iterations)
        found, notes = train_and_detect(own, {}, examples, examples, steps, context(dataset, trunk=own))
        return float(np.nanmean(voc_average_precision(list(examples), found, 2, thresholds=[0.5]))), notes["losses"]

    learnt, losses = ap50(60)
    assert losses[-1][1] < 0.4 * losses[0][1]
    assert ap50(2)[0] < 0.2
    assert learnt > 0.7


def test_precise_batch_norm_changes_statistics_alone() -> None:
    examples, own = Examples(scenes()), trunk()
    states = []
    for batches in (0, 4):
        settings = replace(TINY, precise_bn=batches)
        detector = build(own, settings)
        Training(detector, examples, settings, context(scenes(), trunk=own), "x").run()
        states.append(detector.state_dict())
    for name, value in states[0].items():
        is_statistic = "running" in name
        assert torch.equal(value, states[1][name]) != is_statistic or "num_batches" in name, name


def build(own: torch.nn.Module, settings: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_detector(own, 2, settings)


def test_each_step_has_the_schedules_learning_rate() -> None:
    own = trunk()
    settings = replace(TINY, warmup_iterations=3, warmup_factor=1 / 3, drops=(4,), precise_bn=0)
    run = Training(build(own, settings), Examples(scenes()), settings, context(scenes(), trunk=own), "x")
    rates = []
    for batch in run._batches(0, 6):
        run.step(batch)
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01 / 3, 0.01 * 5 / 9, 0.01 * 7 / 9, 0.01, 0.001, 0.001])
    assert rates == pytest.approx([learning_rate(settings, i) for i in range(6)])


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    own = trunk()
    examples, settings = Examples(scenes()), replace(TINY, lr=1e12, warmup_iterations=0)
    with pytest.raises(ValueError, match=r"not finite at iteration \d+ .*try a smaller learning rate"):
        train_and_detect(own, {}, examples, examples, settings, context(scenes(), trunk=own))


def test_images_that_lose_their_objects_can_be_learnt_from(tmp_path: Path) -> None:
    """A readable image without objects may stand in for an unreadable one."""
    own = trunk()
    run = Training(build(own, TINY), Examples(scenes()), TINY, context(scenes(), trunk=own), "x")
    (batch,) = list(run._batches(0, 1))
    for sample in batch:
        sample.target.update(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    losses = run.step(batch)
    assert all(np.isfinite(list(losses.values())))


def test_detections_are_in_the_original_images_pixels() -> None:
    """A network that says "this box" of an image of 64 pixels, enlarged from 32, means half of it."""

    class Says(torch.nn.Module):
        def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            assert images[0].shape == (3, 64, 64)
            assert float(images[0].max()) <= 1
            box = torch.tensor([[8.0, 16, 24, 64]])
            return [{"boxes": box, "scores": torch.tensor([0.5]), "labels": torch.tensor([2])}]

    examples = Examples(scenes(2))
    found = detect(Says(), examples, replace(TINY, test_min_size=64, test_max_size=100), context(scenes(2)))
    assert [d.boxes.tolist() for d in found] == [[[4.0, 8.0, 12.0, 32.0]]] * 2
    assert [d.labels.tolist() for d in found] == [[1]] * 2


def test_the_trunk_is_not_changed_and_the_global_generator_not_used() -> None:
    own = trunk()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    examples = Examples(scenes())
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    train_and_detect(own, {}, examples, examples, replace(TINY, iterations=1), context(scenes(), trunk=own))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert identity(own, examples, TINY, 0) == identity(trunk(), examples, TINY, 0)
    for place, changed in enumerate((trunk(2), Examples(scenes(5)), replace(TINY, lr=9.0), 1)):
        arguments: list[Any] = [own, examples, TINY, 0]
        arguments[place] = changed
        assert identity(*arguments) != identity(own, examples, TINY, 0)
    examples[0].boxes[0, 0] += 1  # an annotation was corrected
    assert identity(own, examples, TINY, 0) != identity(own, Examples(scenes()), TINY, 0)
