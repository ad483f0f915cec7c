"""Training with SwAV and DeepCluster-v2 from their YAMLs: every parameter learns, a resume is exact, two equal one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from classy_vision.hooks import ClassyHook
from classy_vision.trainer import LocalTrainer
from cluster_methods import of_processes, small
from ranks import run_ranks
from small_task import assert_identical, everything
from test_checkpoint_resume import Killer, Stop
from tiny_method import Losses

from pirl_plugin.data.loading import SampledViews
from pirl_plugin.heartbeat import DATA, STARTING
from pirl_plugin.hooks.checkpoint import checkpoints
from pirl_plugin.tasks import SSLPretrainingTask
from pirl_plugin.weights.files import read_weights


class Watch(Losses):
    """Losses, what is logged beside them, and what the loss keeps after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[dict[str, torch.Tensor]] = []
        self.without_gradient: list[list[str]] = []

    def on_step(self, task: Any) -> None:
        super().on_step(task)
        self.states.append({name: value.clone() for name, value in task.base_loss.state_dict().items()})
        named = [*task.base_model.named_parameters(), *task.base_loss.named_parameters()]
        self.without_gradient.append([name for name, p in named if p.grad is None or not p.grad.any()])


def run(config: dict[str, Any], *hooks: ClassyHook, saved: Path | None = None) -> SSLPretrainingTask:
    task = SSLPretrainingTask.from_config(config)
    task.hooks.extend(hooks)
    if saved is not None:
        task._set_checkpoint_dict(read_weights(saved))
    LocalTrainer().train(task)
    return task


@pytest.mark.parametrize("method", ["swav", "swav_32", "swav_256", "deepcluster_v2", "deepcluster_v2_32"])
def test_two_steps_from_the_yaml(method: str) -> None:
    """Epochs of two steps; SwAV's prototypes wait for the second one."""
    watch = Watch()
    task = run(small(method, num_epochs=2), watch)
    assert len(watch.losses) == 4
    frozen = ["prototypes"] if method.startswith("swav") else []
    assert watch.without_gradient == [frozen, frozen, [], []]
    if frozen:
        first = [state["prototypes"] for state in watch.states]
        assert torch.equal(first[0], first[1])
        assert not torch.equal(first[1], first[3])
        assert [len(queue.rows) for queue in task.base_loss.queues] == [10, 10]
        assert task.base_loss.queue_in_use
    else:
        assert watch.states[1]["written"].sum() >= 16  # the first pass saw whole batches of the 20 images
        assert [int(state["assigned_epoch"]) for state in watch.states] == [0, 0, 1, 1]
        assert not torch.equal(watch.states[1]["assignments"], watch.states[2]["assignments"])


@pytest.mark.parametrize("method", ["swav_32", "deepcluster_v2_32"])
def test_the_loss_falls(method: str) -> None:
    """The same 8 images in each of 40 steps, with crops alone: with colours it is mostly noise."""
    off = [f"transform.{name}_probability=0.0" for name in ("jitter", "photometric", "grayscale")]
    settings = ["dataset.num_images=8", "transform.image_scale=[0.7,1.0]", *off]
    if method == "swav_32":
        settings += ["loss.freeze_epochs=0", "loss.queue=null", "loss.queue_start_epoch=0"]
    watch = Watch()
    run(small(method, *settings, num_epochs=40, optimizer={"name": "scheduled_sgd", "lr": 0.1}), watch)
    assert sum(watch.losses[-10:]) < 0.8 * sum(watch.losses[:10])


@pytest.mark.parametrize("method", ["swav_32", "deepcluster_v2_32"])
@pytest.mark.parametrize("step", [3, 4])
def test_a_resume_is_exact(method: str, step: int, tmp_path: Path) -> None:
    """In the middle of epoch 1, and at its end: clusters, prototypes, memory and queue are those of the whole run."""
    whole_watch, pieces_watch = Watch(), Watch()
    settings = {"checkpoint": {"name": "run_checkpoint", "every_steps": 1, "background": False}}
    whole = run(small(method, run_dir=str(tmp_path / "whole"), **settings), whole_watch)
    config = small(method, run_dir=str(tmp_path / "pieces"), **settings)
    with pytest.raises(Stop):
        run(config, Watch(), Killer(step=step + 1))  # what is due at an epoch's last step is saved at the epoch's end
    (saved,) = (path for path in checkpoints(tmp_path / "pieces") if path.name == f"step_{step:09d}.pt")
    torch.manual_seed(99)
    resumed = run(config, pieces_watch, saved=saved)
    assert pieces_watch.losses == whole_watch.losses[step:]
    assert pieces_watch.statistics == whole_watch.statistics[step:]
    assert_identical(everything(whole), everything(resumed))


def test_the_first_pass_says_that_it_makes_progress() -> None:
    """Once a batch, before the first step: as a whole it may take longer than any patience."""

    class Beat:
        marks: list[tuple[int, int]] = []

        def mark(self, batches: int, doing: int) -> None:
            self.marks.append((batches, doing))

    task = SSLPretrainingTask.from_config(small("deepcluster_v2_32", num_epochs=1))
    task.heartbeat = Beat()  # type: ignore[assignment]
    LocalTrainer().train(task)
    assert Beat.marks[:3] == [(0, STARTING), (0, STARTING), (0, DATA)]  # an epoch has two batches


def test_the_first_pass_takes_the_loader_that_training_goes_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one would start its workers a second time, and this one's batches would not be page-locked."""
    asked, iterator = [], SampledViews.iterator

    def noted(views: SampledViews, *arguments: Any, **keywords: Any) -> Any:
        asked.append(keywords.get("pin_memory"))
        return iterator(views, *arguments, **keywords)

    monkeypatch.setattr(SampledViews, "iterator", noted)
    run(small("deepcluster_v2_32", num_epochs=1))
    assert asked == [False, False]  # as on a CPU


def test_without_the_hook_nothing_starts() -> None:
    with pytest.raises(ValueError, match="needs the hook 'cluster_assignment'"):
        run(small("swav_32", hooks=[]))


# -- two processes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what both ranks found, of one start of two processes for both methods."""
    folder = tmp_path_factory.mktemp("two")
    run_ranks("cluster_methods.py", folder)
    return folder


@pytest.mark.parametrize("method", ["swav", "deepcluster_v2"])
def test_two_processes_equal_one(two: Path, method: str) -> None:
    """Codes, queue, memory, clusters, prototypes and weights, up to the order of sums; ranks agree to the bit."""
    first, second = (torch.load(two / f"{method}_rank_{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_identical(first, second)
    one = of_processes(method, 8)
    assert one.keys() == first.keys()
    for name, expected in one.items():
        if expected.is_floating_point():
            torch.testing.assert_close(first[name], expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert torch.equal(first[name], expected), name
