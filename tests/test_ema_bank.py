"""The memory bank: the moving average by hand, repeated ids, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from pirl_plugin.memory import EMAMemoryBank
from pirl_plugin.registry import build


def test_rows_are_unit_norm_from_the_start_and_part_of_the_state():
    bank = build("memory_bank", {"name": "ema_memory_bank"}, num_images=20, dim=5)
    torch.testing.assert_close(bank.rows.norm(dim=1), torch.ones(20))
    assert list(bank.state_dict()) == ["rows"]
    assert bank.momentum == 0.5


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.9, 1.0])  # 0.5 cannot tell old from new
def test_momentum_weighs_the_old_row(momentum):
    bank = EMAMemoryBank(num_images=4, dim=2, momentum=momentum)
    before, new = bank.rows.clone(), torch.tensor([0.0, 3.0])
    bank.update(torch.tensor([2]), new.unsqueeze(0))
    expected = F.normalize(momentum * before[2] + (1 - momentum) * torch.tensor([0.0, 1.0]), dim=0)
    torch.testing.assert_close(bank.rows[2], expected)
    assert torch.equal(bank.rows[[0, 1, 3]], before[[0, 1, 3]])


def test_by_hand():
    """Row (1, 0), new (0, 1), weight 1/2: the mean (1/2, 1/2) has norm 1/sqrt(2), so both entries become 0.7071."""
    bank = EMAMemoryBank(num_images=1, dim=2)
    bank.rows.copy_(torch.tensor([[1.0, 0.0]]))
    bank.update(torch.tensor([0]), torch.tensor([[0.0, 1.0]]))
    assert bank.rows[0].tolist() == pytest.approx([0.5**0.5, 0.5**0.5])


def test_repeated_ids_are_averaged_in_any_order():
    embeddings = F.normalize(torch.randn(3, 4), dim=1)
    rows = []
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        bank = EMAMemoryBank(num_images=2, dim=4, momentum=0.3)
        bank.rows.copy_(torch.eye(4)[:2])
        ids = torch.tensor([1, 0, 1])
        bank.update(ids[order], embeddings[order])
        rows.append(bank.rows.clone())
    expected = F.normalize(0.3 * torch.eye(4)[1] + 0.7 * embeddings[[0, 2]].mean(dim=0), dim=0)
    for result in rows:
        torch.testing.assert_close(result[1], expected)
        torch.testing.assert_close(result, rows[0])


def test_opposite_vectors_keep_the_old_row_instead_of_a_zero_one():
    bank = EMAMemoryBank(num_images=1, dim=3)
    before = bank.rows.clone()
    bank.update(torch.tensor([0]), -before)
    assert torch.equal(bank.rows, before)


def test_update_takes_low_precision_and_passes_no_gradient():
    bank = EMAMemoryBank(num_images=3, dim=4)
    embeddings = torch.randn(2, 4, requires_grad=True)
    bank.update(torch.tensor([0, 2]), embeddings.bfloat16())
    assert bank.rows.dtype == torch.float32
    assert not bank.rows.requires_grad


@pytest.mark.parametrize("bad", [3, -1])
def test_an_id_outside_is_named_and_nothing_is_written(bad):
    bank = EMAMemoryBank(num_images=3, dim=4)
    before = bank.rows.clone()
    with pytest.raises(IndexError, match=f"Image id {bad} is outside .* valid 0..2: set loss.num_images"):
        bank.update(torch.tensor([0, bad]), torch.randn(2, 4))
    assert torch.equal(bank.rows, before)


def test_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"embeddings must be \(2, 4\) for these ids, got \(2, 5\)"):
        EMAMemoryBank(num_images=3, dim=4).update(torch.tensor([0, 1]), torch.randn(2, 5))
