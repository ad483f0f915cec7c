"""Sets of permutations against Noroozi & Favaro's algorithm written out, and what the sets in use are like."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from pirl_plugin.data import permutation_sets
from pirl_plugin.data.permutation_sets import cache_folder, permutation_set
from pirl_plugin.functional.permutations import greedy_permutations, hamming_distances

# smallest and mean distance of two members, in places: of the sets that are in use
MEASURED = {
    ("max_avg", 100): (2, 8.08),
    ("max_avg", 701): (2, 8.0114123),
    ("max_avg", 2000): (2, 8.0039985),
    ("max_avg", 10000): (2, 8.0008),
    ("max_min", 100): (6, 8.0262626),
    ("max_min", 701): (5, 7.8796046),
}


def written_out(num_patches: int, size: int, rule: str, first: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All distances from all chosen ones, anew at every step."""
    chosen, left = [first], [order for order in itertools.permutations(range(num_patches)) if order != first]
    while len(chosen) < size:
        distances = [[sum(a != b for a, b in zip(order, one, strict=True)) for one in chosen] for order in left]
        scores = [math.fsum(row) / len(row) if rule == "max_avg" else min(row) for row in distances]
        chosen.append(left.pop(scores.index(max(scores))))
    return chosen


@pytest.mark.parametrize("rule", ["max_avg", "max_min"])
@pytest.mark.parametrize("num_patches", [3, 4, 5])
def test_the_algorithm_written_out(num_patches: int, rule: str) -> None:
    size = min(40, math.factorial(num_patches))
    found = [tuple(row) for row in greedy_permutations(num_patches, size, rule, seed=3).tolist()]
    assert found == written_out(num_patches, size, rule, found[0])


def test_distances_by_hand() -> None:
    """012 and 021 differ in two places, 012 and 120 in three, 021 and 120 in two."""
    assert hamming_distances(np.array([[0, 1, 2], [0, 2, 1], [1, 2, 0]], dtype=np.uint8)) == (2, pytest.approx(7 / 3))
    with pytest.raises(ValueError, match="at least two"):
        hamming_distances(np.array([[0, 1, 2]], dtype=np.uint8))


@pytest.mark.parametrize("size", [100, 701, 2000])
def test_the_sets_in_use(size: int) -> None:
    found = greedy_permutations(9, size, "max_avg")
    assert (found.shape, found.dtype) == ((size, 9), np.uint8)
    assert (np.sort(found, axis=1) == np.arange(9)).all()
    assert len(np.unique(found, axis=0)) == size
    distances = (found[:, None] != found[None]).sum(axis=2)[np.triu_indices(size, 1)]
    assert (distances.min(), distances.mean()) == (
        MEASURED["max_avg", size][0],
        pytest.approx(hamming_distances(found)[1]),
    )
    assert distances.mean() == pytest.approx(MEASURED["max_avg", size][1], abs=1e-7)


@pytest.mark.slow
def test_the_largest_set() -> None:
    found = greedy_permutations(9, 10000, "max_avg")
    assert len(np.unique(found, axis=0)) == 10000
    assert hamming_distances(found) == (2, pytest.approx(MEASURED["max_avg", 10000][1]))


@pytest.mark.parametrize("size", [100, 701])
def test_the_other_rule_keeps_all_apart(size: int) -> None:
    smallest, mean = hamming_distances(greedy_permutations(9, size, "max_min"))
    assert (smallest, mean) == (MEASURED["max_min", size][0], pytest.approx(MEASURED["max_min", size][1], abs=1e-7))


@pytest.mark.parametrize("rule", ["max_avg", "max_min"])
def test_a_smaller_set_is_the_beginning_of_a_larger_one_and_the_seed_decides(rule: str) -> None:
    large = greedy_permutations(6, 300, rule, seed=1)
    np.testing.assert_array_equal(greedy_permutations(6, 40, rule, seed=1), large[:40])
    assert not np.array_equal(greedy_permutations(6, 40, rule, seed=2), large[:40])
    firsts = [tuple(greedy_permutations(3, 1, rule, seed=seed)[0].tolist()) for seed in range(300)]
    counts = np.unique(firsts, axis=0, return_counts=True)[1]
    assert ((counts - 50) ** 2 / 50).sum() < 20.5  # chi-square, 5 degrees of freedom, p = 0.001


def test_all_of_them_can_be_had() -> None:
    assert len(np.unique(greedy_permutations(4, 24), axis=0)) == 24


@pytest.mark.parametrize(
    ("patches", "size", "message"), [(4, 25, "have 24 orders"), (10, 5, "1..9"), (4, 0, "have 24")]
)
def test_sets_that_cannot_be(patches: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        greedy_permutations(patches, size)


# -- on disk -----------------------------------------------------------------------------------------------------------


def test_a_set_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = permutation_set(4, 10, "max_avg", 0, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["permutations_4_10_max_avg_seed0.npy"]
    monkeypatch.setattr(permutation_sets, "greedy_permutations", None)
    np.testing.assert_array_equal(permutation_set(4, 10, "max_avg", 0, tmp_path), first)


@pytest.mark.parametrize("content", [b"", b"no array", None])
def test_a_damaged_file_is_built_anew(tmp_path: Path, content: bytes | None) -> None:
    first = permutation_set(4, 10, "max_avg", 0, tmp_path)
    (path,) = tmp_path.iterdir()
    if content is None:
        np.save(path, np.zeros((10, 4), dtype=np.uint8))
    else:
        path.write_bytes(content)
    np.testing.assert_array_equal(permutation_set(4, 10, "max_avg", 0, tmp_path), first)
    np.testing.assert_array_equal(np.load(path), first)


def test_a_folder_that_cannot_be_written_to_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert len(permutation_set(4, 10, "max_avg", 0, tmp_path / "file" / "folder")) == 10


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIRL_PLUGIN_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("PIRL_PLUGIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "pirl_plugin"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "pirl_plugin"
