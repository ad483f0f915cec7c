"""Two processes with half the batch each are one process with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed_worker import SCENARIOS, run
from ranks import HERE, ONE_THREAD, run_ranks
from small_task import NUM_IMAGES, assert_identical
from test_checkpoint_resume import COMMAND, flat, metrics

from pirl_plugin import distributed
from pirl_plugin.hooks.checkpoint import checkpoints
from pirl_plugin.weights.files import read_weights

TIMEOUT = 300


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of both ranks, of one start of two processes for all tests."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks("distributed_worker.py", folder)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "repeated_ids"])
def test_loss_gradients_bank_and_z_equal_one_process(two: list, name: str) -> None:
    one, (first, second) = run(name), (ranks[name] for ranks in two)
    assert torch.equal(torch.cat([first["ids"], second["ids"]], dim=1), one["ids"])
    torch.testing.assert_close((first["losses"] + second["losses"]) / 2, one["losses"], rtol=1e-5, atol=0)
    assert first["epoch_mean"] == second["epoch_mean"] == pytest.approx(one["epoch_mean"], rel=1e-5)
    torch.testing.assert_close(in_order(name, first["rows"]), in_order(name, one["rows"]), rtol=1e-5, atol=1e-6)
    for part, value in one["end"].items():
        if not part.endswith("memory_bank.rows"):
            torch.testing.assert_close(first["end"][part], value, rtol=1e-3, atol=1e-5)
    assert first["normalizer"] == pytest.approx(one["normalizer"], rel=1e-5)
    period = SCENARIOS[name].get("accumulate_steps", 1)
    for step in range(period - 1, len(one["gradients"]), period):
        assert first["gradients"][step].keys() == one["gradients"][step].keys()
        for parameter, gradient in one["gradients"][step].items():
            close = {"rtol": 1e-4, "atol": 1e-5 * gradient.abs().max().item()}
            torch.testing.assert_close(first["gradients"][step][parameter], gradient, **close)
    assert_identical(first["end"], second["end"])


def in_order(name: str, rows: torch.Tensor) -> torch.Tensor:
    """A queue gets two accumulated batches rank by rank: the same rows in another order."""
    if name != "momentum_accumulated":
        return rows
    return torch.stack([step[step[:, 0].argsort()] for step in rows])


def test_keys_are_shuffled_over_the_ranks_and_come_back(two: list) -> None:
    ranks = [result["shuffled"] for result in two]
    everyone = torch.cat([rank["seen"] for rank in ranks])
    assert sorted(everyone.tolist()) == list(range(0, 80, 10))
    assert [rank["own"].tolist() for rank in ranks] == [[0, 10, 20, 30], [40, 50, 60, 70]]
    for rank in ranks:
        assert sorted(rank["seen"].tolist()) != rank["own"].tolist()  # the seed at hand mixes them
        torch.testing.assert_close(rank["output"], rank["expected"])
        assert len(rank["output"].unique(dim=0)) == 4


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *((name, [torch.ones(2)]) for name in ("all_gather", "all_to_all", "broadcast_")),
        *((name, [torch.ones(2)]) for name in ("all_reduce_mean", "all_reduce_sum")),
        ("gather_objects", [1]),
        ("barrier", []),
    ],
)
def test_every_collective_counts_as_progress(monkeypatch: pytest.MonkeyPatch, name: str, arguments: list) -> None:
    """Of two processes the watch takes the one that has entered fewer for the one that hangs."""
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    calls = ("all_gather_into_tensor", "all_reduce", "all_to_all_single", "broadcast", "all_gather_object", "barrier")
    for call in calls:
        monkeypatch.setattr(distributed.dist, call, lambda *anything, **more: None)
    before = distributed.collectives_entered()
    getattr(distributed, name)(*arguments)
    assert distributed.collectives_entered() == before + 1


@pytest.mark.parametrize("reduce", [distributed.all_reduce_mean, distributed.all_reduce_sum])
def test_a_mean_or_a_sum_is_a_new_tensor_in_one_process_too(reduce: Any) -> None:
    given = torch.tensor([1.0, 2.0])
    reduce(given).add_(1)
    assert given.tolist() == [1, 2]


def test_the_scenarios_can_tell() -> None:
    """What is compared above changes in training, and one head is idle where it is meant to be."""
    one = run("nce")
    assert (one["rows"][0] != one["rows"][-1]).any(dim=1).sum() == NUM_IMAGES * 2 // 3
    assert one["normalizer"] > 1
    assert all(gradient.any() for gradient in one["gradients"][0].values())
    idle = {name.split(".")[1] for name in one["gradients"][0].keys() - run("idle_image_head")["gradients"][0].keys()}
    assert idle == {"image"}


def test_rows_are_the_same_bits_on_all_ranks_after_every_step(two: list) -> None:
    for name in SCENARIOS:
        assert torch.equal(two[0][name]["rows"], two[1][name]["rows"])
        assert two[0][name]["normalizer"] == two[1][name]["normalizer"]


def test_ranks_draw_different_negatives(two: list) -> None:
    assert not torch.equal(two[0]["nce"]["random"], two[1]["nce"]["random"])


def test_repeated_ids_over_both_ranks_count_as_their_mean(two: list) -> None:
    """3 images in a global batch of 8: each stands there 2 or 3 times, on both ranks, and its row moves once."""
    ranks = [result["repeated_ids"] for result in two]
    rows = ranks[0]["start"]
    for step in range(2):
        ids = torch.cat([rank["ids"][step] for rank in ranks])
        embeddings = F.normalize(torch.cat([rank["embeddings"][step] for rank in ranks]), dim=1)
        assert sorted(ids.bincount().tolist()) == [2, 3, 3]
        means = torch.stack([embeddings[ids == image_id].mean(dim=0) for image_id in range(3)])
        rows = F.normalize(0.5 * rows + 0.5 * means, dim=1)
        torch.testing.assert_close(ranks[0]["rows"][step], rows, rtol=0, atol=1e-6)


def test_ranks_that_begin_with_rows_of_their_own_agree_from_the_start(two: list) -> None:
    """Images 2, 3 on one rank and 3, 4 on the other."""
    first, second = (result["own_seeds"] for result in two)
    assert not torch.equal(first["before"], second["before"])
    assert torch.equal(first["started"], first["before"])
    assert torch.equal(second["started"], first["before"])
    assert first["normalizer"] == second["normalizer"] > 0
    assert torch.equal(first["rows"], second["rows"])
    new = F.normalize(torch.cat([first["image"], second["image"]]), dim=1)
    mean = torch.stack([new[0], (new[1] + new[2]) / 2, new[3]])
    torch.testing.assert_close(first["rows"][2:5], F.normalize(first["before"][2:5] + mean, dim=1))
    assert torch.equal(first["rows"][[0, 1, 5]], first["before"][[0, 1, 5]])


# -- the command -------------------------------------------------------------------------------------------------------


def torchrun(folder: Path, *overrides: str) -> str:
    """Runs the command on two processes; gives back what they said."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(HERE.parent / "tools" / "train.py"), *COMMAND, f"run_dir={folder}", *overrides]
    environment = {**os.environ, **ONE_THREAD}
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def test_train_under_torchrun_and_again(tmp_path: Path) -> None:
    """2 epochs of 3 steps; then the last checkpoint is lost and the second epoch is made again."""
    folder = tmp_path / "run"
    first = torchrun(folder, "batch_size=4")
    middle, last = checkpoints(folder)
    assert [path.name for path in (middle, last)] == ["step_000000003.pt", "step_000000006.pt"]
    expected, lines = read_weights(last), metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["images_seen"] == 2 * NUM_IMAGES
    # one process speaks and writes
    assert first.count("Finished after 6 steps") == 1
    log = (folder / "log.txt").read_text()
    assert log.count("Checkpoint written") == 2
    assert json.loads((folder / "environment.json").read_text())

    last.unlink()
    assert torchrun(folder, "batch_size=4").count(f"Going on from {middle}") == 1
    again = read_weights(last)
    for part in ("base_model", "loss", "optimizer"):
        assert_identical(flat(expected["classy_state_dict"][part]), flat(again["classy_state_dict"][part]))
    assert len(again["random_states"]) == 2
    for left, right in zip(expected["random_states"], again["random_states"], strict=True):
        assert torch.equal(left["torch"], right["torch"])
    assert metrics(folder) == lines
