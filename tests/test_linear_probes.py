"""The probes' mathematics against a plain loop in float64, one classifier at a time, and against torch itself."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pirl_plugin.benchmarks.linear.probes import GridPoint, ProbeGrid
from pirl_plugin.benchmarks.linear.protocols import PROTOCOLS, Protocol, equally_spaced
from pirl_plugin.benchmarks.linear.targets import held_out_mask, mean_loss

CHANNELS, POSITIONS, CLASSES, BATCH = 3, 4, 5, 8
DIMS = CHANNELS * POSITIONS
POINTS = [GridPoint(0.1, 0.0), GridPoint(0.1, 0.05), GridPoint(0.02, 0.05), GridPoint(0.5, 0.01)]
STEPS = 7


def data(steps: int = STEPS, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, BATCH, DIMS, generator=g) * 2 + 1
    return x, torch.randint(0, CLASSES, (steps, BATCH), generator=g)


def factor(step: int) -> float:
    """Two drops in seven steps."""
    return 0.1 ** (step * 3 // STEPS)


def train(protocol: Protocol, points: list[GridPoint], x: Tensor, labels: Tensor, steps: int = STEPS) -> ProbeGrid:
    grid = ProbeGrid(CHANNELS, DIMS, CLASSES, protocol, points, seed=3)
    for step in range(steps):
        grid.train_step(x[step], labels[step], factor(step))
    return grid


# -- an independent slow version: one classifier, numpy, float64, derivatives by hand ----------------------------------


def reference(protocol: Protocol, point: GridPoint, x: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    start = ProbeGrid(CHANNELS, DIMS, CLASSES, protocol, [point], seed=3)
    p = {name: value.detach()[0].double().numpy().copy() for name, value in start.parameters.items()}
    v = {name: np.zeros_like(value) for name, value in p.items()}
    mean, var = np.zeros(CHANNELS), np.ones(CHANNELS)
    for step in range(len(x)):
        maps = x[step].double().numpy().reshape(BATCH, CHANNELS, POSITIONS)
        if protocol.norm == "none":
            normalized = maps
        else:
            m, s = maps.mean(axis=(0, 2)), maps.var(axis=(0, 2))
            n = BATCH * POSITIONS
            mean, var = 0.9 * mean + 0.1 * m, 0.9 * var + 0.1 * s * n / (n - 1)
            normalized = (maps - m[:, None]) / np.sqrt(s + 1e-5)[:, None]
        scale, shift = p.get("scale", np.ones(CHANNELS)), p.get("shift", np.zeros(CHANNELS))
        rows = (normalized * scale[:, None] + shift[:, None]).reshape(BATCH, DIMS)
        scores = rows @ p["weight"].T + p["bias"]
        probability = np.exp(scores - scores.max(axis=1, keepdims=True))
        probability /= probability.sum(axis=1, keepdims=True)
        of_scores = (probability - np.eye(CLASSES)[labels[step].numpy()]) / BATCH
        of_rows = (of_scores @ p["weight"]).reshape(BATCH, CHANNELS, POSITIONS)
        gradient = {"weight": of_scores.T @ rows, "bias": of_scores.sum(axis=0)}
        if "scale" in p:
            gradient |= {"scale": (of_rows * normalized).sum(axis=(0, 2)), "shift": of_rows.sum(axis=(0, 2))}
        for name, value in p.items():
            g = gradient[name] + (point.weight_decay * value if name in ("weight", "bias") else 0)
            v[name] = protocol.momentum * v[name] + g
            value -= point.lr * factor(step) * (g + protocol.momentum * v[name] if protocol.nesterov else v[name])
    return p | {"mean": mean, "var": var}


@pytest.mark.parametrize("name", ["paper", "vissl", "goyal19", "moco"])
def test_every_point_of_the_grid_takes_the_steps_of_a_plain_loop(name):
    protocol, (x, labels) = PROTOCOLS[name], data()
    grid = train(protocol, POINTS, x, labels)
    for index, point in enumerate(POINTS):
        expected = reference(protocol, point, x, labels)
        for key, value in grid.parameters.items():
            np.testing.assert_allclose(value[index].detach().numpy(), expected[key], atol=2e-5, rtol=1e-4, err_msg=key)
        if protocol.norm != "none":
            np.testing.assert_allclose(grid.running["mean"].numpy(), expected["mean"], rtol=1e-5)
            np.testing.assert_allclose(grid.running["var"].numpy(), expected["var"], rtol=1e-5)
    moved = {key: value[1].detach() - value[2].detach() for key, value in grid.parameters.items()}
    assert all(float(difference.abs().max()) > 1e-3 for difference in moved.values()), "the learning rate tells"


def test_protocols_differ_where_they_say():
    """What the parametrised test above compares is not the same thing four times."""
    x, labels = data()
    ends = {name: reference(PROTOCOLS[name], POINTS[1], x, labels)["weight"] for name in ("paper", "vissl", "goyal19")}
    assert np.abs(ends["paper"] - ends["goyal19"]).max() > 1e-3  # Nesterov
    assert np.abs(ends["vissl"] - ends["goyal19"]).max() > 1e-3  # initial weights, scale and shift


def test_a_grid_equals_separate_runs():
    x, labels = data()
    grid = train(PROTOCOLS["vissl"], POINTS, x, labels)
    for index, point in enumerate(POINTS):
        alone = train(PROTOCOLS["vissl"], [point], x, labels)
        for key, value in alone.parameters.items():
            torch.testing.assert_close(grid.parameters[key][index], value[0], atol=1e-6, rtol=1e-5)
        only = grid.only(index)
        torch.testing.assert_close(only.scores(x[0])[0], grid.scores(x[0])[index])
        torch.testing.assert_close(only.scores(x[0]), alone.scores(x[0]), atol=1e-5, rtol=1e-5)


def test_a_diverging_classifier_leaves_the_others_alone():
    x, labels = data()
    with_it = train(PROTOCOLS["vissl"], [GridPoint(1e38, 0.0), POINTS[0]], x, labels)
    without = train(PROTOCOLS["vissl"], [POINTS[0]], x, labels)
    assert not torch.isfinite(with_it.scores(x[0])[0]).all()
    torch.testing.assert_close(with_it.scores(x[0])[1], without.scores(x[0])[0])


def test_evaluation_is_torch_s_batch_norm_and_linear_layer():
    x, labels = data()
    grid = train(PROTOCOLS["vissl"], POINTS[:1], x, labels)
    norm, linear = nn.BatchNorm1d(CHANNELS), nn.Linear(DIMS, CLASSES)
    with torch.no_grad():
        for own, name in (
            (norm.weight, "scale"),
            (norm.bias, "shift"),
            (linear.weight, "weight"),
            (linear.bias, "bias"),
        ):
            own.copy_(grid.parameters[name][0])
        norm.running_mean.copy_(grid.running["mean"])
        norm.running_var.copy_(grid.running["var"])
        expected = linear(norm.eval()(x[0].unflatten(1, (CHANNELS, -1))).flatten(1))
    torch.testing.assert_close(grid.scores(x[0])[0], expected, atol=1e-5, rtol=1e-5)


def test_initial_weights():
    grids = {name: ProbeGrid(2, 10_000, 4, PROTOCOLS[name], POINTS[:2], seed=1) for name in ("paper", "vissl")}
    normal, uniform = grids["paper"].parameters["weight"], grids["vissl"].parameters["weight"]
    assert normal.std().item() == pytest.approx(0.01, rel=0.03)
    assert uniform.abs().max().item() == pytest.approx(0.01, rel=0.01)
    assert uniform.std().item() == pytest.approx(0.01 / math.sqrt(3), rel=0.03)
    assert torch.equal(normal[0], normal[1])
    assert not grids["paper"].parameters["bias"].any()
    assert not torch.equal(normal, ProbeGrid(2, 10_000, 4, PROTOCOLS["paper"], POINTS[:2], seed=2).parameters["weight"])


def test_one_step_by_hand():
    """One feature 1, two classes, zero weights: p = 1/2, gradient of w_right = -1/2, Nesterov's first step 1.9 times.

    Then with decay 0.1 from w = 0.95 lr: checked on the bias of the right class as well.
    """
    protocol = dataclasses.replace(PROTOCOLS["moco"], nesterov=True)
    grid = ProbeGrid(1, 1, 2, protocol, [GridPoint(0.2, 0.1)])
    with torch.no_grad():
        grid.parameters["weight"].zero_()
    losses, scores = grid.train_step(torch.ones(1, 1), torch.tensor([1]), 1.0)
    assert losses.item() == pytest.approx(math.log(2))
    assert not scores.any()
    assert grid.parameters["weight"].flatten().tolist() == pytest.approx([-0.19, 0.19])
    assert grid.parameters["bias"].flatten().tolist() == pytest.approx([-0.19, 0.19])
    grid.train_step(torch.ones(1, 1), torch.tensor([1]), 0.5)
    p = 1 / (1 + math.exp(-0.76))  # scores -0.38 and 0.38
    g = p - 1 + 0.1 * 0.19
    v = 0.9 * -0.5 + g
    assert grid.parameters["weight"][0, 1].item() == pytest.approx(0.19 - 0.2 * 0.5 * (g + 0.9 * v))


# -- protocols ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "classes", "epochs", "drops"),
    [
        ("paper", 1000, 28, [10, 19]),
        ("vissl", 1000, 28, [8, 16, 24]),
        ("vissl", 205, 14, [4, 8, 12]),
        ("vissl", 8142, 84, [24, 48, 72]),
        ("goyal19", 1000, 28, [8, 16, 24]),
        ("moco", 1000, 100, [60, 80]),
    ],
)
def test_epochs_and_drops_are_the_published_ones(name, classes, epochs, drops):
    protocol = PROTOCOLS[name]
    assert protocol.published_epochs(classes) == epochs
    assert protocol.published_epochs(42) is None
    factors = [protocol.lr_factor(epoch, epochs) for epoch in range(epochs)]
    assert [epoch for epoch in range(1, epochs) if factors[epoch] != factors[epoch - 1]] == drops
    assert factors[-1] == pytest.approx(10.0 ** -len(drops))


def test_numbers_of_the_protocols():
    """Reference table: (lr, weight decay, Nesterov, batch norm, batch size)."""
    table = {
        "paper": (0.01, 5e-4, False, "plain", 256),
        "vissl": (0.01, 5e-4, True, "affine", 256),
        "goyal19": (0.01, 1e-4, True, "plain", 256),
        "moco": (30.0, 0.0, False, "none", 256),
        "swav": (0.3, 1e-6, False, "none", 256),
    }
    for name, numbers in table.items():
        p = PROTOCOLS[name]
        assert (p.lr, p.weight_decay, p.nesterov, p.norm, p.batch_size) == numbers
        assert p.momentum == 0.9


def test_the_cosine_ends_near_zero():
    swav = PROTOCOLS["swav"]
    assert [swav.lr_factor(epoch, 100) for epoch in (0, 50)] == pytest.approx([1, 0.5])
    assert swav.lr_factor(99, 100) == pytest.approx(0.5 * (1 + math.cos(0.99 * math.pi)))


def test_equally_spaced_points():
    assert equally_spaced(0) == ()
    assert equally_spaced(3) == (0.25, 0.5, 0.75)


# -- losses and held-out images ----------------------------------------------------------------------------------------


def test_the_loss_of_classes_is_torch_s_for_every_classifier():
    scores, labels = torch.randn(3, 6, 4), torch.tensor([0, 3, 1, 2, 2, 0])
    expected = torch.stack([F.cross_entropy(one, labels) for one in scores])
    torch.testing.assert_close(mean_loss(scores, labels), expected)


def test_the_loss_of_multi_labels_by_hand_and_without_what_is_ignored():
    """Scores 0: log 2 for each label that counts. 3 of 4 count on the first image, 2 on the second: 5 log 2 / 2."""
    targets = torch.tensor([[1, -1, 0, 1], [0, 0, -1, -1]], dtype=torch.int8)
    assert mean_loss(torch.zeros(2, 4), targets).item() == pytest.approx(2.5 * math.log(2))
    scores = torch.randn(2, 4, dtype=torch.float64)
    counted = targets != 0
    expected = (
        F.binary_cross_entropy_with_logits(scores[counted], (targets == 1).double()[counted], reduction="sum") / 2
    )
    assert mean_loss(scores, targets).item() == pytest.approx(expected.item())


def test_held_out_images_are_the_same_share_of_each_class():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 1 + [3] * 2).roll(5)
    mask = held_out_mask(labels, 0.25, torch.Generator().manual_seed(0))
    assert [int(mask[labels == c].sum()) for c in (0, 1, 2)] == [10, 5, 0]
    assert int(mask[labels == 3].sum()) in (0, 1)
    assert torch.equal(mask, held_out_mask(labels, 0.25, torch.Generator().manual_seed(0)))
    assert not torch.equal(mask, held_out_mask(labels, 0.25, torch.Generator().manual_seed(1)))
    many = [held_out_mask(labels, 0.9, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert all(bool((~one[labels == c]).any()) for one in many for c in range(4)), "no class is held out as a whole"
    small = torch.arange(300) % 100  # three images a class: 0.3 wanted of each
    assert 20 <= int(held_out_mask(small, 0.1, torch.Generator().manual_seed(0)).sum()) <= 40


def test_held_out_images_of_multi_labels():
    mask = held_out_mask(torch.ones(50, 4, dtype=torch.int8), 0.2, torch.Generator().manual_seed(0))
    assert int(mask.sum()) == 10
