"""The one rule by which a changed protocol shows: in every benchmark that names one."""

from __future__ import annotations

import ast
from pathlib import Path

from pirl_plugin.benchmarks.changes import changes, noted, recorded_name


def test_only_what_differs_is_named_published_first() -> None:
    found = changes({"num_epochs": (28, 2), "lr": ((0.1,), [0.1]), "costs": ((1.0, 2.0), (1.0,)), "list": (None, None)})
    assert found == {"num_epochs": [28, 2], "costs": [[1.0, 2.0], [1.0]]}
    assert (recorded_name("paper", found), noted(found)) == ("paper*", {"changed": found})
    assert (recorded_name("paper", {}), noted({})) == ("paper", {})


def test_no_benchmark_has_a_rule_of_its_own(repository_root: Path) -> None:
    """A star is put behind a protocol's name in one place, and where detection keeps the name among its numbers."""
    files = sorted((repository_root / "pirl_plugin" / "benchmarks").rglob("*.py"))
    found = {path.name for path in files for text in formatted(path) if text.endswith("*")}
    assert found == {"changes.py", "schedule.py"}


def formatted(path: Path) -> list[str]:
    """The last constant part of each f-string."""
    joined = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.JoinedStr)]
    ends = [node.values[-1] for node in joined if node.values]
    return [str(end.value) for end in ends if isinstance(end, ast.Constant)]
