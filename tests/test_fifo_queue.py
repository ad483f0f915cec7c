"""The queue against a list that is cut to length."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F

from pirl_plugin.memory import FIFOQueue
from pirl_plugin.registry import build
from pirl_plugin.schema import ConfigError


def queue(size: int = 5, dim: int = 3) -> FIFOQueue:
    return build("memory_bank", {"name": "fifo_queue", "size": size}, dim=dim)


def oldest_first(bank: FIFOQueue) -> torch.Tensor:
    return bank.rows.roll(-int(bank.position), dims=0)


def test_by_hand() -> None:
    """Five rows, batches of two: rows 0 1, 2 3, then 4 and, over the edge, 0."""
    bank = queue()
    start = bank.rows.clone()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(5))
    batches = [torch.eye(3)[[0, 1]] * 2, torch.eye(3)[[1, 2]], torch.eye(3)[[2, 0]] * 0.5]
    for batch, position in zip(batches, (2, 4, 1), strict=True):
        bank.enqueue(batch)
        assert bank.position.item() == position
    expected = torch.eye(3)[[0, 1, 1, 2, 2]]
    expected[0] = torch.eye(3)[0]  # the last one, which took the first one's place
    assert torch.equal(bank.rows, expected)
    bank = queue()
    bank.rows.copy_(start)
    bank.enqueue(batches[0])
    assert torch.equal(bank.rows[2:], start[2:])


@pytest.mark.parametrize("size", [1, 2, 7, 8, 12])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_a_list_that_is_cut_to_length(size: int, batch: int) -> None:
    bank = queue(size)
    listed = list(bank.rows)
    for _ in range(9):
        new = torch.randn(batch, 3)
        bank.enqueue(new)
        listed = [*listed, *F.normalize(new, dim=1)][-size:]
        torch.testing.assert_close(oldest_first(bank), torch.stack(listed))


def test_what_is_appended_has_no_gradient_and_lower_precision_is_taken() -> None:
    bank, embeddings = queue(), torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    bank.update(torch.tensor([7, 9]), embeddings)
    assert not bank.rows.requires_grad
    assert bank.rows.dtype == torch.float32
    torch.testing.assert_close(bank.rows[:2], F.normalize(embeddings.detach().float(), dim=1))


def test_rows_and_position_are_saved() -> None:
    first, second = queue(), queue()
    first.enqueue(torch.randn(3, 3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    new = torch.randn(4, 3)
    first.enqueue(new)
    second.enqueue(new)
    assert torch.equal(first.rows, second.rows)
    assert first.position == second.position == 2


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"must be \(B, 3\), got \(2, 4\)"):
        queue().enqueue(torch.zeros(2, 4))
    with pytest.raises(ConfigError, match="size"):
        queue(size=0)
