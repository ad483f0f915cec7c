"""The split memory bank: equal to the whole one in 2 and 4 processes, in files, and in memory."""

from __future__ import annotations

import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from classy_vision.losses import build_loss
from run_command import run
from sharded_worker import CASES, DIM, NUM_IMAGES

from pirl_plugin.commands import train
from pirl_plugin.hooks.checkpoint_files import checkpoints, parts_path
from pirl_plugin.hooks.health import HealthHook
from pirl_plugin.losses import PIRLNCELoss
from pirl_plugin.memory import ShardedEMAMemoryBank, shard_parts

SPLIT = {"name": "sharded_ema_memory_bank"}


def one_process() -> ShardedEMAMemoryBank:
    torch.manual_seed(7)
    return PIRLNCELoss(NUM_IMAGES, DIM, 5, memory_bank=SPLIT).memory_bank


@pytest.fixture(scope="module")
def worked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of 2 and of 4 processes, of one start for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    for world_size in (2, 4):
        one_process().save_parts(folder / str(world_size) / "from_one")
    command = [sys.executable, str(Path(__file__).with_name("sharded_worker.py")), str(folder)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(params=[2, 4])
def ranks(request: pytest.FixtureRequest, worked: Path) -> list[dict[str, Any]]:
    """What every rank saw."""
    folder = worked / str(request.param)
    results = [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(request.param)]
    return [{**result, "folder": folder} for result in results]


@pytest.mark.parametrize("name", list(CASES))
def test_equals_the_whole_bank_step_by_step(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        for part, steps in rank[name].items():
            for ours, theirs in steps:
                exact = part == "rows"
                torch.testing.assert_close(ours, theirs, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
        losses = torch.stack([ours for ours, _ in rank[name]["losses"]])
        assert losses.isfinite().all()
        assert len(losses.unique()) == 4
        assert all(ours.abs().sum() > 0 for ours, _ in rank[name]["gradients"])


def test_every_image_but_the_own_is_drawn_alike(ranks: list[dict[str, Any]]) -> None:
    """One image's draws, 400 times; each shard gives ceil(10 / R), so a row of a shard of s rows is drawn 1/s of it."""
    world_size, counts = len(ranks), ranks[0]["draws"]["counts"]
    share = math.ceil(10 / world_size)
    assert ranks[0]["draws"]["width"] == share * world_size
    for rank in range(world_size):
        first, last = rank * NUM_IMAGES // world_size, (rank + 1) * NUM_IMAGES // world_size
        expected = 400 * share / (last - first)
        assert (counts[first:last] - expected).abs().max() < 4.5 * expected**0.5


def test_files_are_read_by_any_number_of_processes(ranks: list[dict[str, Any]]) -> None:
    """Rows begin alike however many ranks there are, so that all must agree: one process, 2 and 4."""
    expected = one_process().shard
    for rank in ranks:
        for part in ("rows", "again", "of_one"):
            assert torch.equal(rank["parts"][part], expected)
    bank = one_process()
    bank.storage.zero_()
    bank.load_parts(ranks[0]["folder"] / "parts")
    assert torch.equal(bank.shard, expected)


def test_a_hundred_million_rows_in_bfloat16_are_3_2_gb_on_each_of_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    total = 0
    for rank in range(8):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(ShardedEMAMemoryBank, "_random_rows", meta_rows)
        bank = ShardedEMAMemoryBank(100_000_000, 128, dtype="bfloat16")
        assert bank.storage.numel() * bank.storage.element_size() == pytest.approx(3.2e9, rel=1e-6)
        assert bank.first == total
        total += len(bank.shard)
    assert total == 100_000_000


def meta_rows(bank: ShardedEMAMemoryBank, dtype: str) -> torch.Tensor:
    return torch.empty(bank.last - bank.first + 1, bank.dim, dtype=getattr(torch, dtype), device="meta")


def test_memory_of_each_rank_is_said_and_another_number_of_processes_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        ShardedEMAMemoryBank(1_000_000, 16, dtype="bfloat16").synchronize()
    assert "1000000 rows, 1000000 on each of 1 processes, 0.03 GB" in caplog.text
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "3")
    monkeypatch.setitem(os.environ, "RANK", "1")
    bank = ShardedEMAMemoryBank(10, 4)
    assert (bank.first, bank.last) == (3, 6)
    with pytest.raises(ValueError, match=r"split over 3 processes, but there are 1: start them with torchrun"):
        bank.synchronize()
    with pytest.raises(ValueError, match="2 rows cannot be split over 3 processes"):
        ShardedEMAMemoryBank(2, 4)


def test_the_state_dict_has_no_rows_and_the_loss_builds_by_name() -> None:
    loss = build_loss({"name": "pirl_nce", "num_images": 30, "dim": 4, "num_negatives": 5, "memory_bank": SPLIT})
    assert set(loss.state_dict()) == {"log_normalizer", "normalizer_batches"}
    torch.testing.assert_close(loss.memory_bank.shard.norm(dim=1), torch.ones(30))
    with pytest.raises(IndexError, match="Image id 30 is outside the memory bank"):
        loss({view: torch.randn(2, 4) for view in ("image", "patches")}, torch.tensor([0, 30]))


def test_health_does_not_search_a_part_of_the_rows() -> None:
    loss = build_loss({"name": "pirl_nce", "num_images": 30, "dim": 4, "num_negatives": 5, "memory_bank": SPLIT})
    batch = SimpleNamespace(output={"image": torch.randn(2, 4)}, sample={"target": torch.tensor([0, 1])})
    hook = HealthHook()
    hook._search(SimpleNamespace(base_loss=loss, last_batch=batch))
    assert hook._found == {}


def test_a_run_goes_on_with_the_rows_of_its_checkpoint(tmp_path: Path) -> None:
    """Four epochs at once, and two, then the other two."""
    command = [
        "method=pirl_32", "trunk=resnet18_narrow", "trunk.width=0.125", "dataset=generated_scenes",
        "dataset.num_images=16", "batch_size=8", "device=cpu", "loss.num_negatives=8",
        "loss.memory_bank={name: sharded_ema_memory_bank}", "num_epochs=4", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    rows = []
    for _ in range(2):
        outcome = run(train.main, command)
        assert outcome.code == 0, outcome.err
        last = checkpoints(tmp_path / "run")[-1]
        bank = ShardedEMAMemoryBank(16, 128)
        bank.load_parts(parts_path(last))
        rows.append(bank.shard.clone())
        last.unlink()
        shutil.rmtree(parts_path(last))
    assert "Going on from" in outcome.err
    assert torch.equal(*rows)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("exit 3",)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Evil())), r"its index refers to posix.system"),
        (lambda folder: (folder / ".metadata").write_bytes(pickle.dumps([1])), "its index is a list"),
        (lambda folder: (folder / ".metadata").write_bytes(b"no pickle"), "cannot read"),
        (lambda folder: (folder / ".metadata").unlink(), "cannot read"),
    ],
)
def test_an_index_that_is_none_is_refused_and_not_run(tmp_path: Path, spoil: Any, message: str) -> None:
    bank = one_process()
    bank.save_parts(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        bank.load_parts(tmp_path)


def test_rows_of_another_bank_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_parts, "_PIECE", 10)
    rows = torch.randn(23, 4)
    shard_parts.save(rows, 0, tmp_path / "whole")
    read = torch.zeros(6, 4)
    shard_parts.load(read, 8, 23, tmp_path / "whole")  # over the border of two pieces
    assert torch.equal(read, rows[8:14])
    with pytest.raises(ValueError, match="holds a memory bank of 23 rows, this one has 24"):
        shard_parts.load(torch.zeros(24, 4), 0, 24, tmp_path / "whole")
    with pytest.raises(ValueError, match="no part of a memory bank of 5 dimensions"):
        shard_parts.load(torch.zeros(23, 5), 0, 23, tmp_path / "whole")
    shard_parts.save(rows[3:], 3, tmp_path / "late")
    with pytest.raises(ValueError, match="lacks the memory bank's rows 0 to 2"):
        shard_parts.load(torch.zeros(23, 4), 0, 23, tmp_path / "late")
