from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from classy_vision.hooks import build_hook
from step_task import BATCH, Task
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from pirl_plugin.hooks import scalars
from pirl_plugin.hooks.progress import ProgressHook
from pirl_plugin.hooks.wandb import run_id
from pirl_plugin.schema import ConfigError


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- scalars and metrics.jsonl -----------------------------------------------------------------------------------------


def test_loss_is_the_mean_since_the_last_line_by_hand(tmp_path: Path) -> None:
    """Steps 1..5 lose 1..5: mean 3. Steps 6, 7 lose 6, 7 and the epoch ends: mean 6.5."""
    task = Task(tmp_path)
    task.start(build_hook({"name": "metrics_jsonl"}))
    for loss in range(1, 8):
        task.step(float(loss))
    task.finish()
    values = [(line["step"], line["loss"], line["images_seen"]) for line in lines(tmp_path)]
    assert values == [(5, 3.0, 20), (7, 6.5, 28)]


def test_an_epoch_that_ends_on_a_logged_step_has_one_line(tmp_path: Path) -> None:
    Task(tmp_path).run(10, build_hook({"name": "metrics_jsonl"}))
    assert [line["step"] for line in lines(tmp_path)] == [5, 10]


def test_micro_batches_count_for_the_loss_and_not_as_steps(tmp_path: Path) -> None:
    task = Task(tmp_path, accumulate_steps=2)
    task.start(build_hook({"name": "metrics_jsonl"}))
    for loss in range(11):
        task.step(float(loss))
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(5, 4.5)]  # 0..9


def test_everything_a_line_holds(tmp_path: Path) -> None:
    task = Task(tmp_path)
    task.base_loss.last_statistics = {"image/positive_similarity": torch.tensor(0.25)}
    task.base_loss.normalizer = 2.5
    task.health = {"rankme": 7.0}
    task.run(5, build_hook({"name": "metrics_jsonl"}))
    (line,) = lines(tmp_path)
    expected = {"step": 5, "epoch": 0, "lr": 0.03, "image/positive_similarity": 0.25, "normalizer": 2.5, "rankme": 7.0}
    assert {name: line[name] for name in expected} == expected
    assert set(line) - set(expected) == {"images_seen", "loss", "images_per_second", "seconds", "peak_memory_mib"}
    assert line["peak_memory_mib"] > 10


@pytest.mark.parametrize("use_gpu", [False, True])
def test_peak_memory_is_that_of_the_task_s_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_gpu: bool
) -> None:
    """On a machine with a GPU, which a run on the CPU leaves alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    task = Task(tmp_path)
    task.use_gpu = use_gpu
    task.run(5, build_hook({"name": "metrics_jsonl"}))
    (line,) = lines(tmp_path)
    assert (line["peak_memory_mib"] == 3) == use_gpu


def test_a_resumed_run_repeats_no_step_and_goes_on_counting_seconds(tmp_path: Path) -> None:
    first = build_hook({"name": "metrics_jsonl"})
    Task(tmp_path).run(15, first)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 20, "lo')  # a write that was interrupted
    second = build_hook({"name": "metrics_jsonl"})
    second.set_classy_state({"seconds": 1000.0})
    Task(tmp_path, step=7).run(8, second)
    assert [line["step"] for line in lines(tmp_path)] == [5, 10, 15]
    seconds = [line["seconds"] for line in lines(tmp_path)]
    assert seconds[0] < 100 < 1000 < seconds[1] < seconds[2]
    assert first.get_classy_state()["seconds"] < 100 < 1000 < second.get_classy_state()["seconds"]
    assert lines(tmp_path)[1]["images_seen"] == 40


def test_images_per_second_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps of 4 images, 2 s each, then five of 1 s: 2 and 4 images/s, after 10 and 15 s."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    task = Task(tmp_path)
    task.start(build_hook({"name": "metrics_jsonl"}))
    for seconds in [2] * 5 + [1] * 5:
        clock.now += seconds
        task.step()
    assert [(line["images_per_second"], line["seconds"]) for line in lines(tmp_path)] == [(2, 10), (4, 15)]


def test_a_value_that_is_not_finite_leaves_valid_json(tmp_path: Path) -> None:
    Task(tmp_path).run(5, build_hook({"name": "metrics_jsonl"}), loss=math.nan)
    assert lines(tmp_path)[0]["loss"] is None


def test_without_a_run_folder_nothing_is_written_unless_a_file_is_named(tmp_path: Path) -> None:
    Task(None).run(5, build_hook({"name": "metrics_jsonl"}), build_hook({"name": "tensorboard_scalars"}))
    Task(None).run(5, build_hook({"name": "metrics_jsonl", "file": str(tmp_path / "new" / "metrics.jsonl")}))
    assert [line["step"] for line in lines(tmp_path / "new")] == [5]


def test_several_loggers_collect_once_a_logged_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = scalars._Meter._device_values
    monkeypatch.setattr(scalars._Meter, "_device_values", lambda self, task: calls.append(1) or original(self, task))
    hooks = [build_hook({"name": name}) for name in ("progress", "metrics_jsonl", "tensorboard_scalars")]
    Task(tmp_path).run(12, *hooks)
    assert len(calls) == 3  # steps 5 and 10, and the end of the epoch
    assert lines(tmp_path)[0]["loss"] == 1.0


def test_between_logged_steps_no_value_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(tmp_path)
    names = ("progress", "metrics_jsonl", "tensorboard_scalars", "health", "unreadable_images")
    task.start(*(build_hook({"name": name}) for name in names))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a value was read between logged steps")

    with monkeypatch.context() as patch:
        for name in ("item", "__float__", "__bool__", "cpu"):
            patch.setattr(Tensor, name, refuse)
        for _ in range(4):
            task.step(output={"image": torch.eye(8)[:BATCH]})
        with pytest.raises(AssertionError):
            float(task.last_batch.loss)


def test_the_hosts_own_tasks_are_logged_too(tmp_path: Path) -> None:
    class HostTask:
        train, num_updates, train_phase_idx, base_loss = True, 0, 2, torch.nn.CrossEntropyLoss()
        optimizer = SimpleNamespace(options_view=SimpleNamespace(lr=0.1))
        last_batch = SimpleNamespace(loss=torch.tensor(2.0))
        get_global_batchsize = staticmethod(lambda: 8)

    task, hook = HostTask(), build_hook({"name": "metrics_jsonl", "file": str(tmp_path / "metrics.jsonl")})
    hook.on_start(task)
    task.num_updates = 24
    hook.on_step(task)
    hook.on_phase_end(task)
    (line,) = lines(tmp_path)
    assert (line["step"], line["epoch"], line["loss"]) == (3, 2, 2.0)


# -- TensorBoard and W&B -----------------------------------------------------------------------------------------------


def test_tensorboard_holds_the_same_values_and_a_resumed_run_hides_what_it_repeats(tmp_path: Path) -> None:
    Task(tmp_path).run(15, build_hook({"name": "tensorboard_scalars"}), loss=1.0)
    Task(tmp_path, step=7).run(5, build_hook({"name": "tensorboard_scalars"}), loss=3.0)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert "step" not in events.Tags()["scalars"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(5, 1.0), (10, 3.0), (12, 3.0)]


def test_wandb_missing_is_said_when_the_hook_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'pirl-plugin\[wandb\]'"):
        build_hook({"name": "wandb_scalars"})


def test_wandb_gets_the_values_and_a_run_id_that_survives_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[dict[str, float]] = []
    started: list[dict[str, Any]] = []
    run = SimpleNamespace(log=logged.append, finish=lambda: logged.append({}), define_metric=lambda *a, **k: None)
    fake = SimpleNamespace(init=lambda **arguments: started.append(arguments) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    Task(tmp_path).run(5, build_hook({"name": "wandb_scalars"}))
    Task(tmp_path, step=5).run(5, build_hook({"name": "wandb_scalars", "project": "p", "mode": "offline"}))
    assert [values.get("step") for values in logged] == [5, None, 10, None]
    assert started[0]["id"] == started[1]["id"] == run_id(tmp_path)
    assert run_id(tmp_path) != run_id(tmp_path / "other")
    assert (started[1]["project"], started[1]["mode"], started[0]["name"]) == ("p", "offline", tmp_path.name)


def test_wandb_is_not_imported_with_the_package() -> None:
    assert "wandb" not in sys.modules


# -- progress ----------------------------------------------------------------------------------------------------------


def test_lines_of_a_run_without_a_terminal(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step a second: lines at step 1, then every 6 seconds, and at the end; 4 images/s, 1 s for each step left."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("time.perf_counter", lambda: clock.now)
    task = Task()
    with caplog.at_level(logging.INFO, logger="pirl_plugin"):
        task.start(ProgressHook(every_seconds=6))
        for _ in range(10):
            clock.now += 1
            task.step(2.5)
        task.finish()
    messages = [record.message for record in caplog.records]
    assert [message.split("  ")[1] for message in messages] == ["step 1/20 (5%)", "step 7/20 (35%)", "step 10/20 (50%)"]
    assert messages[1] == "epoch 1/2  step 7/20 (35%)  loss 2.5  lr 0.03  4 images/s  ETA 00:13"


def test_a_plain_program_without_logging_sees_the_lines_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.Logger, "hasHandlers", lambda self: False)
    Task().run(3, ProgressHook())
    shown = [line.split("  ")[1] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["step 1/20 (5%)", "step 3/20 (15%)"]


def test_a_bar_on_a_terminal_begins_where_the_run_was_resumed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    task = Task(step=10)
    hook = ProgressHook()
    task.start(hook)
    assert (hook._bar.n, hook._bar.total) == (10, 20)
    for _ in range(10):
        task.step(2.5)
    assert hook._bar.n == 20
    task.finish()
    assert "epoch 2/2: 100%" in capsys.readouterr().err


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("progress", "scalars"):
        monkeypatch.setattr(f"pirl_plugin.hooks.{module}.is_primary", lambda: False)
    monkeypatch.setattr(logging.Logger, "hasHandlers", lambda self: False)
    Task().run(6, ProgressHook())
    assert capsys.readouterr().err == ""


# -- unreadable images -------------------------------------------------------------------------------------------------


def test_unreadable_images_are_counted_once_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = Task(tmp_path)
    task.start(build_hook({"name": "unreadable_images", "tolerated": 0.1}))
    for ids in ((7,), (), (3, 7)):
        task.step(unreadable=ids)
    task.finish()
    assert (tmp_path / "unreadable_images.txt").read_text() == "3\t3.jpg\n7\t7.jpg\n"
    assert "2 of 20 images could not be read and were replaced by others, such as 3.jpg" in caplog.text


def test_too_many_unreadable_images_end_the_run() -> None:
    task = Task()
    task.start(build_hook({"name": "unreadable_images", "tolerated": 0.1}))
    task.step(unreadable=(3, 7))
    with pytest.raises(RuntimeError, match=r"3 of 20 images could not be read, more than the tolerated fraction 0\.1"):
        task.step(unreadable=(5,))


def test_all_readable_leaves_no_report(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Task(tmp_path).run(3, build_hook({"name": "unreadable_images"}))
    assert not (tmp_path / "unreadable_images.txt").exists()
    assert not caplog.records


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["progress", "metrics_jsonl", "tensorboard_scalars", "health", "unreadable_images"])
def test_evaluation_steps_are_no_business_of_these_hooks(name: str, tmp_path: Path) -> None:
    task = Task(tmp_path)
    task.train = False
    task.run(10, build_hook({"name": name}))
    assert task.health == {}
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"name": "health", "max_row": 5}, "max_row"),
        ({"name": "rankme", "num_embeddings": 0}, "num_embeddings"),
        ({"name": "progress", "every_seconds": 0}, "every_seconds"),
        ({"name": "unreadable_images", "tolerated": 1.5}, "tolerated"),
        ({"name": "metrics_jsonl", "file": 5}, "file"),
    ],
)
def test_wrong_arguments_are_refused(config: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as error:
        build_hook(config)
    assert [problem.path for problem in error.value.problems] == [path]
