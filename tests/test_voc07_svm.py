"""The VOC07 SVM benchmark: its views, its labels, and whole runs on small images."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.transforms as tv
from classy_vision.dataset.transforms import build_transform
from PIL import Image
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from svm_pictures import Pictures, context

from pirl_plugin.benchmarks import VOC07SVM, VOC07LowShotSVM, run_benchmark
from pirl_plugin.benchmarks.svm.data import multi_labels, normalized
from pirl_plugin.benchmarks.svm.grid import COSTS
from pirl_plugin.data.squashed_view import SquashedView
from pirl_plugin.records import read_records
from pirl_plugin.schema import ConfigError


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# -- the squashed view -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (300, 256), (40, 31)])
@pytest.mark.parametrize(("resize", "square"), [(256, 224), (32, 32), (None, 224)])
def test_squashed_view_is_torchvisions(size, resize, square):
    image = picture(*size)
    steps = [] if resize is None else [tv.Resize(resize)]
    expected = tv.functional.pil_to_tensor(tv.Compose([*steps, tv.Resize([square, square])])(image))
    view = SquashedView(size=square, resize=resize)(image)["image"]
    assert torch.equal(view, expected)
    assert view.is_contiguous()


def test_squashed_view_keeps_the_border_that_a_crop_loses():
    """A wide white picture with a red left edge: the edge is still there in the square."""
    pixels = np.full((100, 200, 3), 255, dtype=np.uint8)
    pixels[:, :20] = (255, 0, 0)
    view = build_transform({"name": "squashed_view", "size": 50, "resize": None})(Image.fromarray(pixels))["image"]
    assert view[:, 25, 0].tolist() == [255, 0, 0]
    assert view[:, 25, -1].tolist() == [255, 255, 255]


def test_squashed_view_converts_other_modes():
    view = SquashedView(size=8, resize=None)(picture(20, 10).convert("L"))["image"]
    assert view.shape == (3, 8, 8)


# -- labels and points -------------------------------------------------------------------------------------------------


def test_one_label_an_image_becomes_each_class_against_the_rest():
    dataset = SimpleNamespace(labels=np.array([2, 0, 2]), class_names=["a", "b", "c", "d"])
    expected = [[-1, -1, 1, -1], [1, -1, -1, -1], [-1, -1, 1, -1]]
    assert multi_labels(dataset, "train").tolist() == expected
    dataset.multi_labels = np.array([[1, 0], [0, -1], [1, 1]])
    assert multi_labels(dataset, "train").tolist() == dataset.multi_labels.tolist()
    with pytest.raises(ValueError, match="the test split has no labels"):
        multi_labels(SimpleNamespace(labels=None), "test")


def test_points_have_unit_length_but_for_nothing():
    """(3, 4) has length 5: divided by 5.00001; a zero stays zero."""
    found = normalized(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    np.testing.assert_allclose(found, [[3 / 5.00001, 4 / 5.00001], [0, 0]], rtol=1e-12)
    assert found.dtype == np.float64


def test_different_classes_of_the_splits_are_refused():
    other = Pictures(20, seed=1)
    other.class_names = ["red", "green", "yellow"]
    with pytest.raises(ValueError, match=r"different classes, for example \['blue', 'yellow'\]"):
        list(VOC07SVM().run(context(test=other)))


# -- the protocol ------------------------------------------------------------------------------------------------------


def svm(cost: float) -> LinearSVC:
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, dual=True, random_state=0)


def slow_protocol(train: Pictures, test: Pictures, costs: list[float]) -> tuple[dict[str, float], dict[str, float]]:
    """The published procedure written down as it is told: chosen costs and interpolated AP in percent, by class."""
    x, other, chosen, found = train.features(), test.features(), {}, {}
    for label, name in enumerate(train.class_names):
        y = np.array([1 if value == 1 else -1 for value in train.multi_labels[:, label]])
        best = -1.0
        for cost in costs:
            values = []
            for kept, held in StratifiedKFold(3).split(x, y):
                scores = svm(cost).fit(x[kept], y[kept]).decision_function(x[held])
                values.append(average_precision_score(y[held] == 1, scores))
            if np.mean(values) > best:
                best, chosen[name] = np.mean(values), cost
        scores = svm(chosen[name]).fit(x, y).decision_function(other)
        counted = [i for i in range(len(test)) if test.multi_labels[i, label] != 0]
        ranked = sorted(counted, key=lambda i, scores=scores: -scores[i])
        hits = np.cumsum([test.multi_labels[i, label] == 1 for i in ranked])
        precision = hits / np.arange(1, len(ranked) + 1)
        area = sum(max(precision[rank:]) for rank in range(len(ranked)) if test.multi_labels[ranked[rank], label] == 1)
        found[name] = 100 * area / hits[-1]
    return chosen, found


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_the_benchmark_is_the_slow_protocol():
    train, test = Pictures(60, seed=0), Pictures(40, seed=1)
    costs = [0.01, 0.1, 1.0, 10.0, 100.0]
    chosen, expected = slow_protocol(train, test, costs)
    (result, eleven) = VOC07SVM(layers=["res5"], costs=costs).run(context(train, test))
    assert (train.multi_labels == 0).any()
    assert (test.multi_labels == 0).any()
    assert result.extra["costs"] == chosen
    assert len(set(chosen.values())) > 1
    assert result.value == pytest.approx(np.mean(list(expected.values())), abs=1e-6)
    assert result.extra["AP"] == pytest.approx(expected, abs=0.0051)
    assert (result.metric, eleven.metric) == ("mAP", "mAP_11point")
    assert result.value != eleven.value
    assert result.extra["fits"] == 3 * 5 * 3 + 3


def test_difficult_images_are_negatives_in_training_and_left_out_of_the_test():
    def value(train, test):
        return next(VOC07SVM(layers=["res5"], costs=[1.0]).run(context(train, test))).value

    train, test = Pictures(60, seed=0), Pictures(40, seed=1)
    expected = value(train, test)
    as_negatives = Pictures(60, seed=0)
    as_negatives.multi_labels[as_negatives.multi_labels == 0] = -1
    assert value(as_negatives, test) == expected
    as_positives = Pictures(60, seed=0)
    as_positives.multi_labels[as_positives.multi_labels == 0] = 1
    assert value(as_positives, test) != expected
    for label in (1, -1):
        counted = Pictures(40, seed=1)
        counted.multi_labels[counted.multi_labels == 0] = label
        assert value(train, counted) != expected


def test_classes_that_cannot_be_learned_or_measured():
    """Red is in no training image: its images rank at random, AP = their share. Blue is in no test image: left out."""
    train, test = Pictures(60, seed=0, difficult=0), Pictures(40, seed=1, difficult=0)
    train.multi_labels[:, 0] = -1
    test.multi_labels[:, 2] = -1
    result = next(VOC07SVM(layers=["res5"], costs=[1.0]).run(context(train, test)))
    share = 100 * (test.multi_labels[:, 0] == 1).mean()
    assert result.extra["classes_not_learned"] == ["red"]
    assert result.extra["classes_not_in_the_test"] == ["blue"]
    assert set(result.extra["AP"]) == {"red", "green"}
    assert result.extra["AP"]["red"] == pytest.approx(share, abs=0.01)
    assert result.value == pytest.approx(np.mean(list(result.extra["AP"].values())), abs=0.01)
    train.multi_labels[:] = 1
    with pytest.raises(ValueError, match="nothing to learn"):
        next(VOC07SVM(layers=["res5"]).run(context(train, test)))
    test.multi_labels[:] = 0
    with pytest.raises(ValueError, match="nothing can be measured"):
        next(VOC07SVM(layers=["res5"], costs=[1.0]).run(context(None, test)))


def test_a_class_of_one_image_takes_the_cost_that_suits_the_others():
    train = Pictures(60, seed=0, difficult=0)
    train.multi_labels[:, 0] = -1
    train.multi_labels[7, 0] = 1
    result = next(VOC07SVM(layers=["res5"], costs=[0.01, 100.0]).run(context(train)))
    assert result.extra["classes_not_cross_validated"] == ["red"]
    assert set(result.extra["cross_validated_AP"]) == {"green", "blue"}
    assert result.extra["costs"]["red"] in (0.01, 100.0)
    assert result.extra["fits"] == 2 * 3 * 2 + 3


def test_more_numbers_than_images_change_nothing():
    """20 images of 48 numbers go through the triangle; as do all sides of it here."""
    train, test = Pictures(20, seed=3, difficult=0), Pictures(40, seed=1)
    chosen, expected = slow_protocol(train, test, [0.1, 1.0])
    result = next(VOC07SVM(layers=["res5"], costs=[0.1, 1.0]).run(context(train, test)))
    assert result.extra["costs"] == chosen
    assert result.value == pytest.approx(np.mean(list(expected.values())), abs=1e-6)


# -- names -------------------------------------------------------------------------------------------------------------


def test_views_of_the_protocols():
    squashed = {"name": "squashed_view", "size": 224, "resize": 256}
    assert VOC07SVM().evaluation_view(224) == VOC07SVM(protocol="goyal19").evaluation_view(224) == squashed
    assert VOC07SVM().evaluation_view(32) == {"name": "squashed_view", "size": 32, "resize": 32}
    cropped = {"name": "eval_view", "resize": 256, "crop": 224}
    assert VOC07SVM(protocol="swav").evaluation_view(224) == cropped


SQUASHED = {"name": "squashed_view", "size": 224, "resize": 256}


def protocol_of(benchmark: VOC07SVM, **changes) -> tuple[str, dict[str, list]]:
    changes.setdefault("view", benchmark.evaluation_view(changes.get("image_size", 224)))
    given = context(**{"image_size": 224, **changes})
    result = next(benchmark.run(given))
    return result.protocol, result.extra.get("changed", {})


@pytest.mark.parametrize("protocol", ["vissl", "goyal19", "swav"])
def test_the_published_settings_have_the_published_name(protocol):
    assert protocol_of(VOC07SVM(layers=["res5"], protocol=protocol)) == (protocol, {})


@pytest.mark.parametrize(
    ("settings", "changes", "expected"),
    [
        ({"costs": [1.0, 2.0]}, {}, {"costs": [list(COSTS["vissl"]), [1.0, 2.0]]}),
        ({"pooling": "avg"}, {}, {"pooling": ["grid", "avg"]}),
        ({"folds": 2}, {}, {"folds": [3, 2]}),
        ({"max_iter": 100, "solver": "liblinear"}, {}, {"max_iter": [2000, 100]}),
        ({}, {"image_size": 64}, {"image_size": [224, 64]}),
        ({}, {"view": {"name": "eval_view"}}, {"transform": [SQUASHED, {"name": "eval_view"}]}),
    ],
)
def test_what_differs_gets_a_star_and_is_named(settings, changes, expected):
    assert protocol_of(VOC07SVM(layers=["res5"], **settings), **changes) == ("vissl*", expected)


@pytest.mark.parametrize("benchmark", [VOC07SVM, VOC07LowShotSVM])
def test_settings_of_the_other_solver_are_refused(benchmark):
    with pytest.raises(ConfigError) as error:
        benchmark(max_iter=100, num_jobs=2)
    assert [str(problem) for problem in error.value.problems] == [
        f"{name}: has no effect with solver=newton: leave it out, or set solver=liblinear."
        for name in ("max_iter", "num_jobs")
    ]
    benchmark(max_iter=100, num_jobs=2, solver="liblinear")


def test_wrong_settings_are_refused():
    for settings in ({"folds": 1}, {"costs": [0.0]}, {"layers": []}, {"protocol": "moco"}, {"solver": "cuda"}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            VOC07SVM(**settings)


# -- whole runs --------------------------------------------------------------------------------------------------------


def config(**changes) -> dict:
    return {
        "benchmark": {"name": "voc07_svm", "costs": [0.1, 10.0]},
        "weights": "random",
        "trunk": {"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "small"},
        "dataset": {"name": "generated_scenes", "num_images": 48, "size": 48},
        "image_size": 32,
        "device": "cpu",
        **changes,
    }


def test_generated_scenes_from_a_configuration_to_records(tmp_path):
    found = run_benchmark(config(run_dir=str(tmp_path / "run")))
    assert [(one.setting["layer"], one.metric) for one in found] == [
        ("res5", "mAP"),
        ("res4", "mAP"),
        ("res4", "mAP_11point"),
        ("res5", "mAP_11point"),
    ]
    assert {one.protocol for one in found} == {"vissl*"}
    headline = json.loads((tmp_path / "run" / "result.json").read_text())
    assert headline["value"] == found[0].value
    assert headline["extra"]["transform"] == {"name": "squashed_view", "size": 32, "resize": 32}
    assert read_records(tmp_path) == found
    again = run_benchmark(config(run_dir=str(tmp_path / "other")))
    assert [one.value for one in again] == [one.value for one in found]
    assert len(list((tmp_path / "features").iterdir())) == 4  # two layers of two splits, shared by the runs


def test_annotations_without_lists_of_classes(tmp_path):
    """A devkit of three classes of its own, one of them in every image, one image with a box of no area."""
    root = tmp_path / "cells"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(24):
        shown = ["RBC"] + (["WBC"] if index % 2 else []) + (["Platelets"] if index % 3 == 0 else [])
        pixels = rng.integers(0, 100, (30, 40, 3), dtype=np.uint8) + np.uint8(100 * (index % 2))
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{index}.jpg")
        right = 1 if index == 5 else 20
        objects = "".join(
            f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{right}</xmax>"
            "<ymax>20</ymax></bndbox></object>"
            for name in shown
        )
        (root / "Annotations" / f"{index}.xml").write_text(f"<annotation>{objects}</annotation>")
    for split, ids in (("trainval", range(16)), ("test", range(16, 24))):
        (root / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{index}\n" for index in ids))
    data = {"name": "voc", "root": str(root)}
    found = run_benchmark(config(dataset=data, train_split="trainval", test_split="test"))
    extra = found[0].extra
    assert extra["num_classes"] == 3
    assert extra["classes_not_learned"] == ["RBC"]  # every image shows it: nothing to tell apart, and AP is 100 %
    assert extra["AP"]["RBC"] == 100
    assert extra["AP"]["WBC"] == 100  # as bright as no other image
    assert found[0].setting == {"layer": "res5"}


def test_folders_of_classes_are_taken_class_against_class(tmp_path):
    for split in ("train", "test"):
        for label, name in enumerate(("blue", "green", "red")):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(6):
                pixels = np.random.default_rng(index).integers(0, 80, (20, 20, 3))
                pixels[..., 2 - label] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / split / name / f"{index}.png")
    found = run_benchmark(config(dataset={"name": "image_folder", "root": str(tmp_path)}))
    assert found[0].extra["AP"] == {"blue": 100, "green": 100, "red": 100}
