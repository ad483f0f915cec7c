"""A run that was stopped and started again ends in the same bits as one that was not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from classy_vision.hooks import ClassyHook
from classy_vision.trainer import LocalTrainer
from small_task import NUM_IMAGES, Recorder, assert_identical, build, everything, train
from soak.processes import SMALL, metrics

from pirl_plugin.commands.train import main
from pirl_plugin.hooks.checkpoint import checkpoints, get_random_state, set_random_state
from pirl_plugin.tasks import SSLPretrainingTask
from pirl_plugin.weights.files import read_weights


class Stop(Exception):
    """A run that is killed."""


class Killer(ClassyHook):
    """Stops the run after a step, or at the end of an epoch; stands after the checkpoint hook."""

    on_start = on_phase_start = on_end = ClassyHook._noop

    def __init__(self, step: int | None = None, epoch: int | None = None) -> None:
        super().__init__()
        self.step, self.epoch = step, epoch

    def on_step(self, task: Any) -> None:
        if self.step is not None and task.step_idx == self.step:
            raise Stop

    def on_phase_end(self, task: Any) -> None:
        if self.epoch is not None and task.epoch == self.epoch:
            raise Stop


class EpochMeans(ClassyHook):
    """What a stock hook would log at the end of an epoch."""

    on_start = on_phase_start = on_step = on_end = ClassyHook._noop

    def __init__(self) -> None:
        super().__init__()
        self.means: list[float] = []

    def on_phase_end(self, task: Any) -> None:
        assert len(task.losses) == task.num_batches_per_phase
        self.means.append(sum(task.losses) / len(task.losses))


HOOKS = [{"name": "memory_bank_update"}, {"name": "metrics_jsonl"}]


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """3 epochs of 3 steps; Z is averaged over 4 batches, so that a resume in epoch 1 must restore it half done."""
    saving = {"name": "run_checkpoint", "every_epochs": 1, **changes.pop("checkpoint", {})}
    loss = {"estimator": "nce", "normalizer_steps": 4}
    base = {"loss": loss, "num_epochs": 3, "hooks": HOOKS, "checkpoint": saving, "log_every": 1}
    return {**base, "run_dir": str(folder), **changes}


def resume(folder: Path, *hooks: ClassyHook, **changes: Any) -> SSLPretrainingTask:
    """A new task that goes on from the newest checkpoint."""
    task = build(*hooks, **settings(folder, **changes))
    task._set_checkpoint_dict(read_weights(checkpoints(folder)[-1]))
    LocalTrainer().train(task)
    return task


_WHOLE: dict[Any, Any] = {}


def uninterrupted(sizes: tuple[tuple[str, Any], ...], folder: Path) -> tuple[Any, Recorder, EpochMeans, list]:
    """The run that others are compared with, made once for each of the sizes."""
    if sizes not in _WHOLE:
        seen, means = Recorder(), EpochMeans()
        task = train(seen, means, **settings(folder, **dict(sizes)))
        _WHOLE[sizes] = (task, seen, means, metrics(folder))
    return _WHOLE[sizes]


@pytest.mark.parametrize(
    ("killer", "changes", "saved_at"),
    [
        ({"epoch": 0}, {}, 3),
        ({"step": 5}, {"checkpoint": {"every_steps": 4}}, 4),
        ({"step": 4}, {"checkpoint": {"every_steps": 1, "every_epochs": None}}, 4),
        ({"step": 6}, {"checkpoint": {"every_steps": 1}}, 5),  # the last step of an epoch is saved at its end
        ({"step": 5}, {"checkpoint": {"every_steps": 4}, "batch_size": 4, "accumulate_steps": 2}, 4),
    ],
)
def test_resumed_equals_uninterrupted(tmp_path: Path, killer: dict, changes: dict, saved_at: int) -> None:
    sizes = {key: value for key, value in changes.items() if key != "checkpoint"}
    expected, whole, whole_means, whole_metrics = uninterrupted(tuple(sizes.items()), tmp_path / "whole")
    folder, first, means = tmp_path / "pieces", Recorder(), EpochMeans()
    with pytest.raises(Stop):
        train(first, means, Killer(**killer), **settings(folder, **changes))
    assert checkpoints(folder)[-1].name == f"step_{saved_at:09d}.pt"
    torch.manual_seed(99)
    second = Recorder()
    resumed = resume(folder, second, means, **changes)

    assert_identical(everything(expected), everything(resumed))
    batches = saved_at * expected.accumulate_steps
    assert first.losses[:batches] + second.losses == whole.losses
    assert means.means[-1] == whole_means.means[-1]
    assert len(means.means) == 3
    assert metrics(folder) == whole_metrics
    assert resumed.step_idx == expected.step_idx == expected.total_steps
    assert torch.equal(torch.get_rng_state(), read_weights(checkpoints(folder)[-1])["random_states"][0]["torch"])


def test_the_mean_of_an_interrupted_epoch_is_that_of_all_of_it(tmp_path: Path) -> None:
    """Stopped after 4 of 9 steps, one of them in epoch 1: its mean still counts three."""
    _, _, expected, _ = uninterrupted((), tmp_path / "whole")
    changes = {"checkpoint": {"every_steps": 4}}
    with pytest.raises(Stop):
        train(Killer(step=4), **settings(tmp_path, **changes))
    means = EpochMeans()
    resume(tmp_path, means, **changes)
    assert means.means == expected.means[1:]


def test_a_checkpoint_holds_what_others_read_and_plain_data_only(tmp_path: Path) -> None:
    task = train(**settings(tmp_path, num_epochs=1, checkpoint={"every_steps": 2}))
    state = torch.load(checkpoints(tmp_path)[0], weights_only=True)
    assert state["input_args"]["config"] == task.config
    assert [len(losses) for losses in state["losses"].values()] == [2]
    saved = state["classy_state_dict"]
    assert set(saved["base_model"]["model"]) == {"trunk", "heads"}
    assert set(saved["base_model"]["model"]["heads"]) == {"image", "patches"}
    assert {"memory_bank.rows", "log_normalizer", "normalizer_batches"} <= set(saved["loss"])
    assert (saved["num_updates"], saved["global_batch_size"]) == (16, 8)


def test_which_checkpoints_are_kept(tmp_path: Path) -> None:
    """5 epochs of 3 steps: every second for good (steps 6 and 12), and the last two (12 and 15)."""
    names = {"every_steps": 3, "keep": 2, "keep_every_epochs": 2}
    train(**settings(tmp_path, num_epochs=5, checkpoint=names))
    assert [path.name for path in checkpoints(tmp_path)] == [f"step_{step:09d}.pt" for step in (6, 12, 15)]


def test_what_is_to_be_kept_is_known_after_a_resume(tmp_path: Path) -> None:
    names = {"every_steps": 3, "keep": 1, "keep_every_epochs": 1}
    with pytest.raises(Stop):
        train(Killer(epoch=0), **settings(tmp_path, checkpoint=names))
    resume(tmp_path, checkpoint=names)
    assert [path.name for path in checkpoints(tmp_path)] == [f"step_{step:09d}.pt" for step in (3, 6, 9)]


def test_another_global_batch_is_refused(tmp_path: Path) -> None:
    """Four processes instead of two, say: steps and schedule would not continue."""
    with pytest.raises(Stop):
        train(Killer(epoch=0), **settings(tmp_path))
    with pytest.raises(ValueError, match="8 images a step over all processes, this one takes 6: start as many"):
        resume(tmp_path, batch_size=6)


def test_a_checkpoint_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="set run_dir, or set checkpoint to null"):
        train(checkpoint={"name": "run_checkpoint"})


def test_random_states_travel() -> None:
    state = get_random_state()
    first = torch.rand(3)
    set_random_state(state)
    assert torch.equal(torch.rand(3), first)


def test_a_gpu_s_random_state_is_looked_at_only_where_the_gpu_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    there, given = torch.tensor([4, 7], dtype=torch.uint8), list[torch.Tensor]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: there)
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)
    for in_use in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda in_use=in_use: in_use)
        state = get_random_state()
        assert state["cuda"] is (there if in_use else None)
        set_random_state(state)
    assert given == [there]


@pytest.mark.gpu
def test_a_gpu_s_random_state_travels() -> None:
    torch.rand(1, device="cuda")
    state = get_random_state()
    first = torch.rand(3, device="cuda")
    set_random_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), first)


# -- the command -------------------------------------------------------------------------------------------------------

COMMAND = [
    *(argument for argument in SMALL if not argument.startswith("method=")),
    "batch_size=8",
    "log_every=1",
    "num_epochs=2",
    # what RankMe and retrieval look back at is not saved: no more than one process sees in an epoch
    f"hooks=[{{name:health,num_embeddings:{NUM_IMAGES // 2}}},{{name:memory_bank_update}},{{name:metrics_jsonl}}]",
]


def test_the_same_command_again_goes_on_and_then_has_nothing_to_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert main([*COMMAND, f"run_dir={whole}"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("pirl_plugin.hooks.metrics.MetricsJsonlHook.on_phase_end", stop_in_epoch_1)
        with pytest.raises(Stop):
            main([*COMMAND, f"run_dir={pieces}"])
    assert [path.name for path in checkpoints(pieces)] == ["step_000000003.pt"]
    assert main([*COMMAND, f"run_dir={pieces}", "num_workers=1"]) == 0
    assert "Going on from" in capfd.readouterr().err
    first, second = (read_weights(checkpoints(folder)[-1])["classy_state_dict"] for folder in (whole, pieces))
    for part in ("base_model", "loss", "optimizer"):
        assert_identical(flat(first[part]), flat(second[part]))
    assert metrics(pieces) == metrics(whole)

    before = {path: path.stat().st_mtime_ns for path in pieces.rglob("*.pt")}
    assert main([*COMMAND, f"run_dir={pieces}"]) == 0
    assert "Finished already" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in pieces.rglob("*.pt")} == before
    assert metrics(pieces) == metrics(whole)

    assert main([*COMMAND, f"run_dir={pieces}", "optimizer.lr=0.07", "transform.hue=0.2"]) != 0
    message = capfd.readouterr().err
    assert re.search(r"holds a run with other settings \(.*optimizer\.lr: 0\.\d+ -> 0\.07", message)
    assert "transform.hue: 0.1 -> 0.2" in message
    assert "Set run_dir to a new folder" in message


def stop_in_epoch_1(hook: ClassyHook, task: Any) -> None:
    if task.epoch == 1:
        raise Stop


def flat(state: Any, path: str = "") -> dict[str, torch.Tensor]:
    """All tensors and numbers of a nested state, by path."""
    if isinstance(state, (dict, list)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {name: value for key, item in items for name, value in flat(item, f"{path}/{key}").items()}
    return {path: state if isinstance(state, torch.Tensor) else torch.tensor(float(state or 0))}
