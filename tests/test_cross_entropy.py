"""Losses over classes against sums written out."""

from __future__ import annotations

import math

import pytest
import torch

from pirl_plugin.registry import build
from pirl_plugin.schema import ConfigError

LABELS = torch.tensor([2, 0, 1, 1])


def test_by_hand() -> None:
    """Scores 0 and log 3: probabilities 1/4 and 3/4; classes 1 and 0: -(log 3/4 + log 1/4) / 2."""
    loss = build("loss", {"name": "pretext_cross_entropy"})
    output = {"image": torch.tensor([[0.0, math.log(3)]] * 2), "rotation": torch.tensor([1, 0])}
    assert loss(output, torch.tensor([5, 6])).item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 2)
    assert loss.last_statistics["accuracy"] == 0.5
    assert loss.views == ["image"]
    assert loss.state_dict() == {}


def test_several_views_of_an_image_have_an_answer_each() -> None:
    loss = build("loss", {"name": "pretext_cross_entropy", "answer": "turns"})
    scores, turns = torch.randn(5, 4, 3, dtype=torch.float64), torch.randint(3, (5, 4))
    expected = sum(scores[b, v].logsumexp(0) - scores[b, v, turns[b, v]] for b in range(5) for v in range(4)) / 20
    assert loss({"image": scores, "turns": turns}, torch.arange(5)).item() == pytest.approx(expected.item(), rel=1e-6)


def test_labels_are_looked_up_by_image_id() -> None:
    loss = build("loss", {"name": "supervised_cross_entropy"}, labels=LABELS)
    scores, ids = torch.randn(3, 3), torch.tensor([3, 0, 2])
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([1, 2, 1]))
    torch.testing.assert_close(loss({"image": scores}, ids), expected)
    crops = scores.unsqueeze(1).expand(3, 2, 3)
    torch.testing.assert_close(loss({"image": crops}, ids), expected)
    assert loss.state_dict() == {}  # a checkpoint holds no labels


def test_half_precision_scores_are_summed_in_float32() -> None:
    loss = build("loss", {"name": "pretext_cross_entropy"})
    scores = torch.randn(64, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = loss({"image": scores, "rotation": torch.zeros(64, dtype=torch.int64)}, torch.arange(64))
    expected = torch.nn.functional.cross_entropy(scores.double(), torch.zeros(64, dtype=torch.int64))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_what_is_missing_is_named() -> None:
    loss = build("loss", {"name": "pretext_cross_entropy"})
    with pytest.raises(KeyError, match=r"needs 'rotation' beside the views; transform and model gave \['image'\]"):
        loss({"image": torch.zeros(2, 4)}, torch.arange(2))
    with pytest.raises(KeyError, match=r"scores of the view 'image'; the model gave \['rotation'\]"):
        loss({"rotation": torch.zeros(2, dtype=torch.int64)}, torch.arange(2))
    with pytest.raises(ValueError, match=r"\(2,\) classes for scores \(2, 4, 3\)"):
        loss({"image": torch.zeros(2, 4, 3), "rotation": torch.zeros(2, dtype=torch.int64)}, torch.arange(2))
    with pytest.raises(KeyError, match="scores of the view"):
        build("loss", {"name": "supervised_cross_entropy"}, labels=LABELS)({}, torch.arange(2))
    with pytest.raises(ConfigError, match="labels: missing"):
        build("loss", {"name": "supervised_cross_entropy"})
