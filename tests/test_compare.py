"""``tools/compare.py`` as users run it, and the report at the end of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_command import run

from pirl_plugin.commands import compare, sweep
from pirl_plugin.records import Record, write_record
from pirl_plugin.sweep.plan import BENCHMARK, TRAIN, Run
from pirl_plugin.sweep.run import Execution
from pirl_plugin.sweep.state import Outcome, write_outcome


def result(folder: Path, method: str, value: float, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    record = Record(method, "knn", "weighted_knn", "cifar10", {"k": 20}, "top1", value, "%", seed, config_sha256=method)
    write_record(record, folder / "result.json")
    return folder


def test_results_of_several_places_in_one_table(tmp_path: Path) -> None:
    for seed, value in enumerate((60.0, 62.0)):
        result(tmp_path / f"a/pirl-{seed}", "pirl", value, seed)
    other = result(tmp_path / "b/npid", "npid", 50.0)
    outcome = run(compare.main, [str(tmp_path / "a"), str(other / "result.json"), f"--out={tmp_path / 'out'}"])
    assert (outcome.code, outcome.err) == (0, "3 runs found; writing the report\n")
    heads, row, *_ = outcome.out.splitlines()
    assert heads.split() == ["pirl", "npid"]
    assert row.split()[-5:] == ["61.0", "±", "1.4", "★", "50.0"]
    assert outcome.out.endswith(f"Report: {tmp_path / 'out' / 'report.html'}\n")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "report.md", "report.csv"}


@pytest.mark.parametrize(("name", "said"), [("nowhere", "no folder"), (".", "no benchmark results under")])
def test_nothing_to_compare_is_one_line(tmp_path: Path, name: str, said: str) -> None:
    outcome = run(compare.main, [str(tmp_path / name), f"--out={tmp_path / 'out'}"])
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith(f"error: {said}")
    assert len(outcome.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_sweep_reports_its_own_runs_failed_ones_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two methods, one of which cannot be trained; a run of another sweep lies in the same store."""

    def trained(method: str) -> Run:
        return Run(method, TRAIN, (f"method={method}",), method, method, "lam=1", 0)

    def measured(method: str) -> Run:
        return Run(f"{method}-knn", BENCHMARK, (), f"{method}/benchmarks/knn", method, "lam=1", 0, "knn20", method)

    class Made(Execution):
        def run(self, *_: object, **__: object) -> None:
            for run_ in self.runs.values():
                fine = run_.method == "pirl"
                if fine and run_.benchmark:
                    result(self.folder(run_), "pirl (lam=1)", 60.0)
                state, reason = ("finished", "") if fine else ("skipped", "npid failed")
                write_outcome(self.folder(run_), Outcome(run_.id, state, reason))
                self.states[run_.id] = state

    plan = [trained("pirl"), measured("pirl"), trained("npid"), measured("npid")]
    result(tmp_path / "store" / "another", "another", 1.0)
    monkeypatch.setattr(sweep, "plan", lambda settings, load: plan)
    monkeypatch.setattr(sweep, "Execution", Made)
    place = [f"store={tmp_path / 'store'}", f"run_dir={tmp_path / 'out'}", "launcher=inline"]
    outcome = run(sweep.main, ["sweep=demo", *place])
    assert outcome.code == 1, outcome.err
    heads, row, *_ = outcome.out.splitlines()
    assert heads.split() == ["pirl", "(lam=1)", "npid", "(lam=1)"]
    assert row.split()[-2:] == ["60.0", "failed"]
    assert "skipped: npid failed" in (tmp_path / "out" / "report.md").read_text()
    assert "another" not in (tmp_path / "out" / "report.html").read_text()
