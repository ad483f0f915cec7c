"""``colours: device``: the same views, batches, losses and weights, to the last bit, as with colours in the loader."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from classy_vision.trainer import LocalTrainer
from cluster_methods import small
from PIL import Image
from small_task import DIM, Recorder, assert_identical, build, everything, train
from test_checkpoint_resume import Killer, Stop, checkpoints, resume, settings

from pirl_plugin.benchmarks import invariance
from pirl_plugin.commands import show_views
from pirl_plugin.data import rotation_views
from pirl_plugin.data.generated_scenes import GeneratedScenes
from pirl_plugin.data.loading import KeyedViews, SampledViews
from pirl_plugin.data.multi_views import ImageViews
from pirl_plugin.functional.pending_colours import coloured, program_name, view_of
from pirl_plugin.integrations.vissl import VISSLViews
from pirl_plugin.registry import build as build_component
from pirl_plugin.schema import ConfigError
from pirl_plugin.tasks import SSLPretrainingTask

EVERYTHING = {"equalize_probability": 0.4, "grayscale_probability": 0.3, "solarize_probability": 0.3}
BLURRED = {**EVERYTHING, "blur_probability": 0.5}
JIGSAW = {"name": "image_and_jigsaw_patches", "image_size": 16, "jigsaw_size": 24, "patch_size": 8}
TRANSFORMS: dict[str, dict[str, Any]] = {
    "image": {"name": "image_view", "image_size": 16, **BLURRED},
    "plain": {"name": "image_view", "image_size": 16, "fast": False, **BLURRED},
    "views": {"name": "image_views", "image_size": 16, "second_view": {"blur_probability": 1.0, "hue": 0.4}, **BLURRED},
    "named": {"name": "image_views", "image_size": 16, "view_names": ["image", "key"], **BLURRED},
    "crops": {"name": "image_views", "image_size": 16, "num_crops": 3, "crop_size": 9, **BLURRED},
    "jigsaw": {**JIGSAW, **BLURRED},
    "jigsaw flip": {**JIGSAW, "patch_flip": "crop", "rotate_crop": True, **BLURRED},
    "jigsaw as it is": {**JIGSAW, "patch_photometric": False},
    "puzzle": {"name": "jigsaw_puzzle", "num_permutations": 6, "grid": 2, "resize": 26, "jigsaw_size": 24,
               "patch_size": 10, "colours_of": "patch", **BLURRED},
    "beside rotated": {"name": "image_and_rotation", "image_size": 16, **EVERYTHING},
    "rotated": {"name": "rotated_image", "image_size": 16, **EVERYTHING},
    "four rotated": {"name": "rotated_image", "image_size": 16, "rotations": "all", **EVERYTHING},
}  # fmt: skip


def picture(seed: int, size: tuple[int, int] = (45, 36)) -> Image.Image:
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def samples(config: dict[str, Any], colours: str, count: int = 24) -> list[tuple[dict[str, torch.Tensor], int]]:
    transform = build_component("transform", {**config, "colours": colours})
    return [(transform(picture(i), np.random.default_rng(i)), i) for i in range(count)]


@pytest.mark.parametrize("config", TRANSFORMS.values(), ids=list(TRANSFORMS))
def test_views_and_batches_are_the_same(config: dict[str, Any]) -> None:
    in_loader, on_device = samples(config, "loader"), samples(config, "device")
    for (expected, _), (pending, _) in zip(in_loader, on_device, strict=True):
        for name, view in pending.items():
            if view.dtype == torch.uint8:
                assert view.is_contiguous()
                assert pending[program_name(name)].dtype == torch.float32
        assert_identical(coloured(pending), expected)
        assert list(coloured(pending)) == list(expected)
    collate = build_component("collator", {"name": "view_collator"})
    expected, pending = collate(in_loader)["input"], collate(on_device)["input"]
    changed = [name for name in expected if not torch.equal(pending[name], expected[name])]
    assert changed == [name for name in expected if expected[name].dtype == torch.uint8]  # there was something to do
    assert_identical(coloured(pending, torch.device("cpu")), expected)


def test_the_jigsaw_collator_hands_the_programs_on() -> None:
    collate = build_component("collator", {"name": "jigsaw_collator"})
    pending = collate(samples(TRANSFORMS["jigsaw"], "device"))["input"]
    assert {name: tuple(x.shape) for name, x in pending.items() if view_of(name, pending)} == {
        "image_program": (24, 13, 2),
        "patches_program": (24, 9, 13, 2),
    }
    assert_identical(coloured(pending), collate(samples(TRANSFORMS["jigsaw"], "loader"))["input"])


def test_a_turn_the_wrong_way_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flip after the turn is not the turn after a flip."""
    expected = samples(TRANSFORMS["rotated"], "loader")
    monkeypatch.setattr(rotation_views, "program_name", lambda view: "none")
    found = [coloured(views)["image"] for views, _ in samples(TRANSFORMS["rotated"], "device")]
    assert not all(torch.equal(image, views["image"]) for image, (views, _) in zip(found, expected, strict=True))


def test_only_programs_of_views_are_programs() -> None:
    views = {"image": torch.zeros(1, 3, 2, 2), "image_program": torch.zeros(1, 3, 2, 2, dtype=torch.uint8)}
    views |= {"other_program": torch.zeros(1, 2, 2), "_program": torch.zeros(1)}
    assert_identical(coloured(views), views)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "rotated_image", "blur_probability": 0.1}, "colours=device with blur_probability > 0"),
        ({"name": "image_and_rotation", "blur_probability": 0.1}, "colours=device with blur_probability > 0"),
        ({"name": "jigsaw_puzzle", "num_permutations": 6}, "use colours_of=patch or colours=loader"),
        ({"name": "goyal19_view"}, "colours"),
    ],
)
def test_colours_that_cannot_come_last_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        build_component("transform", {**config, "colours": "device"})


def test_another_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="colours"):
        build_component("transform", {"name": "image_view", "colours": "gpu"})


# -- who colours them --------------------------------------------------------------------------------------------------


def test_views_are_coloured_where_nobody_asks_for_programs() -> None:
    """Benchmarks' loaders give views as ever."""
    scenes, transforms = GeneratedScenes(num_images=4, size=32), []
    for colours in ("loader", "device"):
        transforms.append(build_component("transform", {**TRANSFORMS["jigsaw"], "colours": colours}))
    expected, found = (KeyedViews(scenes, transform, seed=3)[1, 2] for transform in transforms)
    assert_identical(found[1], expected[1])
    batches = SampledViews(scenes, transforms[1], build_component("collator", {"name": "jigsaw_collator"}), 2)
    assert set(next(iter(batches.iterator()))["input"]) == {"image", "patches"}


def test_show_views_shows_colours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn = []
    monkeypatch.setattr(show_views, "draw_views", lambda samples, *_, **__: drawn.append(samples))
    words = ["method=pirl_32", "dataset=generated_scenes", "dataset.num_images=3", "transform.equalize_probability=1"]
    for colours in ("loader", "device"):
        show_views.show_views([*words, f"transform.colours={colours}"], tmp_path / "views.png", 3)
    for expected, found in zip(*drawn, strict=True):
        assert_identical(found, expected)


def test_the_invariance_benchmark_takes_no_notice() -> None:
    config = {**JIGSAW, "colours": "device"}
    assert invariance.transformed_views(config) == ["patches"]
    assert invariance.transformed_views({**TRANSFORMS["image"], "colours": "device"}) == ["image"]
    contexts: list[Any] = [SimpleNamespace(pretraining={"transform": own}) for own in (config, JIGSAW)]
    chosen, plain = (invariance.transform_for(context) for context in contexts)
    assert chosen == plain == invariance.transform_for(contexts[1], config)
    assert "colours" not in plain


def test_vissl_gets_coloured_views() -> None:
    found = []
    for colours in ("loader", "device"):
        torch.manual_seed(0)
        found.append(VISSLViews({**TRANSFORMS["jigsaw"], "colours": colours})(picture(1))["data"])
    assert_identical(*found)


# -- pretraining -------------------------------------------------------------------------------------------------------


def changed(colours: str) -> dict[str, Any]:
    return {"transform": {**TRANSFORMS["jigsaw"], "colours": colours}}


def test_pretraining_and_its_resume_are_the_same(tmp_path: Path) -> None:
    in_loader, on_device = Recorder(), Recorder()
    expected = train(in_loader, **settings(tmp_path / "loader", **changed("loader")))
    found = train(on_device, **settings(tmp_path / "device", **changed("device")))
    assert in_loader.losses == on_device.losses
    assert_identical(everything(found), everything(expected))
    first, second, folder = Recorder(), Recorder(), tmp_path / "pieces"
    with pytest.raises(Stop):
        train(first, Killer(step=5), **settings(folder, checkpoint={"every_steps": 4}, **changed("device")))
    assert checkpoints(folder)[-1].name == "step_000000004.pt"
    resumed = resume(folder, second, checkpoint={"every_steps": 4}, **changed("device"))
    assert first.losses[:4] + second.losses == in_loader.losses
    assert_identical(everything(resumed), everything(expected))


def test_an_idle_views_program_goes_with_it() -> None:
    """The patches have no weight in the loss: they are neither coloured nor computed."""

    class Views(Recorder):
        def on_step(self, task: Any) -> None:
            assert set(task.last_batch.sample["input"]) == {"image"}
            super().on_step(task)

    in_loader, on_device = Views(), Views()
    train(in_loader, loss={"lam": 0.0}, **changed("loader"))
    train(on_device, loss={"lam": 0.0}, **changed("device"))
    assert in_loader.losses == on_device.losses


@pytest.mark.parametrize("method", ["swav", "deepcluster_v2"])
def test_several_crops_and_a_pass_before_the_first_epoch(method: str) -> None:
    """SwAV's multi-crop; DeepCluster-v2's clusters of embeddings that a hook has computed."""
    found = []
    for colours in ("loader", "device"):
        config = small(method, f"transform.colours={colours}", num_epochs=1)
        task = SSLPretrainingTask.from_config(config)
        LocalTrainer().train(task)
        found.append({**task.base_model.state_dict(), **task.base_loss.state_dict()})
    assert_identical(*found)


def test_a_momentum_encoder_sees_the_colours() -> None:
    found = []
    for colours in ("loader", "device"):
        task = build(
            transform={**TRANSFORMS["named"], "colours": colours},
            collator={"name": "view_collator"},
            model={"name": "momentum_ssl_model", "shared_heads": {"key": "image"}, "momentum_views": ["key"]},
            heads={"image": {"name": "linear", "dim": DIM}},
            loss={"name": "moco", "dim": DIM, "memory_bank": {"name": "fifo_queue", "size": 16}},
            hooks=[{"name": "momentum_update"}, {"name": "memory_bank_update", "view": "momentum/key"}],
        )
        LocalTrainer().train(task)
        found.append({**task.base_model.state_dict(), **task.base_loss.state_dict()})
    assert_identical(*found)


def test_the_bfloat16_check_looks_at_views_alone() -> None:
    train(precision="bf16", **changed("device"))


@pytest.mark.parametrize("setting", [{"colours": "device"}, {"fast": False}])
def test_how_views_are_made_is_not_said_of_the_second_alone(setting):
    with pytest.raises(ValueError, match=f"second_view.{next(iter(setting))}"):
        ImageViews(second_view=setting)
