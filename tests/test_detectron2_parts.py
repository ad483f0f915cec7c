"""What detectron2's engine does without detectron2: options, refusals, folders, messages. None of it is skipped."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pirl_plugin.benchmarks.context import BenchmarkContext, progress_bar
from pirl_plugin.benchmarks.detection import detectron2_preflight as preflight
from pirl_plugin.benchmarks.detection.benchmark import DetectionVOC
from pirl_plugin.benchmarks.detection.detectron2_config import norm_name, norm_note, options, trunk_shape
from pirl_plugin.benchmarks.detection.detectron2_job import (
    FOLDER,
    Batches,
    Job,
    as_detections,
    check_processes,
    folder_of,
    last_line,
    log_in_process,
)
from pirl_plugin.benchmarks.detection.engine import resolve
from pirl_plugin.benchmarks.detection.presets import published
from pirl_plugin.benchmarks.detection.voc import Examples
from pirl_plugin.registry import build

PAPER, MOCO = published("paper", "voc07"), published("moco", "voc07+12")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_without_detectron2_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pirl_plugin.benchmarks.detection.detectron2_engine"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "detectron2", None)
    with pytest.raises(ImportError, match=r"engine=detectron2 needs detectron2.*install\.html, or use engine=torchvis"):
        importlib.import_module(name)
    assert name not in sys.modules


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "depth", "channels"),
    [
        ({"depth": 18}, 18, 64),
        ({"depth": 34, "width": 1.0, "stem": "imagenet"}, 34, 64),
        ({}, 50, 64),  # the trunk's own default
        ({"depth": 50, "width": 2.0}, 50, 128),
        ({"depth": 101, "width": 0.5}, 101, 32),
    ],
)
def test_trunks_that_detectron2_can_be(config: dict[str, Any], depth: int, channels: int) -> None:
    assert trunk_shape({"name": "resnet_trunk", **config}) == (depth, channels)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "resnet_trunk", "depth": 18, "width": 0.25}, "ResNet-18 has width 1 only, this trunk's is 0.25"),
        ({"name": "resnet_trunk", "depth": 34, "width": 2.0}, "ResNet-34 has width 1 only"),
        ({"name": "resnet_trunk", "stem": "small"}, "stem 'imagenet'.*this trunk's is 'small'"),
        ({"name": "resnet_trunk", "stem": "medium"}, "this trunk's is 'medium'"),
        ({"name": "vit"}, "takes a resnet_trunk, got 'vit'"),
    ],
)
def test_other_trunks_are_refused_with_the_way_out(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*use engine=torchvision"):
        trunk_shape(config)


def test_options_by_hand() -> None:
    """The PIRL paper's numbers under detectron2's names; the rest is compared with detectron2's own file elsewhere."""
    chosen = options(published("paper", "voc07+12"), {"name": "resnet_trunk", "depth": 50}, 20, "FrozenBN")
    by_hand = {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.NORM": "FrozenBN",
        "MODEL.BACKBONE.FREEZE_AT": 2,
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.BASE_LR": 0.003,
        "SOLVER.STEPS": [17000],
        "SOLVER.MAX_ITER": 25000,
        "SOLVER.WARMUP_ITERS": 1000,
        "SOLVER.WARMUP_FACTOR": 1 / 3,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
        "INPUT.MIN_SIZE_TEST": 800,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
        "MODEL.ROI_HEADS.NUM_CLASSES": 20,
        "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsAnyDepth",
    }
    assert {key: chosen[key] for key in by_hand} == by_hand


def test_options_of_other_trunks() -> None:
    """VISSL's ResNet-50w2 files have 128, 128 and 512 here; detectron2 asks for 64 with basic blocks."""
    keys = [f"MODEL.RESNETS.{key}" for key in ("STEM_OUT_CHANNELS", "WIDTH_PER_GROUP", "RES2_OUT_CHANNELS")]
    wide = options(MOCO, {"name": "resnet_trunk", "width": 2.0}, 20, "SyncBN")
    assert [wide[key] for key in keys] == [128, 128, 512]
    assert wide["MODEL.ROI_HEADS.NAME"] == "Res5ROIHeadsExtraNorm"
    basic = options(MOCO, {"name": "resnet_trunk", "depth": 18}, 20, "SyncBN")
    assert [basic[key] for key in keys] == [64, 64, 64]


@pytest.mark.parametrize(
    ("protocol", "device", "processes", "name"),
    [
        ("paper", "cuda", 8, "FrozenBN"),
        ("paper", "cpu", 1, "FrozenBN"),
        ("moco", "cuda", 8, "SyncBN"),
        ("moco", "cuda:1", 1, "SyncBN"),
        ("moco", "cpu", 1, "BN"),
        ("moco", "cpu", 2, "naiveSyncBN"),
    ],
)
def test_the_norm_that_a_device_allows(protocol: str, device: str, processes: int, name: str) -> None:
    settings = published(protocol, "voc07")
    assert norm_name(settings, device, processes) == name
    assert (norm_note(name) is None) == (name in ("FrozenBN", "SyncBN"))


def test_auto_is_torchvision_for_a_trunk_that_detectron2_cannot_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    narrow, wide = ({"name": "resnet_trunk", "depth": depth, "width": 0.25} for depth in (18, 50))
    with caplog.at_level(logging.INFO):
        assert [resolve("auto", trunk) for trunk in (narrow, wide, {})] == ["torchvision", "detectron2", "detectron2"]
    assert "engine=auto: torchvision, because detectron2's ResNet-18 has width 1 only" in caplog.text
    assert resolve("detectron2", narrow) == "detectron2"  # which then refuses it


def test_several_gpus_are_detectron2s(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    module = types.ModuleType("detectron2_engine")
    module.train_and_detect = lambda *arguments, num_gpus=1: asked.append((len(arguments), num_gpus))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pirl_plugin.benchmarks.detection.detectron2_engine", module)
    for num_gpus in (1, 8):
        DetectionVOC(engine="detectron2", num_gpus=num_gpus)._engine("detectron2")(*range(6))  # type: ignore[arg-type]
    assert asked == [(6, 1), (6, 8)]
    with pytest.raises(ValueError, match="num_gpus=8 needs engine=detectron2"):
        DetectionVOC(engine="torchvision", num_gpus=8)._engine("torchvision")


# -- processes and folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processes", "device", "gpus", "message"),
    [
        (0, CPU, 0, "num_gpus must be >= 1"),
        (3, CPU, 0, "divide the batch of 16 images, got 3"),
        (8, CUDA, 4, "num_gpus=8 was asked for, but torch sees 4"),
        (2, CPU, 4, "use device=cuda"),
    ],
)
def test_processes_that_cannot_be(
    processes: int, device: torch.device, gpus: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=message):
        check_processes(processes, PAPER, device)


@pytest.mark.parametrize(("processes", "device", "gpus"), [(1, CPU, 4), (2, CPU, 0), (4, CUDA, 4), (1, CUDA, 4)])
def test_processes_that_can_be(
    processes: int, device: torch.device, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    check_processes(processes, PAPER, device)


def a_context(run_dir: Path | None) -> BenchmarkContext:
    return BenchmarkContext(trunk=nn.Identity(), train=None, test=None, transform=dict, run_dir=run_dir)


def test_without_a_run_the_folder_is_temporary() -> None:
    with folder_of(a_context(None), "x") as folder:
        assert folder.is_dir()
    assert not folder.exists()


def test_only_the_same_training_finds_its_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with folder_of(a_context(tmp_path), "one") as folder:
        assert folder == tmp_path / FOLDER
        for name in ("last_checkpoint", "metrics.json", "model_0000004.pth"):
            (folder / name).write_text("x")
    with folder_of(a_context(tmp_path), "one") as folder:
        assert (folder / "last_checkpoint").is_file()
    assert "starts anew" not in caplog.text
    with caplog.at_level(logging.WARNING), folder_of(a_context(tmp_path), "another") as folder:
        assert not (folder / "last_checkpoint").exists()
        assert not (folder / "metrics.json").exists()
    assert "the training starts anew" in caplog.text
    caplog.clear()
    with folder_of(a_context(tmp_path), "another"):
        pass
    assert caplog.text == ""


def test_a_job_can_be_sent(tmp_path: Path) -> None:
    trunk = {"name": "resnet_trunk", "depth": 18}
    examples = Examples(build("dataset", {"name": "generated_scenes", "num_images": 3}))
    job = Job(build("model", trunk), trunk, examples, examples, PAPER, "cpu", 2, 0, 0, tmp_path, None, progress_bar)
    sent = pickle.loads(pickle.dumps(job))
    assert sent.settings == PAPER
    assert [example.name for example in sent.train] == [example.name for example in examples]
    assert torch.equal(sent.trunk.conv1.weight, job.trunk.conv1.weight)


def test_a_process_tells_the_terminal_ours_and_the_file_everything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    log_in_process(tmp_path / "log.txt")
    logging.getLogger("pirl_plugin.x").info("ours")
    logging.getLogger("detectron2.x").info("theirs")
    for handler in root.handlers:
        handler.flush()
    told = capsys.readouterr().err
    assert "ours" in told
    assert "theirs" not in told
    written = (tmp_path / "log.txt").read_text()
    assert "INFO pirl_plugin.x: ours" in written
    assert "INFO detectron2.x: theirs" in written
    monkeypatch.setattr(root, "handlers", [])
    log_in_process(None)
    assert len(root.handlers) == 1


def test_of_a_traceback_its_last_line() -> None:
    assert (
        last_line(RuntimeError("\n\n-- Process 0 ...\nTraceback\n  File\nValueError: no GPU\n\n"))
        == "ValueError: no GPU"
    )
    assert last_line(RuntimeError()) == "RuntimeError"


def test_batches_are_made_when_they_are_asked_for_and_unreadable_images_counted() -> None:
    asked = []

    def loader(seed: int, num_workers: int) -> list[list[dict[str, Any]]]:
        asked.append((seed, num_workers))
        return [[{"unreadable": True}, {"unreadable": False}], [{"unreadable": True}]]

    batches = Batches(loader, num_workers=3)
    batches.seed = 7
    assert asked == []
    assert len(list(batches)) == 2
    assert asked == [(7, 3)]
    assert batches.unreadable == 2


def test_detections_are_arrays() -> None:
    found = {"boxes": torch.tensor([[0.0, 1, 2, 3]]), "scores": torch.tensor([0.5]), "labels": torch.tensor([2])}
    one, none = as_detections([found, None])
    assert none is None
    assert one is not None
    np.testing.assert_array_equal(one.boxes, [[0, 1, 2, 3]])
    assert (one.boxes.dtype, one.scores.dtype, one.labels.dtype) == (np.float32, np.float32, np.int64)


# -- the pre-flight check's own words ----------------------------------------------------------------------------------


def test_a_table_of_checks() -> None:
    checks = [preflight.same("pixel mean", [1], [1]), preflight.same("classes", 21, 20)]
    assert preflight.table(checks) == "  ok    pixel mean  [1]\n  WRONG classes     20, not 21"
    preflight.verify(checks[:1])
    with pytest.raises(ValueError, match=r"not what the protocol says: classes is 20, not 21\."):
        preflight.verify(checks)


def test_learning_rates_are_compared_where_they_change() -> None:
    """A schedule that drops one iteration late differs at that iteration alone."""
    network = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-4)

    def wrong(rate_at: Any) -> list[preflight.Check]:
        checks = preflight.training_checks(network, optimizer, rate_at, PAPER, 16)
        return [check for check in checks if not check.right]

    def right(at: int) -> float:
        warming = 0.001 + 0.002 * at / 1000
        return warming if at < 1000 else 0.003 if at < 9500 else 0.0003

    assert wrong(right) == []
    (found,) = wrong(lambda at: 0.003 if at == 9500 else right(at))
    assert found.what == "learning rate at the drops 9500"
    assert (found.found, found.wanted) == ("0.003 at 9500", "0.0003 at 9500")
