"""Heads from lightly, and LARS: against the library called directly, and against steps written out."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from classy_vision.heads import ClassyHead
from classy_vision.optim import build_optimizer
from classy_vision.optim.param_scheduler import ConstantParamScheduler
from lightly.models.modules import heads as lightly_heads
from lightly.utils.lars import LARS as LightlyLARS
from torch import nn

from pirl_plugin.models.lightly_heads import LightlyHead
from pirl_plugin.optim import ScheduledLARS, ScheduledSGD
from pirl_plugin.optim.scheduled_lars import LARS
from pirl_plugin.registry import build

# ours, and what lightly calls it: projection, prediction
HEADS: dict[str, tuple[dict[str, Any], Callable[[], nn.Module], Callable[[], nn.Module] | None]] = {
    "simclr": (
        {"name": "simclr", "hidden_dim": 7, "dim": 4},
        lambda: lightly_heads.SimCLRProjectionHead(6, 7, 4),
        None,
    ),
    "simclr_v2": (
        {"name": "simclr", "dim": 4, "num_layers": 3},
        lambda: lightly_heads.SimCLRProjectionHead(6, 6, 4, num_layers=3),
        None,
    ),
    "byol": (
        {"name": "byol", "hidden_dim": 7, "dim": 4},
        lambda: lightly_heads.BYOLProjectionHead(6, 7, 4),
        lambda: lightly_heads.BYOLPredictionHead(4, 7, 4),
    ),
    "simsiam": (
        {"name": "simsiam", "hidden_dim": 7, "dim": 4, "bottleneck_dim": 2},
        lambda: lightly_heads.SimSiamProjectionHead(6, 7, 4),
        lambda: lightly_heads.SimSiamPredictionHead(4, 2, 4),
    ),
    "barlow_twins": (
        {"name": "barlow_twins", "hidden_dim": 7, "dim": 4},
        lambda: lightly_heads.BarlowTwinsProjectionHead(6, 7, 4),
        None,
    ),
}


def head_of(config: dict[str, Any]) -> LightlyHead:
    return build("head", config, in_dim=6, unique_id="image")


@pytest.mark.parametrize("name", HEADS)
def test_lightly_s_own(name: str) -> None:
    config, projection, prediction = HEADS[name]
    head, x = head_of(config), torch.randn(5, 6)
    assert isinstance(head, ClassyHead)
    assert head.unique_id == "image"
    expected = projection()
    expected.load_state_dict(head.projection.state_dict())
    found = head(x)
    if prediction is None:
        assert torch.equal(found, expected(x))
    else:
        assert list(found) == ["", "prediction"]  # benchmarks take the first
        predicted = prediction()
        predicted.load_state_dict(head.prediction.state_dict())
        assert torch.equal(found[""], expected(x))
        assert torch.equal(found["prediction"], predicted(expected(x)))


@pytest.mark.parametrize("name", HEADS)
def test_leading_dimensions_stay_and_make_up_the_batch(name: str) -> None:
    head, x = head_of(HEADS[name][0]), torch.randn(4, 3, 6)
    together, apart = head(x), copy.deepcopy(head)(x.flatten(0, 1))
    for one, other in zip(*(f.values() if isinstance(f, dict) else [f] for f in (together, apart)), strict=True):
        assert one.shape == (4, 3, 4)
        torch.testing.assert_close(one.flatten(0, 1), other)


def layers(module: nn.Module) -> list[str]:
    return [type(layer).__name__ for layer in module.layers]


def test_two_layers() -> None:
    """SimSiam's have a batch norm after each (the paper's CIFAR-10), those of Barlow Twins after the first."""
    simsiam = head_of({"name": "simsiam", "hidden_dim": 7, "dim": 4, "num_layers": 2})
    assert layers(simsiam.projection) == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    barlow_twins = head_of({"name": "barlow_twins", "hidden_dim": 7, "dim": 4, "num_layers": 2})
    assert layers(barlow_twins.projection) == ["Linear", "BatchNorm1d", "ReLU", "Linear"]


def test_moco_v2_s_head_is_ours() -> None:
    ours, theirs = build("head", {"name": "mlp", "dim": 4}, in_dim=6), lightly_heads.MoCoProjectionHead(6, 6, 4)
    x = torch.randn(5, 6)
    theirs.layers.load_state_dict(ours.mlp.state_dict())
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("name", "millions"), [("simclr", 4.46), ("byol", 11.55), ("simsiam", 14.69), ("barlow_twins", 151.03)]
)
def test_sizes_are_the_papers(name: str, millions: float) -> None:
    """On ResNet-50's 2,048 channels, counted by hand from the layers (a weight, a bias or a batch norm's two each)."""
    with torch.device("meta"):
        head = build("head", {"name": name}, in_dim=2048, unique_id="image")
    assert sum(p.numel() for p in head.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


# -- LARS --------------------------------------------------------------------------------------------------------------


def test_two_steps_by_hand() -> None:
    """Weights (3, 4), norm 5, gradient (0, 2), decay 0.1: 0.002 x 5 / (2 + 0.5) = 0.004 of (0.3, 2.4), times lr 50.

    Then the norm and the direction have changed, and 0.9 of the first step is added. The bias takes SGD's own steps.
    """
    config = {"name": "scheduled_lars", "lr": 50.0, "lr_batch_size": None, "weight_decay": 0.1}
    optimizer = build_optimizer({**config, "trust_coefficient": 0.002})
    linear = nn.Linear(2, 1)
    linear.weight.data, linear.bias.data = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0])
    optimizer.set_param_groups(optimizer.param_groups_of(linear, lr=ConstantParamScheduler(50.0)))
    w, v = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    b, u = 1.0, 0.0
    for step in range(2):
        linear.weight.grad, linear.bias.grad = torch.tensor([[0.0, 2.0]]), torch.tensor([0.5])
        optimizer.step(where=step / 2)
        gradient = torch.tensor([0.0, 2.0], dtype=torch.float64)
        trust = 0.002 * w.norm() / (gradient.norm() + 0.1 * w.norm())
        v = 0.9 * v + trust * (gradient + 0.1 * w)
        u = 0.9 * u + 0.5
        w, b = w - 50 * v, b - 50 * u
        torch.testing.assert_close(linear.weight[0].double(), w, rtol=1e-5, atol=0)
        assert linear.bias.item() == pytest.approx(b)
        if step == 0:
            torch.testing.assert_close(w, torch.tensor([2.94, 3.52], dtype=torch.float64))


def weights_of_all_kinds(device: str = "cpu") -> list[nn.Parameter]:
    """A convolution's, a layer's, one that is all zero, one whose gradient will be, and one without a gradient."""
    g = torch.Generator().manual_seed(1)
    drawn = [torch.randn(*shape, generator=g) for shape in ((4, 3, 3, 3), (5, 7), (3, 2), (6, 2), (2, 2))]
    drawn[2].zero_()
    return [nn.Parameter(value.to(device)) for value in drawn]


def give_gradients(weights: list[nn.Parameter], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for weight in weights[:-1]:
        weight.grad = torch.randn(weight.shape, generator=g).to(weight.device)
    if not weights[3].is_meta:
        weights[3].grad.zero_()  # type: ignore[union-attr]


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_it_is_lightly_s_and_each_goes_on_from_the_other_s_checkpoint(momentum: float, nesterov: bool) -> None:
    settings = {"lr": 0.7, "momentum": momentum, "nesterov": nesterov, "trust_coefficient": 0.02}
    ours, theirs = weights_of_all_kinds(), weights_of_all_kinds()

    def made(kind: Any, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": weights[:1] + weights[2:], "weight_decay": 0.1}, {"params": weights[1:2]}]
        made: torch.optim.Optimizer = kind(groups, **settings)
        return made

    one, other = made(LARS, ours), made(LightlyLARS, theirs)
    for step in range(6):
        for weights, optimizer in ((ours, one), (theirs, other)):
            give_gradients(weights, step)
            for group in optimizer.param_groups:
                group["lr"] = 0.7 - 0.1 * step
            optimizer.step()
        for mine, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-7)
        states = one.state_dict(), other.state_dict()
        assert states[0]["param_groups"] == states[1]["param_groups"]
        assert states[0]["state"].keys() == states[1]["state"].keys()
        if step == 2:
            one, other = made(LARS, ours), made(LightlyLARS, theirs)
            one.load_state_dict(states[1])
            other.load_state_dict(states[0])


def test_no_step_looks_at_a_number_on_the_host() -> None:
    """A device without numbers, where that cannot be; lightly's does it twice for every weight tensor."""
    for kind, looks in ((LARS, False), (LightlyLARS, True)):
        weights = weights_of_all_kinds("meta")
        optimizer = kind(weights, lr=0.1, momentum=0.9, weight_decay=0.1)
        for step in range(2):
            give_gradients(weights, step)
            with pytest.raises(RuntimeError) if looks else contextlib.nullcontext():
                optimizer.step()


def test_the_scale_of_the_loss_changes_the_biases_alone() -> None:
    """Which is why Barlow Twins' 0.024 makes 0.0048 of a rate of 0.2 for them."""
    ends = []
    for scale in (1.0, 0.024):
        optimizer = ScheduledLARS(lr=0.2, lr_batch_size=None, weight_decay=1e-12)
        linear = nn.Linear(2, 1)
        linear.weight.data, linear.bias.data = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0])
        optimizer.set_param_groups(optimizer.param_groups_of(linear, lr=ConstantParamScheduler(0.2)))
        linear.weight.grad, linear.bias.grad = torch.tensor([[0.0, scale]]), torch.tensor([scale])
        optimizer.step(where=0.0)
        ends.append((linear.weight.clone(), 1 - linear.bias.item()))
    torch.testing.assert_close(ends[0][0], ends[1][0])
    assert (ends[0][1], ends[1][1]) == (pytest.approx(0.2), pytest.approx(0.0048, rel=1e-4))


def test_schedule_and_groups_are_those_of_scheduled_sgd() -> None:
    settings: dict[str, Any] = {"lr": 0.3, "lr_batch_size": 256, "warmup_epochs": 10, "weight_decay": 1e-6}
    one, other = ScheduledLARS(**settings), ScheduledSGD(**settings)
    mine, theirs = (optimizer.lr_scheduler(4096, 100) for optimizer in (one, other))
    assert [mine(k / 20) for k in range(20)] == [theirs(k / 20) for k in range(20)]
    assert mine(0.1) == pytest.approx(4.8)
    groups = one.param_groups_of(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), lr=mine)
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 1e-6), (3, 0.0)]


def test_no_weight_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="weight_decay must be above 0, got 0: LARS takes"):
        ScheduledLARS(weight_decay=0.0)
