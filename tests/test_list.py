from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest

from pirl_plugin.commands.list import main
from pirl_plugin.config import groups
from pirl_plugin.listing import as_text, components, methods
from pirl_plugin.registry import REGISTRIES, ours
from pirl_plugin.schema import PROVIDED, ConfigError, Fraction, PositiveInt


class Bank:
    """A bank for this test.

    And more.
    """

    def __init__(
        self,
        num_rows: Annotated[PositiveInt, PROVIDED],
        size: PositiveInt,
        lam: Fraction | None = None,
        on: bool = True,
    ) -> None: ...


@pytest.fixture(autouse=True)
def _bank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRIES["memory_bank"], "bank_of_the_list_test", Bank)


def test_a_component_with_all_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory_bank"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "memory_bank"
    start = next(i for i, line in enumerate(shown) if line.startswith("  bank_of_the_list_test"))
    assert [" ".join(line.split()) for line in shown[start : start + 5]] == [
        "bank_of_the_list_test A bank for this test.",
        "num_rows: int >= 1 (given by the surrounding code)",
        "size: int >= 1 (required)",
        "lam: float >= 0, <= 1 or null = null",
        "on: bool = true",
    ]


def test_every_name_of_the_package_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    listed = {(item["kind"], item["name"]) for item in json.loads(capsys.readouterr().out)}
    assert listed == {(kind, name) for kind in REGISTRIES for name in ours(kind)} | {
        ("method", name) for name in groups()["method"]
    }
    assert ("hook", "metrics_jsonl") in listed


def test_the_table_of_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split() == ["method", "paper", "year", "needs", "YAML"]
    assert [line.split()[0] for line in shown[1:]] == groups()["method"]
    row = next(line for line in shown if line.startswith("pirl_64 "))
    assert "Misra & van der Maaten, arXiv:1912.01991  2020  memory bank" in row
    assert row.endswith("benchmark_configs/method/pirl_64.yaml")
    assert main([]) == 0
    assert capsys.readouterr().out.startswith("\n".join(shown))


def test_every_method_says_where_it_is_from() -> None:
    """Paper, year and what it needs; a variant has them from the method that it starts from."""
    assert [info.name for info in methods() if not (info.paper and info.year and info.needs)] == []


def test_a_variant_changes_what_it_says_itself(tmp_path: Path) -> None:
    folder = tmp_path / "configs" / "method"
    folder.mkdir(parents=True)
    (folder / "a.yaml").write_text("about: {paper: P, year: 2020, needs: x}\n")
    (folder / "b.yaml").write_text("defaults: [a, /scale: small, _self_, override /trunk: r]\nabout: {needs: y}\n")
    first, second = methods(folder.parent)
    place = f"{tmp_path.name}/configs/method/a.yaml"
    assert (first.paper, first.year, first.needs, first.path) == ("P", 2020, "x", place)
    assert (second.name, second.paper, second.year, second.needs) == ("b", "P", 2020, "y")


def test_brief_leaves_the_parameters_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory_bank", "--brief"]) == 0
    assert "num_rows" not in capsys.readouterr().out


def test_host_adds_what_comes_with_classy_vision() -> None:
    names = {info.name for info in components(["loss"], host=True)}
    assert "label_smoothing_cross_entropy" in names - {info.name for info in components(["loss"])}


def test_all_of_the_hosts_components_can_be_described() -> None:
    assert "classy_vision" in components(host=True)[0].defined_in
    assert len(as_text(components(host=True))) > 1000


def test_every_component_says_what_it_is() -> None:
    assert [f"{info.kind} {info.name}" for info in components() if not info.summary] == []


def test_an_unknown_kind(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'loss'"):
        components(["los"])
    assert main(["los"]) == 2
    assert "Unknown kind 'los'. Available: methods, task, dataset" in capsys.readouterr().err


def test_plugins_are_imported_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin_of_the_list_test.py").write_text(
        "from pirl_plugin.registry import REGISTRIES\nREGISTRIES['collator']['from_a_plugin'] = dict\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert main(["--plugins", "plugin_of_the_list_test"]) == 0
        assert "from_a_plugin" in ours("collator")
    finally:
        REGISTRIES["collator"].pop("from_a_plugin", None)


def test_a_plugin_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plugins", "nobody_wrote_this"]) == 2
    assert "nobody_wrote_this" in capsys.readouterr().err


def test_an_empty_list_says_so() -> None:
    assert as_text([]) == "Nothing is registered."


def test_the_tool_runs_from_anywhere(repository_root: Path, tmp_path: Path) -> None:
    tool = [sys.executable, str(repository_root / "tools" / "list.py"), "--help"]
    done = subprocess.run(tool, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "every registered component" in done.stdout
