"""The learning rate of every step, by hand, and which parameters decay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from classy_vision.optim import build_optimizer
from classy_vision.optim.param_scheduler import ParamScheduler
from torch import nn

from pirl_plugin.optim.scheduled_sgd import ScheduledSGD


def schedule(num_epochs: int = 100, global_batch_size: int = 256, **arguments: Any) -> ParamScheduler:
    arguments = {"lr": 0.1, "lr_batch_size": 256, **arguments}
    return ScheduledSGD(**arguments).lr_scheduler(global_batch_size, num_epochs)


@pytest.mark.parametrize(
    ("batch", "unit", "peak"), [(256, 256, 0.1), (1024, 256, 0.4), (64, 256, 0.025), (64, None, 0.1)]
)
def test_linear_scaling(batch: int, unit: int | None, peak: float) -> None:
    optimizer = ScheduledSGD(lr=0.1, lr_batch_size=unit)
    assert optimizer.peak_lr(batch) == pytest.approx(peak)
    assert optimizer.lr_scheduler(batch, 10)(0.0) == pytest.approx(peak)


def test_cosine_by_hand() -> None:
    """From 0.1 down to 0.001 of it: half-way the mean, at a quarter 1/2 + sqrt(2)/4 of the way back up."""
    lr = schedule()
    assert lr(0.0) == pytest.approx(0.1)
    assert lr(0.5) == pytest.approx((0.1 + 0.0001) / 2)
    assert lr(0.25) == pytest.approx(0.0001 + 0.0999 * (0.5 + math.sqrt(2) / 4))
    assert lr(0.999999) == pytest.approx(0.0001, rel=1e-3)


def test_the_recipe_of_the_paper() -> None:
    """0.12 at 1,024 images to 1.2e-4 (PIRL, Sec. 3), whatever the number of epochs."""
    lr = ScheduledSGD(lr=0.12, lr_batch_size=1024).lr_scheduler(1024, 800)
    assert (lr(0.0), lr(1 - 1e-9)) == (pytest.approx(0.12), pytest.approx(1.2e-4))


def test_warm_up_is_linear_and_the_cosine_takes_the_rest() -> None:
    """10 of 100 epochs from a fifth of the peak: 0.02, 0.06 half-way, 0.1 at epoch 10; the rest's middle is 55."""
    lr = schedule(warmup_epochs=10, warmup_lr_ratio=0.2)
    assert lr(0.0) == pytest.approx(0.02)
    assert lr(0.05) == pytest.approx(0.06)
    assert lr(0.1) == pytest.approx(0.1)
    assert lr(0.55) == pytest.approx(0.05005)
    assert lr(1 - 1e-9) == pytest.approx(1e-4)
    assert all(lr(k / 1000) < lr((k + 1) / 1000) for k in range(99))
    assert all(lr(k / 1000) > lr((k + 1) / 1000) for k in range(100, 999))


@pytest.mark.parametrize("warmup_epochs", [0.0, 5.0])
def test_milestones_are_epochs_of_the_whole_run(warmup_epochs: float) -> None:
    lr = schedule(200, schedule="multistep", milestones=[120, 160], gamma=0.1, warmup_epochs=warmup_epochs)
    expected = {5.0: 0.1, 119.9: 0.1, 120.0: 0.01, 159.9: 0.01, 160.0: 0.001, 199.9: 0.001}
    assert {epoch: lr(epoch / 200) for epoch in expected} == pytest.approx(expected)
    assert lr(2.5 / 200) == pytest.approx(0.05 if warmup_epochs else 0.1)


def test_wrong_schedules() -> None:
    with pytest.raises(ValueError, match="warmup_epochs must be less than num_epochs = 5, got 5"):
        schedule(5, warmup_epochs=5)
    with pytest.raises(ValueError, match="milestones must lie before num_epochs = 100, got \\[100\\]"):
        schedule(100, schedule="multistep", milestones=[100])
    with pytest.raises(ValueError, match="milestones must rise, got \\[60, 30\\]"):
        ScheduledSGD(schedule="multistep", milestones=[60, 30])
    for arguments in ({"schedule": "multistep"}, {"milestones": [3]}):
        with pytest.raises(ValueError, match="milestones go with schedule='multistep'"):
            ScheduledSGD(**arguments)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize(("everything", "sizes"), [(False, [(2, 0.01), (4, 0.0)]), (True, [(6, 0.01)])])
def test_vectors_do_not_decay_unless_asked(everything: bool, sizes: list) -> None:
    optimizer = ScheduledSGD(weight_decay=0.01, decay_norm_and_bias=everything)
    groups = optimizer.param_groups_of(Net(), lr=optimizer.lr_scheduler(1024, 1))
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == sizes
    if not everything:
        assert {p.ndim for p in groups[0]["params"]} == {2, 4}
        assert {p.ndim for p in groups[1]["params"]} == {1}


def test_two_steps_by_hand() -> None:
    """lr 0.5, momentum 0.9, decay 0.1: w = 1, g = 1 gives v = 1.1, w = 0.45; then v = 0.99 + 1.045, w = 0.45 - 1.0175.

    Without decay v is 1, then 1.9. The rate stays, by a multistep schedule before its milestone.
    """
    config = {"lr": 0.5, "lr_batch_size": None, "weight_decay": 0.1, "schedule": "multistep", "milestones": [9]}
    optimizer = build_optimizer({"name": "scheduled_sgd", **config})
    linear, norm = nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)
    nn.init.ones_(linear.weight)
    optimizer.set_param_groups(optimizer.param_groups_of(linear, norm, lr=optimizer.lr_scheduler(7, 10)))
    weights = []
    for step in range(2):
        for parameter in (linear.weight, norm.weight):
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(where=step / 100)
        weights.append((linear.weight.item(), norm.weight.item()))
    assert weights[0] == pytest.approx((0.45, 0.5))
    assert weights[1] == pytest.approx((-0.5675, 0.5 - 0.5 * 1.9))
    assert optimizer.options_view.lr == 0.5


def test_some_parameters_keep_the_peak_rate() -> None:
    """By a part of their names; the rest, whose rate is reported, follows the cosine."""
    optimizer = ScheduledSGD(lr=0.1, lr_batch_size=256, weight_decay=0.01, constant_lr=["norm", "linear"])
    net = Net()
    optimizer.set_param_groups(optimizer.param_groups_of(net, lr=optimizer.lr_scheduler(512, 10)))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(where=0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    middle = (0.2 + 0.0002) / 2
    assert [rates[id(p)] for p in net.conv.parameters()] == pytest.approx([middle, middle])
    assert [rates[id(p)] for p in (*net.norm.parameters(), *net.linear.parameters())] == pytest.approx([0.2] * 4)
    assert [decays[id(p)] for p in net.linear.parameters()] == [0.01, 0.0]
    assert optimizer.options_view.lr == pytest.approx(middle)
    with pytest.raises(AttributeError):
        optimizer.options_view.no_such_option  # noqa: B018


def test_a_part_that_no_name_has() -> None:
    """Frozen parameters do not count, and a part is no piece of a word."""
    for part in ("frozen", "lin"):
        optimizer = ScheduledSGD(constant_lr=[part])
        with pytest.raises(ValueError, match=f"no trained parameter's name has the part '{part}'"):
            optimizer.param_groups_of(Net(), lr=optimizer.lr_scheduler(1024, 1))
