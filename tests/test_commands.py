"""The commands as users run them: what they write, what they print, and what they say about mistakes."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from run_command import Outcome, locked_elsewhere, run, signalled

from pirl_plugin import config as configs
from pirl_plugin import registry
from pirl_plugin.commands import bench, benchmark, compare, convert, published, show_curves, show_views, sweep, train
from pirl_plugin.commands import list as list_command
from pirl_plugin.commands.running import exit_code
from pirl_plugin.hooks.checkpoint import checkpoints
from pirl_plugin.tasks import SSLPretrainingTask
from pirl_plugin.weights.files import read_weights

DATASET = ["dataset=generated_scenes", "dataset.num_images=48"]
TRUNK = ["trunk=resnet18_narrow", "trunk.width=0.125"]
TRAIN = ["method=pirl_32", *DATASET, *TRUNK, "batch_size=16", "num_epochs=2", "device=cpu", "loss.num_negatives=8"]
RANDOM = ["weights=random", "image_size=32", *TRUNK, *DATASET, "device=cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """One tiny finished run, for all tests here."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    outcome = run(train.main, [*TRAIN, f"run_dir={folder}"])
    assert outcome.code == 0, outcome.err
    return folder, outcome


# -- train -------------------------------------------------------------------------------------------------------------


def test_a_run_leaves_the_files_of_the_design(trained: tuple[Path, Outcome]) -> None:
    folder, outcome = trained
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "log.txt", "checkpoints", "tensorboard"} <= names
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["loss"]["num_images"] == 48
    trunk = {"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "small"}
    assert {**config["trunk"], **trunk} == config["trunk"]
    assert {"commit", "hardware"} & set(json.loads((folder / "environment.json").read_text()))
    state = read_weights(checkpoints(folder)[-1])
    assert state["input_args"]["config"] == config
    assert state["classy_state_dict"]["num_updates"] == 2 * 48
    assert "Finished after 6 steps" in (folder / "log.txt").read_text()
    assert "48 images, 2 epochs" in outcome.err
    assert outcome.out == ""


def test_the_same_command_again_finds_nothing_left_to_do(trained: tuple[Path, Outcome]) -> None:
    folder, _ = trained
    before = {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").iterdir()}
    again = run(train.main, [*TRAIN, f"run_dir={folder}"])
    assert (again.code, "Finished already" in again.err) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in (folder / "checkpoints").iterdir()} == before


def test_other_settings_in_the_same_folder_are_refused(trained: tuple[Path, Outcome]) -> None:
    folder, _ = trained
    config = (folder / "config.yaml").read_bytes()
    other = run(train.main, [*TRAIN, f"run_dir={folder}", "loss.lam=0.25", "num_epochs=3"])
    assert_one_line(other, 1, ["holds a run with other settings", "loss.lam: 0.5 -> 0.25", "num_epochs: 2 -> 3"])
    assert (folder / "config.yaml").read_bytes() == config
    assert "Traceback" in (folder / "log.txt").read_text()  # for those who look for it


def test_what_is_printed_is_what_runs(trained: tuple[Path, Outcome], tmp_path: Path) -> None:
    folder, _ = trained
    shown = run(train.main, [*TRAIN, f"run_dir={folder}", "--print-config"])
    assert (shown.code, shown.err) == (0, "")
    config = yaml.safe_load(shown.out)
    assert config == yaml.safe_load((folder / "config.yaml").read_text())
    assert registry.check("task", config) == []
    assert SSLPretrainingTask.from_config(config).config == config
    new = tmp_path / "new"
    assert run(train.main, [*TRAIN, f"run_dir={new}", "--print-config"]).code == 0
    assert not new.exists()


# -- benchmark ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "knn"])
def test_benchmark_of_a_checkpoint(name: str, trained: tuple[Path, Outcome]) -> None:
    weights = checkpoints(trained[0])[-1]
    outcome = run(benchmark.main, [f"benchmark={name}", f"weights={weights}", *DATASET, "device=cpu"])
    assert outcome.code == 0, outcome.err
    (folder,) = (trained[0] / "benchmarks").glob(f"{name}-generated_scenes-seed0-{weights.stem}-*")
    record = json.loads((folder / "result.json").read_text())
    assert (record["status"], record["benchmark"], record["method"]) == ("ok", name, "pirl_32")
    assert 0 <= record["value"] <= 100
    assert record["weights_sha256"]
    assert (folder / "config.yaml").exists()
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["method", "benchmark", "dataset", "setting", "metric", "value"]
    assert f"{record['value']:.2f} %" in lines[1]
    assert len({line.index("top1") for line in lines if "top1" in line}) == 1
    assert f"{name} of {weights}" in outcome.err  # a line for those who have no terminal
    assert str(folder) in outcome.err


def test_benchmark_of_random_weights(tmp_path: Path) -> None:
    outcome = run(benchmark.main, ["benchmark=knn", *RANDOM, f"run_dir={tmp_path / 'x'}"])
    assert outcome.code == 0, outcome.err
    record = json.loads((tmp_path / "x" / "result.json").read_text())
    assert (record["method"], record["weights_sha256"]) == ("random", None)


def test_default_folders_tell_what_was_measured() -> None:
    config = {"benchmark": {"name": "knn"}, "dataset": {"name": "generated_scenes"}, "seed": 0}
    trunk = {"name": "resnet_trunk", "depth": 18, "width": 0.5}
    places = [
        benchmark.default_run_dir({**config, "weights": weights, "trunk": trunk}).as_posix()
        for weights in ("random", "a/b.pth", "r/checkpoints/step_000000007.pt", "r/checkpoints/best.pt")
    ]
    assert all(re.fullmatch("-[0-9a-f]{8}", place[-9:]) for place in places)
    assert [place[:-9] for place in places] == [
        "runs/random-18-0.5-knn-generated_scenes-seed0",
        "runs/b-knn-generated_scenes-seed0",
        "r/benchmarks/knn-generated_scenes-seed0-step_000000007",
        "r/benchmarks/knn-generated_scenes-seed0-best",
    ]


def default_folder(*overrides: str, weights: str = "random") -> Path:
    trunk = ["trunk=resnet18_small", "image_size=32"]
    config = configs.load("benchmark", [*overrides, f"weights={weights}", *trunk, *DATASET], lambda _: [])
    return benchmark.default_run_dir(config, benchmark._option(overrides))


def test_only_the_same_command_has_the_same_default_folder() -> None:
    told = [
        ["benchmark=semi_supervised"],
        ["benchmark=semi_supervised_10percent"],
        ["benchmark=linear"],
        ["benchmark=linear", "benchmark.protocol=paper"],
        ["benchmark=linear", "precision=bf16"],
    ]
    places = [default_folder(*overrides) for overrides in told]
    places += [default_folder("benchmark=knn", weights=weights) for weights in ("a/x.pth", "b/x.pth")]
    assert len(set(places)) == len(places)
    assert "-semi_supervised_10percent-" in places[1].name
    assert default_folder("benchmark=linear") == default_folder()
    assert default_folder("benchmark=linear", "device=cuda", "num_workers=3") == places[2]
    assert default_folder("benchmark=knn", weights="./a/x.pth") == places[-2]


def test_two_benchmarks_do_not_share_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "result.json").write_text("{}")
    with locked_elsewhere(folder):
        outcome = run(benchmark.main, ["benchmark=knn", *RANDOM, f"run_dir={folder}"])
    assert outcome.code != 0
    assert "is in use by process" in outcome.err
    assert (folder / "result.json").read_text() == "{}"


# -- the others --------------------------------------------------------------------------------------------------------


def test_show_views_draws_a_picture(tmp_path: Path) -> None:
    out = tmp_path / "new" / "views.png"
    outcome = run(show_views.main, ["method=pirl_32", *DATASET, "--rows", "2", "--out", str(out)])
    assert outcome.code == 0, outcome.err
    assert str(out) in outcome.err
    with Image.open(out) as picture:
        assert (picture.format, picture.width > 600, picture.height > 400) == ("PNG", True, True)
        pixels = np.asarray(picture.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000


def test_show_views_says_what_is_wrong(tmp_path: Path) -> None:
    assert_one_line(run(show_views.main, [*DATASET, "--rows", "0"]), 1, ["--rows must be >= 1, got 0"])
    bad = run(show_views.main, [*DATASET, "--rows", "1", "--out", str(tmp_path / "views.txt")])
    assert_one_line(bad, 1, ["txt"])
    assert run(show_views.main, ["loss.lam=2"]).code == 2


def test_a_pretrainings_views_are_left_in_its_folder_once(trained: tuple[Path, Outcome]) -> None:
    folder, _ = trained
    show_views.leave_views(folder)
    content = json.loads((folder / "views.json").read_text())
    assert content["method"] == "pirl_32"
    assert content["views"][1:] == ["image, 32 × 32 pixels", "patches, 9 of 10 × 10 pixels"]
    before = (folder / "views.png").stat().st_mtime_ns
    show_views.leave_views(folder)
    assert (folder / "views.png").stat().st_mtime_ns == before


def test_list_names_every_component() -> None:
    outcome = run(list_command.main, ["--brief"])
    assert outcome.code == 0
    for name in ("pirl_nce", "ema_memory_bank", "jigsaw_collator", "knn"):
        assert name in outcome.out


MAINS = {
    module.__name__.rpartition(".")[2]: module.main
    for module in (train, bench, benchmark, compare, convert, published, sweep, show_views, show_curves)
}
MAINS["list"] = list_command.main


@pytest.mark.parametrize("name", MAINS)
def test_help_helps(name: str) -> None:
    outcome = run(MAINS[name], ["--help"])
    assert (outcome.code, outcome.err) == (0, "")
    assert "example" in outcome.out
    assert all(len(line) <= 120 for line in outcome.out.splitlines())


def test_a_command_goes_by_the_name_it_was_called_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/pirl-list"])
    assert run(list_command.main, ["--help"]).out.startswith("usage: pirl-list ")
    monkeypatch.setattr(sys, "argv", ["tools/list.py"])
    assert run(list_command.main, ["--help"]).out.startswith("usage: list.py ")


def test_a_setting_with_dashes_is_told_how_settings_are_written() -> None:
    outcome = run(train.main, ["--method", "pirl_32"])
    assert outcome.code == 2
    assert "unrecognized arguments: --method; settings are key=value, without dashes: method=..." in outcome.err
    assert "key=value, without" not in run(list_command.main, ["--method"]).err


def test_nobody_reads_to_the_end(repository_root: Path) -> None:
    """``tools/list.py | head -1``."""
    process = subprocess.Popen(
        [sys.executable, str(repository_root / "tools" / "list.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, b"")


def test_another_broken_pipe_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise BrokenPipeError("the worker is gone")

    assert exit_code(fails) == 1
    assert capsys.readouterr().err == "error: the worker is gone\n"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_is_said(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise error

    assert exit_code(fails) == 1
    assert capsys.readouterr().err.startswith("error: out of memory: lower batch_size.")


def test_every_tool_is_a_known_command(repository_root: Path) -> None:
    assert {path.stem for path in (repository_root / "tools").glob("*.py")} == set(MAINS)


def test_make_demo_is_the_sweep_of_that_name(repository_root: Path) -> None:
    makefile = (repository_root / "Makefile").read_text()
    assert re.search(r"^demo: .*\n\t\$\(BIN\)/python tools/sweep.py sweep=demo$", makefile, re.M)


DEMO = ["sweep=demo", "methods=[pirl_32,random_32]", "launcher=inline", "train.num_epochs=1", "train.batch_size=16"]
DEMO += ["train.dataset.num_images=32", "train.trunk.width=0.125", "measure.dataset.num_images=80"]
DEMO += ['method_settings.pirl_32=["loss.num_negatives=8"]']
DEMO += ['benchmark_settings.detection_voc_small=["dataset.num_images=4","benchmark.iterations=1"]']


def test_the_demo_makes_every_benchmark_and_its_report(tmp_path: Path) -> None:
    """In tiny; and a second time from what is there, in no time."""
    place = [f"run_dir={tmp_path / 'demo'}", f"store={tmp_path / 'store'}"]
    outcome = run(sweep.main, [*DEMO, *place])
    assert outcome.code == 0, outcome.err
    expected = configs.load("sweep", ["sweep=demo"], sweep.problems_of)["benchmarks"]
    heads, *rows = outcome.out.splitlines()
    assert heads.split() == ["pirl_32", "random_32"]
    assert rows[len(expected)] == ""
    assert [row.split()[0].removesuffix("_small") for row in rows[: len(expected)]] == [
        name.removesuffix("_small") for name in expected
    ]
    assert not any(word in outcome.out for word in ("failed", "–"))
    assert outcome.out.endswith(f"Report: {tmp_path / 'demo' / 'report.html'}\n")
    assert {"report.html", "report.md", "report.csv"} <= {path.name for path in (tmp_path / "demo").iterdir()}
    pictures = {path.name for path in (tmp_path / "demo" / "figures").iterdir()}
    assert {"neighbours-0.png", "neighbours-1.png", "views-0.png", "invariance-1.svg", "training.png"} <= pictures
    assert "views-1.png" not in pictures  # random sees nothing
    assert "finished: pirl_32, seed 0: linear" in outcome.err
    again = run(sweep.main, [*DEMO, *place])
    assert (again.code, again.out) == (0, outcome.out)
    assert "20 runs, 20 of them finished already" in again.err


# -- mistakes ----------------------------------------------------------------------------------------------------------


def assert_one_line(outcome: Outcome, code: int, said: Sequence[str]) -> None:
    assert outcome.code == code, outcome.err
    lines = [line for line in outcome.err.splitlines() if line.strip()]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("error: ")
    for words in said:
        assert words in lines[0]


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def only_text(folder: Path) -> Path:
    empty(folder)
    (folder / "notes.txt").write_text("no image")
    return folder


def only_broken_images(folder: Path) -> Path:
    empty(folder)
    for name in ("photo.jpg", "picture.jpg"):
        (folder / name).write_bytes(b"\xff\xd8\xff\xe0 cut off")
    return folder


BAD_FOLDERS: list[tuple[Callable[[Path], Path], list[str]]] = [
    (lambda folder: folder, ["No folder", "'photos'"]),
    (empty, ["No images under", "0 other files"]),
    (only_text, ["No images under", "notes.txt"]),
]


@pytest.mark.parametrize(("make", "said"), BAD_FOLDERS, ids=["missing", "empty", "text"])
@pytest.mark.parametrize("main", [train.main, show_views.main], ids=["train", "show_views"])
def test_a_folder_without_images(
    main: Callable[[Sequence[str]], int], make: Callable[[Path], Path], said: list[str], tmp_path: Path
) -> None:
    root = make(tmp_path / "photos")
    extra = [f"run_dir={tmp_path / 'run'}", "dataset=image_folder", f"dataset.root={root}"]
    assert_one_line(run(main, ["method=pirl_32", *TRUNK, *extra]), 1, said)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_no_readable_image(tmp_path: Path) -> None:
    root = only_broken_images(tmp_path / "photos")
    options = [*TRUNK, "dataset=image_folder", f"dataset.root={root}", f"run_dir={tmp_path / 'run'}", "device=cpu"]
    outcome = run(train.main, ["method=pirl_32", *options])
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert "photo.jpg" in outcome.err.splitlines()[-1]


def test_a_wrong_command_line_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = run(train.main, ["trunk=resnt18", "loss.lamb=0.3", "optimizer.lr=fast", "--print-config"])
    assert (outcome.code, outcome.out) == (2, "")
    lines = outcome.err.splitlines()
    assert lines[0] == "error: 3 problems in the configuration"
    assert [line.split(":")[0] for line in lines[1:]] == ["  trunk", "  loss.lamb", "  optimizer.lr"]
    for arguments, path in (
        ([f"weights={tmp_path / 'nothing.pt'}"], "weights: no such file"),
        ([f"weights={tmp_path}"], "is a folder"),
        ([], "weights: must be set"),
        (["weights=random", "image_size=32"], "trunk: "),
    ):
        outcome = run(benchmark.main, arguments)
        assert (outcome.code, path in outcome.err) == (2, True), outcome.err
    assert run(train.main, ["--no-such-option"]).code == 2
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_run_is_not_a_file_of_weights(trained: tuple[Path, Outcome]) -> None:
    outcome = run(benchmark.main, [f"weights={trained[0]}", *DATASET])
    assert outcome.code == 2
    assert str(checkpoints(trained[0])[-1]) in outcome.err


def test_a_file_that_holds_no_weights(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.write_text("not weights")
    outcome = run(benchmark.main, [f"weights={file}", *DATASET, f"run_dir={tmp_path / 'run'}", "device=cpu"])
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: ")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"


# -- as processes ------------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_with_one_line_and_a_whole_checkpoint(tmp_path: Path, repository_root: Path) -> None:
    folder = tmp_path / "run"
    arguments = [*TRAIN, "num_epochs=100000", f"run_dir={folder}"]
    tool = repository_root / "tools" / "train.py"
    outcome = signalled(tool, arguments, signal.SIGINT, lambda: len(checkpoints(folder)) > 1)
    assert outcome.code == 130, outcome.err
    assert (outcome.out, "Traceback" in outcome.err) == ("", False)
    saved = checkpoints(folder)[-1]
    step = int(saved.stem.removeprefix("step_"))
    assert outcome.err.splitlines()[-1] == f"interrupted after step {step}: the same command goes on from {saved}"
    assert read_weights(saved)["classy_state_dict"]["num_updates"] > 0
    assert [path.name for path in (folder / "checkpoints").iterdir() if path.suffix != ".pt"] == []
