"""How the processes that ``torchrun`` started find each other, also after it has started them again."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_LIMIT = 1800.0  # seconds; torch's own for joining a group


def fresh_store(rank: int, world_size: int) -> Any:
    """``torchrun``'s store, in a corner of its own for each start; None where something else started the processes.

    ``torchrun --max-restarts`` keeps its store, and in it the addresses of processes that are dead: torch would connect
    to those (pytorch issue 135712). The number of restarts, where it is given, differs between machines: each counts
    only what failed on its own.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return None
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    limit = timedelta(seconds=_LIMIT)
    store = dist.TCPStore(*place, world_size, is_master=False, timeout=limit, wait_for_workers=False)
    return dist.PrefixStore(f"pirl_plugin/{meet(store, rank, world_size)}", store)


def meet(store: Any, rank: int, world_size: int, limit: float = _LIMIT) -> str:
    """A name that these very processes have agreed on, whatever earlier ones have left in the store.

    Each process asks under a name that nobody had before, and rank 0 answers whoever asks, dead ones too, until those
    that live have answered back.

    Args:
        store: where processes leave notes for each other.
        rank: this process.
        world_size: number of processes.
        limit: seconds to wait.

    Raises:
        RuntimeError: not all have come in time.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + limit
    answered: dict[int, bytes] = {}
    if rank > 0:
        store.set(f"ask/{rank}", mine)
    while True:
        if rank > 0 and store.check([f"answer/{mine}"]):
            name = str(store.get(f"answer/{mine}").decode())
            store.set(f"{name}/{rank}", "here")
            return name
        absent = [] if rank > 0 else [r for r in range(1, world_size) if not store.check([f"{mine}/{r}"])]
        if rank == 0 and not absent:
            return mine
        for other in absent:
            asks = store.get(f"ask/{other}") if store.check([f"ask/{other}"]) else None
            if asks is not None and answered.get(other) != asks:
                answered[other] = asks
                store.set(f"answer/{asks.decode()}", mine)
        if time.monotonic() > end:
            who = "rank 0" if rank > 0 else f"ranks {', '.join(map(str, absent[:8]))}"
            raise RuntimeError(f"{who} did not come within {limit:.0f} s, so that rank {rank} gives up.")
        time.sleep(0.02)  # in Python: a signal is heard meanwhile
