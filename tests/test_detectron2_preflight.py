"""The same network in detectron2, and the check before the training that finds what usually goes wrong."""
# ruff: noqa: E402  (what imports detectron2 comes after the question whether there is one)

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

detectron2 = pytest.importorskip(
    "detectron2", reason="detectron2 is not installed: it is on no package index, see docs/benchmarks.md, Detection"
)

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2_world import (
    CLASSES,
    RESNET18,
    a_context,
    a_detector,
    a_job,
    a_trunk,
    failed,
    scenes,
    small,
    the_trunk,
    with_statistics,
)

from pirl_plugin.benchmarks.detection import detectron2_engine as engine
from pirl_plugin.benchmarks.detection import detectron2_preflight as preflight
from pirl_plugin.benchmarks.detection.detectron2_config import norm_name, options
from pirl_plugin.benchmarks.detection.presets import published
from pirl_plugin.commands.convert import main as convert
from pirl_plugin.models.trunks import ResNetTrunk
from pirl_plugin.registry import build
from pirl_plugin.weights import find_trunk, read_weights
from pirl_plugin.weights.detectron2_names import to_detectron2


@pytest.fixture(scope="module")
def trunk() -> ResNetTrunk:
    return the_trunk()


@pytest.fixture(scope="module")
def torchvision_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """torchvision's ResNet-50 and the file that it was saved to."""
    torch.manual_seed(2)
    network = with_statistics(torchvision.models.resnet50())
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(network.state_dict(), path)
    return network, path


@pytest.mark.parametrize("way", ["names", ".pth", ".pkl"])
def test_a_torchvision_resnet50_has_the_same_res4_features_in_detectron2(
    way: str, torchvision_file: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    """Converted entry by entry; and by the command, into a file that detectron2's own checkpointer reads."""
    theirs, path = torchvision_file
    found = find_trunk(read_weights(path))
    cfg = get_cfg()
    cfg.merge_from_list(
        [part for item in options(published("paper", "voc07"), {**RESNET18, "depth": 50}, 20, "FrozenBN").items()
         for part in item] + ["MODEL.DEVICE", "cpu"]
    )  # fmt: skip
    detector = build_model(cfg).eval()
    if way == "names":
        report = detector.load_state_dict(to_detectron2(found.state, "c4"), strict=False)
        assert all(name.endswith("num_batches_tracked") for name in report.unexpected_keys)
        assert {name.split(".")[0] for name in report.missing_keys} == {"proposal_generator", "roi_heads"}
    else:
        converted = tmp_path / f"r50{way}"
        assert convert([str(path), "--to", "detectron2", "--out", str(converted)]) == 0
        DetectionCheckpointer(detector).load(str(converted))
    pixels = torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        x = ((pixels / 255 - mean) / std)[None]
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        expected4 = theirs.layer3(theirs.layer2(theirs.layer1(x)))
        expected5 = theirs.layer4(expected4)
        res4 = detector.backbone(detector.preprocess_image([{"image": pixels}]).tensor)["res4"]
        res5 = detector.roi_heads.res5(res4)
    assert expected4.abs().max() > 1
    assert (res4 - expected4).abs().max() <= 1e-4
    assert (res5 - expected5).abs().max() <= 1e-4


@pytest.mark.parametrize("protocol", ["paper", "moco"])
@pytest.mark.parametrize(
    "config", [{"depth": 18}, {"depth": 34}, {"depth": 50, "width": 0.5}, {"depth": 101, "width": 0.25}], ids=str
)
def test_every_trunk_that_is_not_refused_passes_every_check(
    config: dict[str, Any], protocol: str, tmp_path: Path
) -> None:
    config = {"name": "resnet_trunk", **config}
    trunk = a_trunk(config)
    job = a_job(trunk, small(protocol), tmp_path, config)
    cfg, detector = a_detector(job)
    before = copy.deepcopy(trunk.state_dict())
    checks = engine.Training(cfg, detector, job).preflight(norm_name(job.settings, "cpu", 1))
    assert failed(checks) == set()
    assert detector.training
    torch.testing.assert_close(dict(trunk.state_dict()), dict(before), rtol=0, atol=0)


# what is planted, and which checks must see it
def name_of(value: object) -> str:
    """The same in every test process, which the order of a set's elements is not."""
    return str(sorted(value) if isinstance(value, set) else value)[:60]


PLANTED: list[tuple[str, dict[str, Any], set[str]]] = [
    ("paper", {"INPUT__FORMAT": "BGR"}, {"channel order"}),
    ("paper", {"MODEL__PIXEL_MEAN": [103.53, 116.28, 123.675]}, {"pixel mean", "res4 features", "res5 features"}),
    ("paper", {"MODEL__PIXEL_STD": [1.0, 1.0, 1.0]}, {"pixel std", "res4 features", "res5 features"}),
    ("paper", {"MODEL__RESNETS__NORM": "BN"}, {"norms", "trained norms"}),
    ("moco", {"MODEL__RESNETS__NORM": "FrozenBN"}, {"norms", "trained norms"}),
    ("paper", {"MODEL__BACKBONE__FREEZE_AT": 3}, {"frozen stages"}),
    ("moco", {"MODEL__BACKBONE__FREEZE_AT": 2}, {"frozen stages", "norms"}),
    ("moco", {"MODEL__ROI_HEADS__NAME": "Res5ROIHeadsAnyDepth"}, {"extra norm after res5", "norms"}),
    ("paper", {"MODEL__ROI_HEADS__NUM_CLASSES": 20}, {"classes with background"}),
    ("paper", {"MODEL__ANCHOR_GENERATOR__SIZES": [[32.0]]}, {"anchors at a position"}),
    ("paper", {"SOLVER__MOMENTUM": 0.8}, {"(norm?, weight decay, momentum, Nesterov)"}),
    ("moco", {"SOLVER__WEIGHT_DECAY_NORM": 1e-4}, {"(norm?, weight decay, momentum, Nesterov)"}),
    ("paper", {"SOLVER__IMS_PER_BATCH": 16}, {"images of a step"}),
]


@pytest.mark.parametrize(("protocol", "planted", "expected"), PLANTED, ids=name_of)
def test_a_planted_mistake_is_found(
    protocol: str, planted: dict[str, Any], expected: set[str], trunk: ResNetTrunk, tmp_path: Path
) -> None:
    job = a_job(trunk, small(protocol), tmp_path)
    cfg, detector = a_detector(job, **planted)
    checks = engine.Training(cfg, detector, job).preflight(norm_name(job.settings, "cpu", 1))
    assert failed(checks) == expected
    with pytest.raises(ValueError, match="detectron2's model is not what the protocol says") as raised:
        preflight.verify(checks)
    assert all(what in str(raised.value) for what in expected)
    assert preflight.table(checks).count("WRONG") == len(expected)


def test_a_stride_in_the_first_convolution_is_found(tmp_path: Path) -> None:
    config = {"name": "resnet_trunk", "depth": 50, "width": 0.25}
    job = a_job(a_trunk(config), small(), tmp_path, config)
    cfg, detector = a_detector(job, MODEL__RESNETS__STRIDE_IN_1X1=True)
    checks = engine.Training(cfg, detector, job).preflight("FrozenBN")
    assert failed(checks) == {"kernels of strided convolutions in blocks", "res4 features", "res5 features"}


@pytest.mark.parametrize(
    ("planted", "expected"),
    [
        ({"SOLVER__BASE_LR": 0.1}, 4),
        ({"SOLVER__WARMUP_FACTOR": 0.001}, 3),  # the start, the warm-up, and all
        ({"SOLVER__WARMUP_ITERS": 500}, 2),
        ({"SOLVER__STEPS": [9501]}, 1),  # one iteration late
        ({"SOLVER__GAMMA": 0.5}, 2),
        ({"SOLVER__MAX_ITER": 25_000}, 0),  # detectron2 trains to the protocol's end in any case
    ],
    ids=str,
)
def test_another_schedule_is_found(planted: dict[str, Any], expected: int, trunk: ResNetTrunk, tmp_path: Path) -> None:
    job = a_job(trunk, published("paper", "voc07"), tmp_path)
    cfg, detector = a_detector(job, **planted)
    training = engine.Training(cfg, detector, job)
    checks = preflight.training_checks(detector, training.optimizer, training._rate_at, job.settings, 16)
    wrong = failed(checks)
    assert len(wrong) == expected
    assert all(what.startswith("learning rate") for what in wrong)
    assert training.scheduler.last_epoch == 0  # looked at, not moved


def test_parameters_that_nobody_optimises_are_found(trunk: ResNetTrunk, tmp_path: Path) -> None:
    job = a_job(trunk, small(), tmp_path)
    cfg, detector = a_detector(job)
    training = engine.Training(cfg, detector, job)
    detector.backbone.stem.conv1.weight.requires_grad_(True)
    checks = preflight.training_checks(detector, training.optimizer, training._rate_at, job.settings, 2)
    assert failed(checks) == {"parameters that are optimised"}


def test_other_weights_or_another_epsilon_are_found(trunk: ResNetTrunk, tmp_path: Path) -> None:
    job = a_job(trunk, small(), tmp_path)
    _, detector = a_detector(job)
    preflight.load_trunk(detector, trunk)
    pixels = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    assert failed(preflight.feature_checks(detector, trunk, pixels, pixels)) == set()
    detector.roi_heads.res5[1].conv2.norm.eps = 1e-2
    assert failed(preflight.feature_checks(detector, trunk, pixels, pixels)) == {"res5 features"}
    assert failed(preflight.network_checks(detector, trunk, job.settings, "FrozenBatchNorm2d", CLASSES)) == {
        "epsilon of the norms"
    }
    detector.backbone.res2[0].conv1.weight.data[0] += 0.1
    assert failed(preflight.feature_checks(detector, trunk, pixels, pixels)) == {"res4 features", "res5 features"}


def test_an_image_in_another_channel_order_is_found(trunk: ResNetTrunk, tmp_path: Path) -> None:
    _, detector = a_detector(a_job(trunk, small(), tmp_path))
    preflight.load_trunk(detector, trunk)
    pixels = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    checks = preflight.feature_checks(detector, trunk, pixels.flip(0), pixels)
    assert failed(checks) == {"res4 features", "res5 features"}
    smaller = preflight.feature_checks(detector, trunk, pixels[:, :32], pixels)
    assert failed(smaller) == {"res4 features", "res5 features"}
    assert "(1, 256, 4, 4)" in smaller[0].wanted


def test_entries_left_over_on_either_side_are_found(trunk: ResNetTrunk, tmp_path: Path) -> None:
    deeper = {**RESNET18, "depth": 34}
    of_34 = build("model", deeper)
    _, detector = a_detector(a_job(trunk, small(), tmp_path))
    checks = preflight.load_trunk(detector, of_34)
    assert failed(checks) == {"trunk entries matched", "left over of the trunk"}
    assert "backbone.res2.2.conv1.weight" in checks[1].found
    _, detector = a_detector(a_job(of_34, small(), tmp_path, deeper), MODEL__RESNETS__DEPTH=34)
    checks = preflight.load_trunk(detector, trunk)
    assert failed(checks) == {"left over of the detector"}
    assert "backbone.res2.2.conv1.weight" in checks[2].found
    assert failed(preflight.load_trunk(detector, of_34)) == set()


def test_another_width_does_not_fit(tmp_path: Path) -> None:
    half, quarter = ({"name": "resnet_trunk", "depth": 50, "width": width} for width in (0.5, 0.25))
    _, detector = a_detector(a_job(a_trunk(half), small(), tmp_path, half))
    with pytest.raises(ValueError, match=r"does not fit detectron2's ResNet: backbone\.stem\.conv1\.weight \(16, 3"):
        preflight.load_trunk(detector, a_trunk(quarter))


def test_a_wrong_model_is_not_trained(
    trunk: ResNetTrunk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(engine.Training, "run", lambda self: pytest.fail("was trained"))
    wrong = replace(small(), pixel_mean=(103.53, 116.28, 123.675))
    with caplog.at_level(logging.INFO), pytest.raises(ValueError, match=r"pixel mean is \[103\.53"):
        engine.train_and_detect(trunk, RESNET18, scenes(), scenes(2), wrong, a_context(trunk, tmp_path))
    assert "WRONG pixel mean" in caplog.text
    assert not [name for name in DatasetCatalog.list() if name.startswith("pirl_plugin")]


def test_the_options_are_those_of_detectron2s_own_voc_file_but_for_these() -> None:
    """Model zoo's faster_rcnn_R_50_C4 for VOC, which has Caffe's ResNet, and ours for torchvision's, side by side."""
    theirs, ours = get_cfg(), get_cfg()
    model_zoo = Path(detectron2.__file__).parent / "model_zoo" / "configs"  # its module needs an old setuptools
    theirs.merge_from_file(str(model_zoo / "PascalVOC-Detection" / "faster_rcnn_R_50_C4.yaml"))
    chosen = options(published("paper_supervised", "voc07+12"), {**RESNET18, "depth": 50}, 20, "FrozenBN")
    ours.merge_from_list([part for item in chosen.items() for part in item])

    def flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if hasattr(value, "items"):
                yield from flat(value, f"{path}{key}.")
            else:
                yield f"{path}{key}", list(value) if isinstance(value, tuple) else value

    of_theirs, of_ours = dict(flat(theirs)), dict(flat(ours))
    assert {key for key, value in of_ours.items() if value != of_theirs[key]} == {
        *("MODEL.WEIGHTS", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD", "MODEL.RESNETS.STRIDE_IN_1X1", "INPUT.FORMAT"),
        *("MODEL.ROI_HEADS.NAME", "SOLVER.STEPS", "SOLVER.MAX_ITER", "SOLVER.WARMUP_FACTOR"),
        *("DATASETS.TRAIN", "DATASETS.TEST"),
    }
