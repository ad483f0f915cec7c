"""What a method brings along and the task joins: facts of the dataset, views and hooks that are needed, no epochs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from classy_vision.heads import ClassyHead
from classy_vision.losses import ClassyLoss
from classy_vision.tasks import build_task
from classy_vision.trainer import LocalTrainer
from small_task import DIM, NUM_IMAGES, Recorder, assert_identical, config, everything, train
from torch import Tensor, nn

from pirl_plugin import config as configs
from pirl_plugin.benchmarks.weights_under_test import Weights
from pirl_plugin.commands.train import main
from pirl_plugin.hooks.checkpoint import checkpoints
from pirl_plugin.registry import REGISTRIES, Configurable
from pirl_plugin.registry import build as build_component
from pirl_plugin.schema import PROVIDED, PositiveInt
from pirl_plugin.tasks import checks
from pirl_plugin.weights.files import read_weights

ONE_VIEW = {"transform": {"name": "image_view", "image_size": 16}, "collator": {"name": "view_collator"}}
LABELLED = {**ONE_VIEW, "heads": {"image": {"name": "classifier"}}, "hooks": None}


class Prototypes(Configurable, ClassyLoss):
    """A loss with parameters and a buffer of its own."""

    calls: Tensor

    def __init__(self, num_images: Annotated[PositiveInt, PROVIDED], dim: int = DIM) -> None:
        super().__init__()
        self.prototypes = nn.Linear(dim, 3, bias=False)
        self.register_buffer("calls", torch.zeros(num_images, dtype=torch.int64))

    def forward(self, output: Mapping[str, Tensor], target: Tensor) -> Tensor:
        self.calls[target] += 1
        return sum(self.prototypes(output[view]).logsumexp(dim=1).mean() for view in ("image", "patches"))


class ImagePrototypes(Prototypes):
    views = ("image",)

    def forward(self, output: Mapping[str, Tensor], target: Tensor) -> Tensor:
        assert "patches" not in output
        return self.prototypes(output["image"]).logsumexp(dim=1).mean()


@pytest.fixture(autouse=True)
def _losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRIES["loss"], "prototypes", Prototypes)
    monkeypatch.setitem(REGISTRIES["loss"], "image_prototypes", ImagePrototypes)


def built(loss: str, **changes: Any) -> Any:
    return build_task({**config(hooks=None, **changes), "loss": {"name": loss}})


# -- facts of the dataset ----------------------------------------------------------------------------------------------


def test_labels_and_classes_come_from_the_dataset() -> None:
    task = build_task({**config(**LABELLED), "loss": {"name": "supervised_cross_entropy"}})
    dataset = task.datasets["train"].dataset
    assert task.base_loss.labels.tolist() == dataset.labels.tolist()
    assert task.base_model.heads["image"].linear.out_features == len(dataset.class_names)
    # what benchmarks build the heads from, without the dataset
    assert task.config["heads"] == {"image": {"name": "classifier", "num_classes": len(dataset.class_names)}}
    assert task.config["loss"] == {"name": "supervised_cross_entropy", "view": "image"}
    head = build_component("head", task.config["heads"]["image"], in_dim=8, unique_id="image")
    assert isinstance(head, ClassyHead)


def test_facts_that_are_not_known_or_known_better() -> None:
    facts = {"num_images": 5, "num_classes": None, "labels": None}
    with pytest.raises(ValueError, match="loss 'supervised_cross_entropy' needs labels: the dataset must have labels"):
        checks.with_facts("loss", {"name": "supervised_cross_entropy"}, facts)
    with pytest.raises(ValueError, match="head 'classifier' needs num_classes"):
        checks.with_facts("head", {"name": "classifier"}, facts)
    known = {"num_images": 5, "num_classes": 3, "labels": torch.arange(5)}
    assert checks.with_facts("head", {"name": "classifier", "num_classes": 3}, known)["num_classes"] == 3
    with pytest.raises(ValueError, match="num_classes is 4, but the dataset has 3 classes: leave it null"):
        checks.with_facts("head", {"name": "classifier", "num_classes": 4}, known)
    assert checks.with_facts("head", {"name": "linear"}, facts) == {"name": "linear"}


# -- losses with a state of their own ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bank", "processes", "here", "megabytes"),
    [
        ({}, 1, 1, 512),
        ({"name": "ema_memory_bank", "dtype": "bfloat16"}, 1, 1, 256),
        ({"name": "ema_memory_bank"}, 8, 4, 4 * 512),
        ({"name": "sharded_ema_memory_bank"}, 8, 4, 256),
        ({"name": "sharded_ema_memory_bank", "dtype": "bfloat16"}, 8, 4, 128),
    ],
)
def test_a_bank_that_the_machine_has_no_memory_for_is_refused(
    monkeypatch: pytest.MonkeyPatch, bank: dict, processes: int, here: int, megabytes: int
) -> None:
    """A million rows x 128, as each of the machine's processes stores them; little is needed besides."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    loss = {"num_images": 10**6, "dim": 128, "memory_bank": bank}
    monkeypatch.setattr(checks, "available_memory", lambda: (megabytes + 9 * here) * 10**6)
    checks.refuse_too_large_bank(loss)
    monkeypatch.setattr(checks, "available_memory", lambda: megabytes * 10**6)
    said = rf"of 1000000 x 128 needs \d.\d GB to build.*the machine has {megabytes / 1000:.1f} GB"
    with pytest.raises(ValueError, match=said) as caught:
        checks.refuse_too_large_bank(loss)
    assert ("in 4 processes" in str(caught.value)) == (here == 4)


def test_parameters_of_a_loss_are_trained_and_saved(tmp_path: Path) -> None:
    task = built("prototypes", checkpoint={"name": "run_checkpoint"}, run_dir=str(tmp_path))
    start = task.base_loss.prototypes.weight.detach().clone()
    assert task.config["loss"] == {"name": "prototypes", "num_images": NUM_IMAGES, "dim": DIM}
    assert [type(hook).__name__ for hook in task.hooks] == ["RunCheckpointHook"]
    LocalTrainer().train(task)
    assert not torch.equal(task.base_loss.prototypes.weight, start)
    saved = read_weights(checkpoints(tmp_path)[-1])["classy_state_dict"]["loss"]
    assert_identical(saved, task.base_loss.state_dict())
    assert saved["calls"].tolist() == [1] * NUM_IMAGES


def test_what_a_loss_draws_does_not_depend_on_the_heads() -> None:
    one = built("image_prototypes", heads={"image": {"name": "linear", "dim": DIM}}, **ONE_VIEW)
    two = built("image_prototypes")
    assert torch.equal(one.base_loss.prototypes.weight, two.base_loss.prototypes.weight)
    assert_identical(one.base_model.trunk.state_dict(), two.base_model.trunk.state_dict())


# -- views that nobody looks at ----------------------------------------------------------------------------------------


def test_views_that_nobody_looks_at_are_not_computed() -> None:
    """Else their batch statistics would move the trunk's running ones."""

    class Views(Recorder):
        def on_step(self, task: Any) -> None:
            assert set(task.last_batch.sample["input"]) == set(task.last_batch.output) == {"image"}
            self.losses.append(float(task.last_batch.loss))

    seen, task = Views(), built("image_prototypes")
    task.hooks.append(seen)
    LocalTrainer().train(task)
    assert len(seen.losses) == 3
    heads = task.base_model.heads
    assert {view for view in heads if not any(p.requires_grad for p in heads[view].parameters())} == {"patches"}


def test_a_hook_s_view_is_needed_too() -> None:
    """lam = 1: the loss looks at the patches alone, the bank is written with the image's embedding."""
    seen = Recorder()
    task = train(seen, loss={"lam": 1.0})
    assert checks.needed_views(task.base_loss, task.hooks) == {"image", "patches"}
    assert len(seen.embeddings) == 3


def test_which_views_names_stand_for() -> None:
    assert checks.views_of(["image", "image/prediction", "momentum/key/prediction", "momentum/image"]) == {
        "image",
        "key",
    }


# -- PIRL without its patches is NPID ----------------------------------------------------------------------------------

SMALL = [
    "dataset=generated_scenes",
    f"dataset.num_images={NUM_IMAGES}",
    "dataset.size=32",
    "trunk=resnet18_narrow",
    "trunk.width=0.125",
    "batch_size=8",
    "num_epochs=2",
    "optimizer.warmup_epochs=0",
    "loss.num_negatives=8",
    "loss.negatives=per_image",
    "device=cpu",
    "run_dir=null",
    "~checkpoint",
    "hooks=[{name:memory_bank_update}]",
]


def test_pirl_with_lam_0_is_npid_step_by_step() -> None:
    """Losses, gradients, bank, weights, running statistics and momentum: every bit of them, after every step."""
    runs = []
    for overrides in (["method=npid_32"], ["method=pirl_32", "loss.lam=0.0"]):
        task, seen = build_task(configs.load("train", [*overrides, *SMALL])), Recorder()
        task.hooks.append(seen)
        LocalTrainer().train(task)
        runs.append((task, seen))
    (npid, one), (pirl, two) = runs
    assert one.losses == two.losses
    assert len(set(one.losses)) == 6
    for step in range(6):
        assert torch.equal(one.ids[step], two.ids[step])
        assert torch.equal(one.rows[step], two.rows[step])
        assert_identical(one.gradients[step], two.gradients[step])
    left, right = everything(npid), everything(pirl)
    assert {name.split(".")[2] for name in right.keys() - left.keys()} == {"patches"}
    assert_identical(left, {name: value for name, value in right.items() if name in left})


@pytest.mark.parametrize(("method", "size"), [("jigsaw_32", 32), ("jigsaw", 224), ("npid_64", 64)])
def test_the_size_that_benchmarks_show_images_at(method: str, size: int) -> None:
    """A puzzle's transform has no image view that could say it."""
    pretraining = configs.load("train", [f"method={method}"])
    assert Weights({}, None, pretraining, {}, None, {}).image_size == size


# -- no epochs ---------------------------------------------------------------------------------------------------------


def test_no_epochs_write_the_initial_weights(tmp_path: Path) -> None:
    command = ["method=random_32", *SMALL[:5], f"run_dir={tmp_path}", "device=cpu", "seed=3"]
    assert main(command) == 0
    (path,) = checkpoints(tmp_path)
    assert path.name == "step_000000000.pt"
    saved = read_weights(path)
    torch.manual_seed(3)
    trunk = build_component("model", saved["input_args"]["config"]["trunk"])
    assert_identical(saved["classy_state_dict"]["base_model"]["model"]["trunk"], dict(trunk.state_dict()))
    before = path.stat().st_mtime_ns
    assert main(command) == 0
    assert path.stat().st_mtime_ns == before


@pytest.mark.filterwarnings("ignore:num_negatives")
@pytest.mark.parametrize("method", ["pirl", "npid", "jigsaw"])
def test_any_method_can_be_left_untrained(method: str) -> None:
    """Whatever its warm-up and milestones are."""
    overrides = [f"method={method}", *SMALL[:5], "num_epochs=0", "run_dir=null", "~checkpoint", "device=cpu"]
    task = build_task(configs.load("train", [*overrides, "batch_size=2"]))
    task.prepare()
    assert task.done_training()
    assert task.where == 0
