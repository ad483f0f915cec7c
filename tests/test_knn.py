"""Weighted nearest neighbours: votes worked out by hand, a slow reference, ties, and the benchmark itself."""

from __future__ import annotations

import math

import pytest
import torch

from pirl_plugin.benchmarks.top_k import top_k_accuracy
from pirl_plugin.functional.knn import knn_votes


def test_votes_by_hand():
    """Query (1, 0); neighbours at cosine 1, 0.6, 0 of classes 0, 1, 1; T = 0.5.

    k = 2: class 0 has exp(1 / 0.5) = e^2, class 1 exp(0.6 / 0.5) = e^1.2. k = 3 adds exp(0) to class 1. All are
    divided by the largest weight, e^2.
    """
    neighbours = torch.tensor([[0.0, 3.0], [2.0, 0.0], [0.6, 0.8]])
    labels = torch.tensor([1, 0, 1])
    votes = knn_votes(torch.tensor([[5.0, 0.0]]), neighbours, labels, [2, 3], 0.5, 2)
    assert votes[2].tolist()[0] == pytest.approx([1, math.exp(1.2 - 2)])
    assert votes[3].tolist()[0] == pytest.approx([1, math.exp(1.2 - 2) + math.exp(-2)])


def test_agrees_with_a_slow_reference():
    g = torch.Generator().manual_seed(0)
    queries, bank = torch.randn(37, 8, generator=g), torch.randn(60, 8, generator=g)
    labels = torch.randint(0, 7, (60,), generator=g)
    for chunk in (1, 200, 1 << 20):
        votes = knn_votes(queries, bank, labels, [1, 5, 60], 0.3, 7, chunk_elements=chunk)
        for k, table in votes.items():
            for i, q in enumerate(queries.double()):
                cos = [float(q @ b / (q.norm() * b.norm())) for b in bank.double()]
                order = sorted(range(60), key=lambda j, cos=cos: -cos[j])[:k]
                expected = [sum(math.exp((cos[j] - max(cos)) / 0.3) for j in order if labels[j] == c) for c in range(7)]
                assert table[i].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_small_temperatures_do_not_overflow():
    votes = knn_votes(torch.ones(1, 4), torch.ones(5, 4), torch.zeros(5, dtype=torch.long), [5], 1e-3, 2)
    assert votes[5].tolist() == [[5.0, 0.0]]


@pytest.mark.parametrize("k", [[], [0], [3, 7]])
def test_k_outside_the_neighbours_is_refused(k):
    with pytest.raises(ValueError, match="k must be in 1..6"):
        knn_votes(torch.ones(1, 2), torch.ones(6, 2), torch.zeros(6, dtype=torch.long), k, 0.1, 2)


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="temperature"):
        knn_votes(torch.ones(1, 2), torch.ones(6, 2), torch.zeros(6, dtype=torch.long), [1], 0.0, 2)
    with pytest.raises(ValueError, match="do not fit"):
        knn_votes(torch.ones(1, 3), torch.ones(6, 2), torch.zeros(6, dtype=torch.long), [1], 0.1, 2)


def test_top_k_by_hand():
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.3, 0.2, 0.1], [0.0, 0.1, 0.2]])
    labels = torch.tensor([2, 0, 0])
    assert top_k_accuracy(scores, labels, 1) == pytest.approx(100 / 3)
    assert top_k_accuracy(scores, labels, 2) == pytest.approx(200 / 3)
    assert top_k_accuracy(scores, labels, 3) == 100


def test_top_k_ties_count_their_chance():
    """Constant scores over 4 classes: 25 % top-1, 50 % top-2. Two tied for first: one half."""
    constant = torch.zeros(8, 4)
    labels = torch.arange(8) % 4
    assert top_k_accuracy(constant, labels, 1) == 25
    assert top_k_accuracy(constant, labels, 2) == 50
    assert top_k_accuracy(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([1]), 1) == 50
    assert top_k_accuracy(torch.tensor([[2.0, 1.0, 1.0]]), torch.tensor([1]), 2) == 50
    assert top_k_accuracy(torch.tensor([[2.0, 1.0, 1.0]]), torch.tensor([1]), 5) == 100


def test_top_k_refuses_nan():
    with pytest.raises(ValueError, match="NaN"):
        top_k_accuracy(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]), 1)
