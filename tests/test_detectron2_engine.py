"""Training and detecting with detectron2; skipped where it is not installed."""
# ruff: noqa: E402  (what imports detectron2 comes after the question whether there is one)

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

detectron2 = pytest.importorskip(
    "detectron2", reason="detectron2 is not installed: it is on no package index, see docs/benchmarks.md, Detection"
)

from detectron2.data import DatasetCatalog
from detectron2_world import (
    CLASSES,
    OBJECTS,
    RESNET18,
    a_context,
    a_devkit,
    a_job,
    examples_of,
    scenes,
    small,
    the_trunk,
    write_annotation,
)

from pirl_plugin.benchmarks.detection import detectron2_engine as engine
from pirl_plugin.benchmarks.detection.detectron2_job import FOLDER
from pirl_plugin.benchmarks.detection.engine import Detections
from pirl_plugin.benchmarks.runner import run_benchmark
from pirl_plugin.models.trunks import ResNetTrunk
from pirl_plugin.weights.detectron2_names import to_detectron2


@pytest.fixture(scope="module")
def trunk() -> ResNetTrunk:
    return the_trunk()


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    return a_devkit(tmp_path)


def check_detections(found: list[Detections | None], count: int, side: int = 64) -> None:
    assert len(found) == count
    for detections in found:
        assert detections is not None
        boxes, scores, labels = detections.boxes, detections.scores, detections.labels
        assert (boxes.dtype, scores.dtype, labels.dtype) == (np.float32, np.float32, np.int64)
        assert boxes.shape == (len(scores), 4)
        assert labels.shape == (len(scores),)
        assert boxes.min(initial=0) >= 0
        assert boxes.max(initial=0) <= side
        assert ((scores > 0.05) & (scores <= 1)).all()
        assert set(labels.tolist()) <= set(range(CLASSES))
    assert sum(len(detections.boxes) for detections in found if detections) > 0


def test_frozen_batch_norm_and_frozen_stages_stay_and_the_rest_is_trained(trunk: ResNetTrunk, tmp_path: Path) -> None:
    before = copy.deepcopy(trunk.state_dict())
    found, notes = engine.train_and_detect(
        trunk, RESNET18, scenes(), scenes(3, "test"), small(lr=0.01), a_context(trunk, tmp_path)
    )
    check_detections(found, 3)
    assert json.loads(json.dumps(notes))["processes"] == 1
    assert notes["preflight"]["norms"] == "20 FrozenBatchNorm2d"
    assert [entry[0] for entry in notes["losses"]] == [1, 2, 3, 4]
    assert "norm" not in notes
    assert "resumed_at" not in notes
    torch.testing.assert_close(dict(trunk.state_dict()), dict(before), rtol=0, atol=0)
    (file,) = (tmp_path / FOLDER).glob("*.pth")
    after = torch.load(file, weights_only=True)["model"]
    for name, value in to_detectron2(before, "c4").items():
        fixed = "norm" in name or "stem" in name or "res2" in name
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(after[name], value) == fixed, name
    lines = (tmp_path / FOLDER / "metrics.json").read_text().splitlines()
    assert json.loads(lines[-1])["iteration"] == 3
    assert not [name for name in DatasetCatalog.list() if name.startswith("pirl_plugin")]


def test_tuned_batch_norm_with_the_extra_norm_and_precise_statistics(trunk: ResNetTrunk, tmp_path: Path) -> None:
    settings = replace(small("moco", lr=0.001), precise_bn=3)
    shown: dict[str, int] = {}

    def progress(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
        for item in items:
            shown[f"{what}, {total}"] = shown.get(f"{what}, {total}", 0) + 1
            yield item

    found, notes = engine.train_and_detect(
        trunk, RESNET18, scenes(), scenes(2, "test"), settings, a_context(trunk, tmp_path, progress=progress)
    )
    assert shown == {"detector, 4": 4, "batch norm, 3": 3, "detections, 2": 2}
    check_detections(found, 2)
    assert "instead of synchronised" in notes["norm"]
    assert notes["preflight"]["norms"] == "21 BatchNorm2d"
    (file,) = (tmp_path / FOLDER).glob("*.pth")
    after = torch.load(file, weights_only=True)["model"]
    given = to_detectron2(trunk.state_dict(), "c4")
    for name in ("backbone.stem.conv1.norm.running_mean", "roi_heads.res5.1.conv2.norm.weight"):
        assert not torch.equal(after[name], given[name])
    # precise statistics are those of images alone: nothing is left of where the new norm started
    assert (after["roi_heads.res5.norm.running_var"] - 1).abs().min() > 0
    without = engine.train_and_detect(
        trunk, RESNET18, scenes(), scenes(2, "test"), replace(settings, precise_bn=0), a_context(trunk, tmp_path / "b")
    )
    assert without[1]["losses"] == notes["losses"]
    (file,) = (tmp_path / "b" / FOLDER).glob("*.pth")
    moving = torch.load(file, weights_only=True)["model"]
    name = "backbone.stem.conv1.norm.running_var"
    assert not torch.allclose(moving[name], after[name], rtol=0.01)
    torch.testing.assert_close(moving["roi_heads.res5.0.conv1.weight"], after["roi_heads.res5.0.conv1.weight"])


def boxes(found: list[Detections | None]) -> np.ndarray:
    return np.concatenate([detections.boxes for detections in found if detections is not None])


def test_the_seed_decides(trunk: ResNetTrunk) -> None:
    def losses(seed: int) -> Any:
        found, notes = engine.train_and_detect(
            trunk, RESNET18, scenes(), scenes(2, "test"), small(iterations=2), a_context(trunk, seed=seed)
        )
        return notes["losses"], boxes(found).tolist()

    first = losses(0)
    assert losses(0) == first
    assert losses(1) != first


class Interrupting:
    """A progress bar that interrupts the training, as Ctrl-C would, after some steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self, items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
        for done, item in enumerate(items):
            if what == "detector" and done == self.after:
                raise KeyboardInterrupt
            yield item


def test_an_interrupted_training_goes_on(
    trunk: ResNetTrunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)

    def run(**changes: Any) -> tuple[list[Detections | None], dict[str, Any]]:
        settings = small(iterations=5, **({"lr": changes.pop("lr")} if "lr" in changes else {}))
        context = a_context(trunk, tmp_path, **changes)
        return engine.train_and_detect(trunk, RESNET18, scenes(), scenes(2, "test"), settings, context)

    with pytest.raises(KeyboardInterrupt):
        run(progress=Interrupting(3))
    (file,) = (tmp_path / FOLDER).glob("*.pth")
    steps = torch.load(file, weights_only=True)["trainer"]["iteration"] + 1
    assert steps in (2, 3)
    with caplog.at_level(logging.INFO):
        found, notes = run()
    assert notes["resumed_at"] == steps
    assert f"Going on from iteration {steps} of 5" in caplog.text
    assert [entry[0] for entry in notes["losses"]] == [1, 2, 3, 4, 5]
    again, notes = run()  # nothing is left to train
    assert notes["resumed_at"] == 5
    np.testing.assert_array_equal(boxes(again), boxes(found))
    assert "starts anew" not in caplog.text
    with caplog.at_level(logging.WARNING):
        _, notes = run(lr=0.0001)
    assert "is of other weights, data or settings: the training starts anew" in caplog.text
    assert "resumed_at" not in notes


def test_a_checkpoint_about_once_a_minute(trunk: ResNetTrunk, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A minute is not over in four steps: only the last one is kept."""
    with caplog.at_level(logging.INFO, "fvcore"):
        engine.train_and_detect(
            trunk, RESNET18, scenes(), scenes(2), replace(small(), rois_per_image=2), a_context(trunk, tmp_path)
        )
    assert caplog.text.count("Saving checkpoint") == 1
    assert [file.name for file in (tmp_path / FOLDER).glob("*.pth")] == ["model_0000004.pth"]


@pytest.mark.slow
def test_two_processes(trunk: ResNetTrunk, tmp_path: Path) -> None:
    """detectron2's launcher, on the CPU: every image is detected in, once, and both work on the same network."""
    if torch.cuda.is_available():
        pytest.skip("detectron2's launcher takes GPUs where there are any")
    settings = replace(small("moco", iterations=3), precise_bn=2)
    found, notes = engine.train_and_detect(
        trunk, RESNET18, scenes(), scenes(5, "test"), settings, a_context(trunk, tmp_path), num_gpus=2
    )
    check_detections(found, 5)
    assert notes["processes"] == 2
    assert "NaiveSyncBatchNorm" in notes["norm"]
    assert "detector 3/3" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_a_process_that_fails_says_why(trunk: ResNetTrunk, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("detectron2's launcher takes GPUs where there are any")
    wrong = replace(small(), pixel_std=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"a process of detectron2 failed: ValueError: .*pixel std is \[1\.0"):
        engine.train_and_detect(trunk, RESNET18, scenes(), scenes(2), wrong, a_context(trunk, tmp_path), num_gpus=2)


def test_what_one_of_several_processes_does(trunk: ResNetTrunk, tmp_path: Path) -> None:
    """In this process, so that it can be looked at."""
    job = replace(a_job(trunk, small(iterations=1), tmp_path), log_file=tmp_path / "log.txt")
    engine.process(job, tmp_path / "result.pt")
    found, notes = torch.load(tmp_path / "result.pt", weights_only=True)
    assert len(found) == 3
    assert notes["losses"][0][0] == 1


@pytest.mark.gpu
def test_synchronised_batch_norm_on_a_gpu(trunk: ResNetTrunk, tmp_path: Path) -> None:
    on_gpu = copy.deepcopy(trunk).cuda()
    settings = replace(small("moco", lr=0.001), precise_bn=2)
    found, notes = engine.train_and_detect(
        *(on_gpu, RESNET18, scenes(), scenes(3, "test"), settings),
        a_context(on_gpu, tmp_path, device=torch.device("cuda")),
    )
    check_detections(found, 3)
    assert notes["preflight"]["norms"] == "21 SyncBatchNorm"


def test_what_cannot_be_trained_is_refused_before_anything_is_built(
    trunk: ResNetTrunk, devkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "run", lambda job: pytest.fail("was run"))
    ok = (trunk, RESNET18, scenes(), scenes(2), small(), a_context(trunk))
    with pytest.raises(ValueError, match="stem 'imagenet'.*'small': use engine=torchvision"):
        engine.train_and_detect(trunk, {**RESNET18, "stem": "small"}, *ok[2:])
    with pytest.raises(ValueError, match="divide the batch of 2 images, got 3"):
        engine.train_and_detect(*ok, num_gpus=3)
    for name in OBJECTS:
        write_annotation(devkit / "Annotations" / f"{name}.xml", [])
    with pytest.raises(ValueError, match="none of the 4 training images has an object"):
        engine.train_and_detect(trunk, RESNET18, examples_of(devkit), *ok[3:])


def test_the_benchmark_runs_it_and_names_it_in_the_record(tmp_path: Path) -> None:
    """From a configuration to a record; ``auto`` is this engine for a trunk that it can be, and torchvision's else."""
    changes = {"iterations": 2, "batch_size": 2, "min_size": 64, "rois_per_image": 8, "proposals": 10}
    config = {
        "benchmark": {"name": "detection_voc", **changes},
        "weights": "random",
        "image_size": 64,
        "dataset": {"name": "generated_scenes", "num_images": 4},
        "device": "cpu",
    }
    headline = run_benchmark({**config, "trunk": RESNET18, "run_dir": str(tmp_path)})[0]
    assert headline.setting == {"engine": "detectron2", "train_set": "voc07", "rule": "eleven_point"}
    assert headline.protocol == "paper*"
    assert headline.extra["detectron2"] == detectron2.__version__
    assert headline.extra["preflight"]["channel order"] == "RGB"
    assert json.loads((tmp_path / "result.json").read_text())["extra"]["processes"] == 1
    narrow = run_benchmark({**config, "trunk": {**RESNET18, "width": 0.25}})[0]
    assert narrow.setting["engine"] == "torchvision"
