"""The areas of tools/bench.py: both sides of a row must compute the same, or their ratio means nothing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pirl_plugin.functional.sampling import draw_negative_ids
from pirl_plugin.losses import PIRLNCELoss
from pirl_plugin.speed import bank, loss, step
from pirl_plugin.speed.areas import AREAS
from pirl_plugin.speed.measuring import Settings


@pytest.mark.parametrize("estimator", ["nce", "softmax", "infonce"])
def test_the_published_loss_is_ours(estimator: str) -> None:
    ours = PIRLNCELoss(300, 16, 40, loss.TEMPERATURE, estimator=estimator, normalizer=660.0)
    views = {name: torch.randn(4, 16, requires_grad=True) for name in ("image", "patches")}
    ids = torch.tensor([3, 7, 0, 299])
    candidates = draw_negative_ids(ids, 40, 300)
    value = ours(views, ids, negative_ids=candidates)
    theirs = loss.published_loss(list(views.values()), ids, candidates, ours.memory_bank.rows, estimator, 660.0)
    torch.testing.assert_close(value, theirs, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(each, list(views.values())) for each in (value, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_the_loss_s_rows_have_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = loss.Case("shared", batch=2, candidates=50, faster=30, smaller=10)
    monkeypatch.setattr(loss, "CASES", (wanted, loss.Case("per_image", "infonce", 2, 50)))
    rows = list(loss.rows(Settings(quick=True, repeats=1)))
    assert [(row.unit, row.wanted) for row in rows] == [("s", 30), ("bytes", 10), ("s", None)]
    assert all(row.ours > 0 and row.theirs > 0 for row in rows)
    assert "floor: 0 MB of rows read once" in rows[0].detail


def test_a_step_of_the_bank_s_area_writes_the_bank() -> None:
    work = bank.step_of(5_000, Settings(quick=True))
    (ours,) = [cell.cell_contents for cell in work.__closure__ or () if isinstance(cell.cell_contents, PIRLNCELoss)]
    before = ours.memory_bank.rows.clone()
    work()
    assert (ours.memory_bank.rows != before).any(dim=1).sum() in range(1, 9)


def test_every_area_says_what_it_is() -> None:
    for name, area in AREAS.items():
        assert area.about, name
        assert callable(area.rows), name


def test_the_unguarded_step_looks_at_nothing_and_leaves_the_task_as_it_was() -> None:
    calls: list[str] = []

    class Task:
        where = 0.0
        optimizer = SimpleNamespace(zero_grad=lambda: None, step=lambda where: calls.append("update"))

        def run_optimizer(self, loss: Any) -> None:
            calls.append("guarded")

        def step(self) -> None:
            self.run_optimizer(torch.ones((), requires_grad=True))

    task: Any = Task()
    step.unguarded_step(task)()
    task.step()
    assert calls == ["update", "guarded"]
