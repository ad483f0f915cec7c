"""detectron2's engine, run with detectron2 itself; all of it is skipped where detectron2 is not installed."""
# ruff: noqa: E402  (what imports detectron2 comes after the question whether there is one)

from __future__ import annotations

import copy
import json
import logging
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

detectron2 = pytest.importorskip(
    "detectron2", reason="detectron2 is not installed: it is on no package index, see README, Detection"
)

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.evaluation import PascalVOCDetectionEvaluator
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.env import seed_all_rng

from pirl_plugin.benchmarks.context import BenchmarkContext
from pirl_plugin.benchmarks.detection import detectron2_engine as engine
from pirl_plugin.benchmarks.detection import detectron2_preflight as preflight
from pirl_plugin.benchmarks.detection.detectron2_config import norm_name, options
from pirl_plugin.benchmarks.detection.detectron2_job import FOLDER, Job
from pirl_plugin.benchmarks.detection.engine import Detections
from pirl_plugin.benchmarks.detection.evaluation import IOU_THRESHOLDS, voc_average_precision
from pirl_plugin.benchmarks.detection.presets import DetectionProtocol, published
from pirl_plugin.benchmarks.detection.schedule import with_overrides
from pirl_plugin.benchmarks.detection.voc import Examples
from pirl_plugin.benchmarks.runner import run_benchmark
from pirl_plugin.commands.convert import main as convert
from pirl_plugin.data.voc import VOC_CLASSES
from pirl_plugin.models.trunks import ResNetTrunk
from pirl_plugin.registry import build
from pirl_plugin.weights import find_trunk, read_weights
from pirl_plugin.weights.detectron2_names import to_detectron2

RESNET18 = {"name": "resnet_trunk", "depth": 18}
CLASSES = 8


# -- what the tests share ----------------------------------------------------------------------------------------------


def small(name: str = "paper", **changes: Any) -> DetectionProtocol:
    """A protocol that trains in a second: 64 pixels, few proposals."""
    few = {"rpn_pre_nms_train": 100, "rpn_post_nms_train": 20, "rpn_pre_nms_test": 100, "rpn_post_nms_test": 10}
    numbers = {"batch_size": 2, "iterations": 4, "min_size": 64, "rois_per_image": 8, **few, **changes}
    return with_overrides(published(name, "voc07"), **numbers)


def a_trunk(config: dict[str, Any] = RESNET18) -> ResNetTrunk:
    """With batch norms of which no entry is trivial."""
    return with_statistics(build("model", config)).requires_grad_(False)


def with_statistics(network: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.weight, 0.3, 0.9),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
            ):
                tensor.data.uniform_(low, high, generator=generator)  # type: ignore[union-attr]
    return network.eval()


def scenes(count: int = 6, split: str = "train") -> Examples:
    return Examples(build("dataset", {"name": "generated_scenes", "num_images": count, "size": 64, "split": split}))


def a_context(trunk: nn.Module, run_dir: Path | None = None, **changes: Any) -> BenchmarkContext:
    return BenchmarkContext(trunk=trunk, train=None, test=None, transform=dict, run_dir=run_dir, **changes)


def a_job(trunk: nn.Module, settings: DetectionProtocol, folder: Path, config: dict[str, Any] = RESNET18) -> Job:
    nothing: Callable[..., Iterable[Any]] = lambda items, total, what: items  # noqa: E731
    return Job(trunk, config, scenes(), scenes(3, "test"), settings, "cpu", 1, 0, 0, folder, None, nothing)


def a_detector(job: Job, **planted: Any) -> tuple[Any, Any]:
    """Configuration and model as ``run`` makes them, with options planted; keys with __ for a dot."""
    cfg = engine.configuration(job, norm_name(job.settings, "cpu", 1), ("train", "test"))
    cfg.merge_from_list([part for key, value in planted.items() for part in (key.replace("__", "."), value)])
    return cfg, build_model(cfg)


def failed(checks: Iterable[preflight.Check]) -> set[str]:
    return {check.what for check in checks if not check.right}


@pytest.fixture(scope="module")
def trunk() -> ResNetTrunk:
    torch.manual_seed(1)
    return a_trunk()


# -- the same network --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("protocol", "planted", "expected"), PLANTED, ids=lambda value: str(value)[:60])
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


# -- images ------------------------------------------------------------------------------------------------------------

OBJECTS = {  # name, difficult, xmin, ymin, xmax, ymax
    "000001": [("dog", 0, 5, 4, 40, 30), ("cat", 1, 1, 1, 20, 20)],
    "000002": [("person", 0, 10, 10, 30, 40), ("person", 0, 7, 7, 7, 20)],  # the second one pixel wide
    "000003": [("cat", 0, 30, 8, 70, 60)],  # reaches out of the image
    "000004": [],
}


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for name, objects in OBJECTS.items():
        pixels = rng.integers(0, 256, (50, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "JPEGImages" / f"{name}.jpg", quality=95)
        write_annotation(tmp_path / "Annotations" / f"{name}.xml", objects)
    for split in ("train", "test"):
        (tmp_path / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(OBJECTS) + "\n")
    return tmp_path


def write_annotation(file: Path, objects: list[tuple[Any, ...]]) -> None:
    root = ElementTree.Element("annotation")
    size = ElementTree.SubElement(root, "size")
    for side, value in (("width", 64), ("height", 50)):
        ElementTree.SubElement(size, side).text = str(value)
    for name, difficult, *corners in objects:
        item = ElementTree.SubElement(root, "object")
        for key, value in (("name", name), ("pose", "x"), ("truncated", 0), ("difficult", difficult)):
            ElementTree.SubElement(item, key).text = str(value)
        box = ElementTree.SubElement(item, "bndbox")
        for side, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
            ElementTree.SubElement(box, side).text = str(value)
    ElementTree.ElementTree(root).write(file)


def examples_of(devkit: Path, split: str = "train") -> Examples:
    return Examples(build("dataset", {"name": "voc", "root": str(devkit), "split": split}))


def test_records_are_those_of_detectron2s_own_reader_without_boxes_that_have_no_area(devkit: Path) -> None:
    theirs = load_voc_instances(str(devkit), "train", VOC_CLASSES)
    theirs[1]["annotations"].pop(1)
    ours = engine.records(examples_of(devkit))
    assert [record["annotations"] for record in ours] == [record["annotations"] for record in theirs]
    assert [record["image_id"] for record in ours] == [0, 1, 2, 3]
    assert len(ours[0]["annotations"]) == 2  # the difficult one is trained on, too


@pytest.mark.parametrize("training", [True, False])
def test_an_image_is_prepared_as_by_detectron2s_own_mapper(devkit: Path, training: bool) -> None:
    settings = small(train_min_sizes=[40, 56, 90], train_max_size=100, min_size=None)
    cfg = get_cfg()
    cfg.merge_from_list([part for item in options(settings, RESNET18, 20, "BN").items() for part in item])
    examples = examples_of(devkit)
    theirs, ours = DatasetMapper(cfg, training), engine.Mapper(examples, settings, training)
    flipped = 0
    for seed in range(8):
        for index, record in enumerate(load_voc_instances(str(devkit), "train", VOC_CLASSES)[:3]):
            record["annotations"] = [item for item in record["annotations"] if item["bbox"][2] - item["bbox"][0] > 1]
            seed_all_rng(seed)
            expected = theirs(record)
            seed_all_rng(seed)
            mapped = ours({"image_id": index})
            assert torch.equal(mapped["image"], expected["image"])
            assert (mapped["width"], mapped["height"], mapped["unreadable"]) == (64, 50, False)
            if training:
                torch.testing.assert_close(
                    mapped["instances"].gt_boxes.tensor, expected["instances"].gt_boxes.tensor, rtol=0, atol=1e-4
                )
                assert mapped["instances"].gt_classes.tolist() == expected["instances"].gt_classes.tolist()
                flipped += bool(mapped["instances"].gt_boxes.tensor[0, 0] != expected_left(index, mapped))
            else:
                assert "instances" not in mapped
    assert not training or 0 < flipped < 24


def expected_left(index: int, mapped: dict[str, Any]) -> float:
    """Left edge of the image's first box where it is not flipped."""
    return float(np.float32((list(OBJECTS.values())[index][0][2] - 1) * mapped["image"].shape[2] / 64))


def test_an_unreadable_image(devkit: Path) -> None:
    """Another one stands in, in training with its own objects; a test leaves it out."""
    (devkit / "JPEGImages" / "000001.jpg").write_bytes(b"damaged")
    examples = examples_of(devkit)
    mapped = engine.Mapper(examples, small(), training=True)({"image_id": 0})
    assert mapped["unreadable"]
    assert [VOC_CLASSES[label] for label in mapped["instances"].gt_classes.tolist()] == ["person"]
    trunk = a_trunk()
    found, notes = engine.train_and_detect(
        trunk, RESNET18, examples, examples_of(devkit, "test"), small(iterations=3), a_context(trunk)
    )
    assert [detections is None for detections in found] == [True, False, False, False]
    assert notes["unreadable_train"] >= 1


# -- training and detecting --------------------------------------------------------------------------------------------


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


# -- the number of record ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("year", "rule"), [(2007, "eleven_point"), (2012, "interpolated")])
def test_our_ap_is_that_of_detectron2s_evaluator(year: int, rule: Any, tmp_path: Path) -> None:
    """On the same detections. It writes scores with three decimals and boxes with one: so are these.

    Numbers of objects are not multiples of ten, where its recalls miss the levels 0.3, 0.6 and 0.7 by rounding.
    """
    rng = np.random.default_rng(4)
    names = [f"{number:06d}" for number in range(40)]
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("\n".join(names))
    kinds, left = VOC_CLASSES[:3], [17, 23, 11]
    found: list[Detections] = []
    scores = iter(rng.permutation(np.arange(60, 999)) / 1000)
    for name in names:
        objects, rows = [], []
        for _ in range(rng.integers(0, 4)):
            label = int(rng.integers(3))
            x, y = rng.integers(1, 30, 2)
            w, h = rng.integers(5, 30, 2)
            difficult = int(rng.random() < 0.2) if left[label] > 0 else 1
            left[label] -= 1 - difficult
            objects.append((kinds[label], difficult, int(x), int(y), int(x + w), int(y + h)))
            for _ in range(rng.integers(0, 3)):
                noise = rng.normal(0, 0.15 * min(w, h), 4).round(1)
                rows.append((np.array([x - 1, y - 1, x + w, y + h]) + noise, label, next(scores)))
        rows += [(rng.integers([0, 0, 21, 21], [20, 20, 41, 41]), int(rng.integers(3)), next(scores))] * (
            rng.random() < 0.5
        )
        write_annotation(tmp_path / "Annotations" / f"{name}.xml", objects)
        Image.new("RGB", (64, 64)).save(tmp_path / "JPEGImages" / f"{name}.jpg")
        found.append(
            Detections(
                np.array([row[0] for row in rows], np.float32).reshape(-1, 4),
                np.array([row[2] for row in rows], np.float32),
                np.array([row[1] for row in rows], np.int64),
            )
        )
    examples = examples_of(tmp_path, "test")
    totals = [sum(int(((e.labels == label) & ~e.difficult).sum()) for e in examples) for label in range(3)]
    assert all(total % 10 for total in totals)
    assert min(totals) > 5
    MetadataCatalog.get(f"ours_{year}").set(thing_classes=kinds, dirname=str(tmp_path), split="test", year=year)
    evaluator = PascalVOCDetectionEvaluator(f"ours_{year}")
    evaluator.reset()
    for name, detections in zip(names, found, strict=True):
        instances = Instances((64, 64))
        instances.pred_boxes = Boxes(torch.from_numpy(detections.boxes))
        instances.scores = torch.from_numpy(detections.scores)
        instances.pred_classes = torch.from_numpy(detections.labels)
        evaluator.process([{"image_id": name}], [{"instances": instances}])
    theirs = evaluator.evaluate()["bbox"]
    ours = 100 * voc_average_precision(list(examples), found, 3, rule)
    assert 20 < theirs["AP50"] < 95
    assert ours[0].mean() == pytest.approx(theirs["AP50"], abs=1e-9)
    assert ours[np.isclose(IOU_THRESHOLDS, 0.75)].mean() == pytest.approx(theirs["AP75"], abs=1e-9)
    assert ours.mean() == pytest.approx(theirs["AP"], abs=1e-9)
    MetadataCatalog.remove(f"ours_{year}")
