"""The loss of SwAV against a slow float64 version, its queue, and its prototypes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pirl_plugin.losses import SwAVLoss
from pirl_plugin.registry import build


def loss_of(**arguments: Any) -> SwAVLoss:
    torch.manual_seed(0)
    return build("loss", {"name": "swav", "dim": 5, "num_prototypes": 4, "freeze_epochs": 0, **arguments})


def outputs(batch: int = 6, small: int = 3, views: int = 2) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    return {"image": torch.randn(batch, views, 5, generator=g), "crops": torch.randn(batch, small, 5, generator=g)}


IDS = torch.arange(6)


def slow_codes(scores: list[list[float]], epsilon: float, iterations: int) -> list[list[float]]:
    """Sinkhorn's iterations on a crops x prototypes table, a number at a time: prototypes first, then crops."""
    q = [[math.exp(value / epsilon) for value in row] for row in scores]
    prototypes = range(len(scores[0]))
    for _ in range(iterations):
        sums = [sum(row[k] for row in q) for k in prototypes]
        q = [[row[k] / sums[k] / len(sums) for k in prototypes] for row in q]
        q = [[value / sum(row) / len(q) for value in row] for row in q]
    return [[value * len(q) for value in row] for row in q]


def slow_loss(output: dict[str, Tensor], prototypes: Tensor, queues: list[Tensor] | None = None, **kw: Any) -> float:
    """Eq. 1 for several crops, averaged: the code of large crop i, predicted from every crop j != i."""
    temperature, epsilon, iterations = kw.get("temperature", 0.1), kw.get("epsilon", 0.05), kw.get("iterations", 3)
    large = output["image"].double().unbind(1)
    crops = [*large, *output.get("crops", large[0][:, None][:, :0]).double().unbind(1)]
    scores = [F.normalize(crop, dim=1) @ prototypes.double().T for crop in crops]
    total = []
    for i in range(len(large)):
        rows = scores[i] if queues is None else torch.cat([scores[i], queues[i].double() @ prototypes.double().T])
        codes = slow_codes(rows.tolist(), epsilon, iterations)
        for j in range(len(crops)):
            for image in range(len(scores[j])):
                if j != i:
                    p = (scores[j][image] / temperature).log_softmax(dim=0).tolist()
                    total.append(-sum(q * log_p for q, log_p in zip(codes[image], p, strict=True)))
    return sum(total) / len(total)


def test_two_images_by_hand() -> None:
    """Both crops of image n lie on prototype n, epsilon = temperature = 1: every exponential is e or 1.

    The table [[e, 1], [1, e]] has equal sums along rows and columns, so that its codes are (e, 1) / (e + 1), which are
    the predictions too: the loss is the entropy of that distribution.
    """
    loss = loss_of(dim=2, num_prototypes=2, temperature=1.0, epsilon=1.0, small_view=None)
    loss.prototypes.data.copy_(torch.eye(2))
    p = math.e / (math.e + 1)
    expected = -p * math.log(p) - (1 - p) * math.log(1 - p)
    image = torch.eye(2).unsqueeze(1).expand(2, 2, 2)
    assert loss({"image": 7 * image}, torch.arange(2)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.3}, {"epsilon": 0.2}, {"sinkhorn_iterations": 1}, {"num_views": 3}, {"small_view": None}],
)
def test_it_is_the_slow_version(settings: dict[str, Any]) -> None:
    loss, output = loss_of(**settings), outputs(views=settings.get("num_views", 2))
    if "small_view" in settings:
        del output["crops"]
    told = {**settings, "iterations": settings.get("sinkhorn_iterations", 3)}
    assert loss(output, IDS).item() == pytest.approx(slow_loss(output, loss.prototypes.detach(), **told), rel=1e-4)


def test_the_codes_are_not_trained() -> None:
    """Gradients are those of the cross entropy with codes held constant: a finite difference of the slow version."""
    loss, output = loss_of().double(), {name: x.double().requires_grad_() for name, x in outputs().items()}
    loss(output, IDS).backward()
    assert all(x.grad is not None and x.grad.any() for x in output.values())
    # a small crop has no code, so that its difference quotient is the whole gradient
    moved = {name: x.detach().clone() for name, x in output.items()}
    moved["crops"][2, 1, 3] += 1e-6
    before = {name: x.detach() for name, x in output.items()}
    step = slow_loss(moved, loss.prototypes.detach()) - slow_loss(before, loss.prototypes.detach())
    assert output["crops"].grad[2, 1, 3].item() == pytest.approx(step / 1e-6, rel=1e-3)  # type: ignore[index]


def test_bfloat16_embeddings_and_their_length_make_no_difference() -> None:
    loss, output = loss_of(), outputs()
    rounded = {name: x.bfloat16() for name, x in output.items()}
    assert loss(rounded, IDS).dtype == torch.float32
    torch.testing.assert_close(loss(rounded, IDS), loss({name: 9 * x.float() for name, x in rounded.items()}, IDS))


def test_effective_prototypes_count() -> None:
    loss = loss_of(dim=4, temperature=0.01, small_view=None)
    loss.prototypes.data.copy_(torch.eye(4))
    for used in (1, 2, 4):
        crops = torch.eye(4)[torch.arange(8) % used]
        loss({"image": torch.stack([crops, crops], dim=1)}, torch.arange(8))
        assert loss.last_statistics["effective_prototypes"].item() == pytest.approx(used)


# -- the queue ---------------------------------------------------------------------------------------------------------


def batches() -> Iterator[Tensor]:
    g = torch.Generator().manual_seed(8)
    while True:
        yield torch.randn(6, 2, 5, generator=g)


def test_the_queue_takes_part_from_its_epoch_on_once_it_is_full() -> None:
    loss = loss_of(queue={"name": "fifo_queue", "size": 10}, queue_start_epoch=1)
    written, seen = [], 0
    for (epoch, in_use), image in zip(
        [(0, False), (0, False), (0, False), (1, True), (1, True)], batches(), strict=False
    ):
        loss.start_epoch(epoch, seen)
        assert loss.queue_in_use is in_use
        output = {**outputs(), "image": image}
        queues = [torch.cat(written)[-10:, view] for view in (0, 1)] if in_use else None
        assert loss(output, IDS).item() == pytest.approx(slow_loss(output, loss.prototypes.detach(), queues), rel=1e-4)
        seen += 6
        loss.after_step(IDS, image, seen)
        written.append(F.normalize(image, dim=2))


def test_an_unfilled_queue_waits() -> None:
    loss = loss_of(queue={"name": "fifo_queue", "size": 10}, queue_start_epoch=0)
    loss.start_epoch(0, 0)
    found = []
    for step, image in zip(range(3), batches(), strict=False):
        found.append(loss.queue_in_use)
        loss.after_step(IDS, image, 6 * (step + 1))
    assert found == [False, False, True]


def test_the_queue_changes_the_codes() -> None:
    """So that the tests above can tell."""
    loss = loss_of(queue={"name": "fifo_queue", "size": 10}, queue_start_epoch=0)
    without = loss(outputs(), IDS).item()
    loss.start_epoch(0, 10)
    assert abs(loss(outputs(), IDS).item() - without) > 1e-2
    assert {"queues.0.rows", "queues.1.rows", "queues.0.position"} <= set(loss.state_dict())


# -- the prototypes ----------------------------------------------------------------------------------------------------


def test_prototypes_are_held_in_the_first_epochs_and_get_a_zero_gradient() -> None:
    loss = loss_of(freeze_epochs=1)
    start = loss.prototypes.detach().clone()
    for epoch, moves in ((0, False), (1, True)):
        loss.start_epoch(epoch, 0)
        loss.prototypes.grad = None
        loss(outputs(), IDS).backward()
        assert loss.prototypes.grad is not None
        assert bool(loss.prototypes.grad.any()) is moves
        loss.prototypes.data.mul_(0.9).add_(0.1)  # a step, weight decay included
        loss.after_step(IDS, outputs()["image"], 0)
        assert torch.equal(loss.prototypes, start) is not moves
        torch.testing.assert_close(loss.prototypes.norm(dim=1), torch.ones(4))


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_mistakes_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError, match="needs the output 'crops'.*num_crops.*loss.small_view=null"):
        loss_of()({"image": outputs()["image"]}, IDS)
    with pytest.raises(ValueError, match=r"must hold \(B, 2, 5\).*got \(6, 5\)"):
        loss_of()({**outputs(), "image": torch.randn(6, 5)}, IDS)
    with pytest.raises(ValueError, match="num_views >= 2"):
        loss_of(num_views=1, small_view=None)
    monkeypatch.setitem(__import__("sys").modules, "lightly.loss", None)
    with pytest.raises(
        ImportError, match=r"The loss swav needs the package lightly.*pip install 'pirl-plugin\[methods"
    ):
        loss_of()
