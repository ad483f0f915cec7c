"""Mistakes that a task's signature cannot show, each refused with what to do about it, and what follows from parts."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pirl_plugin import distributed
from pirl_plugin.data.datasets import ImageDataset
from pirl_plugin.data.loading import SampledViews
from pirl_plugin.functional import bank_rows
from pirl_plugin.functional.pending_colours import coloured
from pirl_plugin.hooks.checkpoint import dataset_facts
from pirl_plugin.models.ssl_model import SSLModel, is_pixels
from pirl_plugin.models.trunks import ResNetTrunk, bfloat16_hazards
from pirl_plugin.registry import lookup
from pirl_plugin.schema import is_provided, parameters

log = logging.getLogger(__name__)


def chosen_device(device: str, sync_batch_norm: bool) -> str:
    """``cuda`` or ``cpu`` for ``auto``, ``cuda`` or ``cpu``.

    Raises:
        ValueError: a GPU that is not there, or batch norm over processes without one.
    """
    if device == "cuda" and not torch.cuda.is_available():
        build = "is a build without CUDA" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
        raise ValueError(
            f"device=cuda was asked for, but torch sees no GPU: use device=cpu or install a CUDA build that fits the "
            f"driver (torch {torch.__version__} {build})."
        )
    chosen = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    if sync_batch_norm and chosen == "cpu":
        raise ValueError(
            "sync_batch_norm needs a GPU (torch's SyncBatchNorm has no CPU kernels), the run would be on the CPU: "
            "set sync_batch_norm=false."
        )
    return chosen


def facts_of(dataset: ImageDataset) -> dict[str, Any]:
    """What a loss or a head may want to know of the dataset, under the names of the parameters that take it.

    ``num_images``; and of a labelled dataset ``num_classes`` and ``labels``, a class for each image id, ``(N,)`` int64.
    """
    facts: dict[str, Any] = {"num_images": len(dataset), "num_classes": None, "labels": None}
    if dataset.labels is not None:
        facts |= {"num_classes": len(dataset.class_names), "labels": torch.from_numpy(dataset.labels)}
    return facts


def with_facts(kind: str, config: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """A component's configuration with those facts that are numbers filled in, so that it builds without the dataset.

    Raises:
        ValueError: the configuration states another number, or the component wants to know what is not known.
    """
    filled = dict(config)
    for name, (annotation, parameter) in parameters(lookup(kind, config["name"])).items():
        if name not in facts or not is_provided(annotation):
            continue
        if facts[name] is None:
            if parameter.default is parameter.empty and config.get(name) is None:
                raise ValueError(f"{kind} {config['name']!r} needs {name}: the dataset must have labels.")
        elif isinstance(facts[name], int):
            if config.get(name) not in (None, facts[name]):
                what = f"{facts[name]} {name.removeprefix('num_')}"
                raise ValueError(f"{kind}.{name} is {config[name]}, but the dataset has {what}: leave it null.")
            filled[name] = facts[name]
    return filled


def refuse_too_large_bank(loss: Mapping[str, Any]) -> None:
    """Raises where the memory bank of a loss cannot fit into the host's memory, in which it is built.

    Without it the operating system would end the run without a word, as soon as the rows are written.

    Raises:
        ValueError: says how much is needed and how much there is.
    """
    rows, dim = loss.get("num_images"), loss.get("dim", 128)
    available = available_memory()
    if not isinstance(rows, int) or not isinstance(dim, int) or available is None:
        return
    bank, processes = loss.get("memory_bank") or {}, distributed.local_processes()
    is_split = bank.get("name", "ema_memory_bank").startswith("sharded")
    of_each = math.ceil(rows / distributed.launched_processes()) if is_split else rows
    half = bank.get("dtype") == "bfloat16"
    # every process of the machine builds its own, all at about the same time
    needed = processes * bank_rows.bytes_to_build(of_each, dim, "bfloat16" if half else "float32")
    if needed > available:
        where = f" in {processes} processes" if processes > 1 else ""
        raise ValueError(
            f"the memory bank of {rows} x {dim} needs {needed / 1e9:.1f} GB to build{where}, the machine has "
            f"{available / 1e9:.1f} GB left: lower loss.dim, store the rows in bfloat16, take a sharded bank, or use a "
            "machine with more memory."
        )


def available_memory() -> int | None:
    """Bytes that this process may still get: of the machine, and of the control group (container, job) it is in."""
    found = []
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdecimal():
        found.append(max(0, int(limit[0]) - int(used[0])))
    return min(found, default=None)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().split("\n")
    except OSError:
        return []


def needed_hooks(parts: Iterable[nn.Module]) -> list[str]:
    """Hooks that a model or a loss cannot do without, by its ``needed_hooks``."""
    return list(dict.fromkeys(name for part in parts for name in getattr(part, "needed_hooks", ())))


def refuse_wrong_hooks(parts: Iterable[nn.Module], hooks: Iterable[Any]) -> None:
    """Raises for a hook that a part needs and that is not there, or twice, and for one whose work nobody needs."""
    hooks, needed = list(hooks), needed_hooks(parts)
    for name in needed:
        count = sum(isinstance(hook, lookup("hook", name)) for hook in hooks)
        if count == 0:
            raise ValueError(f"The method needs the hook {name!r}: add {{'name': {name!r}}} to hooks.")
        if count > 1:
            raise ValueError(f"hooks hold {name} {count} times: keep one, or its work is done as often a step.")
    for hook in hooks:
        work = getattr(hook, "only_where_needed", None)
        if work is not None and work not in needed:
            raise ValueError(f"hooks hold {work}, but neither the model nor the loss needs it: take the hook out.")


def views_of(outputs: Iterable[str]) -> set[str]:
    """The views that named outputs of a model are made from: ``image`` of ``momentum/image/prediction``."""
    return {name.removeprefix("momentum/").partition("/")[0] for name in outputs}


def needed_views(loss: nn.Module, hooks: Iterable[Any]) -> set[str] | None:
    """Views that the loss or a hook looks at; None for a loss that does not say which ``views`` it uses: all."""
    used: Sequence[str] | None = getattr(loss, "views", None)
    return None if used is None else views_of([*used, *(hook.view for hook in hooks if hasattr(hook, "view"))])


def freeze_idle_heads(model: SSLModel, loss: nn.Module) -> None:
    """Freezes heads whose view does not enter the loss (its weight is 0): they would never get a gradient.

    ``DistributedDataParallel`` waits for every gradient that it was told of. A loss that does not say which ``views``
    it uses is taken to use all.
    """
    used: Sequence[str] | None = getattr(loss, "views", None)
    if used is None:
        return
    trained = {model.head_of(view) for view in views_of(name for name in used if not name.startswith("momentum/"))}
    for view, head in model.heads.items():
        if view not in trained:
            head.requires_grad_(False)


def refuse_wrong_bfloat16_gradients(trunk: ResNetTrunk, views: SampledViews) -> None:
    """Raises where torch's CPU kernels would give wrong gradients, see ``bfloat16_hazards``."""
    _, sample, _ = views[(0, 0)]
    for name, view in coloured(sample).items():
        if not is_pixels(view):
            continue
        hazards = bfloat16_hazards(trunk, view.shape[-2], view.shape[-1])
        if hazards:
            raise ValueError(
                f"precision=bf16 on the CPU gives wrong gradients for the view {name!r} of {view.shape[-2]} pixels: "
                f"{hazards[0]} sees a 1x1 input (a fault of torch's CPU kernels). Use precision=float32, larger "
                "views, or trunk.stem=small."
            )


def warn_of_repeated_images(num_images: int, global_batch_size: int) -> None:
    """Says so where one optimiser step takes more images than there are."""
    if global_batch_size > num_images and distributed.is_primary():
        log.warning(
            "A step takes %d images, all processes together, of a dataset of %d: it repeats them. Lower batch_size.",
            global_batch_size,
            num_images,
        )


def refuse_other_batch_size(state: Mapping[str, Any], global_batch_size: int, processes: int | None = None) -> None:
    """Raises for a checkpoint of a run with another global batch: its steps and its schedule do not continue.

    Args:
        state: of the checkpoint.
        global_batch_size: images of an optimiser step over all processes, now.
        processes: how many there are now, for the advice.
    """
    saved = int(state.get("global_batch_size", global_batch_size))
    if saved == global_batch_size:
        return
    advice = "start as many processes as before"
    if processes and saved % processes == 0:
        advice += f", or set batch_size and accumulate_steps to a product of {saved // processes}"
    raise ValueError(
        f"The checkpoint is of a run with {saved} images a step over all processes, this one takes "
        f"{global_batch_size}: {advice}, or set run_dir to a new folder."
    )


def refuse_other_dataset(checkpoint: Mapping[str, Any], task: Any) -> None:
    """Raises where the images have changed under a checkpoint: its bank's rows would be of other images."""
    saved, now = checkpoint.get("dataset"), dataset_facts(task)
    if saved and now and dict(saved) != now:
        counts = (saved.get("num_images"), now["num_images"])
        how = f"{counts[0]} images then, {counts[1]} now" if counts[0] != counts[1] else "other names or sizes of files"
        raise ValueError(
            f"The dataset has changed since the checkpoint was written ({how}): ids would mean other images. Restore "
            "the images, or set run_dir to a new folder."
        )


def refuse_disagreement(task: Any) -> None:
    """Raises on every rank where the ranks were not started alike; collective.

    Compared are configuration, dataset (number of images and fingerprint), the step gone on from and the memory bank.
    """
    if not distributed.is_distributed():
        return
    everyone = distributed.gather_objects(_facts_of_rank(task))
    for rank, facts in enumerate(everyone):
        different = [name for name, value in everyone[0].items() if facts.get(name) != value]
        if different:
            said = "; ".join(f"{name}: {everyone[0][name]!r} and {facts.get(name)!r}"[:200] for name in different)
            raise ValueError(f"ranks 0 and {rank} were not started alike: {said}. Start all with the same command.")


def _facts_of_rank(task: Any) -> dict[str, Any]:
    bank = getattr(task.base_loss, "memory_bank", None)
    shape = {name: getattr(bank, name) for name in ("num_images", "dim", "size") if hasattr(bank, name)}
    state = (task.checkpoint_dict or {}).get("classy_state_dict", {})
    return {
        **{f"configuration, {key}": value for key, value in task.config.items()},
        "images": len(task.datasets["train"]),
        "dataset": dataset_facts(task).get("fingerprint"),
        "goes on after images": state.get("num_updates"),
        "memory bank": (type(bank).__name__, shape),
    }
