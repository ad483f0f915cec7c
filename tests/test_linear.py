"""The linear probe and the benchmark runner, on made images and on features whose answer is known."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from classy_vision.dataset import ClassyDataset, register_dataset
from PIL import Image
from sklearn.linear_model import LogisticRegression

from pirl_plugin.benchmarks import BenchmarkContext, run_benchmark
from pirl_plugin.benchmarks.features import extract, grid_pool
from pirl_plugin.benchmarks.knn import KNN
from pirl_plugin.benchmarks.linear.benchmark import Linear
from pirl_plugin.benchmarks.linear.cached import converged_scores
from pirl_plugin.benchmarks.linear.logistic import Standardizer, choose_l2, fit_logistic, held_out_parts
from pirl_plugin.benchmarks.linear.protocols import PROTOCOLS, equally_spaced
from pirl_plugin.benchmarks.top_k import top_k_accuracy
from pirl_plugin.data.views import EvalView
from pirl_plugin.models import ResNetTrunk, SSLModel
from pirl_plugin.records import read_records
from pirl_plugin.registry import Configurable, build, check
from pirl_plugin.schema import ConfigError
from pirl_plugin.weights import write_atomically

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255), (255, 255, 255)]
TRUNK = {"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "small"}
VIEW = {"name": "eval_view", "resize": 16, "crop": 16}


@register_dataset("coloured_squares_for_tests")
class ColouredSquares(Configurable, ClassyDataset):
    """Noisy squares of one colour per class: separable by any trunk. ``random_labels`` breaks the link."""

    def __init__(
        self,
        split: str | None = None,
        size: int = 60,
        classes: int = 3,
        random_labels: bool = False,
        unreadable: int = 0,
    ) -> None:
        rng = np.random.default_rng(0 if split == "train" else 1)
        self.size, self.unreadable = size, unreadable
        self.colours = np.arange(size) % classes
        self.labels = rng.integers(0, classes, size) if random_labels else self.colours.astype(np.int64)
        self.class_names = [str(c) for c in range(classes)]
        self.noise = rng.integers(0, 60, (size, 16, 16, 3))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, image_id: int) -> tuple[Image.Image, int]:
        if image_id < self.unreadable:  # the contract: the next readable image, under its own id
            image_id = self.unreadable
        pixels = np.clip(np.array(COLOURS[self.colours[image_id]]) * 0.7 + self.noise[image_id], 0, 255)
        return Image.fromarray(pixels.astype(np.uint8)), image_id


DATA = {"name": "coloured_squares_for_tests"}


def config(**changes) -> dict:
    return {
        "benchmark": {"name": "linear"},
        "weights": "random",
        "trunk": TRUNK,
        "dataset": DATA,
        "transform": VIEW,
        "device": "cpu",
        **changes,
    }


def context(train: dict | None = None, test: dict | None = None, **changes) -> BenchmarkContext:
    torch.manual_seed(0)
    return BenchmarkContext(
        trunk=build("model", TRUNK).eval(),
        train=ColouredSquares(split="train", **(train or {})),
        test=ColouredSquares(split="test", **(test or {})),
        transform=EvalView(16, 16),
        batch_size=17,
        **changes,
    )


# -- the classifier ----------------------------------------------------------------------------------------------------


def toy(seed: int = 0, count: int = 400, dims: int = 12, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=g)
    return torch.randn(count, dims, generator=g) + F.one_hot(labels, dims), labels


@pytest.mark.parametrize("l2", [0.3, 0.01, 1e-3])
def test_logistic_regression_agrees_with_scikit_learn(l2):
    """Its objective is ``C * sum of losses + ||w||^2 / 2``, so C = 1 / (l2 * N)."""
    x, labels = toy()
    ours = fit_logistic(x, labels, 4, l2)
    theirs = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5000).fit(x.double().numpy(), labels.numpy())
    np.testing.assert_allclose(ours.weight.T.numpy(), theirs.coef_, atol=2e-3)
    expected = theirs.predict_proba(x.double().numpy())
    np.testing.assert_allclose(ours(x).softmax(1).numpy(), expected, atol=2e-3)


def test_where_it_starts_does_not_matter():
    x, labels = toy()
    cold = fit_logistic(x, labels, 4, 0.01)
    warm = fit_logistic(x, labels, 4, 0.01, start=fit_logistic(x, labels.roll(1), 4, 1e-4))
    torch.testing.assert_close(cold.weight, warm.weight, atol=2e-3, rtol=0)


def test_the_chosen_penalty_is_the_best_on_what_was_held_out():
    """60 images, pure noise in 40 dimensions beside one telling feature: a weak penalty fits the noise."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    x = torch.cat(
        [(labels * 2.0 - 1)[:, None] + torch.randn(200, 1, generator=g), torch.randn(200, 40, generator=g)], 1
    )
    held_out = torch.arange(200) >= 60
    choice, classifier = choose_l2(x, labels, 2, [1e-5, 0.1], [held_out])
    assert choice.l2 == 0.1
    assert choice.accuracy[0.1] > choice.accuracy[1e-5] + 3
    assert choice_of_many(x, labels, held_out) == [10.0, 1.0, 0.1, 0.01], "ends with the first that is worse"
    scores = classifier(x[held_out])
    assert top_k_accuracy(scores, labels[held_out], 1) == pytest.approx(choice.accuracy[0.1])
    assert F.cross_entropy(scores, labels[held_out]).item() == pytest.approx(choice.loss[0.1], rel=1e-4)


def choice_of_many(x: torch.Tensor, labels: torch.Tensor, held_out: torch.Tensor) -> list[float]:
    return list(choose_l2(x, labels, 2, [1e-5, 1e-3, 0.01, 0.1, 1.0, 10.0], [held_out])[0].loss)


def test_held_out_parts_are_disjoint_and_even():
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 4 + [3])
    parts = held_out_parts(labels, 5, torch.Generator().manual_seed(0))
    assert [[int(part[labels == c].sum()) for c in (0, 1)] for part in parts] == [[20, 10]] * 5
    assert sorted(int(part[labels == 2].sum()) for part in parts) == [0, 1, 1, 1, 1]
    assert torch.stack(parts).sum(dim=0).tolist() == [1] * 154 + [0], "the only image of a class is never held out"
    assert not torch.equal(parts[0], held_out_parts(labels, 5, torch.Generator().manual_seed(1))[0])
    assert held_out_parts(torch.arange(5), 5, torch.Generator()) == []


def test_several_held_out_parts_are_averaged():
    x, labels = toy()
    parts = held_out_parts(labels, 5, torch.Generator().manual_seed(0))
    together, _ = choose_l2(x, labels, 4, [0.01], parts)
    alone = [choose_l2(x, labels, 4, [0.01], [part])[0].accuracy[0.01] for part in parts]
    sizes = [int(part.sum()) for part in parts]
    assert together.accuracy[0.01] == pytest.approx(np.average(alone, weights=sizes))


def test_standardizer_and_its_axes():
    """The rotated features are those of unit deviation, as seen along uncorrelated axes; dead features are harmless."""
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(500, 6, generator=g) @ torch.randn(6, 6, generator=g) + 5, torch.full((500, 1), 7.0)], 1)
    standardize = Standardizer.fit(x)
    found = standardize(x)
    second_moment = (found.T @ found / 500).double()
    torch.testing.assert_close(second_moment, torch.diag(standardize.variance.double()), atol=1e-4, rtol=1e-4)
    standard = (x[:, :6] - x[:, :6].mean(0)) / x[:, :6].std(0, correction=0)
    torch.testing.assert_close(found @ found.T, standard @ standard.T, atol=1e-2, rtol=1e-3)
    assert float(standardize.variance.sum()) == pytest.approx(6, rel=1e-4)


def test_preconditioning_changes_the_time_and_not_the_result():
    """Features of very different scale: the same minimum, whatever the solver is told about them."""
    x, labels = toy()
    x = x * torch.logspace(-1.5, 0.5, 12)
    told, untold = (fit_logistic(x, labels, 4, 0.01, variance, max_iter=3000) for variance in (x.var(0), None))
    torch.testing.assert_close(told(x).softmax(1), untold(x).softmax(1), atol=2e-3, rtol=0)


# -- the pooling and the SGD of Goyal et al. ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dims"),
    [((64, 112), 9216), ((256, 56), 9216), ((512, 28), 8192), ((1024, 14), 9216), ((2048, 7), 8192)],
)
def test_grid_pooling_of_a_resnet50_at_224_has_the_published_sizes(shape, dims):
    channels, side = shape
    assert grid_pool(torch.zeros(1, channels, side, side)).shape == (1, dims)


def test_grid_pooling_averages_its_windows():
    """2048 x 7 x 7, kernel 6 stride 1: the first number is the mean of the upper left 6 x 6."""
    x = torch.arange(49.0).view(1, 1, 7, 7).expand(1, 2048, 7, 7)
    assert grid_pool(x)[0, :4].tolist() == pytest.approx(
        [x[0, 0, i : i + 6, j : j + 6].mean().item() for i in (0, 1) for j in (0, 1)]
    )
    assert grid_pool(torch.zeros(1, 64, 8, 8)).shape == (1, 64 * 64), "never finer than the map"
    assert grid_pool(torch.zeros(1, 512, 16, 16)).shape == (1, 512 * 16)


def test_learning_rate_drops_are_equally_spaced():
    for name in ("goyal19_cached", "paper"):
        rates = [PROTOCOLS[name].lr * PROTOCOLS[name].lr_factor(epoch, 28) for epoch in range(28)]
        assert [epoch for epoch in range(1, 28) if rates[epoch] < rates[epoch - 1]] == [10, 19]
        assert rates[0] == 0.01
        assert rates[27] == pytest.approx(1e-4)
    never = dataclasses.replace(PROTOCOLS["paper"], drops=equally_spaced(0))
    assert never.lr_factor(27, 28) == 1


# -- the benchmarks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "changes", "name"),
    [("small", {}, "small"), ("goyal19_cached", {"batch_size": 16}, "goyal19_cached*")],
)
def test_separable_classes_are_told_apart(protocol, changes, name):
    results = list(Linear(layers=["res5", "conv1"], protocol=protocol, **changes).run(context()))
    assert [(r.setting["layer"], r.metric, r.value, r.headline) for r in results] == [
        ("conv1", "top1", 100.0, False),
        ("res5", "top1", 100.0, True),
        ("best_on_test", "top1", 100.0, False),
    ]
    assert {r.protocol for r in results} == {name}
    assert results[2].extra["layer"] == "conv1"
    assert "on the test images" in results[2].extra["chosen"]


def test_random_labels_give_chance():
    """4 classes, 1,000 test images: 25 % with a standard error of 1.4."""
    values = {"size": 1000, "classes": 4, "random_labels": True}
    (result,) = Linear(layers=["conv1"]).run(context(values, values))
    assert result.value == pytest.approx(25, abs=5)
    knn = list(KNN(k=[5], layer="conv1").run(context(values, values)))
    assert knn[0].value == pytest.approx(25, abs=5)


def test_top_5_only_where_there_are_more_than_5_classes():
    five, seven = ([r.metric for r in Linear().run(context({"classes": c}, {"classes": c}))] for c in (5, 7))
    assert five == ["top1"]
    assert seven == ["top1", "top5"]


def test_the_seed_moves_the_result_by_less_than_a_third_of_a_point():
    """Overlapping classes, about 60 % right: the seed only decides which images choose the penalty."""

    (x, labels), (test_x, test_labels) = toy(1, 3000), toy(2, 1000)

    def accuracy(seed: int) -> float:
        scores, more = converged_scores(seed, x, labels, test_x, 4, [1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5])
        assert more["held_out"] == 3000
        return top_k_accuracy(scores, test_labels, 1)

    found = [accuracy(seed) for seed in (0, 0, 1, 2)]
    assert found[0] == found[1]
    assert 45 < found[0] < 75
    assert np.std(found[1:]) < 0.3


def test_unreadable_images_are_left_out_and_counted():
    (result,) = Linear().run(context({"unreadable": 2}, {"unreadable": 5}))
    assert result.extra["unreadable_train"] == 2
    assert result.extra["unreadable_test"] == 5
    assert result.extra["num_test"] == 55
    assert result.value == 100


def test_features_are_in_the_order_of_ids_and_independent_of_batches_and_workers():
    one = context()
    single = extract(one, one.test, ["res2", "res5"], "avg", "test")
    many = extract(
        BenchmarkContext(**{**one.__dict__, "batch_size": 60, "num_workers": 2}), one.test, ["res5"], "avg", "test"
    )
    torch.testing.assert_close(single.of["res5"], many.of["res5"])
    image, _ = one.test[7]
    x = EvalView(16, 16)(image)["image"].float() / 255
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = one.trunk.features(x[None], ["res2"])["res2"].mean(dim=(2, 3))[0]
    torch.testing.assert_close(single.of["res2"][7], expected, atol=1e-4, rtol=1e-4)
    assert single.ids.tolist() == list(range(len(one.test)))


def test_splits_with_different_classes_and_unlabelled_data_are_refused():
    with pytest.raises(ValueError, match="different classes"):
        list(Linear().run(context({"classes": 3}, {"classes": 4})))
    unlabelled = context()
    unlabelled.train.labels = None
    with pytest.raises(ValueError, match="train split has no class labels"):
        list(Linear().run(unlabelled))


def test_knn_yields_each_k_and_cuts_it_to_the_training_set():
    results = list(KNN(k=[200, 3]).run(context()))
    assert [(r.setting["k"], r.headline) for r in results] == [(3, False), (200, True)]
    assert results[0].value == 100
    assert "note" not in results[0].extra
    assert "cut to the 60 training images" in results[1].extra["note"]


def test_the_published_name_of_knn_needs_the_published_view():
    view = {"name": "eval_view", "resize": 256, "crop": 224}
    one = context(image_size=224, view=view)
    other = dataclasses.replace(one, view={**view, "resize": 224})
    small = dataclasses.replace(one, image_size=32, view={"name": "eval_view", "resize": 32, "crop": 32})
    found = [next(iter(KNN(k=[1]).run(each))) for each in (one, other, small)]
    assert [result.protocol for result in found] == ["weighted_knn", "weighted_knn*", "weighted_knn*"]
    assert [result.extra.get("changed") for result in found] == [
        None,
        {"transform": [view, {**view, "resize": 224}]},
        {"image_size": [224, 32]},
    ]


def test_knn_on_the_embedding_uses_the_image_head():
    torch.manual_seed(0)
    model = SSLModel(trunk=TRUNK, heads={"image": {"name": "linear", "dim": 3}}).eval()
    with torch.no_grad():
        for parameter in model.heads.parameters():
            parameter.zero_()
        model.heads["image"].linear.bias.fill_(1)  # all images alike: every vote ties
    results = list(KNN(k=[60], features="embedding").run(context(model=model)))
    assert results[0].value == pytest.approx(100 / 3)
    assert results[0].setting == {"k": 60, "temperature": 0.07, "features": "embedding"}
    with pytest.raises(ValueError, match="no image head"):
        list(KNN(features="embedding").run(context()))


# -- the runner --------------------------------------------------------------------------------------------------------


def test_run_folder_and_records(tmp_path):
    full = config(benchmark={"name": "linear", "layers": ["res2", "res5"]}, run_dir=str(tmp_path / "run"), seed=3)
    found = run_benchmark(full)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.yaml",
        "environment.json",
        "result.json",
        "results.jsonl",
    }
    headline = json.loads((tmp_path / "run" / "result.json").read_text())
    assert headline["setting"] == {"layer": "res5"}
    assert headline["value"] == 100
    assert (headline["method"], headline["seed"], headline["status"]) == ("random", 3, "ok")
    assert headline["dataset"] == "coloured_squares_for_tests"
    assert headline["weights_sha256"] is None
    assert read_records(tmp_path) == found
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 3
    assert "headline" not in headline["extra"]


def test_checkpoints_bring_their_trunk_head_and_view_size(tmp_path):
    torch.manual_seed(0)
    model = SSLModel(trunk=TRUNK, heads={"image": {"name": "mlp", "dim": 5}, "patches": {"name": "jigsaw"}})
    training = {
        "trunk": TRUNK,
        "method": "pirl",
        "heads": {"image": {"name": "mlp", "dim": 5}},
        "transform": {"name": "image_view", "image_size": 12},
    }
    path = tmp_path / "c.pt"
    write_atomically(
        {"input_args": {"config": training}, "classy_state_dict": {"base_model": model.get_classy_state()}}, path
    )
    found = run_benchmark(
        config(
            weights=str(path), trunk=None, transform=None, benchmark={"name": "knn", "k": [1], "features": "embedding"}
        )
    )
    assert found[0].method == "pirl"
    assert len(found[0].weights_sha256 or "") == 64
    assert found[0].extra["trunk"] == TRUNK
    assert found[0].extra["transform"] == {"name": "eval_view", "resize": 12, "crop": 12}


def test_the_checkpoint_s_weights_are_what_is_measured(tmp_path):
    """All weights zero: all features alike, every vote ties, exactly chance. Random ones tell the colours apart."""
    trunk = ResNetTrunk(18, width=0.125, stem="small")
    with torch.no_grad():
        for parameter in trunk.parameters():
            parameter.zero_()
    state = {"model": {"trunk": trunk.state_dict(), "heads": {}}}
    path = tmp_path / "zero.pt"
    write_atomically({"input_args": {"config": {"trunk": TRUNK}}, "classy_state_dict": {"base_model": state}}, path)
    (found,) = run_benchmark(config(weights=str(path), trunk=None))
    assert found.value == pytest.approx(100 / 3, abs=0.01)
    (found,) = run_benchmark(config())
    assert found.value == 100


def test_a_failed_run_is_a_record_with_its_reason(tmp_path):
    (tmp_path / "result.json").write_text("of an earlier run")
    broken = config(run_dir=str(tmp_path), benchmark={"name": "knn", "features": "embedding"})
    with pytest.raises(ValueError, match="no image head"):
        run_benchmark(broken)
    (record,) = read_records(tmp_path)
    assert (record.status, record.value) == ("failed", None)
    assert "no image head" in (record.reason or "")
    assert record.setting == {"features": "embedding"}


def test_wrong_configurations_are_refused_all_at_once_and_leave_nothing(tmp_path):
    bad = config(
        benchmark={"name": "linear", "layers": ["res6"]},
        dataset={"name": "coloured_square"},
        sede=1,
        batch_size=0,
        trunk=None,
    )
    with pytest.raises(ConfigError) as caught:
        run_benchmark({**bad, "run_dir": str(tmp_path / "run")})
    paths = {problem.path for problem in caught.value.problems}
    assert paths == {"sede", "benchmark.layers[0]", "dataset.name", "batch_size", "trunk"}
    assert not (tmp_path / "run").exists()


def test_weights_without_a_description_tell_their_trunk_or_ask_for_it(tmp_path):
    write_atomically(ResNetTrunk(18).state_dict(), tmp_path / "plain.pt")
    found = run_benchmark(config(weights=str(tmp_path / "plain.pt"), trunk=None))
    assert found[0].extra["weights_format"] == "torchvision state dict"
    assert found[0].extra["trunk"] == {"name": "resnet_trunk", "depth": 18, "width": 1.0, "stem": "imagenet"}
    write_atomically(ResNetTrunk(18, stem="medium").state_dict(), tmp_path / "open.pt")
    with pytest.raises(ValueError, match="do not say the stride.*trunk=resnet18 trunk.stem=small"):
        run_benchmark(config(weights=str(tmp_path / "open.pt"), trunk=None))


def test_components_are_registered_and_the_stub_is_picklable():
    assert check("benchmark", {"name": "knn", "k": [1, 2]}) == []
    assert [p.path for p in check("benchmark", {"name": "linear", "layers": []})] == ["layers"]
    pickle.dumps(ColouredSquares())
