"""The adapted losses: by hand, against sums written out, against lightly itself, and on two processes against one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightly.loss
import pytest
import torch
from lightly_worker import CONFIGS, OF_THE_GLOBAL_BATCH, embeddings, frozen, measured
from ranks import run_ranks
from small_task import assert_identical
from torch import Tensor

from pirl_plugin.losses.lightly_losses import TwoViewLoss
from pirl_plugin.registry import build
from pirl_plugin.schema import ConfigError

IDS = torch.arange(2)


def loss_of(name: str, **arguments: Any) -> TwoViewLoss:
    return build("loss", {"name": name, **arguments})


def stacked(first: list[list[float]], second: list[list[float]]) -> dict[str, Tensor]:
    return {"image": torch.tensor([first, second]).transpose(0, 1)}


# -- by hand -----------------------------------------------------------------------------------------------------------


def test_nt_xent_by_hand() -> None:
    """Two images at right angles, views equal, tau = 1: each view has its twin at 1 and two others at 0."""
    output = stacked([[1, 0], [0, 3]], [[2, 0], [0, 1]])
    assert loss_of("nt_xent", temperature=1.0)(output, IDS).item() == pytest.approx(math.log(1 + 2 / math.e))
    assert loss_of("nt_xent", temperature=0.5)(output, IDS).item() == pytest.approx(math.log(1 + 2 / math.e**2))


def test_barlow_twins_by_hand() -> None:
    """Uncorrelated columns: the identity, 0. The other view negated: -1 on the diagonal, 2 x (1 + 1)^2.

    Equal columns: ones everywhere, so that two entries off the diagonal are wrong by 1, times lambda.
    """
    square, line = [[1, 1], [1, -1], [-1, 1], [-1, -1]], [[1, 1], [-1, -1], [3, 3], [5, 5]]
    negated = [[-x for x in row] for row in square]
    loss, ids = loss_of("barlow_twins", lambda_param=0.25), torch.arange(4)
    assert loss(stacked(square, square), ids).item() == pytest.approx(0, abs=1e-6)
    assert loss(stacked(square, negated), ids).item() == pytest.approx(8, rel=1e-4)
    assert loss(stacked(line, line), ids).item() == pytest.approx(0.5, rel=1e-4)


def test_vicreg_by_hand() -> None:
    """Columns (1, -1) and (-1, 1): variance 2, covariance -2; twice (-2)^2 over two dimensions is 4, for both views 8.

    Constant views one apart: 25 x 1 of invariance, and 25 x (1 - 0.01) of standard deviations of sqrt(0.0001).
    """
    loss = loss_of("vicreg")
    assert loss(stacked([[1, -1], [-1, 1]], [[1, -1], [-1, 1]]), IDS).item() == pytest.approx(8)
    constant = stacked([[0, 0], [0, 0]], [[1, 1], [1, 1]])
    assert loss(constant, IDS).item() == pytest.approx(25 + 25 * 0.99)
    assert loss_of("vicreg", lambda_param=2.0, mu_param=0.0)(constant, IDS).item() == pytest.approx(2)


PREDICTED = {
    "image": torch.tensor([[[0.0, -2.0], [1.0, 1.0]]]),  # first view's projection, second's
    "image/prediction": torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]),
}


def test_simsiam_and_byol_by_hand() -> None:
    """First prediction and second target at 45 degrees, second and first opposite: cosines sqrt(1/2) and -1."""
    ids = torch.tensor([0])
    assert loss_of("simsiam")(PREDICTED, ids).item() == pytest.approx(-(math.sqrt(0.5) - 1) / 2)
    output = {**PREDICTED, "image": torch.randn(1, 2, 2), "momentum/image": PREDICTED["image"]}
    expected = (2 - 2 * math.sqrt(0.5)) + (2 + 2)
    assert loss_of("byol")(output, ids).item() == pytest.approx(expected)
    assert loss_of("byol", scale=0.25)(output, ids).item() == pytest.approx(expected / 4)


def test_statistics_tell_collapse() -> None:
    loss = loss_of("nt_xent")
    loss(stacked([[1, 0], [-2, 0]], [[0, 1], [0, -1]]), IDS)
    assert loss.last_statistics["positive_similarity"].item() == pytest.approx(0)
    assert loss.last_statistics["embedding_std"].item() == pytest.approx(1)
    loss(stacked([[1, 0], [2, 0]], [[3, 0], [4, 0]]), IDS)
    assert loss.last_statistics["positive_similarity"].item() == pytest.approx(1)
    assert loss.last_statistics["embedding_std"].item() == pytest.approx(0, abs=1e-6)


# -- slow references in float64 ----------------------------------------------------------------------------------------


def slow_nt_xent(a: Tensor, b: Tensor, temperature: float = 0.3) -> float:
    views = [row / row.norm() for row in [*a, *b]]
    count, total = len(a), 0.0
    for one in range(2 * count):
        similar = {other: float(views[one] @ views[other]) / temperature for other in range(2 * count) if other != one}
        total -= similar[(one + count) % (2 * count)] - math.log(sum(map(math.exp, similar.values())))
    return total / (2 * count)


def slow_barlow_twins(a: Tensor, b: Tensor, lambda_param: float = 0.01) -> float:
    def unit(x: Tensor) -> Tensor:
        return (x - x.mean()) / (x.pow(2).mean() - x.mean() ** 2 + 1e-5).sqrt()

    total = 0.0
    for i in range(a.shape[1]):
        for j in range(a.shape[1]):
            c = float((unit(a[:, i]) * unit(b[:, j])).mean())
            total += (1 - c) ** 2 if i == j else lambda_param * c**2
    return total


def slow_vicreg(a: Tensor, b: Tensor, weights: tuple[float, float, float] = (5.0, 3.0, 2.0)) -> float:
    count, dim = a.shape
    invariance = sum(float((a[i, j] - b[i, j]) ** 2) for i in range(count) for j in range(dim)) / (count * dim)
    variance = covariance = 0.0
    for x in (a, b):
        centred = x - x.sum(dim=0) / count
        for i in range(dim):
            deviation = math.sqrt(float((centred[:, i] ** 2).sum()) / (count - 1) + 1e-4)
            variance += max(0.0, 1 - deviation) / dim / 2
            for j in range(dim):
                if i != j:
                    covariance += (float((centred[:, i] * centred[:, j]).sum()) / (count - 1)) ** 2 / dim
    return weights[0] * invariance + weights[1] * variance + weights[2] * covariance


@pytest.mark.parametrize(
    ("name", "slow"), [("nt_xent", slow_nt_xent), ("barlow_twins", slow_barlow_twins), ("vicreg", slow_vicreg)]
)
def test_sums_written_out(name: str, slow: Callable[[Tensor, Tensor], float]) -> None:
    a, b = (x.double() for x in embeddings()["image"].unbind(1))
    found = build("loss", CONFIGS[name])({"image": torch.stack([a, b], dim=1)}, torch.arange(len(a)))
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(slow(a, b), rel=1e-9)


DIRECT: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "nt_xent": lambda o: lightly.loss.NTXentLoss(temperature=0.3)(*o["image"].unbind(1)),
    "barlow_twins": lambda o: lightly.loss.BarlowTwinsLoss(lambda_param=0.01)(*o["image"].unbind(1)),
    "vicreg": lambda o: lightly.loss.VICRegLoss(5.0, 3.0, 2.0)(*o["image"].unbind(1)),
    "simsiam": lambda o: negative_cosine(o["image/prediction"], o["image"]),
    "byol": lambda o: 4 + 4 * negative_cosine(o["image/prediction"], o["momentum/image"]),
}


def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    loss = lightly.loss.NegativeCosineSimilarity()
    return (loss(predictions[:, 0], targets[:, 1]) + loss(predictions[:, 1], targets[:, 0])) / 2


@pytest.mark.parametrize("name", DIRECT)
def test_lightly_called_directly(name: str) -> None:
    output = embeddings()
    found = build("loss", CONFIGS[name])(output, torch.arange(8))
    assert torch.equal(found, DIRECT[name](output))
    doubled = build("loss", {**CONFIGS[name], "scale": 2.0})(output, torch.arange(8))
    torch.testing.assert_close(doubled, 2 * found)


# -- what the adapter itself does --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DIRECT)
def test_two_views_of_their_own_names_are_the_same(name: str) -> None:
    output = embeddings()
    apart = {}
    for key, both in output.items():
        apart[key], apart[key.replace("image", "second")] = both.unbind(1)
    stacked_loss, apart_loss = build("loss", CONFIGS[name]), build("loss", {**CONFIGS[name], "second_view": "second"})
    assert torch.equal(stacked_loss(output, torch.arange(8)), apart_loss(apart, torch.arange(8)))
    assert set(stacked_loss.views) <= set(output)
    assert set(apart_loss.views) <= set(apart)


@pytest.mark.parametrize("name", DIRECT)
def test_the_views_count_the_same(name: str) -> None:
    output = embeddings()
    swapped = {key: both.flip(1) for key, both in output.items()}
    loss = build("loss", CONFIGS[name])
    torch.testing.assert_close(loss(output, torch.arange(8)), loss(swapped, torch.arange(8)))


@pytest.mark.parametrize(("name", "target"), [("simsiam", "image"), ("byol", "momentum/image")])
def test_no_gradient_flows_into_what_is_predicted(name: str, target: str) -> None:
    output = {key: both.requires_grad_() for key, both in embeddings().items()}
    build("loss", CONFIGS[name])(output, torch.arange(8)).backward()
    assert output[target].grad is None
    assert output["image/prediction"].grad.norm() > 0


@pytest.mark.parametrize("name", DIRECT)
def test_half_precision_embeddings_are_compared_in_float32_and_nothing_is_saved(name: str) -> None:
    output = {key: both.bfloat16() for key, both in embeddings().items()}
    loss = build("loss", CONFIGS[name])
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(output, torch.arange(8))
    expected = loss({key: both.float() for key, both in output.items()}, torch.arange(8))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert loss.state_dict() == {}


def test_wrong_embeddings() -> None:
    loss, apart = loss_of("nt_xent"), loss_of("nt_xent", second_view="key")
    with pytest.raises(KeyError, match=r"needs the output 'image'; the model gave \['crops'\]"):
        loss({"crops": torch.zeros(2, 2, 3)}, IDS)
    with pytest.raises(KeyError, match="needs the output 'key'"):
        apart({"image": torch.zeros(2, 3)}, IDS)
    with pytest.raises(ValueError, match=r"'image' must hold two views of each image, \(B, 2, D\), got \(2, 3\)"):
        loss({"image": torch.zeros(2, 3)}, IDS)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 4\)"):
        apart({"image": torch.zeros(2, 3), "key": torch.zeros(2, 4)}, IDS)
    with pytest.raises(KeyError, match="'momentum/image'"):
        loss_of("byol")(PREDICTED, IDS)
    with pytest.raises(ConfigError, match="temperature: must be greater than 0"):
        loss_of("nt_xent", temperature=0.0)


# -- two processes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks found, of one start of two processes for all tests."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks("lightly_worker.py", folder)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_and_its_gradients_are_those_of_the_global_batch(two: list[dict[str, Any]], name: str) -> None:
    """Gradients as ``DistributedDataParallel`` averages them."""
    one, ranks = measured(name), [rank["losses"][name] for rank in two]
    torch.testing.assert_close(sum(rank["loss"] for rank in ranks) / 2, one["loss"], rtol=1e-5, atol=0)
    for key, gradient in one["gradients"].items():
        assert gradient.norm() > 0
        halves = torch.cat([rank["gradients"][key] for rank in ranks]) / 2
        torch.testing.assert_close(halves, gradient, rtol=1e-4, atol=1e-6)


def test_half_a_batch_is_not_the_whole() -> None:
    """So that the test above can tell: without the other half, the loss is another one."""
    for name in ("nt_xent", "barlow_twins", "vicreg"):
        halves = [measured(name, part)["loss"] for part in (slice(0, 4), slice(4, 8))]
        assert abs(sum(halves) / 2 - measured(name)["loss"]) > 1e-2


@pytest.mark.parametrize("name", ["simclr", "byol", "moco_v2"])
def test_methods_train_on_two_processes(two: list[dict[str, Any]], name: str) -> None:
    """Gradients for every parameter and the same weights, copies and queues on both ranks, which see other images."""
    first, second = (rank["tasks"][name] for rank in two)
    assert_identical(first["end"], second["end"])
    assert sorted(first["ids"] + second["ids"]) == list(range(16))
    assert first["without_gradient"] == []
    assert any(not torch.equal(first["start"][part], first["end"][part]) for part in first["start"])


@pytest.mark.parametrize("name", OF_THE_GLOBAL_BATCH)
def test_two_processes_end_in_the_weights_of_one(two: list[dict[str, Any]], name: str) -> None:
    one, ranks = frozen(name), [rank["frozen"][name] for rank in two]
    torch.testing.assert_close(sum(rank["losses"] for rank in ranks) / 2, one["losses"], rtol=1e-4, atol=0)
    assert_identical(ranks[0]["end"], ranks[1]["end"])
    for part, value in one["end"].items():  # the head's bias changes nothing: its gradient is rounding alone
        torch.testing.assert_close(ranks[0]["end"][part], value, rtol=1e-3, atol=2e-6 + 1e-4 * value.abs().max().item())
