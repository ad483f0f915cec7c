"""Linear classifiers, what their settings mean: rates, grids, epochs, changes from a protocol; multi-labels; memory."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import pytest
import torch
from linear_worker import SIZE, Squares, context, kept, plan, small_batches
from sklearn.linear_model import LogisticRegression

from pirl_plugin.benchmarks.average_precision import average_precision
from pirl_plugin.benchmarks.linear.benchmark import Linear
from pirl_plugin.benchmarks.linear.logistic import fit_logistic
from pirl_plugin.benchmarks.linear.probes import GridPoint
from pirl_plugin.benchmarks.linear.protocols import PROTOCOLS
from pirl_plugin.benchmarks.linear.targets import Targets
from pirl_plugin.benchmarks.linear.watch import say_memory
from pirl_plugin.benchmarks.training import LabelledBatches, augmented_view
from pirl_plugin.models.normalize import Normalize
from pirl_plugin.schema import ConfigError

FIVE = ["conv1", "res2", "res3", "res4", "res5"]


# -- names and numbers -------------------------------------------------------------------------------------------------


def test_the_learning_rate_follows_the_batch_unless_it_is_given():
    (point,) = Linear(protocol="vissl", batch_size=64).points
    assert point == GridPoint(0.0025, 5e-4)
    assert Linear(protocol="vissl", batch_size=64).changes == {"batch_size": [256, 64]}
    (point,) = Linear(protocol="vissl", batch_size=64, lr=0.01).points
    assert point.lr == 0.01
    assert Linear(protocol="vissl", lr=0.01, weight_decay=[5e-4], momentum=0.9).changes == {}


def test_a_grid_is_every_pair_and_a_change():
    linear = Linear(protocol="paper", lr=[0.1, 0.01], weight_decay=[0, 1e-4])
    assert linear.points == [GridPoint(0.1, 0), GridPoint(0.1, 1e-4), GridPoint(0.01, 0), GridPoint(0.01, 1e-4)]
    assert linear.changes == {"lr": [[0.01], [0.1, 0.01]], "weight_decay": [[5e-4], [0, 1e-4]]}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({}, "protocol=small"),
        ({"protocol": "goyal19_cached"}, "one lr and one weight_decay, which leave nothing to choose"),
        ({"protocol": "paper", "lr": [0.1]}, "one lr and one weight_decay, which leave nothing to choose"),
    ],
)
def test_what_to_choose_with_is_refused_where_nothing_is_chosen(arguments, why):
    with pytest.raises(ConfigError) as caught:
        Linear(**arguments, held_out=0.2, refit=False)
    assert [str(problem) for problem in caught.value.problems] == [
        f"{name}: has no effect with {why}: leave it out." for name in ("held_out", "refit")
    ]
    Linear(protocol="paper", lr=[0.1, 0.01], held_out=0.2, refit=False)


@pytest.mark.parametrize(
    ("arguments", "classes", "epochs", "changes"),
    [
        ({}, 1000, 28, {}),
        ({}, 205, 14, {}),
        ({}, 8142, 84, {}),
        ({}, 42, 28, {"num_epochs": [None, 28]}),
        ({"schedule": "places205"}, 205, 14, {}),
        ({"schedule": "imagenet"}, 205, 28, {"num_epochs": [14, 28]}),
        ({"schedule": "places205"}, 8, 14, {"num_epochs": [None, 14]}),
        ({"num_epochs": 14}, 205, 14, {}),
        ({"num_epochs": 3}, 1000, 3, {"num_epochs": [28, 3]}),
        ({"protocol": "moco"}, 1000, 100, {}),
        ({"protocol": "moco"}, 42, 100, {"num_epochs": [None, 100]}),
        ({"protocol": "goyal19_cached"}, 42, 28, {}),
    ],
)
def test_epochs_by_the_number_of_classes(arguments, classes, epochs, changes):
    assert Linear(**{"protocol": "paper", **arguments})._epochs(classes) == (epochs, changes)


def test_protocols_without_a_schedule_for_the_data_say_so():
    with pytest.raises(ValueError, match=r"moco says how many epochs for imagenet only: set benchmark\.num_epochs"):
        Linear(protocol="moco")._epochs(205)


def test_the_published_name_needs_the_published_view():
    one = context(Squares(8), Squares(8), image_size=224, view={"name": "eval_view", "resize": 256, "crop": 224})
    targets, linear = Targets.of(one), Linear(protocol="paper")
    assert linear._changes_by_the_data(one, targets) == {}
    other = dataclasses.replace(one, view={"name": "eval_view", "resize": 224, "crop": 224})
    assert linear._changes_by_the_data(other, targets) == {"transform": [dict(one.view), dict(other.view)]}
    assert linear._changes_by_the_data(dataclasses.replace(one, image_size=64), targets)["image_size"] == [224, 64]


@pytest.mark.parametrize(
    ("arguments", "paths"),
    [
        ({"protocol": "small", "lr": 0.1, "num_epochs": 3}, {"lr", "num_epochs"}),
        ({"protocol": "paper", "l2": [1.0]}, {"l2"}),
        ({"protocol": "goyal19_cached", "lr": [0.1, 0.01]}, {"lr"}),
        ({"protocol": "swav", "schedule": "places205"}, {"schedule"}),
    ],
)
def test_settings_without_effect_are_refused(arguments, paths):
    with pytest.raises(ConfigError) as caught:
        Linear(**arguments)
    assert {problem.path for problem in caught.value.problems} == paths


def test_memory_is_said_where_it_is_much_and_refused_where_it_is_too_much(caplog):
    """Five layers of about 9,000 numbers, 1,000 classes, 3 x 4 bytes each: 0.5 GB a point of the grid, here four."""
    shapes = {layer: (64, 9216) for layer in FIVE}
    points = {layer: [GridPoint(0.1, 0.0)] * 4 for layer in FIVE}
    with caplog.at_level(logging.INFO, "pirl_plugin"):
        say_memory(shapes, 1000, points, PROTOCOLS["paper"], torch.device("cpu"))
    assert "20 linear classifiers with 1000 classes take 2.1 GiB" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "pirl_plugin"):
        say_memory(shapes, 10, points, PROTOCOLS["paper"], torch.device("cpu"))
    assert caplog.text == ""
    with pytest.raises(ValueError, match="fewer layers or a smaller grid"):
        say_memory(shapes, 10**8, points, PROTOCOLS["paper"], torch.device("cpu"))


# -- several labels an image -------------------------------------------------------------------------------------------


def test_multi_labels_get_map_and_their_name(tmp_path):
    train, test = Squares(120, multi=True, noise=20), Squares(60, seed=1, multi=True, noise=20)
    one = context(train, test)
    found = list(Linear(layers=["res2", "res5"], protocol="paper", num_epochs=8, lr=0.02, batch_size=24).run(one))
    assert [(r.setting["layer"], r.metric, r.headline) for r in found] == [
        ("res2", "mAP", False),
        ("res5", "mAP", True),
        ("best_on_test", "mAP", False),
    ]
    assert found[0].protocol == "paper*"
    assert found[0].extra["changed"]["loss"] == ["softmax", "binary"]
    assert found[-1].value > 90
    probes = kept(one, plan(small_batches("paper", 24), [GridPoint(0.02, 5e-4)], ["res5"]))
    normalize = Normalize()
    images = torch.stack([one.transform(test[i][0])["image"] for i in range(60)])
    maps = one.trunk.features(normalize(images), ["res5"])["res5"]  # type: ignore[operator]
    scores = probes.grids["res5"].scores(maps.flatten(1))[0].numpy()
    expected = np.mean([average_precision(scores[:, c], test.multi_labels[:, c]) for c in range(4)])
    assert probes.outcomes["res5"].metrics["mAP"] == pytest.approx(100 * expected)


def test_what_difficult_objects_show_is_not_learned_from():
    """Absent, present or ignored: an ignored label may say anything without moving a weight."""
    train, test = Squares(60, multi=True), Squares(20, seed=1, multi=True)
    one = context(train, test)
    assert (train.multi_labels == 0).sum() > 10
    batches = LabelledBatches(one, train, torch.from_numpy(train.multi_labels), augmented_view(SIZE), 60)
    ((_, targets),) = batches.epoch(0)
    assert sorted(targets.flatten().tolist()) == sorted(train.multi_labels.flatten().tolist())
    found = kept(one, plan(small_batches("paper"), num_epochs=1))
    train.multi_labels = np.where(train.multi_labels == 0, 1, train.multi_labels)
    other = kept(one, plan(small_batches("paper"), num_epochs=1))
    assert not torch.equal(found.weights()["res5.weight"], other.weights()["res5.weight"])


def test_small_protocol_on_multi_labels_is_scikit_learn_s_class_by_class():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=g)
    labels = (x[:, :3] + torch.randn(300, 3, generator=g) > 0).to(torch.int8) * 2 - 1
    labels[torch.rand(300, 3, generator=g) < 0.1] = 0
    ours = fit_logistic(x, labels, 3, 0.05)
    for c in range(3):
        counted = labels[:, c] != 0
        theirs = LogisticRegression(C=1 / (0.05 * 300), tol=1e-8, max_iter=5000)
        theirs.fit(x[counted].double().numpy(), labels[counted, c].numpy())
        np.testing.assert_allclose(ours.weight[:, c].numpy(), theirs.coef_[0], atol=2e-3)
        np.testing.assert_allclose(ours.bias[c].numpy(), theirs.intercept_[0], atol=2e-3)


@pytest.mark.parametrize("protocol", ["small", "goyal19_cached"])
def test_cached_protocols_take_multi_labels_too(protocol):
    train, test = Squares(120, multi=True, noise=20), Squares(60, seed=1, multi=True, noise=20)
    (found,) = Linear(protocol=protocol).run(context(train, test))
    assert (found.metric, found.protocol, found.headline) == ("mAP", protocol, True)
    assert 40 < found.value <= 100


def test_splits_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="different classes"):
        Targets.of(context(Squares(20, multi=True), Squares(20, classes=3, multi=True)))
    with pytest.raises(ValueError, match="test split has no class labels"):
        Targets.of(context(Squares(20), Squares(20, multi=True)))
    bare = Squares(20)
    bare.labels = None
    with pytest.raises(ValueError, match="train split has no class labels"):
        Targets.of(context(bare, bare))


def test_the_cached_protocol_differs_from_the_paper_in_what_its_words_say():
    paper, cached = (dataclasses.asdict(PROTOCOLS[name]) for name in ("paper", "goyal19_cached"))
    different = {name: cached[name] for name in paper if cached[name] != paper[name] and name != "unstated"}
    assert different == {"layers": ("res5",), "nesterov": True, "epochs": {"any": 28}, "cached": True}
    for words in ("res5 of unaugmented images", "Nesterov's momentum", "28 epochs for any"):
        assert words in str(Linear.__doc__)
