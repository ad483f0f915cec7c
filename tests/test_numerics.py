"""Losses and gradients that are not finite: reported with step, ids and rate; stop, skip or go back, as set."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from classy_vision.hooks import ClassyHook
from classy_vision.trainer import LocalTrainer
from cluster_methods import small
from small_task import NUM_IMAGES, Recorder, assert_identical, build, everything, train
from test_checkpoint_resume import settings

from pirl_plugin.registry import REGISTRIES
from pirl_plugin.registry import build as build_component
from pirl_plugin.tasks import SSLPretrainingTask
from pirl_plugin.tasks.numerics import MOST_IN_A_ROW, Snapshot, gradients_are_finite
from pirl_plugin.tasks.step_flags import Flags, StepFlags
from pirl_plugin.tasks.trainer import Trainer
from pirl_plugin.weights.files import read_weights


def spoil(task: Any, steps: tuple[int, ...], where: str = "loss", times: int = 10**6) -> None:
    """Makes the loss, or only its gradient, not finite in some optimiser steps (from 1)."""
    compute, left = task.compute_loss, [times]

    def spoilt(output: Any, sample: Any) -> torch.Tensor:
        loss = compute(output, sample)
        if task.step_idx + 1 not in steps or left[0] == 0:
            return loss
        left[0] -= 1
        if where == "loss":
            return loss * torch.nan
        loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss

    task.compute_loss = spoilt


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_stop_names_step_ids_and_rate_and_saves_the_batch(tmp_path: Path, where: str) -> None:
    seen = Recorder()
    task = build(seen, **settings(tmp_path))
    spoil(task, (5,), where)
    with pytest.raises(FloatingPointError) as caught:
        Trainer().train(task)
    said = str(caught.value)
    assert said.startswith(f"The {where} is not finite in step 5 (epoch 1, learning rate 0.0")
    assert "\n" not in said
    (path,) = (tmp_path / "nonfinite").iterdir()
    assert path.name == "step_000000005_rank_0.pt"
    assert str(path) in said
    saved = read_weights(path)
    (batch,) = saved["batches"]
    named = re.search(r"images ([\d, ]+); rank 0", said)[1]
    assert named == ", ".join(map(str, batch["target"].tolist()))
    assert batch["input"]["image"].shape[0] == 8
    assert (saved["step"], saved["epoch"]) == (5, 1)
    assert len(seen.losses) == 4
    assert all(torch.isfinite(value).all() for value in everything(task).values())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_skip_leaves_weights_statistics_and_momentum_as_they_were(tmp_path: Path, where: str) -> None:
    class Copies(ClassyHook):
        on_start = on_phase_start = on_phase_end = on_end = ClassyHook._noop
        after: list[dict[str, torch.Tensor]] = []

        def on_step(self, task: Any) -> None:
            self.after.append({name: value.clone() for name, value in everything(task).items()})

    copies = Copies()
    copies.after = []
    task = build(copies, **settings(tmp_path, on_nonfinite="skip", num_epochs=1))
    spoil(task, (2,), where)
    Trainer().train(task)
    first, second, third = copies.after

    def without_bank(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in state.items() if "memory_bank" not in name}

    assert_identical(without_bank(first), without_bank(second))
    assert any(not torch.equal(third[name], second[name]) for name in third)
    assert all(torch.isfinite(value).all() for value in third.values())
    assert task.step_idx == 3


def test_a_first_step_that_is_skipped_leaves_no_momentum(tmp_path: Path) -> None:
    task = build(**settings(tmp_path, on_nonfinite="skip", num_epochs=1))
    spoil(task, (1,))
    Trainer().train(task)
    assert all(torch.isfinite(value).all() for value in everything(task).values())


def test_skipping_without_bad_steps_changes_nothing(tmp_path: Path) -> None:
    plain = train(**settings(tmp_path / "a", num_epochs=1))
    skipping = train(**settings(tmp_path / "b", num_epochs=1, on_nonfinite="skip"))
    assert_identical(everything(plain), everything(skipping))


def test_a_network_that_is_lost_is_not_skipped_for_ever(tmp_path: Path) -> None:
    task = build(**settings(tmp_path, on_nonfinite="skip", num_epochs=10))
    spoil(task, tuple(range(2, 31)))
    with pytest.raises(FloatingPointError, match=f"not finite in step {MOST_IN_A_ROW + 2} "):
        Trainer().train(task)


def test_roll_back_goes_on_from_the_checkpoint_without_that_step(tmp_path: Path) -> None:
    """Step 5 is bad; the run goes back to step 4 and past it. The same as to skip step 5."""
    changes = {"checkpoint": {"every_steps": 2}}
    back = build(**settings(tmp_path / "back", on_nonfinite="roll_back", **changes))
    spoil(back, (5,))
    Trainer().train(back)
    skip = build(**settings(tmp_path / "skip", on_nonfinite="skip", **changes))
    spoil(skip, (5,))
    Trainer().train(skip)
    assert back.excluded_steps == [5]
    assert (back.step_idx, skip.step_idx) == (9, 9)
    assert_identical(everything(back), everything(skip))
    lines = (tmp_path / "back" / "metrics.jsonl").read_text().splitlines()
    assert [int(re.search(r'"step": (\d+)', line)[1]) for line in lines] == list(range(1, 10))


def test_roll_back_needs_a_checkpoint(tmp_path: Path) -> None:
    task = build(**settings(tmp_path, on_nonfinite="roll_back"))
    spoil(task, (2,))
    with pytest.raises(FloatingPointError, match="in step 2 .*The run stops: there is no checkpoint to go back to"):
        Trainer().train(task)


def test_a_snapshot_restores_only_where_it_is_told() -> None:
    network = torch.nn.BatchNorm1d(3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    snapshot = Snapshot([network], optimizer)
    for bad in (False, True):
        snapshot.take()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        network(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        snapshot.restore_where(torch.tensor(bad))
        same = [torch.equal(before[name], value) for name, value in network.state_dict().items()]
        assert all(same) == bad


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("pirl_nce", {"num_negatives": 4}),
        ("pirl_nce", {"num_negatives": 4, "memory_bank": {"name": "sharded_ema_memory_bank"}}),
        ("moco", {"memory_bank": {"name": "fifo_queue", "size": 9}}),
        ("deepcluster_v2", {"num_clusters": [2]}),
        ("swav", {"num_prototypes": 3, "queue": {"name": "fifo_queue", "size": 9}}),
    ],
)
def test_a_snapshot_holds_no_memory_bank(name: str, settings: dict[str, Any]) -> None:
    """Under whatever name a loss has it; everything else it does hold."""
    loss = build_component("loss", {"name": name, "dim": 4, **settings}, num_images=9)
    banks = [part for part in loss.modules() if isinstance(part, tuple(REGISTRIES["memory_bank"].values()))]
    of_banks = {row.data_ptr() for bank in banks for row in bank.buffers()}
    assert of_banks
    kept = {value.data_ptr() for value in Snapshot([loss], torch.optim.SGD([torch.zeros(1)])).live}
    assert kept == {value.data_ptr() for value in (*loss.parameters(), *loss.buffers())} - of_banks


@pytest.mark.parametrize("method", ["swav_32", "deepcluster_v2_32"])
def test_a_step_that_is_skipped_leaves_banks_of_clusters_finite(method: str) -> None:
    """Embeddings and loss are not numbers in step 2: the banks are written, but with nothing of that."""
    overrides = ["loss.queue={name:fifo_queue,size:10}"] if method == "swav_32" else []
    task = SSLPretrainingTask.from_config(small(method, *overrides, num_epochs=2, on_nonfinite="skip"))
    compute = task.compute_model

    def spoilt(sample: Any) -> Any:
        output = compute(sample)
        return {view: value * torch.nan for view, value in output.items()} if task.step_idx == 1 else output

    task.compute_model = spoilt  # type: ignore[method-assign]
    LocalTrainer().train(task)
    assert task.step_idx == 4
    assert all(torch.isfinite(value).all() for value in everything(task).values())


def test_flags_of_one_process() -> None:
    flags = StepFlags(torch.device("cpu"))
    yes, no = torch.tensor(True), torch.tensor(False)
    assert not flags.push(no, no, False)
    assert flags.pop() == [Flags(False, False, False)]
    assert flags.push(no, yes, False)
    assert flags.push(yes, no, True)
    assert flags.pop(all_of_them=True) == [Flags(False, False, True), Flags(True, True, True)]
    assert flags.pop() == []


def test_gradients_are_finite() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(NUM_IMAGES)) for _ in range(2)]
    assert gradients_are_finite(parameters)
    parameters[0].grad = torch.full((NUM_IMAGES,), 1e10)
    assert gradients_are_finite(parameters)
    parameters[0].grad[3] = torch.nan
    assert not gradients_are_finite(parameters)
