"""Small versions of ``tests/soak``: processes killed, checkpoints damaged, images broken, configurations mutated."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from soak import configs, corrupt, disk, endurance, images, kills, ranks
from soak.processes import SMALL, Ranks, Starter, _command, differences, free_port, metrics, steps_logged

from pirl_plugin import config as composing
from pirl_plugin.hooks.checkpoint import checkpoints


@pytest.fixture(scope="module")
def starter() -> Starter:
    return Starter()


@pytest.mark.parametrize("name", ["one process", "two processes"])
def test_killed_at_random_moments(starter: Starter, tmp_path: Path, name: str) -> None:
    seconds = kills.uninterrupted(starter, name, 4, tmp_path / "whole")
    hit, _ = kills.killed_again_and_again(starter, name, 4, tmp_path / "pieces", 2, seconds, random.Random(0))
    assert hit == 2
    assert differences(tmp_path / "whole", tmp_path / "pieces") == []


def test_the_comparison_can_tell(starter: Starter, tmp_path: Path) -> None:
    for seed in (0, 1):
        made = starter.start(
            [*SMALL, "batch_size=8", "num_epochs=1", f"seed={seed}", f"run_dir={tmp_path / str(seed)}"], tmp_path
        )
        assert made.wait() == [0], made.said()
    found = differences(tmp_path / "0", tmp_path / "1")
    assert {"base_model", "loss", "random"} <= {name.partition("/")[0] for name in found}


@pytest.mark.parametrize(
    ("number", "code", "words"), [(signal.SIGTERM, 75, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted")]
)
def test_workers_do_not_keep_a_run_that_was_told_to_stop(
    starter: Starter, tmp_path: Path, number: signal.Signals, code: int, words: str
) -> None:
    """A cluster tells all processes of a job, those that load images too, and so does Ctrl-C in a terminal."""
    run_dir = tmp_path / "run"
    often = ["num_epochs=100000", "num_workers=2", "log_every=1", f"run_dir={run_dir}"]
    made = starter.start([*SMALL, "batch_size=8", *often], tmp_path / "log")
    assert made.until(lambda: steps_logged(run_dir) > 1), made.said()
    main_process = made.processes[0].pid
    children = Path(f"/proc/{main_process}/task/{main_process}/children").read_text().split()
    for pid in [*map(int, children), main_process]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    assert made.wait(120) == [code], made.said()
    last = made.said().splitlines()[-1]
    assert last.startswith(f"{words} after step ")
    assert "Traceback" not in made.said()
    step = int(last.removeprefix(f"{words} after step ").partition(":")[0])
    assert checkpoints(run_dir)[-1].name == f"step_{step:09d}.pt"


def test_ctrl_c_ends_all_ranks_after_the_same_step(starter: Starter, tmp_path: Path) -> None:
    """Each gets it at another moment, and then once more from torchrun."""
    run_dir = tmp_path / "run"
    often = ["num_epochs=100000", "log_every=1", f"run_dir={run_dir}"]
    made = starter.start([*SMALL, "batch_size=4", *often], tmp_path / "log", ranks=2)
    assert made.until(lambda: steps_logged(run_dir) > 1), made.said()
    for rank in (1, 0, 0, 1):
        made.send(signal.SIGINT, rank)
    assert made.wait(120) == [130, 130], made.said()
    assert made.said().count("interrupted after step ") == 1
    assert "Traceback" not in made.said()
    assert len(checkpoints(run_dir)) == 1


def test_another_number_of_ranks_goes_on_and_says_what_differs(starter: Starter, tmp_path: Path) -> None:
    """Three steps on two ranks, the fourth to the sixth on one with the same global batch."""
    run_dir = tmp_path / "run"
    common = [*SMALL, "num_epochs=2", "log_every=1", f"run_dir={run_dir}"]
    made = starter.start([*common, "batch_size=4"], tmp_path / "two", ranks=2)
    assert made.wait() == [0, 0], made.said()
    before, (first, last) = metrics(run_dir), checkpoints(run_dir)
    last.unlink()
    refused = starter.start([*common, "batch_size=4"], tmp_path / "refused")
    assert refused.wait() == [1]
    assert "set batch_size and accumulate_steps to a product of 8" in refused.said()
    made = starter.start([*common, "batch_size=8"], tmp_path / "one")
    assert made.wait() == [0], made.said()
    assert f"Going on from {first}" in made.said()
    assert "Going on with 1 process(es) instead of 2. The images of each step" in made.said()
    assert "statistics are of 8 images instead of 4" in made.said()
    after = metrics(run_dir)
    for key in ("step", "epoch", "images_seen", "lr"):
        assert [line[key] for line in after] == [line[key] for line in before]
    assert after[:3] == before[:3]


def test_two_ranks_stop_together_where_one_is_told_to(starter: Starter, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    often = ["num_epochs=100000", "log_every=1", "checkpoint.every_epochs=null", f"run_dir={run_dir}"]
    made = starter.start([*SMALL, "batch_size=4", *often], tmp_path / "log", ranks=2)
    assert made.until(lambda: steps_logged(run_dir) > 1), made.said()
    made.send(signal.SIGUSR1, rank=1)
    assert made.wait(120) == [75, 75], made.said()
    (saved,) = checkpoints(run_dir)
    assert int(saved.stem.partition("_")[2]) == metrics(run_dir)[-1]["step"]


def test_ranks_with_other_settings_are_stopped_at_the_start(starter: Starter, tmp_path: Path) -> None:
    """One process has another number of images, as of a disk that lacks some."""
    common = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes, logs = [], []
    for rank in (0, 1):
        arguments = [*SMALL, "batch_size=4", f"dataset.num_images={24 + rank}", f"run_dir={tmp_path / 'run'}"]
        logs.append(tmp_path / f"rank_{rank}.txt")
        environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(starter.context.Process(target=_command, args=(arguments, environment, str(logs[-1]))))
        processes[-1].start()
    made = Ranks(processes, logs)
    assert made.wait(120) == [1, 1], made.said()
    assert "error: ranks 0 and 1 were not started alike: " in made.said()
    assert "images: 24 and 25" in made.said()


@pytest.mark.parametrize("how", ["die", "hang"])
def test_a_rank_that_comes_to_harm_takes_the_other_down(starter: Starter, tmp_path: Path, how: str) -> None:
    seconds, wrong = ranks.harm(starter, tmp_path / "run", 4, 25.0, how, 5)
    assert wrong == []
    assert seconds > 0
    assert ranks.started_again(starter, tmp_path / "run", 4, 45.0, how, 5) == []
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 13))


@pytest.mark.slow
def test_torchrun_starts_a_killed_run_again_and_it_ends_in_the_same_bits(starter: Starter, tmp_path: Path) -> None:
    """``--max-restarts``: the processes that it starts again must not look for those that are dead."""
    made = starter.start(ranks.arguments_of(tmp_path / "whole", 3, 45.0, None, 1), tmp_path / "log", ranks=2)
    assert made.wait() == [0, 0], made.said()
    _, wrong = ranks.restarted_by_torchrun(tmp_path / "run", 3, 45.0, 5)
    assert wrong == []
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def test_damaged_checkpoints(tmp_path: Path) -> None:
    run_dir, others = corrupt.prepare(tmp_path)
    found, wrong = corrupt.survey(run_dir, others, 28, 0)
    assert wrong == []
    assert found.total() == 28


def test_broken_images_among_good_ones(tmp_path: Path) -> None:
    """Two of each of 18 kinds."""
    figures, wrong = images.survey(tmp_path, 90, 2 * len(images.BROKEN), workers=0, batch_size=6)
    assert wrong == []
    assert figures["kinds"] >= 12


@pytest.fixture(scope="module")
def base() -> tuple[dict[str, Any], dict[str, list[str]]]:
    return dict(configs.leaves(configs.resolved())), composing.groups()


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(seed=st.integers(0, 2**32))
def test_mutated_configurations(
    base: tuple[dict[str, Any], dict[str, list[str]]], tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    made = configs.mutate(random.Random(seed), *base)
    outcome, fault = configs.fault_of(made, tmp_path_factory.mktemp("mutated") / "run")
    assert fault == "", f"{outcome}: {made.mutations}: {fault}"


def test_the_fuzzer_can_tell(tmp_path: Path) -> None:
    made = configs.Mutated([*configs.BASE, "seed=1"], set_to={"seed": "2"})
    assert "seed=2 was accepted, but 1 is in force" in configs.fault_of(made, tmp_path / "a")[1]
    made = configs.Mutated(list(configs.BASE), misspelt=["loss.lamb"])
    assert "accepted ['loss.lamb']" in configs.fault_of(made, tmp_path / "b")[1]


def test_a_small_disk_that_fills_up(tmp_path: Path) -> None:
    said, wrong = disk.survey(tmp_path)
    assert wrong == []
    if "no tmpfs" in said:
        pytest.skip("this process may not mount a tmpfs")


def test_what_endurance_compares() -> None:
    assert endurance.compared([9, 9, 1, 1, 5, 5, 2, 2]) == (1, 2)
