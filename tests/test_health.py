"""The measurements of a run along its way: own-row retrieval and RankMe."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from classy_vision.hooks import build_hook
from step_task import BATCH, Task

from pirl_plugin.functional.rankme import rankme
from pirl_plugin.hooks.health import HealthHook, own_row_is_nearest
from pirl_plugin.hooks.memory_bank_update import MemoryBankUpdateHook
from pirl_plugin.memory import FIFOQueue


def test_own_row_is_nearest_by_hand() -> None:
    """Rows along x, y and the diagonal: (2, 0) is x's, (1, 1) the diagonal's and not y's, (0, 1) is y's."""
    rows = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), dim=1)
    embeddings = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    assert own_row_is_nearest(embeddings, torch.tensor([0, 1, 1]), rows).tolist() == [True, False, True]
    assert own_row_is_nearest(embeddings, torch.tensor([2, 2, 2]), rows).tolist() == [False, True, False]


def test_a_collapsed_bank_finds_nothing() -> None:
    rows = F.normalize(torch.ones(5, 3), dim=1)
    assert not own_row_is_nearest(torch.ones(4, 3), torch.arange(4), rows).any()


def test_a_sample_of_rows_compares_with_the_own_row_whether_sampled_or_not() -> None:
    rows = torch.eye(8)
    ids = torch.tensor([0, 1, 7])
    queries = torch.eye(8)[torch.tensor([0, 1, 3])]
    candidates = torch.tensor([4, 0, 3])
    assert own_row_is_nearest(queries, ids, rows, candidates).tolist() == [True, True, False]


def test_agrees_with_a_slow_search() -> None:
    rows = F.normalize(torch.randn(50, 6), dim=1)
    ids = torch.randint(50, (40,))
    embeddings = rows[ids] + 0.4 * torch.randn(40, 6)
    slow = []
    for embedding, image_id in zip(embeddings.double(), ids.tolist(), strict=True):
        similarities = [float(embedding @ row / embedding.norm()) for row in rows.double()]
        slow.append(max(range(50), key=similarities.__getitem__) == image_id)
    assert own_row_is_nearest(embeddings, ids, rows).tolist() == slow
    assert 5 < sum(slow) < 35


def test_health_by_hand() -> None:
    """Images 0..3: the image embeddings are their own rows, the patches' are rows 0, 1, 5, 6, so half of them."""
    task = Task()
    output = {"image": torch.eye(8)[:4], "patches": torch.eye(8)[torch.tensor([0, 1, 5, 6])]}
    task.run(9, build_hook({"name": "health"}), output=output)
    assert task.health == {}  # due at the end of the epoch of ten steps
    task = Task()
    task.run(10, build_hook({"name": "health"}), output=output)
    # forty unit vectors along four axes: four equal singular values
    retrieval = {"retrieval/image": 1, "retrieval/patches": 0.5, "retrieval/chance": 1 / 8}
    assert task.health == pytest.approx({"rankme": 4, "health_step": 10, **retrieval}, rel=1e-4)


def test_retrieval_is_measured_on_the_last_images_before_it_is_due_only() -> None:
    task = Task()
    task.start(build_hook({"name": "health", "num_images": 8, "every_steps": 6}))
    wrong, right = torch.eye(8)[4:], torch.eye(8)[:4]
    for output in (wrong, wrong, wrong, wrong, right, wrong):
        task.step(output={"image": output})
    assert task.health["retrieval/image"] == 0.5  # of steps 5 and 6
    for output in (right, right, right, right, wrong, wrong):
        task.step(output={"image": output})
    assert task.health["retrieval/image"] == 0.0


def test_retrieval_of_a_large_bank_uses_a_sample() -> None:
    task = Task()
    task.base_loss.memory_bank.rows = F.normalize(torch.randn(300, 8), dim=1)
    hook = build_hook({"name": "health", "max_rows": 20})
    task.run(10, hook)
    assert len(set(hook._candidates.tolist())) == 20
    assert task.health["retrieval/chance"] == 1 / 20


def test_rankme_uses_the_latest_embeddings() -> None:
    task = Task()
    task.start(build_hook({"name": "rankme", "num_embeddings": 6, "every_steps": 5}))
    batches = [torch.randn(BATCH, 8) for _ in range(5)]
    memory = torch.empty(BATCH, 8)
    for batch in batches:
        task.step(output={"image": memory.copy_(batch)})  # the same memory every time, as compiled models may do
    assert task.health["rankme"] == pytest.approx(rankme(torch.cat(batches)[-6:]))


def test_rankme_keeps_what_the_next_measurement_looks_at_alone() -> None:
    """Six embeddings are two batches: those of steps 4 and 5 of five; of every step where it is measured at each."""
    task, hook = Task(), build_hook({"name": "rankme", "num_embeddings": 6, "every_steps": 5})
    task.start(hook)
    kept = []
    for _ in range(10):
        task.step()
        kept.append(len(hook.get_classy_state()["embeddings"]))
    assert kept == 2 * [0, 0, 0, 1, 0]
    task, hook = Task(), build_hook({"name": "rankme", "num_embeddings": 6, "every_steps": 1})
    task.start(hook)
    batches = [torch.randn(BATCH, 8) for _ in range(3)]
    for batch in batches:
        task.step(output={"image": batch})
        assert len(hook.get_classy_state()["embeddings"]) <= 2
    assert task.health["rankme"] == pytest.approx(rankme(torch.cat(batches)[-6:]))


@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_rankme_of_unusable_embeddings_does_not_stop_the_run(value: float) -> None:
    task = Task()
    task.run(10, build_hook({"name": "rankme"}), output={"image": torch.full((BATCH, 8), value)})
    assert math.isnan(task.health["rankme"])


def test_micro_batches_of_the_due_step_are_measured_and_those_after_it_wait() -> None:
    task = Task(accumulate_steps=2)
    task.start(build_hook({"name": "health", "num_images": 4, "every_steps": 2}))
    wrong, right = torch.eye(8)[4:], torch.eye(8)[:4]
    for output in (wrong, wrong, right, wrong):
        task.step(output={"image": output})
    assert task.health["retrieval/image"] == 0.5
    for output in (right, right, wrong, wrong):
        task.step(output={"image": output})
    assert task.health["retrieval/image"] == 0.0


def test_a_loss_without_a_bank_has_a_rank_only() -> None:
    task = Task()
    task.base_loss = SimpleNamespace(last_statistics={})
    task.run(10, build_hook({"name": "health"}))
    assert set(task.health) == {"rankme", "health_step"}


def test_crops_count_one_by_one_and_what_is_no_embedding_is_left_alone() -> None:
    """Two crops an image, (4, 2, 8), along eight axes: eight equal singular values; none has a row to be found."""
    task = Task()
    output = {"image": torch.eye(8).reshape(4, 2, 8), "rotation": torch.arange(4), "crops": torch.zeros(4, 3)}
    task.run(10, build_hook({"name": "health"}), output=output)
    assert task.health == pytest.approx({"rankme": 8, "health_step": 10}, rel=1e-4)


def test_nobody_is_looked_for_in_a_queue() -> None:
    task = Task()
    task.base_loss.memory_bank = FIFOQueue(dim=8, size=8)
    task.run(10, build_hook({"name": "health"}), output={"image": torch.eye(8)[:4]})
    assert set(task.health) == {"rankme", "health_step"}


def test_health_after_the_bank_was_written_is_refused() -> None:
    task = Task()
    task.base_loss.memory_bank.synchronize = lambda: None
    task.base_loss.memory_bank.update = lambda ids, embeddings: None
    writer, health = MemoryBankUpdateHook(), HealthHook()
    with pytest.raises(ValueError, match="health must stand before memory_bank_update"):
        task.start(writer, health)
    task.start(health, writer)
