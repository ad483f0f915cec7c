"""Sets of permutations that differ in many places: classes of the jigsaw pretext (Noroozi & Favaro 2016, Alg. 1)."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import numpy as np
import numpy.typing as npt

Permutations = npt.NDArray[np.uint8]
Rule = Literal["max_avg", "max_min"]

LARGEST = 9  # patches: 9! orders are 3 MB, 10! are ten times that


def greedy_permutations(num_patches: int, size: int, rule: Rule = "max_avg", seed: int = 0) -> Permutations:
    """Permutations chosen one by one: the first at random, then always the one that is farthest from those chosen.

    The distance is Hamming's, the number of places in which two permutations differ. Of several that are equally far
    the lexicographically first is taken, so that the set is a function of the arguments alone, and the set of a smaller
    ``size`` is the beginning of a larger one.

    Args:
        num_patches: length n of the permutations, at most 9.
        size: how many, at most n!.
        rule: what is largest: the ``max_avg`` mean (the rule of the released sets of 2,000 and 10,000) or the
            ``max_min`` smallest distance to those chosen.
        seed: of the first one.

    Returns:
        ``(size, n)`` uint8, in the order chosen.

    Raises:
        ValueError: too many patches, or more permutations than there are.
    """
    if not 1 <= num_patches <= LARGEST:
        raise ValueError(f"num_patches must be in 1..{LARGEST} (all their orders are searched), got {num_patches}.")
    if not 1 <= size <= math.factorial(num_patches):
        raise ValueError(f"{num_patches} patches have {math.factorial(num_patches)} orders, {size} were asked for.")
    every = np.array(list(itertools.permutations(range(num_patches))), dtype=np.uint8)
    places = np.ascontiguousarray(every.T)
    distance, differs = np.empty(len(every), np.uint8), np.empty(len(every), np.bool_)
    # the sum over those chosen orders as their mean does, and stays exact
    score = np.zeros(len(every), np.int32) if rule == "max_avg" else np.full(len(every), num_patches, np.int32)
    chosen = np.empty(size, np.int64)
    for step in range(size):
        chosen[step] = score.argmax() if step else np.random.default_rng(seed).integers(len(every))
        distance[:] = 0
        for place, patch in zip(places, every[chosen[step]], strict=True):
            np.not_equal(place, patch, out=differs)
            np.add(distance, differs.view(np.uint8), out=distance)  # seen as bytes: nothing is converted
        if rule == "max_avg":
            score += distance
        else:
            np.minimum(score, distance, out=score)
        score[chosen[step]] = np.iinfo(np.int32).min // 2  # out of the running, whatever is added
    return every[chosen]


def hamming_distances(permutations: Permutations) -> tuple[int, float]:
    """Smallest and mean Hamming distance between two different members of a set, in places.

    Raises:
        ValueError: fewer than two members.
    """
    count, length = permutations.shape
    if count < 2:
        raise ValueError(f"distances need at least two permutations, got {count}.")
    smallest, total = length, 0
    for row in range(1, count):
        distance = (permutations[:row] != permutations[row]).sum(axis=1)
        smallest, total = min(smallest, int(distance.min())), total + int(distance.sum())
    return smallest, total / (count * (count - 1) / 2)
