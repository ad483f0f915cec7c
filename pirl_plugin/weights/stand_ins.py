"""Objects of other libraries that lie beside the weights in a checkpoint, read as empty stand-ins.

Checkpoints of older programs hold more than tensors: the command line (``argparse.Namespace``), a configuration, numpy
scalars. Nothing of that is needed to find the trunk, yet torch's safe reader refuses the whole file for it. Letting
torch build the real objects would mean trusting their constructors with what the file says (``numpy.dtype`` takes the
memory layout itself from the pickle), so no class of theirs is ever imported or called: each name below is answered
with an empty class of ours, whatever the file wants to put into it. A name that is not below is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any


class StandIn:
    """What a checkpoint held in this place was left unread; takes any arguments and any state, and keeps none."""

    name = "an object"

    def __init__(self, *arguments: Any, **more: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __repr__(self) -> str:
        return f"<{self.name}, not read>"


class _DictStandIn:
    """Calling it gives a plain dictionary: torch's safe reader puts items into nothing else."""

    def __new__(cls, *arguments: Any) -> OrderedDict[str, Any]:  # type: ignore[misc]
        return OrderedDict()


_BUILTINS = ("bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "slice", "str", "tuple")
_NODES = ("AnyNode", "BooleanNode", "BytesNode", "EnumNode", "FloatNode", "IntegerNode", "PathNode", "StringNode")
_NUMPY = ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")

OBJECTS = (
    "argparse.Namespace",
    *(f"builtins.{name}" for name in _BUILTINS),
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.{name}" for core in ("core", "_core") for name in _NUMPY),
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.nodes.{name}" for name in _NODES),
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "typing.Any",
)
DICTIONARIES = (
    "collections.defaultdict",
    "detectron2.config.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "vissl.config.attr_dict.AttrDict",
    "yacs.config.CfgNode",
)


def _stand_in(name: str, base: type) -> tuple[Callable[..., Any], str]:
    return type(name.rpartition(".")[2], (base,), {"name": name}), name


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *(_stand_in(name, StandIn) for name in OBJECTS),
    *(_stand_in(name, _DictStandIn) for name in DICTIONARIES),
]
"""For ``torch.serialization.safe_globals``: what to use, and the name in the file that it stands for."""
