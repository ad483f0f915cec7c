"""The rules of the package's shape, held against its source: everything flows one way, and files stay small.

Each rule is a function of a folder of source that returns what breaks it, so that the tests below can also plant a
breach and see it found.
"""

from __future__ import annotations

import ast
import configparser
import importlib
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PACKAGE = "pirl_plugin"
FLOORS = (
    {"functional", "weights", "distributed", "registry", "schema", "records", "atomic", "optional", "text", "published"}
    | {"plugins", "heartbeat", "plain_yaml", "rendezvous", "run_lock", "signals"},
    {"losses", "memory", "data", "models", "optim", "hooks"},
    {"tasks", "benchmarks", "sweep", "report", "config", "listing", "integrations"},
    {"speed"},
    {"commands"},
)
COMPONENTS = FLOORS[1]  # these know each other through the registry only
OPTIONAL = {"detectron2", "lightly", "pycocotools", "submitit", "timm", "triton", "vissl", "wandb"}
OPTIONAL |= {"sklearn"}  # required, but a seventh of the time that importing everything takes, for one solver alone
NOT_FOR_THE_REPORT = {"torch", "torchvision", "classy_vision"}
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 500, 70
MACHINE_PATH = re.compile(r"(?<![\w.~:/*-])/(?:home|Users|root|work|mnt|scratch|data|opt)/[\w.-]+")

Function = (ast.FunctionDef, ast.AsyncFunctionDef)


# -- reading -----------------------------------------------------------------------------------------------------------


def modules(root: Path) -> dict[str, ast.Module]:
    """Syntax tree by dotted module name."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def imported(tree: ast.AST, known: set[str]) -> set[str]:
    """Modules that a tree imports, anywhere but for type checkers only."""
    names: set[str] = set()
    for node in walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written in full"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in known else str(node.module) for name in full}
    return names


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """As ``ast.walk``, without ``if TYPE_CHECKING``."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from walk(child)


def import_graph(root: Path) -> dict[str, set[str]]:
    trees = modules(root)
    return {name: imported(tree, set(trees)) - {name} for name, tree in trees.items()}


def room(module: str) -> str:
    """``losses`` for ``pirl_plugin.losses.pirl_nce``; empty for the package itself."""
    return module.split(".")[1] if "." in module else ""


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.partition(".")[0] == PACKAGE}


def floor(room_name: str) -> int | None:
    return next((level for level, rooms in enumerate(FLOORS) if room_name in rooms), None)


# -- rules -------------------------------------------------------------------------------------------------------------


def unknown_rooms(root: Path) -> list[str]:
    """Every room stands on a floor, so that the next rule knows it."""
    return sorted({room(name) for name in import_graph(root) if room(name) and floor(room(name)) is None})


def arrows_up(root: Path) -> list[str]:
    """No room imports a higher one, nor the package itself, which imports them all."""
    found = []
    for name, targets in import_graph(root).items():
        level = floor(room(name))
        for target in ours(targets):
            too_high = room(target) == "" or (floor(room(target)) or 0) > (level or 0)
            if level is not None and too_high and level < len(FLOORS) - 1:
                found.append(f"{name} imports {target}")
    return found


def siblings(root: Path) -> list[str]:
    """Components know each other through the registry only."""
    return [
        f"{name} imports {target}"
        for name, targets in import_graph(root).items()
        for target in ours(targets)
        if {room(name), room(target)} <= COMPONENTS and room(name) != room(target)
    ]


def import_cycle(root: Path) -> list[str]:
    """Modules of one circle of imports, if there is any."""
    whole = import_graph(root)
    graph = {name: sorted(targets & set(whole)) for name, targets in whole.items()}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in graph[name]:
            circle = visit(target, [*path, name])
            if circle:
                return circle
        done.add(name)
        return []

    return next((circle for name in graph if (circle := visit(name, []))), [])


def torch_in_the_report(root: Path) -> list[str]:
    """The report is made from records alone, on a machine without torch."""
    graph = import_graph(root)
    start = [name for name in graph if room(name) in ("report", "published")]
    reached, queue = set(start), list(start)
    while queue:
        name = queue.pop()
        package = name.rpartition(".")[0]  # importing a module runs its package first
        targets = ours(graph[name] | ({package} if package != PACKAGE else set())) - {PACKAGE}
        queue += sorted((targets & set(graph)) - reached)
        reached |= targets & set(graph)
    return [
        f"{name} imports {target}"
        for name in sorted(reached)
        for target in sorted(graph[name])
        if target.partition(".")[0] in NOT_FOR_THE_REPORT
    ]


def detectron2_imports(root: Path) -> list[str]:
    """Detectron2 is imported in one file."""
    users = [name for name, targets in import_graph(root).items() if any(t.startswith("detectron2") for t in targets)]
    return users[1:]


def long_modules(root: Path) -> list[str]:
    paths = sorted((root / PACKAGE).rglob("*.py"))
    return [str(path) for path in paths if len(path.read_text(encoding="utf-8").splitlines()) > MAX_MODULE_LINES]


def long_functions(root: Path) -> list[str]:
    return [
        f"{name}:{node.lineno} {node.name}"
        for name, tree in modules(root).items()
        for node in ast.walk(tree)
        if isinstance(node, Function) and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]


def hidden_imports(root: Path) -> list[str]:
    """Imports stand at the top, but for optional dependencies and where an ImportError is dealt with."""

    def search(node: ast.AST, inside: bool) -> Iterator[ast.AST]:
        if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type) for h in node.handlers if h.type):
            return
        if inside and isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        for child in ast.iter_child_nodes(node):
            yield from search(child, inside or isinstance(node, Function))

    found = []
    for name, tree in modules(root).items():
        for node in search(tree, False):
            targets = {target.partition(".")[0] for target in imported(node, set())}
            if not targets <= OPTIONAL:
                found.append(f"{name}:{getattr(node, 'lineno', 0)} imports {', '.join(sorted(targets))}")
    return found


def swallowed_errors(root: Path) -> list[str]:
    """No ``except:``, and nothing that catches every error and goes on as if nothing had happened."""
    found = []
    for name, tree in modules(root).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                everything = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
                silent = all(isinstance(statement, (ast.Pass, ast.Continue)) for statement in node.body)
                if node.type is None or (everything and silent):
                    found.append(f"{name}:{node.lineno}")
    return found


RULES = [
    unknown_rooms,
    arrows_up,
    siblings,
    import_cycle,
    torch_in_the_report,
    detectron2_imports,
    long_modules,
    long_functions,
    hidden_imports,
    swallowed_errors,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps(rule: Callable[[Path], list[str]], repository_root: Path) -> None:
    assert rule(repository_root) == []


BREACHES: list[tuple[Callable[[Path], list[str]], dict[str, str]]] = [
    (unknown_rooms, {"utils.py": ""}),
    (arrows_up, {"functional/nce.py": "from pirl_plugin.losses import x"}),
    (arrows_up, {"losses/x.py": "def f():\n    import pirl_plugin.tasks.y"}),
    (arrows_up, {"losses/x.py": "import pirl_plugin"}),
    (arrows_up, {"config.py": "from pirl_plugin import commands", "commands/__init__.py": ""}),
    (siblings, {"losses/x.py": "from pirl_plugin.memory.bank import Bank"}),
    (siblings, {"hooks/x.py": "from pirl_plugin import models", "models/__init__.py": ""}),
    (import_cycle, {"data/a.py": "import pirl_plugin.data.b", "data/b.py": "from pirl_plugin.data import a"}),
    (torch_in_the_report, {"report/x.py": "import torch.nn"}),
    (torch_in_the_report, {"published/x.py": "from torch import nn"}),
    (torch_in_the_report, {"report/x.py": "from pirl_plugin.records import r", "records.py": "import classy_vision"}),
    (
        torch_in_the_report,
        {
            "report/x.py": "from pirl_plugin.weights.files import f",
            "weights/files.py": "",
            "weights/__init__.py": "import torch",
        },
    ),
    (detectron2_imports, {"benchmarks/a.py": "import detectron2.x", "benchmarks/b.py": "from detectron2 import x"}),
    (long_modules, {"config.py": "x = 1\n" * 501}),
    (long_functions, {"config.py": "def f():\n" + "    x = 1\n" * 70}),
    (hidden_imports, {"config.py": "def f():\n    import json"}),
    (hidden_imports, {"config.py": "class A:\n    def f(self):\n        if 1:\n            from torch import nn"}),
    (swallowed_errors, {"config.py": "try:\n    x = 1\nexcept:\n    raise"}),
    (swallowed_errors, {"config.py": "try:\n    x = 1\nexcept Exception:\n    pass"}),
]


@pytest.mark.parametrize(("rule", "files"), BREACHES)
def test_a_planted_breach_is_found(rule: Callable[[Path], list[str]], files: dict[str, str], tmp_path: Path) -> None:
    plant(tmp_path, files)
    assert rule(tmp_path) != []


def test_what_is_allowed_passes_every_rule(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "__init__.py": "from pirl_plugin import losses, commands",
            "losses/__init__.py": "from pirl_plugin.losses import x",
            "losses/x.py": "from pirl_plugin.losses import base\nfrom pirl_plugin import distributed",
            "losses/base.py": "import typing\nif typing.TYPE_CHECKING:\n    from pirl_plugin.losses.x import X",
            "distributed.py": "def f():\n    try:\n        import json\n    except ImportError:\n        json = None",
            "tasks/x.py": "from pirl_plugin.losses import x\ndef f():\n    import wandb",
            "commands/__init__.py": "",
            "commands/train.py": "import pirl_plugin\nfrom pirl_plugin.tasks.x import f",
            "report/x.py": "from pirl_plugin.records import r\nimport json",
            "records.py": "try:\n    x = 1\nexcept OSError:\n    pass",
        },
    )
    assert {rule.__name__: rule(tmp_path) for rule in RULES} == {rule.__name__: [] for rule in RULES}


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# -- tools and the checkout --------------------------------------------------------------------------------------------


def test_tools_only_call_a_command(repository_root: Path) -> None:
    """``tools/*.py`` set the exit code; the work and the arguments are in the package, so that it can be installed."""
    for path in sorted((repository_root / "tools").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ours(imported(tree, set())) == {f"{PACKAGE}.commands.{path.stem}"}, path
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 12, path


def test_every_installed_command_exists_and_has_its_tool(repository_root: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(repository_root / "setup.cfg")
    for line in setup["options.entry_points"]["console_scripts"].split("\n"):
        if line:
            command, module, function = re.fullmatch(r"pirl-(\S+) = ([\w.]+):(\w+)", line).groups()  # type: ignore[union-attr]
            assert callable(getattr(importlib.import_module(module), function)), line
            assert (repository_root / "tools" / f"{command}.py").is_file(), line


def tracked_files(root: Path) -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [root / name for name in listed.split("\0") if name and (root / name).is_file()]


def machine_paths(text: str) -> list[str]:
    return MACHINE_PATH.findall(text)


def test_no_tracked_file_names_a_place_on_somebodys_machine(repository_root: Path) -> None:
    found = {}
    for path in tracked_files(repository_root):
        try:
            paths = machine_paths(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue  # a picture
        if paths and path != Path(__file__).resolve():
            found[str(path)] = paths
    assert found == {}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("root: /home/anna/images", 1),
        ("open('/root/data')", 1),
        ("see https://github.com/root/opt/x and ../data/x", 0),
        ("dataset.root=/path/to/images", 0),
    ],
)
def test_machine_paths(text: str, count: int) -> None:
    assert len(machine_paths(text)) == count


def test_no_tracked_file_is_large(repository_root: Path) -> None:
    """Data and weights do not belong in the repository."""
    large = [str(path) for path in tracked_files(repository_root) if path.stat().st_size > 2**20]
    assert large == []
