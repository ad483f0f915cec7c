"""RankMe against matrices whose singular values are known by hand, and against a slow reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pirl_plugin.functional.rankme import rankme


def test_orthonormal_columns_have_full_rank():
    """Singular values 1, 1, 1, 1: p = 1/4 each, entropy log 4, RankMe 4; the same for a tall and for a wide matrix."""
    tall = torch.cat([torch.eye(4), torch.zeros(20, 4)])
    assert rankme(tall) == pytest.approx(4, rel=1e-5)
    assert rankme(tall.T.contiguous()) == pytest.approx(4, rel=1e-5)


def test_singular_values_three_to_one_by_hand():
    """sigma = (3, 1): p = (3/4, 1/4), RankMe = exp(-(3/4) ln(3/4) - (1/4) ln(1/4))."""
    expected = math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))
    assert rankme(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(expected, rel=1e-5)


def test_collapsed_embeddings_have_rank_one():
    assert rankme(torch.ones(100, 16)) == pytest.approx(1, abs=1e-3)


def test_agrees_with_numpy_on_a_tall_random_matrix_and_ignores_scale():
    matrix = torch.randn(300, 20, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 20)
    sigma = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert rankme(matrix) == pytest.approx(float(np.exp(-np.sum(p * np.log(p)))), rel=1e-9)
    assert rankme(matrix * 1000) == pytest.approx(rankme(matrix), rel=1e-6)


def test_is_not_centred():
    """A common offset is part of the matrix: it dominates and pulls the rank down."""
    matrix = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    assert rankme(matrix + 100) < 2 < rankme(matrix)


@pytest.mark.parametrize("bad", [torch.zeros(4), torch.zeros(0, 4), torch.zeros(3, 4), torch.full((3, 4), math.nan)])
def test_undefined_input_is_refused(bad):
    with pytest.raises(ValueError, match="RankMe|matrix"):
        rankme(bad)
