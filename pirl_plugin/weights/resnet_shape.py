"""What a ResNet's weights tell of its shape: kind of block, blocks a stage, width, stem."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

TRUNK_ENTRY = re.compile(r"(conv1|bn1|layer[1-4])\.")
"""Start of the names of a ResNet's entries without its classifier, as torchvision calls them."""

COUNTER = "num_batches_tracked"
"""End of the names of batch norm's counters, which files of before torch 0.4.1 do not have."""

DEPTHS = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
"""Depth of the ResNet by whether its blocks are bottlenecks, and the number of blocks of each stage."""

_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class ResNetShape:
    """Shape of a ResNet without its classifier.

    Attributes:
        bottleneck: whether its blocks are bottlenecks (three convolutions) or basic (two).
        blocks: number of blocks of each of the four stages.
        channels: of the first convolution's output.
        inputs: channels of the images.
        kernel: side of the first convolution's kernel, pixels.
    """

    bottleneck: bool
    blocks: tuple[int, int, int, int]
    channels: int
    inputs: int
    kernel: int

    @property
    def depth(self) -> int | None:
        """18, 34, 50, 101 or 152; None for any other."""
        return DEPTHS.get((self.bottleneck, self.blocks))

    @property
    def name(self) -> str:
        """For people, e.g. ``ResNet-50, width 2, 7x7 stem``."""
        blocks = f"ResNet of {'bottlenecks' if self.bottleneck else 'basic blocks'} {'-'.join(map(str, self.blocks))}"
        kind = f"ResNet-{self.depth}" if self.depth else blocks
        return f"{kind}, width {self.channels / 64:g}, {self.kernel}x{self.kernel} stem"


def resnet_shape(state: Mapping[str, Tensor]) -> ResNetShape:
    """The shape that a ResNet's entries, under torchvision's names, tell of.

    Raises:
        ValueError: no ordinary first convolution, or not four stages.
    """
    first = state.get("conv1.weight")
    if first is None or first.ndim != 4 or first.shape[2] != first.shape[3]:
        found = "is missing" if first is None else f"is {tuple(first.shape)}"
        deep = " (a stem of several convolutions?)" if any(key.startswith("conv1.") for key in state) else ""
        raise ValueError(f"the weights are of no ResNet: conv1.weight must be (channels, 3, k, k), it {found}{deep}.")
    stages = [_blocks(state, stage) for stage in range(1, 5)]
    blocks = (len(stages[0]), len(stages[1]), len(stages[2]), len(stages[3]))
    if 0 in blocks or any(numbers != {str(block) for block in range(len(numbers))} for numbers in stages):
        raise ValueError(
            f"the weights are of no ResNet with four stages of numbered blocks, they have {blocks} blocks."
        )
    return ResNetShape(
        bottleneck="layer1.0.conv3.weight" in state,
        blocks=blocks,
        channels=first.shape[0],
        inputs=first.shape[1],
        kernel=first.shape[2],
    )


def expected_shapes(shape: ResNetShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every entry of torchvision's state dict of this ResNet, the classifier left out."""
    found = {"conv1.weight": (shape.channels, shape.inputs, shape.kernel, shape.kernel), **_norm("bn1", shape.channels)}
    incoming = shape.channels
    for stage, blocks in enumerate(shape.blocks):
        planes = shape.channels * 2**stage
        outgoing = planes * (4 if shape.bottleneck else 1)
        convolutions = [(planes, 1), (planes, 3), (outgoing, 1)] if shape.bottleneck else [(planes, 3), (planes, 3)]
        for block in range(blocks):
            prefix, inside = f"layer{stage + 1}.{block}", incoming
            for number, (channels, kernel) in enumerate(convolutions, 1):
                found[f"{prefix}.conv{number}.weight"] = (channels, inside, kernel, kernel)
                found |= _norm(f"{prefix}.bn{number}", channels)
                inside = channels
            if block == 0 and (stage > 0 or incoming != outgoing):
                found[f"{prefix}.downsample.0.weight"] = (outgoing, incoming, 1, 1)
                found |= _norm(f"{prefix}.downsample.1", outgoing)
            incoming = outgoing
    return found


def check_whole(state: Mapping[str, Tensor]) -> ResNetShape:
    """The shape of a ResNet that has all its entries and no other; batch norm's counters may lack.

    Raises:
        ValueError: no ResNet, one with entries missing, or one with entries that a ResNet does not have.
    """
    shape = resnet_shape(state)
    expected = expected_shapes(shape)
    missing = [key for key in expected if key not in state and not key.endswith(COUNTER)]
    unknown = [key for key in state if key not in expected]
    if missing or unknown:
        listed = [f"missing: {', '.join(missing[:4])} ({len(missing)})"] if missing else []
        listed += [f"no entries of a ResNet: {', '.join(unknown[:4])} ({len(unknown)})"] if unknown else []
        raise ValueError(f"the trunk looks like a {shape.name}, but is not whole: {'; '.join(listed)}.")
    return shape


def infer_trunk(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Configuration of the ``resnet_trunk`` that a ResNet's weights are of, from their names and shapes.

    Strides are not in the weights: they are taken as torchvision's, as everywhere in this package.

    Args:
        state: under torchvision's names, without the classifier.

    Raises:
        ValueError: not a ResNet that ``resnet_trunk`` can be, or one whose stem's stride is open (3x3 kernel: ``small``
            and ``medium`` differ in nothing else); says what to set.
    """
    shape = resnet_shape(state)
    expected = expected_shapes(shape)
    # a name that is not expected is an error too, where the trunk is loaded
    wrong = [
        f"{key} {tuple(state[key].shape)} instead of {size}"
        for key, size in expected.items()
        if key in state and tuple(state[key].shape) != size
    ]
    if shape.depth is None or shape.inputs != 3 or wrong:
        reason = "its images have other than 3 channels" if shape.inputs != 3 else "no depth has these blocks"
        reason = f"{wrong[0]} (ResNeXt and wide ResNets are not supported)" if wrong else reason
        raise ValueError(f"the weights fit no resnet_trunk: they look like {shape.name}, but {reason}.")
    trunk = {"name": "resnet_trunk", "depth": shape.depth, "width": shape.channels / 64}
    if shape.kernel == 7:
        return {**trunk, "stem": "imagenet"}
    if shape.kernel == 3:
        width = f" trunk.width={trunk['width']:g}" if trunk["width"] != 1 else ""
        raise ValueError(
            f"the weights ({shape.name}) do not say the stride of their first convolution, which is 1 for the stem "
            f"'small' and 2 for 'medium': set trunk=resnet{shape.depth}{width} trunk.stem=small (or medium)."
        )
    raise ValueError(f"the weights fit no resnet_trunk: its stems are 7x7 and 3x3, this is {shape.name}.")


def _blocks(state: Mapping[str, Tensor], stage: int) -> set[str]:
    found = (re.match(rf"layer{stage}\.(\d+)\.", key) for key in state)
    return {match[1] for match in found if match}


def _norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {**{f"{name}.{entry}": (channels,) for entry in _NORM}, f"{name}.{COUNTER}": ()}
