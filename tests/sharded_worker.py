"""What test_sharded_bank.py compares: a split bank beside a whole one, in several processes.

``python sharded_worker.py FOLDER`` writes ``FOLDER/R/rank_r.pt`` for each rank r of R = 2 and 4 processes.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pirl_plugin import distributed
from pirl_plugin.losses import PIRLNCELoss

NUM_IMAGES, DIM, BATCH = 23, 6, 3  # rows that no number of processes divides
EVERY = NUM_IMAGES - 1
CASES: dict[str, dict[str, Any]] = {
    "nce": {"estimator": "nce", "normalizer_steps": 2},
    "softmax": {"estimator": "softmax"},
    "infonce": {"estimator": "infonce", "lam": 0.0},
    "bfloat16": {"dtype": "bfloat16", "normalizer": 40.0},
    "shared_all": {"negatives": "shared", "num_negatives": EVERY},
    "per_image_all": {"num_negatives": EVERY},
}


def compare(name: str) -> dict[str, Any]:
    """Four steps with both banks: the same rows, batches and candidates; what comes out of each, step by step."""
    settings = {"num_negatives": 7, "dtype": "float32", **CASES[name]}
    dtype = settings.pop("dtype")
    banks = ("ema_memory_bank", "sharded_ema_memory_bank")
    torch.manual_seed(5)  # the same rows on all ranks
    whole, split = (
        PIRLNCELoss(NUM_IMAGES, DIM, memory_bank={"name": bank, "momentum": 0.7, "dtype": dtype}, **settings)
        for bank in banks
    )
    bank = split.memory_bank
    bank.synchronize()
    bank.shard.copy_(whole.memory_bank.rows[bank.first : bank.last])
    torch.manual_seed(distributed.rank())
    results: dict[str, list[tuple[Tensor, Tensor]]] = {"losses": [], "gradients": [], "rows": [], "z": []}
    for step in range(4):
        batch = {view: torch.randn(BATCH, DIM) for view in ("image", "patches")}
        ids = torch.randint(NUM_IMAGES, (BATCH,))  # repeated ones too, over ranks and within one
        candidates = torch.randint(NUM_IMAGES, (BATCH, 7) if step % 2 else (7,))
        if settings["num_negatives"] == EVERY:
            candidates = None  # every other image: no draw
        elif step == 3:
            candidates[..., 0] = ids[0]
        outcome = []
        for loss in (split, whole):
            views = {view: values.clone().requires_grad_() for view, values in batch.items()}
            value = loss(views, ids, negative_ids=candidates)
            used = [views[view] for view in loss.views]
            gradient = torch.stack(torch.autograd.grad(value, used))
            loss.memory_bank.update(ids, batch["image"])
            rows = loss.memory_bank.rows if loss is whole else distributed.all_gather_rows(bank.shard.clone())
            outcome.append((value.detach(), gradient, rows.float().clone(), loss.log_normalizer.clone()))
        for part, ours, theirs in zip(results.values(), *outcome, strict=True):
            part.append((ours, theirs))
    return results


def draws() -> dict[str, Tensor]:
    """How often each image was drawn for an image of rank 0, and how many candidates a draw gives."""
    torch.manual_seed(11)
    loss = PIRLNCELoss(NUM_IMAGES, DIM, 10, memory_bank={"name": "sharded_ema_memory_bank"})
    bank = loss.memory_bank
    torch.manual_seed(distributed.rank())
    counts = torch.zeros(NUM_IMAGES)
    for _ in range(400):
        own = torch.full((BATCH,), 4) + distributed.rank()
        images = distributed.all_gather(own)
        places = bank._draw(len(images), 10, own.device)
        counts += torch.bincount((places[0] + bank.first), minlength=NUM_IMAGES)
    logits = bank.negative_logits(torch.randn(2, BATCH, DIM), own, None, 10, shared=False)
    return {"counts": distributed.all_reduce_sum(counts), "width": torch.tensor(logits.shape[2])}


def parts(folder: Path) -> dict[str, Any]:
    """Writes a bank, and reads what it and what other numbers of processes have written."""
    torch.manual_seed(7)
    bank = PIRLNCELoss(NUM_IMAGES, DIM, 5, memory_bank={"name": "sharded_ema_memory_bank"}).memory_bank
    rows = distributed.all_gather_rows(bank.shard.clone())
    here = folder / "parts"
    bank.save_parts(here)
    distributed.barrier()
    bank.storage.zero_()
    bank.load_parts(here)
    again = distributed.all_gather_rows(bank.shard.clone())
    bank.load_parts(folder / "from_one")
    return {"rows": rows, "again": again, "of_one": distributed.all_gather_rows(bank.shard.clone())}


def run(rank: int, world_size: int, folder: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    results = {name: compare(name) for name in CASES} | {"draws": draws(), "parts": parts(folder)}
    torch.save(results, folder / f"rank_{rank}.pt")
    dist.destroy_process_group()


def main(folder: Path) -> int:
    """2 processes in ``FOLDER/2``, then 4 in ``FOLDER/4``: forked, so that the imports are made once."""
    fork = multiprocessing.get_context("fork")
    for world_size in (2, 4):
        here = folder / str(world_size)
        processes = [fork.Process(target=run, args=(rank, world_size, here)) for rank in range(world_size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
