"""What stands in a run's way is found before anything is trained."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from run_command import run

from pirl_plugin.commands import preflight, train
from pirl_plugin.commands.preflight import refuse_unusable_folder

TINY = ["method=pirl_32", "dataset=generated_scenes", "dataset.num_images=8", "trunk.width=0.125", "batch_size=4"]


def test_a_folder_that_is_not_there_yet_and_one_of_a_run_are_fine(tmp_path: Path) -> None:
    refuse_unusable_folder(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()  # to look leaves nothing behind
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text("{not json")
    refuse_unusable_folder(tmp_path)


@pytest.mark.parametrize("name", ["", "checkpoints"])
def test_a_file_in_the_place_of_a_folder(tmp_path: Path, name: str) -> None:
    run_dir = tmp_path / "run"
    (run_dir / name).parent.mkdir(exist_ok=True)
    (run_dir / name).write_text("mine")
    outcome = run(train.main, [*TINY, f"run_dir={run_dir}"])
    assert outcome.code == 1
    assert f"{run_dir / name} must be a folder, and is a file" in outcome.err
    assert (run_dir / name).read_text() == "mine"


def test_a_link_to_nowhere(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    with pytest.raises(OSError, match="run is a link to .*gone, which does not exist"):
        refuse_unusable_folder(tmp_path / "run")


@pytest.mark.parametrize("name", [".lock", "config.yaml", "environment.json", "metrics.jsonl", "log.txt"])
def test_a_folder_in_the_place_of_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=f"{name} must be a file, and is a folder"):
        refuse_unusable_folder(tmp_path)


@pytest.mark.parametrize(("free", "code", "said"), [(1000, 1, "the disk has 0.00 GB left: make room"), (10**12, 0, "")])
def test_a_disk_that_no_checkpoint_fits_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, code: int, said: str
) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    outcome = run(train.main, [*TINY, "num_epochs=1", f"run_dir={tmp_path / 'run'}"])
    assert outcome.code == code
    assert said in outcome.err
    assert bool(list((tmp_path / "run" / "checkpoints").glob("*.pt"))) == (code == 0)
