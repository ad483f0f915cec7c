"""PIRL inside VISSL: importing this module registers our loss, transforms, collator and head there, if VISSL is there.

VISSL shares classy-vision's registries of losses and transforms; collators and heads it keeps itself. After the import
a VISSL configuration may say::

    DATA:
      TRAIN:
        LABEL_TYPE: sample_index
        TRANSFORMS: [{name: pirl_views, transform: {name: image_and_jigsaw_patches}}]
        COLLATE_FUNCTION: jigsaw_collator
        INPUT_KEY_NAMES: [patches, images]
    MODEL:
      MULTI_INPUT_HEAD_MAPPING: [[patches, [flatten]], [images, [flatten]]]
      HEAD: {PARAMS: [[[jigsaw, {in_dim: 2048}]], [[mlp, {dims: [2048, 128]}]]]}
    LOSS:
      name: pirl_nce
      pirl_nce: {num_train_samples: -1, num_negatives: 32000}

VISSL fills ``num_train_samples`` in; all other keys of the loss are those of ``pirl_nce``, and ``output_views``, the
names of the model's outputs in the order of ``MULTI_INPUT_HEAD_MAPPING`` (``[patches, image]``). VISSL's own transforms
with ``patch_and_image_collator``, and its own heads, go as well. VISSL has no registry for the hooks of a loss:
``hook_generator`` adds the one that writes the bank, and is passed to VISSL's ``launch_distributed``.
``python -m pirl_plugin.integrations.vissl_main config=...`` does all of it, with the arguments of VISSL's
``tools/run_distributed_engines.py``.

Tried with VISSL's last state (commit 09270ed of 2 March 2024, with fairscale 0.4.13, iopath 0.1.9 and timm 1.0.31) on
Python 3.11, torch 2.15, classy-vision 0.7 and hydra-core 1.3: its trainer, ResNet-18, on the CPU, in one and in two
processes; its checkpoints hold the bank. GPUs have not been tried.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from classy_vision.dataset.transforms import TRANSFORM_REGISTRY, ClassyTransform
from classy_vision.hooks import ClassyHook
from classy_vision.losses import LOSS_REGISTRY
from PIL import Image
from torch import Tensor, nn

from pirl_plugin.data.collators import stack_views
from pirl_plugin.functional.pending_colours import coloured
from pirl_plugin.losses import PIRLNCELoss
from pirl_plugin.models import JigsawHead, Normalize
from pirl_plugin.registry import build

_OUTPUT_VIEWS = ("patches", "image")
_NORMALIZE = Normalize()


class VISSLPIRLNCELoss(PIRLNCELoss):
    """``pirl_nce`` for VISSL, whose models give lists; built from any other configuration it is ``PIRLNCELoss``."""

    output_views: Sequence[str] = _OUTPUT_VIEWS

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PIRLNCELoss:
        """Builds from VISSL's ``LOSS.pirl_nce``, or, without ``num_train_samples`` in it, from our own."""
        if "num_train_samples" not in config:
            loss: PIRLNCELoss = PIRLNCELoss.from_config(config)
            return loss
        settings = {key: value for key, value in config.items() if key not in ("num_train_samples", "output_views")}
        loss = super().from_config({**settings, "num_images": config["num_train_samples"]})
        loss.output_views = list(config.get("output_views") or _OUTPUT_VIEWS)  # type: ignore[attr-defined]
        return loss

    def forward(
        self,
        output: Mapping[str, Tensor] | Sequence[Tensor] | Tensor,
        target: Tensor,
        negative_ids: Tensor | None = None,
    ) -> Tensor:
        """See ``PIRLNCELoss``; outputs without names have those of ``output_views``, a single one is the image's."""
        return super().forward(self.named(output), target.flatten(), negative_ids)

    def named(self, output: Mapping[str, Tensor] | Sequence[Tensor] | Tensor) -> Mapping[str, Tensor]:
        """Outputs of a VISSL model by view.

        Raises:
            ValueError: another number of outputs than of names.
        """
        if isinstance(output, Mapping):
            return output
        if isinstance(output, Tensor):
            return {"image": output}
        if len(output) != len(self.output_views):
            raise ValueError(
                f"The model gave {len(output)} outputs, LOSS.pirl_nce.output_views names {list(self.output_views)}: "
                "name each, in the order of MODEL.MULTI_INPUT_HEAD_MAPPING."
            )
        return dict(zip(self.output_views, output, strict=True))


class VISSLMemoryBankUpdate(ClassyHook):
    """Writes the images' newest embeddings to the bank of ``pirl_nce``, after each step of a VISSL trainer."""

    on_phase_start = on_phase_end = on_end = ClassyHook._noop

    def on_start(self, task: Any) -> None:
        """Makes the rows identical on all processes."""
        task.base_loss.memory_bank.synchronize()

    def on_step(self, task: Any) -> None:
        """One write a step; VISSL's batches are whole optimiser steps."""
        if task.train:
            image = task.base_loss.named(task.last_batch.model_output)["image"]
            task.base_loss.memory_bank.update(task.last_batch.sample["target"].flatten(), image.detach())


class VISSLViews(ClassyTransform):
    """One of our transforms of an image as VISSL's wrapper of transforms wants it: ``{"data": views}``.

    Args:
        transform: its configuration.
    """

    def __init__(self, transform: Mapping[str, Any]) -> None:
        self.transform = build("transform", transform)

    def __call__(self, image: Image.Image) -> dict[str, Any]:
        """Views from torch's random state, which VISSL seeds in each worker."""
        return {"data": coloured(self.transform(image))}


class VISSLJigsawHead(nn.Module):
    """The head ``jigsaw`` on features as VISSL hands them on: the patches of all images below each other.

    Args:
        model_config: VISSL's; not needed.
        in_dim: channels of the features.
        **jigsaw: see ``jigsaw``: ``num_patches``, ``patch_dim``, ``dim``, ``hidden_dim``.
    """

    def __init__(self, model_config: Any, in_dim: int = 2048, **jigsaw: Any) -> None:
        super().__init__()
        self.head = JigsawHead(in_dim=in_dim, **jigsaw)

    def forward(self, batch: Tensor) -> Tensor:
        """``(B * num_patches, in_dim)``, or that and ``(1, 1)``, to ``(B, dim)``."""
        return self.head(batch.flatten(1).unflatten(0, (-1, self.head.num_patches)))


def jigsaw_collator(batch: Sequence[Mapping[str, Any]]) -> dict[str, list[Tensor]]:
    """VISSL's batch from what ``pirl_views`` with ``image_and_jigsaw_patches`` makes of VISSL's samples.

    Args:
        batch: ``{"data": [{"image": uint8 (3, S, S), "patches": (P, 3, s, s)}], "label": [image id], "data_valid":
            [1 or -1]}`` each.

    Returns:
        ``{"images": [(B, 3, S, S)], "patches": [(B * P, 3, s, s)], "label": [ids (B,)], "data_valid": [(B,)]}``,
        pixels as normalised float32.
    """
    stacked = stack_views([(item["data"][0], int(item["label"][0])) for item in batch], ("image", "patches"))
    views = stacked["input"]
    return {
        "images": [_NORMALIZE(views["image"])],
        "patches": [_NORMALIZE(views["patches"].flatten(0, 1))],
        "label": [stacked["target"]],
        "data_valid": [torch.tensor([item["data_valid"][0] > 0 for item in batch])],
    }


def hook_generator(cfg: Any) -> list[ClassyHook]:
    """VISSL's own hooks for a configuration, and the bank's where the loss is ``pirl_nce``."""
    hooks: list[ClassyHook] = importlib.import_module("vissl.hooks").default_hook_generator(cfg)
    return [*hooks, VISSLMemoryBankUpdate()] if cfg.LOSS.name == "pirl_nce" else hooks


def register() -> bool:
    """Puts our components into VISSL's registries, once; False, and nothing done, where there is no VISSL."""
    if importlib.util.find_spec("vissl") is None:
        return False
    collators = importlib.import_module("vissl.data.collators")
    heads = importlib.import_module("vissl.models.heads")
    if "jigsaw_collator" not in collators.COLLATOR_REGISTRY:
        collators.register_collator("jigsaw_collator")(jigsaw_collator)
        heads.register_model_head("jigsaw")(VISSLJigsawHead)
        TRANSFORM_REGISTRY["pirl_views"] = VISSLViews
        LOSS_REGISTRY["pirl_nce"] = VISSLPIRLNCELoss
    return True


REGISTERED = register()
