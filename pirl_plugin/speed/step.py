"""One training step: against its trunk alone, against the published way, against itself with other dataset sizes."""

from __future__ import annotations

import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from pirl_plugin.speed.loss import published_loss
from pirl_plugin.speed.measuring import Row, Settings, Work, interleaved, more
from pirl_plugin.speed.tasks import QUICK, running, sizes
from pirl_plugin.tasks import SSLPretrainingTask


def _sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)


def rows(settings: Settings) -> Iterator[Row]:
    """The step, its growth with n, the start of a run, and two processes."""
    images = 20_000 if settings.quick else 1_281_167
    yield from _against_trunk(settings, images)
    yield _against_published(settings, images)
    yield _guards(settings, images)
    yield _growth(settings)
    yield _start(settings)
    if settings.device.type == "cpu":
        yield _two_processes(settings)


def fastest(device: torch.device) -> list[str]:
    """Overrides for the fastest precision and layout that a device has in hardware."""
    bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else _cpu_has_bf16()
    return ["channels_last=true", *(["precision=bf16"] if bf16 else [])]


def _cpu_has_bf16() -> bool:
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def trunk_step(task: SSLPretrainingTask) -> Work:
    """Forward, backward and SGD of the trunk alone, on the task's tensors, in its precision and layout."""
    trunk = copy.deepcopy(task.base_model.trunk)
    optimizer = _sgd(trunk)
    normalize = task.base_model.normalize
    views = [x.to(task.device).flatten(0, -4) for x in next(task.data_iterator)["input"].values()]
    if task.channels_last:
        views = [x.to(memory_format=torch.channels_last) for x in views]
    pixels = [normalize(x) for x in views]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(task.device.type, torch.bfloat16, enabled=task.precision == "bf16"):
            outputs = [trunk(x) for x in pixels]
        torch.stack([output.float().mean() for output in outputs]).sum().backward()
        optimizer.step()

    return step


def published_step(task: SSLPretrainingTask) -> Work:
    """The same training step the published way: float32, contiguous, a gathered ``(B, K + 1, D)`` for each view."""
    model: nn.Module = copy.deepcopy(task.base_model).float().to(memory_format=torch.contiguous_format)
    optimizer = _sgd(model)
    sample, loss = next(task.data_iterator), task.base_loss
    views = {name: x.to(task.device) for name, x in sample["input"].items()}
    ids: Tensor = sample["target"].to(task.device)
    bank = loss.memory_bank.rows.float()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        output = model(views)
        candidates = torch.randint(len(bank), (len(ids), loss.num_negatives), device=ids.device)
        value = published_loss([output[view] for view in loss.views], ids, candidates, bank, "nce", 2.2 * len(bank))
        value.backward()
        optimizer.step()
        new = nn.functional.normalize(output["image"].detach(), dim=1)
        bank[ids] = nn.functional.normalize(0.5 * bank[ids] + 0.5 * new, dim=1)

    return step


def _against_trunk(settings: Settings, images: int) -> Iterator[Row]:
    for overrides in ([], fastest(settings.device)):
        with running(settings, images, overrides) as task:
            count = task.get_global_batchsize()
            sides = {"ours": task.step, "theirs": trunk_step(task)}
            seconds = interleaved(sides, settings.repeats, device=settings.device)
        how = " ".join(overrides) or "precision=float32"
        yield more(
            f"step, {sizes(settings)}, {how}", "forward + backward + SGD of the bare trunk", count / seconds["ours"],
            count / seconds["theirs"], None if settings.quick else 0.95, "images/s",
            f"all hooks; besides the trunk: {1e3 * (seconds['ours'] - seconds['theirs']):.0f} ms of a step",
        )  # fmt: skip


def _against_published(settings: Settings, images: int) -> Row:
    overrides = fastest(settings.device)
    with running(settings, images, overrides) as task:
        count = task.get_global_batchsize()
        sides = {"ours": task.step, "theirs": published_step(task)}
        seconds = interleaved(sides, settings.repeats, device=settings.device)
    what = f"step as shipped, {sizes(settings)}, {' '.join(overrides)}"
    against = "float32, contiguous, gathered (B, K + 1, D)"
    wanted = None if settings.quick else 2.5
    return more(what, against, count / seconds["ours"], count / seconds["theirs"], wanted, "images/s")


def unguarded_step(task: SSLPretrainingTask) -> Work:
    """The task's step without looking whether its numbers are finite and whether a signal came."""

    def update(loss: Tensor) -> None:
        task.optimizer.zero_grad()
        loss.backward()
        task.optimizer.step(where=task.where)

    def step() -> None:
        task.run_optimizer = update  # type: ignore[method-assign]
        try:
            task.step()
        finally:
            del task.run_optimizer

    return step


def _guards(settings: Settings, images: int) -> Row:
    """What the flags of each step cost; one process, so without their reduction over the processes."""
    with running(settings, images, fastest(settings.device)) as task:
        sides = {"ours": task.step, "theirs": unguarded_step(task)}
        seconds = interleaved(sides, settings.repeats, device=settings.device)
    return Row(
        f"step, {sizes(settings)}, finite and told to stop?", "nobody looks", seconds["ours"], seconds["theirs"], "s",
        seconds["ours"] / seconds["theirs"], 1.05, at_most=True, detail="on_nonfinite=stop",
    )  # fmt: skip


def _growth(settings: Settings) -> Row:
    """Whole steps at two sizes of the dataset, in turns."""
    small, large = (20_000, 1_000_000) if settings.quick else (100_000, 10_000_000)
    overrides = [] if settings.quick else ["trunk=resnet18"]  # the smaller the trunk, the larger the bank's share
    with running(settings, small, overrides) as one, running(settings, large, overrides) as other:
        seconds = interleaved({"small": one.step, "large": other.step}, settings.repeats, device=settings.device)
    return Row(
        f"step, n {large:,}", f"n {small:,}", seconds["large"], seconds["small"], "s",
        seconds["large"] / seconds["small"], 1.1, at_most=True, detail="R18; nothing of a step is O(n)",
    )  # fmt: skip


def _start(settings: Settings) -> Row:
    """From the configuration to the end of the first step; the ratio is the difference in seconds."""

    def start(count: int) -> float:
        begin = time.perf_counter()
        with running(settings, count, overrides) as task:
            task.step()
            return time.perf_counter() - begin

    images, few, overrides = 1_281_167, 10_000, [] if settings.quick else ["loss.num_negatives=8000"]
    start(few)
    pairs = [(start(images), start(few)) for _ in range(1 if settings.quick else 3)]
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Row(
        f"start to first step, n {images:,}", f"n {few:,}", ours, theirs, "s", ours - theirs, 1.0, at_most=True,
        detail="the ratio is the difference in seconds",
    )  # fmt: skip


def _two_processes(settings: Settings) -> Row:
    """``tools/train.py`` alone and under torchrun in turns, one thread a process; by its own log, first steps aside."""
    steps, warm_up, turns = (8, 3, 1) if settings.quick else (16, 6, 3)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(turns):
        for processes, found in rates.items():
            found += _rates(processes, steps)[warm_up:]
    one, two = map(statistics.median, rates.values())
    what, against = "two processes, R18, B 32 each, 96 + 9x32", "one process, one core"
    return more(what, against, two, one, 1.8, "images/s", "views made in the training process; gloo")


def _rates(processes: int, steps: int) -> list[float]:
    """Images per second of each step of a short training."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "pirl_plugin.commands.train"]
        overrides = [*QUICK, "batch_size=32", "dataset=generated_scenes", f"dataset.num_images={steps * 64}"]
        overrides += ["num_epochs=1", "log_every=1", "device=cpu", f"run_dir={folder}/run", "checkpoint=null"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *overrides], env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-500:]}")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
        return [float(json.loads(line)["images_per_second"]) for line in lines]


def to_profile(settings: Settings) -> Work:
    """One step as shipped."""

    def step() -> None:
        with running(settings, 20_000, fastest(settings.device)) as task:
            task.step()

    return step
