"""The measuring itself: medians, memory of known size, the table, and the command's mistakes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from run_command import run

from pirl_plugin.commands import bench
from pirl_plugin.speed.areas import AREAS, Area
from pirl_plugin.speed.measuring import Row, extra_peak_bytes, interleaved, less, more
from pirl_plugin.speed.negatives import AliasTable
from pirl_plugin.speed.table import amount, as_markdown, as_text


def test_both_sides_are_called_in_turns_and_the_warm_up_does_not_count() -> None:
    calls: list[str] = []

    def slow_at_first() -> None:
        calls.append("a")
        time.sleep(0.2 if len(calls) == 1 else 0.0)

    seconds = interleaved({"a": slow_at_first, "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["a", "b"] * 4
    assert seconds["a"] < 0.1


def test_memory_that_a_call_takes_and_gives_back_is_seen() -> None:
    """50 MB by torch; what was held before does not count, nor what the C library had kept for later."""
    held = torch.ones(5_000_000)
    kept = [torch.ones(20_000) for _ in range(500)]
    del kept
    extra = extra_peak_bytes(lambda: torch.ones(12_500_000).sum())
    assert len(held) == 5_000_000
    assert 48e6 < extra < 58e6
    assert extra_peak_bytes(lambda: None) < 4e6


def test_ratios_say_how_many_times_better() -> None:
    assert less("x", "y", ours=2.0, theirs=10.0, wanted=5).reached is True
    assert less("x", "y", ours=2.0, theirs=9.0, wanted=5).reached is False
    assert more("x", "y", ours=9.0, theirs=10.0, wanted=0.95).reached is False
    assert Row("x", "y", 1.0, 1.0, "s", 1.04, wanted=1.05, at_most=True).reached is True
    assert Row("x", "y", 1.0, 1.0, "s", 1.06, wanted=1.05, at_most=True).reached is False
    assert less("x", "y", 1.0, 2.0).reached is None


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"),
        (12.5, "s", "12.5 s"),
        (524.3e6, "bytes", "524.3 MB"),
        (105.0, "images/s", "105 images/s"),
    ],
)
def test_amounts(value: float, unit: str, text: str) -> None:
    assert amount(value, unit) == text


def test_table_as_text_and_as_markdown() -> None:
    measured = [("loss", less("a", "b", 0.1, 1.0, 8, detail="floor: 3 MB")), ("bank", more("c", "d", 1, 2, unit="x/s"))]
    text = as_text(measured).split("\n")
    assert text[1].split() == ["loss", "a", "b", "100", "ms", "1", "s", "10", ">=", "8", "reached"]
    assert text[2].strip() == "floor: 3 MB"
    assert as_markdown(measured).split("\n")[2] == "| loss | a | b | 100 ms | 1 s | 10 | >= 8 | reached |"


def test_alias_table_draws_its_distribution() -> None:
    torch.manual_seed(0)
    counts = torch.bincount(AliasTable(torch.tensor([0.1, 0.2, 0.3, 0.4])).draw(40_000), minlength=4)
    assert (counts - torch.tensor([4000, 8000, 12000, 16000])).abs().max() < 500


def test_the_command_measures_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("set-up", "a table", 0.0, 2.0, "s", float("inf"))
    monkeypatch.setitem(
        AREAS, "small", Area("nothing much", lambda settings: iter([row]), lambda settings: torch.ones(3).sum)
    )
    outcome = run(bench.main, ["small", "--device", "cpu", "--threads", "1", "--json", str(tmp_path / "a" / "x.json")])
    assert outcome.code == 0, outcome.err
    assert "[1/1] small: nothing much" in outcome.err
    assert "set-up" in outcome.out
    written = json.loads((tmp_path / "a" / "x.json").read_text())
    assert written["rows"][0] == {
        "area": "small", "what": "set-up", "against": "a table", "ours": 0.0, "theirs": 2.0, "unit": "s", "ratio": None,
        "wanted": None, "at_most": False, "detail": "", "reached": None,
    }  # fmt: skip
    assert {"machine", "versions", "date", "threads"} <= set(written)
    traced = run(bench.main, ["small", "--profile", str(tmp_path / "trace.json")])
    assert traced.code == 0, traced.err
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "aten::sum" for event in events)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["negatvies"], "Did you mean 'negatives'"),
        (["--repeats", "0"], "--repeats must be >= 1"),
        (["--images", "nowhere"], "no folder 'nowhere'"),
        (["--profile", "x.json"], "--profile takes one area"),
    ],
)
def test_a_mistake_is_named(arguments: list[str], message: str) -> None:
    outcome = run(bench.main, arguments)
    assert outcome.code == 2
    assert message in outcome.err
