"""DeepCluster-v2: k-means against a slow version, the loss, and what images without a cluster do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pirl_plugin.functional import kmeans
from pirl_plugin.losses import DeepClusterV2Loss
from pirl_plugin.registry import build


def loss_of(**arguments: Any) -> DeepClusterV2Loss:
    torch.manual_seed(0)
    settings = {"name": "deepcluster_v2", "dim": 5, "num_clusters": [4, 3, 6], **arguments}
    return build("loss", settings, num_images=30)


def embeddings(count: int = 30, views: int = 2) -> Tensor:
    return torch.randn(count, views, 5, generator=torch.Generator().manual_seed(4))


def clustered(**arguments: Any) -> DeepClusterV2Loss:
    loss = loss_of(**arguments)
    loss.after_step(torch.arange(30), embeddings(), 30)
    loss.start_epoch(0, 0)
    return loss


# -- k-means -----------------------------------------------------------------------------------------------------------


def slow_step(rows: list[list[float]], centroids: list[list[float]]) -> list[list[float]]:
    """A number at a time, in float64."""
    members: list[list[list[float]]] = [[] for _ in centroids]
    for row in rows:
        scores = [sum(a * b for a, b in zip(row, centroid, strict=True)) for centroid in centroids]
        members[scores.index(max(scores))].append(row)
    found = []
    for old, mine in zip(centroids, members, strict=True):
        total = [sum(row[d] for row in mine) for d in range(len(old))]
        norm = math.sqrt(sum(value * value for value in total))
        found.append([value / norm for value in total] if mine else old)
    return found


def test_a_step_by_hand() -> None:
    """(1, 0) and (0, 1) are nearest to the first centroid, whose new direction is the diagonal; nothing to the last."""
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    centroids = torch.tensor([[0.6, 0.8], [-1.0, 0.0], [0.0, -1.0]])
    expected = torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)], [-1.0, 0.0], [0.0, -1.0]])
    torch.testing.assert_close(kmeans.spherical_kmeans_step(rows, centroids), expected)
    assert kmeans.nearest(rows, centroids).tolist() == [0, 0, 1]


def test_opposite_rows_leave_a_centroid_where_it_was() -> None:
    rows, centroids = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert torch.equal(kmeans.spherical_kmeans_step(rows, centroids), centroids)


@pytest.mark.parametrize("at_once", [1, 50, 1 << 25])
def test_steps_are_the_slow_version(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(kmeans, "_SCORES_AT_ONCE", at_once)
    rows = F.normalize(torch.randn(40, 3, generator=torch.Generator().manual_seed(1)), dim=1).double()
    centroids = rows[:7]
    expected = centroids.tolist()
    for _ in range(4):
        expected = slow_step(rows.tolist(), expected)
    found = kmeans.spherical_kmeans(rows, centroids, 4)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert not torch.equal(found, centroids)


def test_rows_of_half_the_size_are_clustered_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of 40 rows in bfloat16 would have lost the last of them."""
    monkeypatch.setattr(kmeans, "_ROWS_AT_ONCE", 7)
    rows = F.normalize(torch.randn(40, 3, generator=torch.Generator().manual_seed(1)), dim=1).bfloat16()
    first = rows[:4]
    found = kmeans.spherical_kmeans(rows, first, 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, kmeans.spherical_kmeans(rows.float(), first.float(), 3))
    assert torch.equal(kmeans.nearest(rows, found), kmeans.nearest(rows.float(), found))


# -- clusters ----------------------------------------------------------------------------------------------------------


def test_clusterings_take_the_large_crops_in_turn() -> None:
    """Each from random images of its own crop; an image's cluster is the one with the nearest centroid."""
    loss, unit = clustered(kmeans_iterations=0), F.normalize(embeddings(), dim=2)
    for index, centroids in enumerate(loss.centroids):
        crop = unit[:, index % 2]
        nearest_of_centroid = (centroids @ crop.T).max(dim=1).values
        torch.testing.assert_close(nearest_of_centroid, torch.ones(len(centroids)))  # a row of this crop's memory
        assert torch.equal(loss.assignments[index], (crop @ centroids.T).argmax(dim=1))
    with_steps = clustered()
    for index, centroids in enumerate(with_steps.centroids):
        crop = unit[:, index % 2]
        torch.testing.assert_close(centroids, kmeans.spherical_kmeans(crop, loss.centroids[index], 10))
        assert torch.equal(with_steps.assignments[index], (crop @ centroids.T).argmax(dim=1))


def test_an_epoch_entered_again_keeps_its_clusters_and_the_next_one_gets_new_ones() -> None:
    loss = clustered()
    before = loss.assignments.clone()
    loss.after_step(torch.arange(30), embeddings().flip(0), 60)
    loss.start_epoch(0, 60)
    assert torch.equal(loss.assignments, before)
    loss.start_epoch(1, 60)
    assert not torch.equal(loss.assignments, before)
    assert loss.assigned_epoch.item() == 1


def test_images_that_nobody_has_seen_have_no_cluster_and_count_for_nothing() -> None:
    loss = loss_of()
    loss.after_step(torch.arange(20), embeddings(20), 20)
    loss.start_epoch(0, 0)
    assert (loss.assignments[:, 20:] == -100).all()
    assert (loss.assignments[:, :20] >= 0).all()
    image = embeddings(4)
    known = loss({"image": image[:2]}, torch.tensor([3, 7]))
    torch.testing.assert_close(loss({"image": image}, torch.tensor([3, 7, 25, 29])), known)
    nobody = image.clone().requires_grad_()
    found = loss({"image": nobody}, torch.tensor([20, 21, 22, 23]))
    found.backward()
    assert found.item() == 0
    assert not nobody.grad.any()  # type: ignore[union-attr]


def test_more_clusters_than_images() -> None:
    with pytest.warns(UserWarning, match=r"num_clusters \[99\] clipped to the number of images, 30"):
        loss = loss_of(num_clusters=[99])
    loss.after_step(torch.arange(20), embeddings(20), 20)  # and than images seen
    loss.start_epoch(0, 0)
    assert len(loss.centroids[0]) == 30
    assert loss.last_statistics["clusters_used"].item() == pytest.approx(20 / 30)


def test_a_bank_of_half_the_size_gives_clusters() -> None:
    bank = {"name": "ema_memory_bank", "momentum": 0.0}
    half, whole = (clustered(memory_bank={**bank, "dtype": dtype}) for dtype in ("bfloat16", "float32"))
    assert [centroids.dtype for centroids in half.centroids] == [torch.float32] * 3
    assert (half.assignments == whole.assignments).float().mean() > 0.9
    assert torch.isfinite(half({"image": embeddings(4)}, torch.arange(4)))


@pytest.mark.parametrize("bank", ["sharded_ema_memory_bank", "fifo_queue"])
def test_a_bank_that_cannot_be_clustered_is_refused(bank: str) -> None:
    with pytest.raises(ValueError, match=f"for k-means, got '{bank}': take ema_memory_bank"):
        loss_of(memory_bank={"name": bank})


# -- the loss ----------------------------------------------------------------------------------------------------------


def test_two_clusters_by_hand() -> None:
    """Centroids (1, 0) and (0, 1), an image of cluster 0 whose crops are (1, 0) and (0, 1), temperature 1.

    The crops' losses are log(e + 1) - 1 and log(1 + e): their mean is log(e + 1) - 1/2.
    """
    loss = loss_of(dim=2, num_clusters=[2], temperature=1.0)
    loss.after_step(torch.tensor([0]), torch.eye(2).unsqueeze(0), 1)
    loss.start_epoch(0, 0)
    loss.centroids[0].copy_(torch.eye(2))
    loss.assignments[0, 0] = 0
    found = loss({"image": 5 * torch.eye(2).unsqueeze(0)}, torch.tensor([0]))
    assert found.item() == pytest.approx(math.log(math.e + 1) - 0.5, rel=1e-6)
    assert loss.last_statistics["accuracy"].item() == 0.5


def test_it_is_the_slow_version_with_small_crops() -> None:
    loss, ids = clustered(small_view="crops", temperature=0.3), torch.tensor([4, 9, 28])
    g = torch.Generator().manual_seed(2)
    output = {"image": torch.randn(3, 2, 5, generator=g), "crops": torch.randn(3, 4, 5, generator=g)}
    total = []
    for clusters, centroids in zip(loss.assignments, loss.centroids, strict=True):
        for row, image_id in enumerate(ids.tolist()):
            for crop in torch.cat([output["image"][row], output["crops"][row]]).double():
                scores = (crop / crop.norm() @ centroids.double().T / 0.3).tolist()
                total.append(math.log(sum(map(math.exp, scores))) - scores[int(clusters[image_id])])
    assert loss(output, ids).item() == pytest.approx(sum(total) / len(total), rel=1e-5)


def test_the_loss_trains_the_network_alone() -> None:
    loss = clustered()
    assert list(loss.parameters()) == []
    image = embeddings(4).requires_grad_()
    loss({"image": image}, torch.arange(4)).backward()
    assert image.grad is not None
    assert image.grad.any()
    saved = {"assignments", "assigned_epoch", "written", "centroids_2", "memory.0.rows", "memory.1.rows"}
    assert saved <= set(loss.state_dict())


def test_mistakes_are_explained() -> None:
    with pytest.raises(RuntimeError, match="hook cluster_assignment makes them before each epoch"):
        loss_of()({"image": embeddings(4)}, torch.arange(4))
    with pytest.raises(RuntimeError, match="memory is empty"):
        loss_of().start_epoch(0, 0)
    with pytest.raises(IndexError, match="Image id 30 is outside"):
        clustered()({"image": embeddings(1)}, torch.tensor([30]))
    with pytest.raises(ValueError, match="at least one clustering"):
        loss_of(num_clusters=[])
