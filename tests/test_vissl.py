"""PIRL inside VISSL: what is handed over there, by itself; and, where VISSL can be imported, VISSL's own trainer."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from classy_vision.losses import LOSS_REGISTRY, build_loss
from PIL import Image

from pirl_plugin.integrations import vissl, vissl_main
from pirl_plugin.losses import PIRLNCELoss
from pirl_plugin.models import JigsawHead, Normalize
from pirl_plugin.schema import ConfigError
from pirl_plugin.weights.files import find_trunk, read_weights

HERE = Path(__file__).parent
SETTINGS: dict[str, Any] = {"dim": 5, "num_negatives": 6, "temperature": 0.3, "estimator": "infonce", "lam": 0.3}


class AttrDict(dict):
    """VISSL hands nested configurations over as such."""

    def __getattr__(self, key: str) -> Any:
        if key not in self:
            raise AttributeError(key)
        return self[key]


def of_vissl(**settings: Any) -> vissl.VISSLPIRLNCELoss:
    torch.manual_seed(0)
    config = AttrDict(name="pirl_nce", num_train_samples=9, **{**SETTINGS, **settings})
    return vissl.VISSLPIRLNCELoss.from_config(config)  # type: ignore[return-value]


def ours(**settings: Any) -> PIRLNCELoss:
    torch.manual_seed(0)
    return PIRLNCELoss(num_images=9, **{**SETTINGS, **settings})


IMAGE, PATCHES = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(3))
IDS, NEGATIVES = torch.tensor([0, 3, 8, 5]), torch.tensor([1, 2, 4])


def test_the_loss_is_ours_on_lists_in_vissls_order() -> None:
    expected = ours()({"image": IMAGE, "patches": PATCHES}, IDS, NEGATIVES)
    assert torch.equal(of_vissl()([PATCHES, IMAGE], IDS, NEGATIVES), expected)
    assert torch.equal(of_vissl()([PATCHES, IMAGE], IDS.unsqueeze(1), NEGATIVES), expected)
    assert torch.equal(of_vissl(output_views=["image", "patches"])([IMAGE, PATCHES], IDS, NEGATIVES), expected)
    assert not torch.equal(of_vissl()([IMAGE, PATCHES], IDS, NEGATIVES), expected)
    # NPID: VISSL takes a single output out of its list
    assert torch.equal(of_vissl(lam=0.0)(IMAGE, IDS, NEGATIVES), ours(lam=0.0)({"image": IMAGE}, IDS, NEGATIVES))


def test_settings_are_checked_there_as_here() -> None:
    bank = AttrDict(name="ema_memory_bank", momentum=0.25)
    assert of_vissl(memory_bank=bank).memory_bank.momentum == 0.25
    with pytest.raises(ConfigError, match="temprature: unknown key. Did you mean 'temperature'"):
        of_vissl(temprature=0.1)
    with pytest.raises(ValueError, match="gave 3 outputs, LOSS.pirl_nce.output_views names"):
        of_vissl()([IMAGE, IMAGE, PATCHES], IDS)
    plain = vissl.VISSLPIRLNCELoss.from_config({"name": "pirl_nce", "num_images": 9, **SETTINGS})
    assert type(plain) is PIRLNCELoss


def test_the_hook_writes_the_images_embeddings_after_a_training_step() -> None:
    loss = of_vissl()
    before = loss.memory_bank.rows.clone()
    batch = SimpleNamespace(model_output=[PATCHES, IMAGE], sample={"target": IDS})
    hook, task = vissl.VISSLMemoryBankUpdate(), SimpleNamespace(base_loss=loss, last_batch=batch, train=False)
    hook.on_start(task)
    hook.on_step(task)
    assert torch.equal(loss.memory_bank.rows, before)
    task.train = True
    hook.on_step(task)
    expected = F.normalize(0.5 * before[IDS] + 0.5 * F.normalize(IMAGE, dim=1), dim=1)
    torch.testing.assert_close(loss.memory_bank.rows[IDS], expected)
    others = [1, 2, 4, 6, 7]
    assert torch.equal(loss.memory_bank.rows[others], before[others])


def test_views_collator_and_head() -> None:
    """From VISSL's sample of one image to the head's embedding, with the patches of all images below each other."""
    name = "image_and_jigsaw_patches"
    views = vissl.VISSLViews({"name": name, "image_size": 16, "jigsaw_size": 24, "patch_size": 8})
    samples = []
    for index in (7, 2):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        torch.manual_seed(index)
        made = views(Image.fromarray(pixels))["data"]
        samples.append({"data": [made], "label": [index], "data_valid": [1 if index == 7 else -1], "data_idx": [index]})
    batch = vissl.jigsaw_collator(samples)
    assert [batch[key][0].tolist() for key in ("label", "data_valid")] == [[7, 2], [True, False]]
    assert batch["images"][0].shape == (2, 3, 16, 16)
    assert batch["patches"][0].shape == (18, 3, 8, 8)
    torch.testing.assert_close(batch["patches"][0][9:], Normalize()(samples[1]["data"][0]["patches"]))
    torch.testing.assert_close(batch["images"][0][0], Normalize()(samples[0]["data"][0]["image"]))

    head = vissl.VISSLJigsawHead(AttrDict(), in_dim=6, patch_dim=3, dim=4)
    same = JigsawHead(in_dim=6, patch_dim=3, dim=4)
    same.load_state_dict(head.head.state_dict())
    features = torch.randn(2, 9, 6)
    torch.testing.assert_close(head(features.flatten(0, 1)), same(features))
    torch.testing.assert_close(head(features.flatten(0, 1)[..., None, None]), same(features))


@pytest.mark.skipif(vissl.REGISTERED, reason="VISSL is there")
def test_without_vissl_nothing_happens() -> None:
    assert LOSS_REGISTRY["pirl_nce"] is PIRLNCELoss
    assert vissl.register() is False
    with pytest.raises(ImportError, match="VISSL is not installed"):
        vissl_main.main(["config=x"])


# -- the real one ------------------------------------------------------------------------------------------------------

needs_vissl = pytest.mark.skipif(not vissl.REGISTERED, reason="VISSL cannot be imported: it is not on PYTHONPATH")

CONFIG = """
SEED_VALUE: 0
LOG_FREQUENCY: 1
MULTI_PROCESSING_METHOD: fork
TRAINER: {TRAIN_STEP_NAME: standard_train_step}
TEST_MODEL: False
METERS: {name: ""}
DATA:
  NUM_DATALOADER_WORKERS: 0
  PIN_MEMORY: False
  TRAIN:
    DATA_SOURCES: [disk_folder]
    DATASET_NAMES: [imagenet1k_folder]
    BATCHSIZE_PER_REPLICA: 4
    LABEL_TYPE: sample_index
    TRANSFORMS:
      - name: pirl_views
        transform: {name: image_and_jigsaw_patches, image_size: 32, jigsaw_size: 48, patch_size: 16}
    COLLATE_FUNCTION: jigsaw_collator
    INPUT_KEY_NAMES: [patches, images]
MODEL:
  TRUNK: {NAME: resnet, RESNETS: {DEPTH: 18}}
  MULTI_INPUT_HEAD_MAPPING: [[patches, [flatten]], [images, [flatten]]]
  HEAD:
    PARAMS: [[[jigsaw, {in_dim: 512, patch_dim: 16, dim: 16}]], [[mlp, {dims: [512, 16]}]]]
LOSS:
  name: pirl_nce
  pirl_nce: {num_train_samples: -1, dim: 16, num_negatives: 8}
OPTIMIZER:
  name: sgd
  num_epochs: 2
  param_schedulers: {lr: {name: cosine, start_value: 0.05, end_value: 0.0001, update_interval: step}}
DISTRIBUTED: {BACKEND: gloo, NUM_NODES: 1, NUM_PROC_PER_NODE: 2, RUN_ID: auto, INIT_METHOD: tcp}
MACHINE: {DEVICE: cpu}
CHECKPOINT: {AUTO_RESUME: False, CHECKPOINT_FREQUENCY: 1}
"""

# transforms, collator and heads as in VISSL's own configuration of PIRL, at a small size; the loss alone is ours
VISSLS_OWN = """
DATA:
  TRAIN:
    TRANSFORMS:
      - {name: ImgPilToPatchesAndImage, crop_size_image: 64, crop_size_patches: 255, num_patches: 9}
      - {name: ColorJitter, brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.2}
      - {name: RandomHorizontalFlip}
      - {name: ToTensor}
      - {name: Normalize, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
    COLLATE_FUNCTION: patch_and_image_collator
MODEL:
  HEAD:
    PARAMS:
      - [[mlp, {dims: [512, 16]}], [siamese_concat_view, {num_towers: 9}], [mlp, {dims: [144, 16]}]]
      - [[mlp, {dims: [512, 16]}]]
"""


@needs_vissl
def test_vissl_finds_our_components() -> None:
    registries = (importlib.import_module(name) for name in ("vissl.data.collators", "vissl.models.heads"))
    collators, heads = registries
    assert collators.get_collator("jigsaw_collator", {}).func is vissl.jigsaw_collator
    assert heads.get_model_head("jigsaw") is vissl.VISSLJigsawHead
    config = AttrDict(name="pirl_nce", num_train_samples=9, **SETTINGS)
    assert isinstance(build_loss(config), vissl.VISSLPIRLNCELoss)
    assert vissl.register() is True  # once more


@needs_vissl
@pytest.mark.parametrize("parts", [{}, yaml.safe_load(VISSLS_OWN)], ids=["our parts", "VISSL's own parts"])
def test_vissl_trains_and_its_checkpoint_holds_the_bank(parts: dict[str, Any], tmp_path: Path) -> None:
    """Two processes, two epochs of two steps: every image's row has moved, and our reader finds the trunk."""
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for index in range(16):
        pixels = np.random.default_rng(index).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    config = yaml.safe_load(CONFIG)
    if parts:
        config["DATA"]["TRAIN"] |= parts["DATA"]["TRAIN"]
        config["MODEL"] |= parts["MODEL"]
    config["DATA"]["TRAIN"]["DATA_PATHS"] = [str(folder.parent)]
    config["CHECKPOINT"]["DIR"] = str(tmp_path / "run")
    (tmp_path / "configs" / "config").mkdir(parents=True)
    text = "# @package _global_\n" + yaml.safe_dump({"config": config})
    (tmp_path / "configs" / "config" / "small.yaml").write_text(text)
    command = [sys.executable, "-m", "pirl_plugin.integrations.vissl_main", "config=small"]
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "VISSLPIRLNCELoss" in (tmp_path / "run" / "log.txt").read_text()
    states = [
        torch.load(tmp_path / "run" / name, weights_only=False)
        for name in ("model_phase0.torch", "model_final_checkpoint_phase1.torch")
    ]
    first, last = (state["loss"]["memory_bank.rows"] for state in states)
    assert first.shape == (16, 16)
    assert (first != last).any(dim=1).all()
    torch.testing.assert_close(last.norm(dim=1), torch.ones(16))
    assert states[1]["loss"]["normalizer_batches"] == 1
    trunk = find_trunk(read_weights(tmp_path / "run" / "model_final_checkpoint_phase1.torch"))
    assert trunk.state["conv1.weight"].shape == (64, 3, 7, 7)
