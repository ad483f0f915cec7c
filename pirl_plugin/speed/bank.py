"""The memory bank: its set-up, one step's look-ups and update, and that their cost does not grow with the dataset."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pirl_plugin.memory import EMAMemoryBank
from pirl_plugin.speed.loss import DIM, Case, make_loss
from pirl_plugin.speed.measuring import Row, Settings, Work, interleaved, less

_BATCH = 32


def rows(settings: Settings) -> Iterator[Row]:
    """Update against the whole bank cloned and written, as one released implementation does; set-up; growth with n."""
    images = 200_000 if settings.quick else 1_281_167
    bank = EMAMemoryBank(images, DIM).to(settings.device)
    ids = torch.randperm(images, device=settings.device)[:_BATCH]
    embeddings = torch.randn(_BATCH, DIM, device=settings.device)

    def cloned() -> None:
        new = bank.rows.clone()
        new[ids] = 0.5 * new[ids] + 0.5 * embeddings
        bank.rows = new

    seconds = interleaved(
        {"ours": lambda: bank.update(ids, embeddings), "theirs": cloned}, settings.repeats, device=settings.device
    )
    yield less(
        f"update of {_BATCH} rows out of {images:,}", "a clone of the bank each step", seconds["ours"],
        seconds["theirs"], detail=f"floor: {3 * _BATCH * DIM * 4 / 1e3:.0f} KB",
    )  # fmt: skip
    built = {
        "ours": lambda: EMAMemoryBank(images, DIM),
        "half": lambda: EMAMemoryBank(images, DIM, dtype="bfloat16"),
        "theirs": lambda: torch.nn.functional.normalize(torch.randn(images, DIM), dim=1),
    }
    seconds = interleaved(built, settings.repeats)
    detail = f"floor: {images * DIM * 4 / 1e6:.0f} MB written; in bfloat16 {seconds['half']:.3g} s"
    yield less(f"{images:,} rows at the start", "normal deviates", seconds["ours"], seconds["theirs"], detail=detail)
    yield from _growth(settings)


def _growth(settings: Settings) -> Iterator[Row]:
    """Draw, loss and update at constant batch; the trunk, which a step is mostly made of, does not know n at all."""
    sizes = (20_000, 1_000_000) if settings.quick else (100_000, 10_000_000)
    works = {images: step_of(images, settings) for images in sizes}
    small, large = interleaved({str(images): work for images, work in works.items()}, settings.repeats).values()
    yield Row(
        f"loss and update, n {sizes[1]:,}", f"n {sizes[0]:,}", large, small, "s", large / small,
        detail="a small bank's rows stay in the caches; the area 'step' has the whole step",
    )  # fmt: skip


def step_of(images: int, settings: Settings) -> Work:
    """What a training step does with a bank of n rows: draws, looks up, contrasts forward and backward, updates."""
    case = Case(batch=8, candidates=4_000) if settings.quick else Case()
    loss = make_loss(images, case, settings.device)
    views = {name: torch.randn(case.batch, DIM, device=settings.device, requires_grad=True) for name in loss.views}

    def step() -> None:
        ids = torch.randint(images, (case.batch,), device=settings.device)
        loss(views, ids).backward()
        loss.memory_bank.update(ids, views["image"].detach())

    return step


def to_profile(settings: Settings) -> Work:
    """Draw, loss and update."""
    return step_of(200_000 if settings.quick else 1_281_167, settings)
