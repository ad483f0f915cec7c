"""ResNet trunks with torchvision's parameter names and features from any stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from classy_vision.models import ClassyModel, register_model
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from pirl_plugin.registry import Configurable
from pirl_plugin.schema import PositiveFloat, checked, did_you_mean

LAYERS = ("conv1", "res2", "res3", "res4", "res5")

_BLOCKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}
_STEMS = {"imagenet": (7, 2), "medium": (3, 2), "small": (3, 1)}  # kernel, stride of conv1


@register_model("resnet_trunk")
@checked
class ResNetTrunk(Configurable, ClassyModel):
    """ResNet without its classifier; parameter names, block order and strides are torchvision's (v1.5).

    The layers that features can be taken from: ``conv1`` (the stem's convolution after batch norm and ReLU, BEFORE the
    max pooling: 64 x 112 x 112 for a 224-pixel image, the map that the protocols of Goyal et al. 2019 pool to 9,216
    numbers) and ``res2`` .. ``res5`` (torchvision's layer1 .. layer4).

    Args:
        depth: 18 and 34 are made of basic blocks, 50, 101 and 152 of bottlenecks.
        width: multiplies ALL channels, the stem's too: 2 is the ResNet-50w2 of the PIRL paper and of VISSL, unlike
            torchvision's ``wide_resnet50_2``. Fractions are for small experiments; 64 * width must be a whole number.
        stem: ``imagenet`` 7x7 stride 2 and max pooling; ``medium`` 3x3 stride 2, none (64 to 96 pixels); ``small`` 3x3
            stride 1, none (32 pixels).
        zero_init_residual: the last batch norm of each block starts at zero, so that each block starts as the identity.

    Attributes:
        channels: number of channels of each layer.
    """

    wrapper_cls = None  # no heads are attached to a trunk: SSLModel holds them

    def __init__(
        self,
        depth: Literal[18, 34, 50, 101, 152] = 50,
        width: PositiveFloat = 1.0,
        stem: Literal["imagenet", "medium", "small"] = "imagenet",
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        base = 64 * width
        if base != int(base):
            raise ValueError(
                f"width must make 64 * width a whole number of channels, got width {width}: {base} channels."
            )
        block, blocks = _BLOCKS[depth]
        kernel, stride = _STEMS[stem]
        first = int(base)
        self.conv1 = nn.Conv2d(3, first, kernel_size=kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else nn.Identity()
        self.channels = {"conv1": first}
        incoming = first
        for stage in range(4):
            planes = first * 2**stage
            setattr(self, f"layer{stage + 1}", _stage(block, incoming, planes, blocks[stage], 1 if stage == 0 else 2))
            incoming = planes * block.expansion
            self.channels[f"res{stage + 2}"] = incoming
        _initialise(self, zero_init_residual)

    def forward(self, x: Tensor, pooled: bool = True) -> Tensor:
        """Global average pooling of ``res5``, or its map: float ``(B, 3, H, W)`` to ``(B, C)``, or ``(B, C, h, w)``."""
        found = self.features(x, ("res5",))["res5"]
        return found.mean(dim=(2, 3)) if pooled else found

    def features(self, x: Tensor, layers: Iterable[str]) -> dict[str, Tensor]:
        """Feature maps of the named layers; nothing deeper than the deepest of them is computed.

        Args:
            x: normalised images, float ``(B, 3, H, W)``.
            layers: names out of ``LAYERS``, any order.

        Returns:
            ``{layer: (B, channels[layer], h, w)}`` in the order asked for.

        Raises:
            ValueError: an unknown layer, or none at all.
        """
        wanted = list(layers)
        for name in wanted:
            if name not in LAYERS:
                raise ValueError(f"Unknown layer {name!r}. Layers: {', '.join(LAYERS)}.{did_you_mean(name, LAYERS)}")
        if not wanted:
            raise ValueError(f"no layer was asked for; layers: {', '.join(LAYERS)}.")
        found = {}
        x = self.relu(self.bn1(self.conv1(x)))
        found["conv1"] = x
        deepest = max(LAYERS.index(name) for name in wanted)
        if deepest > 0:
            x = self.maxpool(x)
        for index in range(1, deepest + 1):
            x = getattr(self, f"layer{index}")(x)
            found[LAYERS[index]] = x
        return {name: found[name] for name in wanted}


def bfloat16_hazards(trunk: ResNetTrunk, height: int, width: int) -> list[str]:
    """Names of the strided convolutions, kernel above 1, that would see a single pixel of an image of this size.

    In bfloat16 on the CPU, torch (2.15, perhaps others) silently returns garbage for the weight gradient of these, so
    that a task should refuse bfloat16 on the CPU when this is not empty. Pure arithmetic, nothing is run.
    """
    hazards = []
    size = (height, width)

    def passes(module: nn.Conv2d | nn.MaxPool2d) -> tuple[int, int]:
        return _output_size(size[0], module, 0), _output_size(size[1], module, 1)

    for name, module in trunk.named_modules():
        if isinstance(module, nn.MaxPool2d):
            size = passes(module)
        elif isinstance(module, nn.Conv2d) and "downsample" not in name and _pair(module.kernel_size)[0] > 1:
            if size == (1, 1) and max(_pair(module.stride)) > 1:
                hazards.append(name)
            size = passes(module)
    return hazards


def _output_size(length: int, module: nn.Conv2d | nn.MaxPool2d, axis: int) -> int:
    kernel, stride, padding = (_pair(value)[axis] for value in (module.kernel_size, module.stride, module.padding))
    return (length + 2 * padding - kernel) // stride + 1


def _pair(value: int | str | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _stage(
    block: type[BasicBlock] | type[Bottleneck], incoming: int, planes: int, blocks: int, stride: int
) -> nn.Sequential:
    outgoing = planes * block.expansion
    downsample = None
    if stride != 1 or incoming != outgoing:
        downsample = nn.Sequential(
            nn.Conv2d(incoming, outgoing, 1, stride=stride, bias=False), nn.BatchNorm2d(outgoing)
        )
    first = block(incoming, planes, stride, downsample)
    return nn.Sequential(first, *(block(outgoing, planes) for _ in range(blocks - 1)))


def _initialise(trunk: nn.Module, zero_init_residual: bool) -> None:
    """As torchvision: He et al. 2015, fan-out; batch norm starts as the identity."""
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if zero_init_residual:
        for module in trunk.modules():
            if isinstance(module, (BasicBlock, Bottleneck)):
                nn.init.zeros_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight)
