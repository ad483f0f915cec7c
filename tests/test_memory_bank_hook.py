"""When the bank is written: once an optimiser step, after the loss was read, never in evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from classy_vision.dataset import ClassyDataset
from classy_vision.hooks import build_hook
from classy_vision.losses import build_loss
from classy_vision.models import ClassyModel
from classy_vision.optim import build_optimizer
from classy_vision.tasks import ClassificationTask
from classy_vision.trainer import LocalTrainer
from small_task import NUM_IMAGES, Recorder, build, train
from torch import Tensor, nn
from torch.utils.data import DataLoader

MOMENTUM = 0.75
LOSS = {"num_negatives": 2, "memory_bank": {"name": "ema_memory_bank", "momentum": MOMENTUM}}


def watch(task: Any) -> list[str]:
    """Notes every reading and writing of the bank, every optimiser step and every batch of a test phase."""
    events: list[str] = []

    def spy(owner: Any, name: str, event: str) -> None:
        plain = getattr(owner, name)

        def noted(*arguments: Any, **keywords: Any) -> Any:
            events.append(event)
            return plain(*arguments, **keywords)

        setattr(owner, name, noted)

    spy(task.base_loss, "forward", "read")
    spy(task.base_loss.memory_bank, "update", "write")
    spy(task.optimizer, "step", "step")
    spy(task, "eval_step", "test")
    return events


def moved(rows: Tensor, ids: Tensor, embeddings: Tensor) -> Tensor:
    """The rule, image by image: ``m <- normalise(momentum * m + (1 - momentum) * mean normalised embedding)``."""
    after = rows.clone()
    for image_id in set(ids.tolist()):
        mean = F.normalize(embeddings[ids == image_id], dim=1).mean(dim=0)
        after[image_id] = F.normalize(MOMENTUM * rows[image_id] + (1 - MOMENTUM) * mean, dim=0)
    return after


@pytest.mark.parametrize(("accumulate_steps", "num_images"), [(1, 12), (3, 12), (1, 3), (2, 3)])
def test_one_write_a_step_with_all_that_the_step_has_seen(accumulate_steps: int, num_images: int) -> None:
    """With 3 images in a batch of 4, one stands there twice; both of its embeddings count."""
    seen = Recorder()
    dataset = {"name": "generated_scenes", "num_images": num_images, "size": 32}
    task = build(seen, loss=LOSS, dataset=dataset, batch_size=4, accumulate_steps=accumulate_steps, num_epochs=2)
    rows = task.base_loss.memory_bank.rows.clone()
    events = watch(task)
    LocalTrainer().train(task)

    assert events == (["read"] * accumulate_steps + ["step", "write"]) * task.total_steps
    for first in range(0, len(seen.rows), accumulate_steps):
        last = first + accumulate_steps
        for waiting in seen.rows[first : last - 1]:
            assert torch.equal(waiting, rows)
        rows = moved(rows, torch.cat(seen.ids[first:last]), torch.cat(seen.embeddings[first:last]))
        torch.testing.assert_close(seen.rows[last - 1], rows, rtol=0, atol=1e-6)
        rows = seen.rows[last - 1]


def test_rows_of_images_that_were_not_seen_stay_as_they_are() -> None:
    seen = Recorder()
    train(seen)
    before = seen.rows[0]
    for ids, rows in zip(seen.ids[1:], seen.rows[1:], strict=True):
        others = torch.ones(NUM_IMAGES, dtype=torch.bool)
        others[ids] = False
        assert torch.equal(rows[others], before[others])
        assert (rows[~others] != before[~others]).any(dim=1).all()
        before = rows


# -- classy-vision's own task, with a test phase -----------------------------------------------------------------------


class Vectors(ClassyDataset):
    """Eight images that are vectors, in two batches."""

    def __init__(self) -> None:
        super().__init__(None, 4, False, None, None)

    def __len__(self) -> int:
        return 8

    def iterator(self, *args: Any, **kwargs: Any) -> DataLoader:
        vectors = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
        batches = [{"input": vectors[ids], "target": ids} for ids in torch.arange(8).split(4)]
        return DataLoader(batches, batch_size=None)


class Embedder(ClassyModel):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, vectors: Tensor) -> dict[str, Tensor]:
        return {"image": self.linear(vectors)}


class StockTask(ClassificationTask):
    """The host's task; only its meters, which want logits, are left out."""

    def update_meters(self, model_output: Any, sample: Any) -> None:
        pass


@pytest.mark.parametrize(("period", "writes"), [(1, 4), (2, 2)])
def test_the_host_s_task_with_test_phases_writes_in_training_only(period: int, writes: int) -> None:
    loss = {"name": "pirl_nce", "num_images": 8, "dim": 3, "num_negatives": 7, "lam": 0.0, "estimator": "infonce"}
    task = (
        StockTask()
        .set_num_epochs(2)
        .set_dataset(Vectors(), "train")
        .set_dataset(Vectors(), "test")
        .set_model(Embedder())
        .set_loss(build_loss(loss))
        .set_optimizer(build_optimizer({"name": "scheduled_sgd", "lr": 0.1}))
        .set_hooks([build_hook({"name": "memory_bank_update"})])
        .set_simulated_global_batchsize(4 * period)
    )
    task.set_use_gpu(False)
    task.set_optimizer_schedulers({"lr": 0.1})
    events = watch(task)
    LocalTrainer().train(task)
    training = (["read"] * period + ["step", "write"]) * (2 // period)
    testing = ["test", "read"] * 2 + ["test"]  # the last call finds no batch any more
    assert events == (training + testing) * 2
    assert events.count("write") == writes


@pytest.mark.parametrize("name", ["memory_bank_update", "rankme"])
def test_a_view_that_the_model_does_not_give_is_refused(name: str) -> None:
    hooks = {"memory_bank_update": {}, name: {"view": "imgae"}}
    with pytest.raises(ValueError, match=rf"{name}\.view must be .* \(image, patches\), got 'imgae'"):
        train(loss=LOSS, hooks=[{"name": hook, **settings} for hook, settings in hooks.items()])
