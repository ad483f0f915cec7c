"""SimCLR, MoCo, BYOL, SimSiam, Barlow Twins and VICReg as whole methods, and MoCo's loss, which is ours."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightly.loss
import pytest
import torch
import torch.nn.functional as F
from classy_vision.trainer import LocalTrainer
from lightly_methods import METHODS, Watch, small
from run_command import run
from small_task import assert_identical, everything, freeze_batch_norm
from test_checkpoint_resume import Killer, Stop

from pirl_plugin.commands.train import main
from pirl_plugin.hooks.checkpoint import checkpoints
from pirl_plugin.losses.moco import MoCoLoss
from pirl_plugin.models.momentum import MomentumSSLModel
from pirl_plugin.registry import build
from pirl_plugin.tasks import SSLPretrainingTask
from pirl_plugin.weights.files import read_weights

# -- MoCo's loss -------------------------------------------------------------------------------------------------------


def moco(rows: list[list[float]] | torch.Tensor, **arguments: Any) -> MoCoLoss:
    rows = torch.as_tensor(rows)
    bank = {"name": "fifo_queue", "size": len(rows)}
    loss = build("loss", {"name": "moco", "dim": rows.shape[1], "memory_bank": bank, **arguments})
    loss.memory_bank.rows.copy_(rows)
    return loss


def test_by_hand() -> None:
    """tau = 1, own key at 1, the queue at 0, 1 and -1: log(2 e + 1 + 1 / e) - 1; the second image's key is opposite."""
    loss = moco([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]], temperature=1.0)
    output = {"image": torch.tensor([[2.0, 0.0], [3.0, 0.0]]), "momentum/key": torch.tensor([[5.0, 0.0], [-1.0, 0.0]])}
    others = math.e + 1 + 1 / math.e
    expected = (math.log(math.e + others) - 1 + math.log(1 / math.e + others) + 1) / 2
    assert loss(output, torch.arange(2)).item() == pytest.approx(expected)
    assert loss.last_statistics["positive_similarity"].item() == pytest.approx(0)
    assert loss.last_statistics["accuracy"].item() == 0  # a tie is no success


def test_lightly_s_loss_with_the_same_bank() -> None:
    queries, keys, rows = torch.randn(6, 4), torch.randn(6, 4), F.normalize(torch.randn(9, 4), dim=1)
    direct = lightly.loss.NTXentLoss(temperature=0.2, memory_bank_size=(9, 4))
    direct.memory_bank.bank.copy_(rows)
    found = moco(rows, temperature=0.2)({"image": queries, "momentum/key": keys}, torch.arange(6))
    torch.testing.assert_close(found, direct(queries, keys))


def test_a_batch_s_own_keys_are_no_negatives_and_no_gradient_flows_into_keys() -> None:
    rows = F.normalize(torch.randn(9, 4), dim=1)
    loss = moco(rows)
    queries, keys = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    value = loss({"image": queries, "momentum/key": keys}, torch.arange(2))
    other_image = torch.stack([keys[0], keys[1] + 1]).detach()
    changed = loss({"image": queries, "momentum/key": other_image}, torch.arange(2))
    one, two = (loss({"image": queries[:1], "momentum/key": k[:1]}, torch.arange(1)) for k in (keys, other_image))
    assert torch.equal(one, two)  # the first image's term does not see the second one's key
    assert value != changed
    value.backward()
    assert queries.grad is not None
    assert keys.grad is None
    assert torch.equal(loss.memory_bank.rows, rows)  # it only reads


def test_what_is_missing_is_named() -> None:
    loss = moco(torch.eye(3))
    with pytest.raises(KeyError, match=r"needs the output 'momentum/key'; the model gave \['image'\]"):
        loss({"image": torch.zeros(2, 3)}, torch.arange(2))
    with pytest.raises(ValueError, match=r"must be \(2, 3\) \(batch, loss.dim\), got \(2, 4\) and \(2, 4\)"):
        loss({"image": torch.zeros(2, 4), "momentum/key": torch.zeros(2, 4)}, torch.arange(2))


# -- whole methods -----------------------------------------------------------------------------------------------------


def trained(method: str, **changes: Any) -> tuple[SSLPretrainingTask, Watch]:
    watch = Watch()
    task = SSLPretrainingTask.from_config(small(method, **changes))
    task.hooks.append(watch)
    LocalTrainer().train(task)
    return task, watch


def weights(task: SSLPretrainingTask) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in task.base_model.state_dict().items()}


@pytest.mark.parametrize("method", [*METHODS, *(f"{name}_32" for name in METHODS)])
def test_every_yaml_trains(method: str) -> None:
    task, watch = trained(method)
    start = weights(SSLPretrainingTask.from_config(small(method)))
    assert len(watch.losses) >= 2
    assert all(map(math.isfinite, watch.losses))
    assert watch.without_gradient == []
    still = {name for name, value in weights(task).items() if torch.equal(start[name], value)}
    online = {name for name, _ in task.base_model.named_parameters() if not name.startswith("momentum_")}
    # a bias before a normalisation, or one that both views have, changes nothing but by rounding
    assert all(re.fullmatch(r"heads\.image\.projection\.layers\.\d\.bias", name) for name in still & online)
    assert not any(name.startswith("momentum_trunk.conv1") for name in still)
    assert watch.outputs[0]["image"].shape in ((8, 16), (8, 2, 16))
    assert math.isfinite(task.health["rankme"])
    assert sorted(set(watch.ids)) == list(range(16))
    embedding = task.base_model.eval()({"image": torch.zeros(3, 3, 16, 16, dtype=torch.uint8)})["image"]
    assert embedding.shape == (3, 16)  # as benchmarks ask for it


@pytest.mark.parametrize("method", [f"{name}_32" for name in METHODS])
def test_the_loss_falls(method: str) -> None:
    """All 16 images in each of 20 steps, with crops alone; the first two steps fill MoCo's queue."""
    transform = {**small(method)["transform"], "image_scale": [0.7, 1.0], "jitter_probability": 0.0}
    transform["grayscale_probability"] = 0.0
    optimizer = {"name": "scheduled_sgd", "lr": 0.03, "lr_batch_size": None}
    _, watch = trained(method, batch_size=16, num_epochs=20, transform=transform, optimizer=optimizer)
    early, late = sum(watch.losses[2:6]) / 4, sum(watch.losses[-4:]) / 4
    assert late < early - 0.05


def test_moco_keys_enter_the_queue_in_order() -> None:
    """Two batches of eight after 20 random rows: 16 keys, the last four rows as they were."""
    task, watch = trained("moco_v2")
    keys = torch.cat([F.normalize(output["momentum/key"], dim=1) for output in watch.outputs])
    torch.testing.assert_close(watch.rows[-1][:16], keys)
    assert torch.equal(watch.rows[-1][16:], watch.rows[0][16:])
    assert {"image", "momentum/key"} == set(watch.outputs[0])
    assert task.base_loss.memory_bank.position.item() == 16


def test_moco_queue_must_be_written_with_the_keys() -> None:
    hooks = [{"name": "memory_bank_update"}, {"name": "momentum_update"}]
    with pytest.raises(ValueError, match="memory_bank_update must store the view 'momentum/key' for this loss, not"):
        trained("moco_v2", hooks=hooks)


# -- batch norm in groups, as on several GPUs --------------------------------------------------------------------------


def momentum_model(**arguments: Any) -> MomentumSSLModel:
    torch.manual_seed(5)
    return build(
        "model",
        {"name": "momentum_ssl_model", "shared_heads": {"key": "image"}, **arguments},
        trunk={"name": "resnet_trunk", "depth": 18, "width": 0.125, "stem": "small"},
        heads={"image": {"name": "mlp", "dim": 3, "hidden_dim": 4, "batch_norm": True}},
    )


MOCO_VIEWS: dict[str, Any] = {"online_views": ["image"], "momentum_views": ["key"]}


def two_views() -> dict[str, torch.Tensor]:
    pixels = torch.randint(256, (2, 12, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return {"image": pixels[0], "key": pixels[1]}


def test_groups_are_embedded_as_if_each_were_alone() -> None:
    views = two_views()
    found = momentum_model(batch_norm_groups=3, **MOCO_VIEWS)(views)
    alone = momentum_model(**MOCO_VIEWS)
    parts = [alone({view: x[start : start + 4] for view, x in views.items()}) for start in (0, 4, 8)]
    for name in ("image", "momentum/key"):
        assert torch.equal(found[name], torch.cat([part[name] for part in parts]))
        assert not torch.allclose(found[name], momentum_model(**MOCO_VIEWS)(views)[name], atol=1e-2)
    model = momentum_model(batch_norm_groups=3, **MOCO_VIEWS).eval()
    torch.testing.assert_close(model(views)["image"], momentum_model().eval()(views)["image"])


def test_keys_are_shuffled_among_the_groups_and_come_back() -> None:
    """Each group of keys has one pixel value in all its images; after the shuffle, groups are mixed."""
    model = momentum_model(batch_norm_groups=3, shuffle_batch_norm=True, **MOCO_VIEWS)
    seen: list[torch.Tensor] = []
    model.normalize.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][:, 0, 0, 0]))
    views = two_views()
    views["key"] = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 3, 8, 8).contiguous() * 20
    freeze_batch_norm(model)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()
    shuffled = model(views)["momentum/key"]
    queries, keys = seen[:3], seen[3:]
    assert torch.equal(torch.cat(queries), views["image"][:, 0, 0, 0])
    assert not torch.equal(torch.cat(keys), views["key"][:, 0, 0, 0])
    assert sorted(torch.cat(keys).tolist()) == list(range(0, 240, 20))
    torch.testing.assert_close(shuffled, model.eval()(views)["momentum/key"])
    assert len(shuffled.unique(dim=0)) == 12


def test_groups_of_different_size_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_norm_groups must divide the batch of a process, 12, got 5"):
        momentum_model(batch_norm_groups=5)(two_views())


# -- what single methods ask for ---------------------------------------------------------------------------------------


def test_the_momentum_copy_follows_by_hand() -> None:
    """BYOL's cosine from 0.996: step 0 of 2 moves by 0.004, step 1 by half of it."""
    name = "heads.image.projection.layers.0.weight"
    task = SSLPretrainingTask.from_config(small("byol"))
    start, online = weights(task), []

    class Online(Watch):
        def on_step(self, task: Any) -> None:
            online.append(weights(task)[name])

    task.hooks.append(Online())
    LocalTrainer().train(task)
    assert torch.equal(start[f"momentum_{name}"], start[name])
    first = 0.996 * start[name] + 0.004 * online[0]
    torch.testing.assert_close(weights(task)[f"momentum_{name}"], 0.998 * first + 0.002 * online[1])
    assert not torch.equal(online[0], online[1])


def test_simsiam_s_prediction_head_keeps_its_rate() -> None:
    task, _ = trained("simsiam")
    groups = task.optimizer.param_groups
    named = dict(task.base_model.named_parameters())
    rates = {name: group["lr"] for group in groups for name, p in named.items() if any(p is q for q in group["params"])}
    peak = 0.05 * 8 / 256
    (of_prediction,) = {rate for name, rate in rates.items() if ".prediction." in name}
    (of_others,) = {rate for name, rate in rates.items() if ".prediction." not in name}
    assert (of_prediction, of_others) == (pytest.approx(peak), pytest.approx(peak / 2))
    assert task.optimizer.options_view.lr == pytest.approx(peak / 2)


# -- stopped and started again -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["moco_v2", "barlow_twins"])
def test_resumed_equals_uninterrupted(tmp_path: Path, method: str) -> None:
    """Three epochs of two steps, stopped in the second: weights, copy, queue and LARS's momentum are the same bits."""
    saving = {"name": "run_checkpoint", "every_steps": 1, "background": False}
    settings = {"num_epochs": 3, "checkpoint": saving}
    whole, _ = trained(method, run_dir=str(tmp_path / "whole"), **settings)
    pieces = {**settings, "run_dir": str(tmp_path / "pieces")}
    task = SSLPretrainingTask.from_config(small(method, **pieces))
    task.hooks.append(Killer(step=3))
    with pytest.raises(Stop):
        LocalTrainer().train(task)
    torch.manual_seed(99)
    resumed = SSLPretrainingTask.from_config(small(method, **pieces))
    resumed._set_checkpoint_dict(read_weights(checkpoints(tmp_path / "pieces")[-1]))
    assert checkpoints(tmp_path / "pieces")[-1].name == "step_000000003.pt"
    LocalTrainer().train(resumed)
    expected = everything(whole)
    assert_identical(expected, everything(resumed))
    assert any(name.startswith("momentum.") for name in expected)
    if method == "moco_v2":
        assert {"loss.memory_bank.rows", "loss.memory_bank.position"} <= set(expected)
        assert any("momentum_trunk" in name for name in expected)


# -- without lightly ---------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_lightly(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightly"]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("_no_lightly")
@pytest.mark.parametrize("method", ["simclr_32", "byol", "simsiam_32", "barlow_twins", "vicreg_32"])
def test_a_method_that_needs_lightly_says_so_in_one_line(tmp_path: Path, method: str) -> None:
    outcome = run(main, [f"method={method}", "trunk=resnet18_narrow", "dataset.num_images=8", f"run_dir={tmp_path}"])
    assert outcome.code == 1
    (line,) = [line for line in outcome.err.splitlines() if "lightly" in line]
    assert line.startswith("error: The head ")
    assert line.endswith("pip install 'pirl-plugin[methods]'")
    assert "Traceback" not in outcome.err


@pytest.mark.usefixtures("_no_lightly")
@pytest.mark.parametrize(
    ("kind", "name"),
    [("loss", name) for name in ("nt_xent", "byol", "simsiam", "barlow_twins", "vicreg")]
    + [("head", name) for name in ("simclr", "byol", "simsiam", "barlow_twins")],
)
def test_every_part_that_needs_lightly_says_so(kind: str, name: str) -> None:
    with pytest.raises(ImportError, match=rf"The {kind} {name} needs the package lightly.*'pirl-plugin\[methods\]'"):
        build(kind, {"name": name}, in_dim=8, unique_id="image")


@pytest.mark.usefixtures("_no_lightly")
def test_moco_needs_no_lightly() -> None:
    _, watch = trained("moco_v2_32")
    assert len(watch.losses) == 2
    assert build("optimizer", {"name": "scheduled_lars"}).trust_coefficient == 0.001


def test_importing_and_listing_do_without() -> None:
    """In a process of its own, where nobody has imported lightly before."""
    program = (
        "import sys, json\n"
        "import pirl_plugin\n"
        "imported = 'lightly' in sys.modules\n"
        "sys.modules['lightly'] = None\n"
        "from pirl_plugin.commands.list import main\n"
        "code = main(['loss', '--brief'])\n"
        "print(json.dumps([imported, code]))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [False, 0]
    assert "vicreg" in done.stdout
