"""Tables: what libraries call a ResNet's entries, where their checkpoints have them, and which of several to take."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Naming:
    """What a library calls the entries of a ResNet.

    Attributes:
        name: of this naming.
        anchor: an entry that every ResNet has under these names; where it is, a trunk is.
        rules: ``(regular expression, replacement)``, applied one after the other, to torchvision's names. They take
            names that no ResNet has along, such as those of squeeze-and-excitation inside a block, so that loading
            meets them; leaving them out would make another network of it.
        with_: entries that must be there too, where the anchor alone does not tell.
    """

    name: str
    anchor: str
    rules: tuple[tuple[str, str], ...] = ()
    with_: tuple[str, ...] = ()

    def to_torchvision(self, entry: str) -> str:
        """The entry's name in torchvision; an entry outside the trunk comes back in any other form."""
        for pattern, replacement in self.rules:
            entry = re.sub(pattern, replacement, entry)
        return entry


_CLASSY_RULES = (
    (r"\._module\.", "."),  # classy-vision wraps blocks that heads may hang on
    (r"^initial_block\.0\.", "conv1."),
    (r"^initial_block\.1\.", "bn1."),
    *((rf"^blocks\.{stage}\.block{stage}-(\d+)\.", rf"layer{stage + 1}.\1.") for stage in range(4)),
    *((rf"\.convolutional_block\.{3 * n}\.", f".conv{n + 1}.") for n in range(3)),
    *((rf"\.convolutional_block\.{3 * n + 1}\.", f".bn{n + 1}.") for n in range(2)),
)

_DETECTRON2_RULES = (
    (r"^stem\.conv1\.norm\.", "bn1."),
    (r"^stem\.", ""),
    *((rf"^res{stage + 1}\.", f"layer{stage}.") for stage in range(1, 5)),
    (r"\.conv(\d)\.norm\.", r".bn\1."),
    (r"\.shortcut\.norm\.", ".downsample.1."),
    (r"\.shortcut\.", ".downsample.0."),
)

NAMINGS: list[Naming] = [
    Naming("torchvision", "layer1.0.conv1.weight"),
    Naming(  # nn.Sequential(*resnet.children()): conv1, bn1, relu, maxpool, layer1, ...
        "numbered children",
        "4.0.conv1.weight",
        ((r"^0\.", "conv1."), (r"^1\.", "bn1."), *((rf"^{stage + 3}\.", f"layer{stage}.") for stage in range(1, 5))),
        with_=("0.weight", "1.weight", "7.0.conv1.weight"),
    ),
    Naming(  # the same of a ResNet that does without modules for ReLU and pooling, as lightly's for small images
        "numbered children, no pooling",
        "2.0.conv1.weight",
        (
            (r"^0\.", "conv1."),
            (r"^1\.", "bn1."),
            *((rf"^{stage + 1}\.", f"layer{stage}.") for stage in range(1, 5)),
            (r"\.shortcut\.", ".downsample."),
        ),
        with_=("0.weight", "1.weight"),
    ),
    Naming(  # a detector with a C4 backbone keeps res5 in its box head
        "detectron2, C4",
        "backbone.res2.0.conv1.weight",
        ((r"^(?:backbone\.|roi_heads\.(?=res5\.))", ""), *_DETECTRON2_RULES),
        with_=("roi_heads.res5.0.conv1.weight",),
    ),
    Naming("detectron2", "res2.0.conv1.weight", _DETECTRON2_RULES),
    Naming(
        "classy-vision, bottlenecks",
        "blocks.0.block0-0.convolutional_block.0.weight",
        (*_CLASSY_RULES, (r"^(layer\d\.\d+)\.bn\.", r"\1.bn3.")),
        with_=("blocks.0.block0-0.convolutional_block.6.weight",),
    ),
    Naming(
        "classy-vision, basic blocks",
        "blocks.0.block0-0.convolutional_block.0.weight",
        (*_CLASSY_RULES, (r"^(layer\d\.\d+)\.bn\.", r"\1.bn2.")),
    ),
]
"""Searched in this order; the first that fits a place in the checkpoint is taken."""


@dataclass(frozen=True)
class TrunkFormat:
    """One kind of checkpoint, known by where in it the trunk is.

    Attributes:
        name: for people; ``{prefix}`` in it is replaced.
        prefix: regular expression of all that stands before the entries' names, the containers' keys included.
        naming: regular expression of the naming's name.
    """

    name: str
    prefix: str
    naming: str = "torchvision"


_IN_STATE_DICT = r"(?:(?:state_dict|model|model_state_dict)\.)?(?:module\.)?(?:model\.)?"
_VISSL = r"classy_state_dict\.base_model\.model\.trunk\."

FORMATS: list[TrunkFormat] = [
    TrunkFormat("pirl_plugin checkpoint", _VISSL),
    TrunkFormat("torchvision state dict", ""),
    TrunkFormat("VISSL checkpoint", _VISSL + r"(?:base_model\.)?_feature_blocks\."),
    TrunkFormat("VISSL state dict", r"(?:\w+\.)?(?:trunk\.)?(?:base_model\.)?_feature_blocks\."),
    TrunkFormat("classy-vision checkpoint", _VISSL, "classy-vision.*"),
    TrunkFormat("MoCo checkpoint", _IN_STATE_DICT + r"encoder_q\.(?:0\.)?"),
    TrunkFormat("MoCo v3 checkpoint", _IN_STATE_DICT + r"base_encoder\."),
    TrunkFormat("DINO checkpoint", r"(?:teacher|student)\.(?:module\.)?(?:backbone\.)?"),
    TrunkFormat("encoder checkpoint", _IN_STATE_DICT + r"(?:encoder|resnet)\."),
    TrunkFormat("backbone checkpoint", _IN_STATE_DICT + r"backbone\."),
    TrunkFormat("backbone cut into an nn.Sequential", _IN_STATE_DICT + r"(?:\w+\.)?", "numbered children.*"),
    TrunkFormat("plain state dict", _IN_STATE_DICT),
    TrunkFormat("detectron2 state dict", _IN_STATE_DICT + r"(?:backbone\.)?(?:bottom_up\.)?", "detectron2.*"),
    TrunkFormat("state dict under {prefix!r}", r".*", r".*"),
]
"""Names for what is found, the first that fits; whoever adds a format puts it before the last row."""

PREFERENCE: tuple[tuple[str, frozenset[str]], ...] = (
    ("the network that training followed", frozenset()),
    ("the teacher, which DINO evaluates", frozenset({"teacher"})),
    ("the student", frozenset({"student"})),
    ("a moving average", frozenset({"ema", "k", "key", "loss", "momentum", "target"})),
)
"""Which trunk is taken where a file holds several: the first of these. A trunk belongs to the last row that shares a
word with its prefix, split at dots and underscores, so ``encoder_q`` comes before ``encoder_k`` and ``backbone`` before
``momentum_backbone``; VISSL's momentum networks are in the state of its ``loss``."""
