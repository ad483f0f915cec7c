"""A trunk under the names of other libraries, and a report of what went where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from pirl_plugin.weights import detectron2_names
from pirl_plugin.weights.finding import FoundTrunk, State
from pirl_plugin.weights.resnet_shape import ResNetShape, check_whole, expected_shapes, infer_trunk


def to_torchvision(state: Mapping[str, Tensor]) -> State:
    """A trunk as torchvision's ``resnet*`` load it: all but the classifier, in their order; the tensors themselves.

    Args:
        state: under torchvision's names, which are ours too.

    Raises:
        ValueError: not a whole ResNet, or entries that a ResNet does not have.
    """
    return {name: state[name] for name in expected_shapes(check_whole(state)) if name in state}


def to_timm(state: Mapping[str, Tensor]) -> State:
    """A trunk as timm's ``resnet*`` load it: their names are torchvision's.

    Raises:
        ValueError: as ``to_torchvision``.
    """
    return to_torchvision(state)


def to_detectron2(state: Mapping[str, Tensor], layout: detectron2_names.Layout = "plain") -> State:
    """A trunk under detectron2's names.

    Args:
        state: under torchvision's names.
        layout: ``plain`` as in files of pretrained backbones, ``c4`` as in a detector with a C4 backbone.

    Raises:
        ValueError: as ``to_torchvision``.
    """
    return detectron2_names.to_detectron2(to_torchvision(state), layout)


@dataclass(frozen=True)
class Target:
    """A library to write weights for.

    Attributes:
        rename: from torchvision's names to its own.
        suffixes: of the files that it reads, the usual one first.
        use: how it is told to load a file, with ``{file}``, ``{load}`` (an expression that reads it), ``{depth}`` and
            ``{res2}`` (channels of the first stage).
        any_shape: whether it builds what the file describes; others have ResNets of width 1 with a 7x7 stem by name.
    """

    rename: Callable[[Mapping[str, Tensor]], State]
    suffixes: tuple[str, ...]
    use: str
    any_shape: bool = False

    def has_model(self, shape: ResNetShape) -> bool:
        """Whether the library has a model for such a trunk."""
        return self.any_shape or (shape.kernel == 7 and shape.channels == 64 and shape.depth is not None)

    def usage(self, file: str, shape: ResNetShape) -> str:
        """How the library is told to load ``file``."""
        load = f"{'safetensors.torch.load_file' if file.endswith('.safetensors') else 'torch.load'}({file!r})"
        return self.use.format(file=file, load=load, depth=shape.depth, res2=256 if shape.bottleneck else 64)


TARGETS = {
    "torchvision": Target(
        to_torchvision,
        (".pth", ".pt", ".safetensors"),
        "torchvision.models.resnet{depth}().load_state_dict({load}, strict=False)  # fc stays random",
    ),
    "timm": Target(
        to_timm,
        (".pth", ".pt", ".safetensors"),
        'timm.create_model("resnet{depth}", num_classes=0, checkpoint_path="{file}")',
    ),
    "detectron2": Target(
        to_detectron2,
        (".pth", ".pkl"),
        "MODEL.WEIGHTS {file} MODEL.RESNETS.DEPTH {depth} MODEL.RESNETS.RES2_OUT_CHANNELS {res2} "
        "MODEL.RESNETS.STRIDE_IN_1X1 False INPUT.FORMAT RGB "
        "MODEL.PIXEL_MEAN [123.675,116.28,103.53] MODEL.PIXEL_STD [58.395,57.12,57.375]",
    ),
    "safetensors": Target(
        to_torchvision,
        (".safetensors",),
        "weights={file} here, {load} elsewhere",
        any_shape=True,
    ),
}


@dataclass(frozen=True)
class ConversionReport:
    """What became of every entry of a checkpoint.

    Attributes:
        format: kind of the checkpoint.
        prefix: where in it the trunk was.
        target: library that the result is for.
        shape: of the trunk.
        matched: name in the result of each entry of the checkpoint's state dict that is the trunk's.
        dropped: entries of the same state dict that are not.
        elsewhere: number of tensors in other parts of the checkpoint.
        missing: entries of such a ResNet that the checkpoint does not have; only batch norm's counters may.
        trunk: configuration of the trunk, as the checkpoint says or its weights tell; None where they do not.
        notes: what else to know.
    """

    format: str
    prefix: str
    target: str
    shape: ResNetShape
    matched: dict[str, str]
    dropped: list[str] = field(default_factory=list)
    elsewhere: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    trunk: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def as_text(self, every_entry: bool = False) -> str:
        """For people: counts, what was left out and what lacks; with ``every_entry`` a line for each."""
        elsewhere = [f"{part or 'top level'} ({count})" for part, count in self.elsewhere.items()]
        lines = [
            f"found     {self.format}: {self.shape.name}",
            f"matched   {len(self.matched)} entries" + (f" under {self.prefix!r}" if self.prefix else ""),
            f"dropped   {len(self.dropped)}" + _listed(self.dropped if every_entry else grouped(self.dropped)),
            f"missing   {len(self.missing)}" + _listed(self.missing if every_entry else grouped(self.missing)),
        ]
        lines += [f"elsewhere {sum(self.elsewhere.values())} tensors: {', '.join(elsewhere)}"] if elsewhere else []
        lines += [f"note      {note}" for note in self.notes]
        if every_entry:
            width = max(map(len, self.matched), default=0)
            lines += [f"  {source:<{width}}  ->  {name}" for source, name in self.matched.items()]
        return "\n".join(lines)


def convert(
    found: FoundTrunk, target: str = "torchvision", trunk: Mapping[str, Any] | None = None
) -> tuple[State, ConversionReport]:
    """A trunk under the names of ``target``, and the report.

    Args:
        found: as ``find_trunk`` gives it.
        target: out of ``TARGETS``.
        trunk: configuration of the trunk where the checkpoint describes it; otherwise its shapes tell.

    Raises:
        ValueError: unknown target, or not a whole ResNet; nothing is left out in silence.
    """
    if target not in TARGETS:
        raise ValueError(f"unknown target {target!r}. Available: {', '.join(TARGETS)}.")
    shape = check_whole(found.state)
    names = dict(zip(to_torchvision(found.state), TARGETS[target].rename(found.state), strict=True))
    notes = [found.note] if found.note else []
    if trunk is None:
        try:
            trunk = infer_trunk(found.state)
        except ValueError as error:
            notes += [str(error)] if TARGETS[target].any_shape else []
    if not TARGETS[target].has_model(shape):
        notes.append(f"{target} has no model by name for a {shape.name}: only the entries' names are its own")
    report = ConversionReport(
        format=found.format,
        prefix=found.prefix,
        target=target,
        shape=shape,
        matched={found.sources.get(name, name): new for name, new in names.items()},
        dropped=found.dropped,
        elsewhere=found.elsewhere,
        missing=[name for name in expected_shapes(shape) if name not in found.state],
        trunk=dict(trunk) if trunk is not None else None,
        notes=notes,
    )
    return TARGETS[target].rename(found.state), report


def grouped(names: Iterable[str], limit: int = 5) -> list[str]:
    """Entries in at most ``limit`` groups: those that start alike are counted, as deep as the limit lets.

    >>> grouped(["fc.weight", "fc.bias"] + [f"old.{i}" for i in range(20)])
    ['fc.* (2)', 'old.* (20)']
    """
    listed = list(names)
    if len(listed) <= limit:
        return listed
    for depth in range(max(name.count(".") for name in listed), 0, -1):
        groups: dict[str, list[str]] = {}
        for name in listed:
            groups.setdefault(".".join(name.split(".")[:depth]), []).append(name)
        if len(groups) <= limit:
            return [f"{start}.* ({len(same)})" if len(same) > 1 else same[0] for start, same in groups.items()]
    return [f"{listed[0]} and {len(listed) - 1} more"]


def _listed(names: list[str]) -> str:
    return f": {', '.join(names)}" if names else ""
