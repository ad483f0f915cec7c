"""Processes that find each other in a store that earlier ones have used."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch.distributed as dist

from pirl_plugin.rendezvous import fresh_store, meet


def meeting(store: Any, ranks: list[int], world_size: int, limit: float = 30.0) -> dict[int, str]:
    """The names that some ranks come to, each in a thread."""
    names: dict[int, str] = {}

    def come(rank: int) -> None:
        try:
            names[rank] = meet(store, rank, world_size, limit)
        except RuntimeError as error:
            names[rank] = f"error: {error}"

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def test_each_start_has_a_name_of_its_own_in_the_same_store() -> None:
    store = dist.HashStore()
    names = [meeting(store, [2, 0, 1], 3) for _ in range(3)]
    assert all(len(set(found.values())) == 1 for found in names)
    assert len({found[0] for found in names}) == 3


@pytest.mark.parametrize("came", [[0], [1], [1, 2], [0, 1]])
def test_what_a_start_that_failed_has_left_is_no_answer(came: list[int]) -> None:
    """Of three, some came and gave up; the next start must not take their notes for those of the living."""
    store = dist.HashStore()
    failed = meeting(store, came, 3, limit=0.3)
    assert all("did not come within 0 s" in said or len(said) == 32 for said in failed.values())
    assert failed[came[0]].startswith("error: rank") or 0 in came
    names = meeting(store, [0, 1, 2], 3)
    assert len(set(names.values())) == 1
    assert names[0] not in failed.values()


def test_without_torchrun_torch_finds_the_processes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert fresh_store(0, 2) is None
