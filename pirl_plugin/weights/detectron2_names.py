"""A ResNet trunk's entries under detectron2's names: names alone, tensors stay as they are. ``formats`` reads them.

detectron2 writes its stem, ``res2`` .. ``res5`` and shortcuts for torchvision's ``conv1``, ``layer1`` .. ``layer4`` and
downsampling, and keeps each batch norm inside the convolution before it. Where a stage stands depends on the detector:

* ``plain``: as in detectron2's files of pretrained backbones, without any prefix; its checkpointer finds the place;
* ``c4``: as in a detector with a C4 backbone, whose res5 is a part of the box head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import Tensor

Layout = Literal["plain", "c4"]

_NORM = r"weight|bias|running_mean|running_var|num_batches_tracked"
_TORCHVISION = re.compile(
    rf"(?:layer(?P<layer>[1-4])\.(?P<block>\d+)\.)?"
    rf"(?:conv(?P<conv>[1-3])\.weight|bn(?P<bn>[1-3])\.(?P<norm>{_NORM})"
    rf"|downsample\.0\.(?P<shortcut>weight)|downsample\.1\.(?P<shortcut_norm>{_NORM}))"
)


def detectron2_name(name: str, layout: Layout = "plain") -> str | None:
    """What detectron2 calls an entry that is ``name`` in torchvision; None if that is no entry of a ResNet trunk.

    >>> detectron2_name("layer4.0.bn2.running_mean", "c4")
    'roi_heads.res5.0.conv2.norm.running_mean'
    """
    found = _TORCHVISION.fullmatch(name)
    if found is None or (found["layer"] is None and "1" not in (found["conv"], found["bn"])):
        return None
    if found["conv"]:
        what = f"conv{found['conv']}.weight"
    elif found["bn"]:
        what = f"conv{found['bn']}.norm.{found['norm']}"
    else:
        what = "shortcut.weight" if found["shortcut"] else f"shortcut.norm.{found['shortcut_norm']}"
    stage = "stem" if found["layer"] is None else f"res{int(found['layer']) + 1}.{found['block']}"
    prefix = "" if layout == "plain" else "roi_heads." if stage.startswith("res5.") else "backbone."
    return f"{prefix}{stage}.{what}"


def to_detectron2(state: Mapping[str, Tensor], layout: Layout = "plain") -> dict[str, Tensor]:
    """A trunk's state dict under detectron2's names, the tensors themselves, in the same order.

    Args:
        state: under torchvision's names, a trunk's entries only (no ``fc``).
        layout: ``plain`` or ``c4``, see above.

    Raises:
        ValueError: an entry that no ResNet trunk has.
    """
    names = {name: detectron2_name(name, layout) for name in state}
    unknown = [name for name, new in names.items() if new is None]
    if unknown:
        raise ValueError(f"no entries of a ResNet trunk under torchvision's names: {_some(unknown)}.")
    return {str(names[name]): value for name, value in state.items()}


def _some(names: Sequence[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
