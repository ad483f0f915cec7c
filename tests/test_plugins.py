"""The door: a package outside this one brings its own loss, collator, method and benchmark."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pirl_plugin import config as configs
from pirl_plugin import plugins
from pirl_plugin.schema import ConfigError

HERE = Path(__file__).parent
EXAMPLE = HERE / "example_plugin"
SMALL = ["device=cpu", "dataset.num_images=40", "dataset.size=32", "trunk=resnet18_narrow", "trunk.width=0.125"]

# all commands of a test in one process: starting Python and torch takes most of the time
PROGRAM = """
import importlib, json, sys
for command, *arguments in json.loads(sys.argv[1]):
    print("##", command, flush=True)
    code = importlib.import_module(f"pirl_plugin.commands.{command}").main(arguments)
    if code:
        sys.exit(f"{command}: exit code {code}")
"""


def run(commands: list[list[str]], path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Commands one after the other in a fresh process that finds ``path``."""
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    return subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def write_distribution(folder: Path, name: str, module: str) -> None:
    """What an installer leaves of a package besides its modules."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{name} = {module}\n")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example installed by pip, and beside it two plugins that cannot be imported."""
    folder, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source") / "example_plugin"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    if importlib.util.find_spec("pip") and importlib.util.find_spec("setuptools"):
        offline = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
        pip = [sys.executable, "-m", "pip", "install", "-q", *offline, "--target", str(folder), str(source)]
        done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    else:
        shutil.copytree(source / "example_plugin", folder / "example_plugin")
        write_distribution(folder, "example-plugin", "example_plugin")
    write_distribution(folder, "broken-plugin", "broken_plugin")
    (folder / "broken_plugin.py").write_text("raise RuntimeError('two\\nlines')\n")
    write_distribution(folder, "gone-plugin", "gone_plugin")
    return folder


def test_an_installed_package_takes_part_in_every_command(installed: Path, tmp_path: Path) -> None:
    training = ["method=uniform_32", "num_epochs=1", "batch_size=20", "transform.image_size=16", "seed=3", *SMALL]
    checkpoint = "runs/uniform_32-generated_scenes-seed3/checkpoints/step_000000002.pt"
    measuring = ["benchmark=centroid", *[s for s in SMALL if not s.startswith("trunk")]]
    sweep = ["methods=[uniform_16]", "benchmarks=[centroid]", "train.num_epochs=2", "seeds=[0,1]", "--dry-run"]
    done = run(
        [
            ["list", "methods"],
            ["list", "loss", "collator", "benchmark"],
            ["train", *training],
            ["benchmark", *measuring, f"weights={checkpoint}"],
            ["sweep", *sweep],
        ],
        installed,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    methods, components, _, measured, planned = (part for part in done.stdout.split("## ")[1:])
    place = "example_plugin/benchmark_configs/method/uniform_16.yaml"
    row = next(line for line in methods.splitlines() if line.startswith("uniform_16 "))
    assert row.split() == ["uniform_16", *["Wang", "&", "Isola,", "arXiv:2005.10242", "2020", "example_plugin"], place]
    for name in ("uniformity", "upside_down", "centroid"):
        assert f"\n  {name} " in components
    assert "t: float > 0 = 2.0" in components
    assert "Finished after 2 steps" in done.stderr
    assert "uniform_32  centroid" in measured
    record = json.loads(next(tmp_path.rglob("result.json")).read_text())
    assert (record["method"], record["benchmark"], record["status"]) == ("uniform_32", "centroid", "ok")
    assert planned.count("tools/train.py method=uniform_16") == 2
    assert planned.count("tools/benchmark.py benchmark=centroid") == 2
    # one line each for those that cannot be imported
    warnings = [line for line in done.stderr.splitlines() if "is left out" in line]
    assert warnings == [
        "The plugin 'broken-plugin' of broken-plugin 1.0 is left out: importing broken_plugin: RuntimeError: two lines",
        "The plugin 'gone-plugin' of gone-plugin 1.0 is left out: importing gone_plugin: "
        "ModuleNotFoundError: No module named 'gone_plugin'",
    ]


def test_plugins_on_the_command_line_need_no_installation(tmp_path: Path) -> None:
    """A sweep hands them on to its runs."""
    done = run(
        [
            ["train", "method=uniform_32", "plugins=[example_plugin]", *SMALL, "--print-config"],
            [
                "benchmark",
                "benchmark=centroid",
                "plugins=[example_plugin]",
                "weights=random",
                "image_size=32",
                *SMALL,
                "--print-config",
            ],
            ["list", "methods"],
            ["sweep", "plugins=[example_plugin]", "methods=[uniform_32]", "benchmarks=[centroid]", "--dry-run"],
        ],
        EXAMPLE,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    trained, measured, methods, planned = done.stdout.split("## ")[1:]
    assert "loss:\n  name: uniformity\n  t: 2.0\n" in trained
    assert "plugins:\n- example_plugin\n" in trained
    assert "name: centroid" in measured
    assert "uniform_16 " in methods  # imported by the command before
    assert planned.count("plugins=[example_plugin]") == 2


def test_without_the_plugin_its_method_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"method: no option 'uniform_32'") as caught:
        configs.load("train", ["method=uniform_32", "plugins=[nobody_wrote_this]"])
    said = [problem for problem in caught.value.problems if problem.path == "plugins[0]"]
    assert len(said) == 1
    assert "cannot import 'nobody_wrote_this'" in said[0].message


@pytest.fixture
def no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_FOLDERS", [])


def test_a_name_that_is_taken_is_said(
    no_folders: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also from a folder with signs that mean something to Hydra; our own method stays what it is."""
    folder = tmp_path / "it's, [a] folder"
    methods = folder / plugins.FOLDER / "method"
    methods.mkdir(parents=True)
    (folder / "plugin_with_a_taken_name.py").touch()
    (methods / "npid.yaml").write_text("# @package _global_\nmethod: theirs\n")
    (methods / "theirs.yaml").write_text("# @package _global_\ndefaults: [npid_32, _self_]\nmethod: theirs\n")
    monkeypatch.syspath_prepend(folder)
    config = configs.load("train", ["plugins=[plugin_with_a_taken_name]", "method=theirs"])
    assert (config["method"], config["loss"]["name"]) == ("theirs", "pirl_nce")
    assert configs.load("train", ["method=npid"])["method"] == "npid"
    assert [record.getMessage() for record in caplog.records] == [
        f"{methods / 'npid.yaml'} is not used: method=npid is {configs.CONFIG_FOLDER / 'method' / 'npid.yaml'} already"
    ]


def test_a_module_beside_our_own_folder_adds_nothing(no_folders: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """``my_method.py`` in a checkout of this project, or in site-packages."""
    monkeypatch.setattr(plugins, "_FOLDERS", [configs.CONFIG_FOLDER])
    assert configs.folders() == (configs.CONFIG_FOLDER,)
