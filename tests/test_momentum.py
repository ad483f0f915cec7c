"""The momentum copy: worked by hand, without gradients, saved, and the same after a resume."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from classy_vision.hooks import build_hook
from classy_vision.trainer import LocalTrainer
from small_task import DIM, Recorder, assert_identical, build, everything, train
from test_checkpoint_resume import Killer, Stop, checkpoints, read_weights

from pirl_plugin.hooks import MomentumUpdateHook
from pirl_plugin.models import MomentumSSLModel, SSLModel
from pirl_plugin.registry import build as build_component
from pirl_plugin.tasks import SSLPretrainingTask, checks

TRUNK = {"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "small"}
HEADS = {"image": {"name": "mlp", "dim": 6, "batch_norm": True}}


def model(**arguments: Any) -> MomentumSSLModel:
    torch.manual_seed(0)
    shared = {"shared_heads": {"key": "image"}}
    return build_component("model", {"name": "momentum_ssl_model", **shared, **arguments}, trunk=TRUNK, heads=HEADS)


def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    views = {name: torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=g) for name in ("image", "key")}
    return {**views, "rotation": torch.arange(4)}


def trained(net: MomentumSSLModel) -> list[torch.Tensor]:
    return [*net.trunk.parameters(), *net.heads.parameters()]


def copied(net: MomentumSSLModel) -> list[torch.Tensor]:
    return [*net.momentum_trunk.parameters(), *net.momentum_heads.parameters()]


# -- the model ---------------------------------------------------------------------------------------------------------


def test_at_first_the_copy_says_the_same() -> None:
    found = model()(batch())
    assert list(found) == ["image", "key", "rotation", "momentum/image", "momentum/key"]
    torch.testing.assert_close(found["momentum/image"], found["image"])
    torch.testing.assert_close(found["momentum/key"], found["key"])


def test_each_network_embeds_its_own_views() -> None:
    """MoCo: the query passes through the trained network alone, the key through the copy alone."""
    net = model(online_views=["image"], momentum_views=["key"])
    found = net(batch())
    assert list(found) == ["image", "rotation", "momentum/key"]
    assert torch.equal(found["momentum/key"], model(online_views=["key"], momentum_views=[])(batch())["key"])
    with pytest.raises(ValueError, match="view 'keys' has no head"):
        model(momentum_views=["keys"])


def test_no_gradient_reaches_the_copy() -> None:
    net = model()
    found = net(batch())
    assert not found["momentum/image"].requires_grad
    assert not any(p.requires_grad for p in copied(net))
    sum(x.square().sum() for x in found.values() if x.is_floating_point()).backward()
    assert [p for p in copied(net) if p.grad is not None] == []
    assert [p for p in trained(net) if p.grad is None] == []


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.999, 1.0])
def test_the_moving_average_by_hand(momentum: float) -> None:
    net = model()
    with torch.no_grad():
        for parameter in trained(net):
            parameter.add_(torch.randn_like(parameter))
    old, new = ([p.detach().double().clone() for p in parts(net)] for parts in (copied, trained))
    net.update_momentum(momentum)
    for before, online, after in zip(old, new, copied(net), strict=True):
        torch.testing.assert_close(after.double(), momentum * before + (1 - momentum) * online, rtol=1e-5, atol=1e-7)
    if momentum in (0, 1):
        expected = old if momentum else new
        assert all(torch.equal(p.double(), value) for p, value in zip(copied(net), expected, strict=True))
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\]"):
            net.update_momentum(bad)


def test_batch_statistics_of_the_copy_are_its_own() -> None:
    """They move in its forward passes, not with the moving average."""
    net = model(online_views=[], momentum_views=["image"])
    before = net.momentum_trunk.bn1.running_mean.clone()
    net(batch())
    assert not torch.equal(net.momentum_trunk.bn1.running_mean, before)
    assert torch.equal(net.trunk.bn1.running_mean, before)
    moved = net.momentum_trunk.bn1.running_mean.clone()
    net.update_momentum(0.0)
    assert torch.equal(net.momentum_trunk.bn1.running_mean, moved)


def test_state_round_trip() -> None:
    first = model()
    with torch.no_grad():
        for parameter in copied(first):
            parameter.add_(1)
    state = first.get_classy_state(deep_copy=True)
    assert list(state["model"]) == ["trunk", "heads", "momentum"]
    second = model()
    second.set_classy_state(state)
    assert_identical(first.state_dict(), second.state_dict())
    with torch.no_grad():
        first.momentum_trunk.conv1.weight.zero_()
    assert state["model"]["momentum"]["trunk"]["conv1.weight"].any()  # a deep copy
    with pytest.raises(ValueError, match="without a momentum copy"):
        second.set_classy_state({"model": {key: state["model"][key] for key in ("trunk", "heads")}})
    plain = build_component("model", {"name": "ssl_model"}, trunk=TRUNK, heads=HEADS)
    plain.set_classy_state(state)  # what benchmarks do
    assert torch.equal(plain.trunk.conv1.weight, first.trunk.conv1.weight)


def test_shuffling_changes_nothing_in_one_process() -> None:
    plain, shuffled = model()(batch()), model(shuffle_batch_norm=True)(batch())
    assert_identical(plain, shuffled)


# -- the hook ----------------------------------------------------------------------------------------------------------


def test_schedules() -> None:
    """BYOL, K = 4 steps from 0.9: 0.9, then cosines of 45, 90 and 135 degrees."""
    cosine = MomentumUpdateHook(momentum=0.9, schedule="cosine")
    expected = [1 - 0.1 * (math.cos(math.pi * k / 4) + 1) / 2 for k in range(4)]
    assert [cosine.momentum_at(k / 4) for k in range(4)] == pytest.approx(expected)
    assert expected == pytest.approx([0.9, 0.914645, 0.95, 0.985355], abs=1e-6)
    assert cosine.momentum_at(0.0) == pytest.approx(0.9)
    assert {MomentumUpdateHook(momentum=0.9).momentum_at(k / 4) for k in range(4)} == {0.9}


def test_the_hook_moves_the_copy_once_per_optimiser_step() -> None:
    """Two accumulated batches a step, six batches: after the second, fourth and sixth."""
    moves: list[float] = []
    hook = build_hook({"name": "momentum_update", "momentum": 0.5, "schedule": "cosine"})
    task = SimpleNamespace(
        base_model=SimpleNamespace(update_momentum=moves.append),
        train=True,
        total_steps=3,
        get_global_batchsize=lambda: 8,
        optimizer_period=2,
    )
    for batches in range(1, 7):
        task.num_updates, task.step_idx = 8 * batches, batches // 2
        hook.on_step(task)
        assert len(moves) == batches // 2
    assert moves == pytest.approx([hook.momentum_at(k / 3) for k in range(3)])
    task.train = False
    hook.on_step(task)
    assert len(moves) == 3


# -- in a run ----------------------------------------------------------------------------------------------------------

HOOKS = [
    {"name": "memory_bank_update", "view": "momentum/image"},
    {"name": "momentum_update", "momentum": 0.6, "schedule": "cosine"},
]


def settings(**changes: Any) -> dict[str, Any]:
    chosen = {"name": "momentum_ssl_model", "momentum_views": ["image"]}
    return {"model": chosen, "hooks": HOOKS, "num_epochs": 2, **changes}


def test_the_copy_is_what_the_steps_make_of_it() -> None:
    """Each parameter's moving average kept beside the run, in float64."""

    class MovingAverage(Recorder):
        def on_start(self, task: SSLPretrainingTask) -> None:
            self.average = [p.detach().double().clone() for p in copied(task.base_model)]
            assert all(torch.equal(a, p.double()) for a, p in zip(self.average, trained(task.base_model), strict=True))

        def on_step(self, task: SSLPretrainingTask) -> None:
            super().on_step(task)
            momentum = 1 - 0.4 * (math.cos(math.pi * (task.step_idx - 1) / 6) + 1) / 2
            new = [p.detach().double() for p in trained(task.base_model)]
            self.average = [momentum * a + (1 - momentum) * p for a, p in zip(self.average, new, strict=True)]

    seen = MovingAverage()
    task = train(seen, **settings())
    for average, parameter in zip(seen.average, copied(task.base_model), strict=True):
        torch.testing.assert_close(parameter.double(), average, rtol=1e-5, atol=1e-6)
    optimised = {id(p) for group in task.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trained(task.base_model)}
    assert not any(name.startswith("momentum") for name in seen.gradients[0])


@pytest.mark.parametrize("killed", [2, 3])
def test_resumed_equals_uninterrupted(tmp_path: Path, killed: int) -> None:
    """Stopped in the first epoch and at its end; the copy is 40 % of the weights at first and moves ever less."""
    saving = {"name": "run_checkpoint", "every_steps": 1, "background": False}
    whole = train(**settings(checkpoint=saving, run_dir=str(tmp_path / "whole")))
    folder = tmp_path / "pieces"
    with pytest.raises(Stop):
        train(Killer(step=killed), **settings(checkpoint=saving, run_dir=str(folder)))
    task = build(**settings(checkpoint=saving, run_dir=str(folder)))
    task._set_checkpoint_dict(read_weights(checkpoints(folder)[-1]))
    LocalTrainer().train(task)
    assert_identical(everything(whole), everything(task))
    assert not torch.equal(whole.base_model.momentum_trunk.conv1.weight, whole.base_model.trunk.conv1.weight)


def test_a_copy_that_nobody_moves_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the hook 'momentum_update'"):
        build(**settings(hooks=HOOKS[:1]))
    with pytest.raises(ValueError, match="hooks hold momentum_update, but neither"):
        build(hooks=HOOKS)
    task = build(**settings(hooks=None))
    assert checks.needed_hooks([task.base_model, task.base_loss]) == ["momentum_update", "memory_bank_update"]
    assert len(task.hooks) == 2


def test_another_model_than_one_of_trunk_and_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.trunk is given by the task"):
        build(model={"name": "ssl_model", "trunk": TRUNK})
    with pytest.raises(ValueError, match="joins a trunk and heads: use ssl_model"):
        build(model=copy.deepcopy(TRUNK))
    assert type(build(model={"name": "ssl_model"}).base_model) is SSLModel
    assert build().config["heads"]["image"]["dim"] == DIM
