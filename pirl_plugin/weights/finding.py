"""The search for the trunk in a checkpoint, guided by the tables in ``formats``."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pirl_plugin.weights.formats import FORMATS, NAMINGS, PREFERENCE, Naming
from pirl_plugin.weights.resnet_shape import TRUNK_ENTRY

log = logging.getLogger(__name__)

State = dict[str, Tensor]
_MAX_DEPTH = 12  # nested containers; checkpoints have up to five
_OURS = ("classy_state_dict", "base_model", "model", "trunk")
_AS_IT_IS = Naming("as it is", anchor="")


@dataclass(frozen=True)
class FoundTrunk:
    """A trunk in a checkpoint.

    Attributes:
        state: its weights under torchvision's names.
        format: name of the kind of checkpoint.
        dropped: names of the entries of the same state dict that are not the trunk's.
        prefix: what stood before the entries' names, the containers' keys included.
        sources: torchvision's name of each entry: its name in the state dict.
        elsewhere: number of tensors in each other part of the checkpoint.
        note: how it was chosen, where there were several.
    """

    state: State
    format: str
    dropped: list[str] = field(default_factory=list)
    prefix: str = ""
    sources: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, int] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class _Candidate:
    path: tuple[str, ...]  # keys of the containers
    inside: str  # prefix of the entries' names
    naming: Naming

    @property
    def prefix(self) -> str:
        return "".join(f"{key}." for key in self.path) + self.inside

    @property
    def rank(self) -> int:
        words = set(re.split(r"[._]", self.prefix))
        return max(rank for rank, (_, names) in enumerate(PREFERENCE) if rank == 0 or names & words)


def find_trunk(checkpoint: Mapping[str, Any], prefix: str | None = None, quiet: bool = False) -> FoundTrunk:
    """The trunk inside a checkpoint: anywhere in its containers, under any of ``NAMINGS``.

    Args:
        checkpoint: as ``read_weights`` gives it.
        prefix: which of several trunks to take; by default ``PREFERENCE`` decides, and says so in the log.
        quiet: leave the log alone.

    Raises:
        ValueError: no trunk, or several and no rule which to take, or entries in it that are no dense tensors.
    """
    containers = dict(_containers(checkpoint))
    if _OURS in containers and _described(checkpoint):  # whatever names its trunk's class uses
        chosen, note = _Candidate(_OURS, "", _AS_IT_IS), ""
    else:
        chosen, note = _choose(_candidates(containers), containers, prefix)
    container = containers[chosen.path]
    sources, dropped = _split(container, chosen)
    state = {name: _checked(container[source], source) for name, source in sources.items()}
    if note and not quiet:
        log.info("%s", note)
    elsewhere = {
        ".".join(path): count
        for path, other in containers.items()
        if path != chosen.path and (count := sum(isinstance(value, Tensor) for value in other.values()))
    }
    return FoundTrunk(state, _format_name(chosen), dropped, chosen.prefix, sources, elsewhere, note)


def _split(container: Mapping[str, Any], chosen: _Candidate) -> tuple[dict[str, str], list[str]]:
    """The trunk's entries, by torchvision's name, and the other ones."""
    sources: dict[str, str] = {}
    dropped = []
    for entry in filter(lambda key: isinstance(key, str), container):
        name = chosen.naming.to_torchvision(entry.removeprefix(chosen.inside))
        in_trunk = TRUNK_ENTRY.match(name) or chosen.naming is _AS_IT_IS
        if not entry.startswith(chosen.inside) or not in_trunk:
            dropped += [entry] if isinstance(container[entry], Tensor) else []
        elif name in sources:
            raise ValueError(f"the trunk's entries {sources[name]!r} and {entry!r} are both {name!r}.")
        else:
            sources[name] = entry
    return sources, dropped


def _described(checkpoint: Mapping[str, Any]) -> bool:
    tree: Any = checkpoint
    for key in ("input_args", "config", "trunk"):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return isinstance(tree, Mapping)


def _containers(tree: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Every mapping in a tree of mappings with the keys that lead to it; each once, however often it is referred to."""
    seen: set[int] = set()
    queue: list[tuple[tuple[str, ...], Mapping[str, Any]]] = [((), tree)]
    for path, mapping in queue:
        if id(mapping) in seen or len(path) > _MAX_DEPTH:
            continue
        seen.add(id(mapping))
        yield path, mapping
        queue += [((*path, key), value) for key, value in mapping.items() if _is_branch(key, value)]


def _is_branch(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Mapping)


def _candidates(containers: Mapping[tuple[str, ...], Mapping[str, Any]]) -> list[_Candidate]:
    found: dict[tuple[tuple[str, ...], str], _Candidate] = {}
    for path, container in containers.items():
        entries = [key for key in container if isinstance(key, str)]
        for naming in NAMINGS:
            for anchor in filter(lambda entry: f".{entry}".endswith(f".{naming.anchor}"), entries):
                candidate = _Candidate(path, anchor.removesuffix(naming.anchor), naming)
                if all(candidate.inside + other in container for other in naming.with_):
                    found.setdefault((path, anchor), candidate)
    return list(found.values())


def _choose(
    candidates: list[_Candidate], containers: Mapping[tuple[str, ...], Mapping[str, Any]], prefix: str | None
) -> tuple[_Candidate, str]:
    """The candidate to take, and a line on how it was chosen where there are others."""
    names = ", ".join(repr(candidate.prefix) for candidate in candidates)
    if not candidates:
        raise ValueError(
            f"no trunk found in the checkpoint: its keys are {_some_keys(containers[()])}. "
            f"Formats: {', '.join(known.name for known in FORMATS[:-1])}."
        )
    if prefix is not None:
        asked = [candidate for candidate in candidates if candidate.prefix.rstrip(".") == prefix.rstrip(".")]
        if not asked:
            raise ValueError(f"no trunk under the prefix {prefix!r}; there are trunks under: {names}.")
        return asked[0], f"took the trunk under {asked[0].prefix!r}, as asked for, out of {names}"
    rank = min(candidate.rank for candidate in candidates)
    best = sorted((c for c in candidates if c.rank == rank), key=lambda candidate: len(candidate.prefix))
    differing = [other for other in best[1:] if not _same(best[0], other, containers)]
    if differing:
        raise ValueError(
            f"the checkpoint holds several trunks, and no rule says which to take: {names}. Take one "
            "out of it with tools/convert.py --prefix PREFIX."
        )
    if len(candidates) == 1:
        return best[0], ""
    return best[0], f"took the trunk under {best[0].prefix!r} ({PREFERENCE[rank][0]}) out of {names}"


def _same(one: _Candidate, other: _Candidate, containers: Mapping[tuple[str, ...], Mapping[str, Any]]) -> bool:
    """Whether two candidates hold the same weights, as where a file has a network under two names."""
    first, second = (_split(containers[candidate.path], candidate)[0] for candidate in (one, other))
    if first.keys() != second.keys():
        return False
    pairs = ((containers[one.path][first[name]], containers[other.path][second[name]]) for name in first)
    return all(isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b) for a, b in pairs)


def _checked(value: Any, entry: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"the trunk's entry {entry!r} is a {type(value).__name__}, not a tensor.")
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise ValueError(f"the trunk's entry {entry!r} is no dense tensor on the CPU: {value.layout}, {value.device}.")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        # a few bytes in the file can stand for a tensor of any size
        raise ValueError(f"the trunk's entry {entry!r} claims {tuple(value.shape)} values, the file holds fewer.")
    return value.detach()


def _format_name(candidate: _Candidate) -> str:
    for known in FORMATS:
        if re.fullmatch(known.prefix, candidate.prefix) and (
            candidate.naming is _AS_IT_IS or re.fullmatch(known.naming, candidate.naming.name)
        ):
            return known.name.format(prefix=candidate.prefix)
    return candidate.prefix


def _some_keys(mapping: Mapping[Any, Any]) -> str:
    keys = [key[:80] if isinstance(key, str) else type(key).__name__ for key in list(mapping)[:5]]
    return ", ".join(keys) or "none"
