"""Low-shot SVMs: what is drawn, how the cost is chosen, and that only the optimistic protocol looks at the test set."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC
from svm_pictures import Pictures, context

from pirl_plugin.benchmarks import VOC07LowShotSVM, run_benchmark
from pirl_plugin.benchmarks.average_precision import average_precision
from pirl_plugin.benchmarks.svm.grid import COSTS as PUBLISHED_COSTS
from pirl_plugin.benchmarks.svm.low_shot_samples import draw_low_shot, sample_generator
from pirl_plugin.schema import ConfigError

COSTS = [0.01, 1.0, 100.0]

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def labels(count: int = 200, classes: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array([-1, -1, 0, 1], dtype=np.int8), (count, classes))


# -- drawing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 16])
@pytest.mark.parametrize("label", [0, 3])
def test_uniform_draws_have_k_positives_and_three_k_negatives(k, label):
    truth = labels()
    rows = draw_low_shot(truth, label, k, "uniform", np.random.default_rng(0))
    drawn = truth[rows, label].tolist()
    assert (drawn.count(1), drawn.count(-1), drawn.count(0)) == (k, 3 * k, 0)
    assert rows.tolist() == sorted(set(rows.tolist()))


def test_draws_per_class_have_k_that_show_each_other_class():
    truth = labels()
    rows = draw_low_shot(truth, 1, 5, "per_class", np.random.default_rng(0))
    negatives = rows[truth[rows, 1] == -1]
    assert (truth[rows, 1] == 1).sum() == 5
    assert not (truth[rows, 1] == 0).any()
    assert 5 <= len(negatives) <= 15
    for other in (0, 2, 3):
        assert (truth[negatives, other] == 1).sum() >= 5
    assert (truth[negatives][:, [0, 2, 3]] == 1).any(axis=1).all()  # none that shows nothing


def test_all_are_taken_where_there_are_too_few():
    truth = np.array([[1, -1], [1, -1], [0, 1], [-1, 1], [-1, -1]], dtype=np.int8)
    for negatives, expected in (("uniform", [0, 1, 3, 4]), ("per_class", [0, 1, 3])):
        assert draw_low_shot(truth, 0, 9, negatives, np.random.default_rng(0)).tolist() == expected


def test_a_draw_depends_on_its_own_numbers_only():
    truth = labels()

    def draw(*of) -> list[int]:
        return draw_low_shot(truth, of[3], of[2], "uniform", sample_generator(*of)).tolist()

    assert draw(0, 1, 8, 2) == draw(0, 1, 8, 2)
    others = [draw(*of) for of in ((1, 1, 8, 2), (0, 2, 8, 2), (0, 1, 8, 2))]
    assert len({tuple(rows) for rows in others}) == 3
    first = {of: sample_generator(*of).random() for of in ((0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0))}
    assert len({*first.values(), sample_generator(0, 0, 0, 1).random()}) == 5


def test_every_image_is_as_likely():
    """2,000 draws of 2 of 8 positives and of 2 of 12 negatives: 500 and 333 times each, within five deviations."""
    truth = np.array([[1, -1]] * 8 + [[-1, 1]] * 12 + [[0, 0]] * 3, dtype=np.int8)
    times = np.zeros(23)
    for sample in range(2000):
        times[draw_low_shot(truth, 0, 2, "uniform", sample_generator(0, sample, 2, 0))] += 1
    assert np.abs(times[:8] - 500).max() < 5 * (2000 * 1 / 4 * 3 / 4) ** 0.5
    assert np.abs(times[8:20] - 2000 / 6).max() < 5 * (2000 * 1 / 6 * 5 / 6) ** 0.5
    assert times[20:].tolist() == [0, 0, 0]


# -- the protocols against a slow loop ---------------------------------------------------------------------------------


def svm(cost: float) -> LinearSVC:
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, max_iter=2000, dual=True, random_state=0)


def slow(train: Pictures, test: Pictures, k: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """mAP of each sample and cost on the test set, and in cross-validation within the sample (NaN: none), percent."""
    x, other = train.features(), test.features()
    tested, validated = np.zeros((2, samples, len(COSTS), 3))
    for place in np.ndindex(tested.shape):
        sample, cost, label = place[0], COSTS[place[1]], place[2]
        rows = draw_low_shot(train.multi_labels, label, k, "uniform", sample_generator(0, sample, k, label))
        y = train.multi_labels[rows, label]
        scores = svm(cost).fit(x[rows], y).decision_function(other)
        tested[place] = 100 * average_precision(scores, test.multi_labels[:, label])
        folds = min(3, k)
        values = [
            average_precision_score(
                y[held] == 1, svm(cost).fit(x[rows][kept], y[kept]).decision_function(x[rows][held])
            )
            for kept, held in (StratifiedKFold(folds).split(x[rows], y) if folds > 1 else [])
        ]
        validated[place] = 100 * np.mean(values) if values else np.nan
    return tested.mean(axis=2), validated.mean(axis=2)


@pytest.fixture(scope="module")
def pictures() -> tuple[Pictures, Pictures]:
    return Pictures(90, seed=5), Pictures(60, seed=6)


@pytest.mark.parametrize("k", [2, 8])
def test_held_out_is_the_slow_protocol(k, pictures):
    tested, validated = slow(*pictures, k, samples=4)
    best = validated.argmax(axis=1)
    (result,) = VOC07LowShotSVM(layers=["res5"], k=[k], num_samples=4, costs=COSTS).run(context(*pictures))
    assert result.extra["costs"] == [COSTS[index] for index in best]
    assert result.extra["samples"] == pytest.approx(tested[range(4), best].tolist(), abs=6e-4)
    assert result.value == pytest.approx(tested[range(4), best].mean(), abs=1e-6)
    assert result.extra["std"] == pytest.approx(tested[range(4), best].std(), abs=6e-4)
    assert result.extra["cross_validated_mAP"] == pytest.approx(validated.max(axis=1).tolist(), abs=0.0051)
    assert result.extra["optimistic"] is False
    assert result.setting == {"layer": "res5", "k": k}


def test_with_one_image_of_each_class_the_cost_is_fixed(pictures):
    tested, _ = slow(*pictures, 1, samples=2)
    (result,) = VOC07LowShotSVM(layers=["res5"], k=[1], num_samples=2, costs=COSTS).run(context(*pictures))
    assert result.extra["costs"] == [1.0, 1.0]
    assert result.extra["cross_validated_mAP"] == [None, None]
    assert result.value == pytest.approx(tested[:, 1].mean(), abs=1e-6)


def test_vissl_reports_the_best_cost_on_the_test_set_and_says_so(pictures):
    tested, _ = slow(*pictures, 4, samples=3)
    settings = {"layers": ["res5"], "k": [4], "num_samples": 3, "costs": COSTS}
    (result,) = VOC07LowShotSVM(protocol="vissl", **settings).run(context(*pictures))
    best = int(tested.mean(axis=0).argmax())
    assert result.value == pytest.approx(tested.mean(axis=0).max(), abs=1e-6)
    assert result.extra["costs"] == [COSTS[best]] * 3
    assert result.extra["optimistic"] is True
    assert list(result.extra["test_mAP_of_costs"].values()) == pytest.approx(tested.mean(axis=0).tolist(), abs=6e-4)
    (careful,) = VOC07LowShotSVM(**settings).run(context(*pictures))
    assert careful.value <= result.value


def test_only_the_optimistic_protocol_looks_at_the_test_set(pictures):
    """Test labels turned round: the held-out choice of costs stays, the published one goes to what was worst."""
    train, test = pictures
    turned = Pictures(60, seed=6)
    turned.multi_labels = -turned.multi_labels
    costs = {}
    for protocol in ("held_out", "vissl"):
        for name, split in (("right", test), ("turned", turned)):
            benchmark = VOC07LowShotSVM(layers=["res5"], k=[8], num_samples=2, costs=COSTS, protocol=protocol)
            costs[protocol, name] = next(benchmark.run(context(train, split))).extra["costs"]
    assert costs["held_out", "right"] == costs["held_out", "turned"]
    assert costs["vissl", "right"] != costs["vissl", "turned"]


# -- what is said ------------------------------------------------------------------------------------------------------


def test_names_headline_and_too_few_positives(pictures):
    train, test = pictures
    fewest = int((train.multi_labels == 1).sum(axis=0).min())
    benchmark = VOC07LowShotSVM(k=[64, 1, 4], costs=None)
    given = context(train, test, image_size=224, view=benchmark.evaluation_view(224))
    found = {(one.setting["layer"], one.setting["k"]): one for one in benchmark.run(given)}
    assert list(found) == [(layer, k) for layer in ("res4", "res5") for k in (1, 4, 64)]
    assert [place for place, one in found.items() if one.headline] == [("res5", 4)]
    assert found["res4", 4].protocol == "held_out"
    assert found["res4", 4].extra["fewer_positives"] == found["res4", 4].extra["fewer_negatives"] == {}
    assert found["res4", 64].protocol == "held_out*"
    assert found["res4", 64].extra["changed"] == {
        what: [asked, found["res4", 64].extra[what]]
        for what, asked in (("fewer_positives", 64), ("fewer_negatives", 64 * (len(train.class_names) - 1)))
    }
    assert min(found["res4", 64].extra["fewer_positives"].values()) == fewest
    absent = (train.multi_labels == -1).sum(axis=0)
    assert absent.max() < 2 * 64
    assert found["res4", 64].extra["fewer_negatives"] == dict(zip(train.class_names, absent.tolist(), strict=True))
    assert found["res4", 64].extra["std"] == 0  # all samples take all there is
    assert found["res4", 4].extra["std"] > 0


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"num_samples": 2}, {"num_samples": [5, 2]}),
        ({"negatives": "per_class"}, {"negatives": ["uniform", "per_class"]}),
        ({"costs": [1.0]}, {"costs": [list(PUBLISHED_COSTS["vissl"]), [1.0]]}),
        ({"pooling": "avg"}, {"pooling": ["grid", "avg"]}),
        ({"folds": 2}, {"folds": [3, 2]}),
    ],
)
def test_what_differs_gets_a_star(settings, change, pictures):
    benchmark = VOC07LowShotSVM(layers=["res5"], k=[2], **settings)
    given = context(*pictures, image_size=224, view=benchmark.evaluation_view(224))
    (result,) = benchmark.run(given)
    assert result.protocol == "held_out*"
    assert result.extra["changed"] == change


def test_the_view_is_squashed_without_a_resize_before():
    assert VOC07LowShotSVM().evaluation_view(224) == {"name": "squashed_view", "size": 224, "resize": None}


def test_seeds_draw_other_samples(pictures):
    def samples(seed: int) -> list[float]:
        benchmark = VOC07LowShotSVM(layers=["res5"], k=[2], num_samples=2, costs=[1.0])
        return next(benchmark.run(context(*pictures, seed=seed))).extra["samples"]

    assert samples(0) == samples(0) != samples(1)


def test_a_class_that_cannot_be_learned_counts_as_chance(pictures):
    train, test = Pictures(90, seed=5, difficult=0), Pictures(60, seed=6, difficult=0)
    train.multi_labels[:, 0] = -1
    test.multi_labels[:, 1:] = -1
    (result,) = VOC07LowShotSVM(layers=["res5"], k=[2], costs=[1.0]).run(context(train, test))
    assert result.value == pytest.approx(100 * (test.multi_labels[:, 0] == 1).mean())
    assert result.extra["fewer_positives"] == {"red": 0}


def test_one_class_has_no_negatives(pictures):
    train = Pictures(20, seed=0)
    train.multi_labels, train.class_names = train.multi_labels[:, :1], ["red"]
    with pytest.raises(ValueError, match="a single class"):
        next(VOC07LowShotSVM().run(context(train, train)))


def test_wrong_settings_are_refused():
    for settings in ({"k": [0]}, {"k": []}, {"protocol": "goyal19"}, {"negatives": "all"}, {"folds": 1}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            VOC07LowShotSVM(**settings)


def test_generated_scenes_from_a_configuration(tmp_path):
    found = run_benchmark(
        {
            "benchmark": {"name": "voc07_low_shot_svm", "k": [1, 4], "num_samples": 2, "costs": [0.1, 10.0]},
            "weights": "random",
            "trunk": {"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "small"},
            "dataset": {"name": "generated_scenes", "num_images": 64, "size": 48},
            "image_size": 32,
            "device": "cpu",
            "run_dir": str(tmp_path / "run"),
        }
    )
    assert found[0].setting == {"layer": "res5", "k": 4}
    assert len(found) == 4
    assert all(0 < one.value < 100 for one in found)
    assert found[0].extra["transform"] == {"name": "squashed_view", "size": 32, "resize": None}
