"""The loss, forward and backward: time and memory against the published way, and against the memory's speed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pirl_plugin.functional.sampling import draw_negative_ids
from pirl_plugin.losses import PIRLNCELoss
from pirl_plugin.speed.measuring import Row, Settings, Work, extra_peak_bytes, interleaved, less, more

DIM, TEMPERATURE = 128, 0.07


class Case(NamedTuple):
    """Sizes and settings of one measurement; ``faster`` and ``smaller`` are the ratios to reach, if any."""

    negatives: str = "per_image"
    estimator: str = "nce"
    batch: int = 32
    candidates: int = 32_000
    dtype: str = "float32"
    faster: float | None = None
    smaller: float | None = None


CASES = (
    Case("shared", faster=30, smaller=10),
    Case("per_image", faster=8, smaller=20),
    Case("per_image", dtype="bfloat16"),
    Case("per_image", "softmax"),
    Case("per_image", "infonce"),
    Case("shared", "infonce"),
    Case("per_image", batch=8),
    Case("per_image", batch=32, candidates=4096),
)


def published_loss(
    views: list[Tensor], ids: Tensor, candidates: Tensor, rows: Tensor, estimator: str, normalizer: float
) -> Tensor:
    """The loss as released code has it: for each view a gathered ``(B, K + 1, D)`` tensor, the own row first.

    Args:
        views: embeddings, each ``(B, D)``.
        ids: image ids, ``(B,)``.
        candidates: ids of the negatives, ``(B, K)``.
        rows: the bank, ``(n, D)``.
        estimator: see ``pirl_nce``.
        normalizer: Z of the estimator ``nce``.
    """
    total = torch.zeros((), device=rows.device)
    for view in views:
        query = F.normalize(view, dim=1)
        chosen = torch.cat([ids.unsqueeze(1), candidates], dim=1)
        gathered = rows.index_select(0, chosen.view(-1)).view(*chosen.shape, -1).to(query.dtype)
        logits = torch.bmm(gathered, query.unsqueeze(2)).squeeze(2) / TEMPERATURE
        if estimator == "infonce":
            total = total + F.cross_entropy(logits, torch.zeros_like(ids))
            continue
        if estimator == "nce":
            probability = logits.exp() / normalizer
            h = probability / (probability + candidates.shape[1] / len(rows))
        else:
            h = logits.softmax(dim=1)
        total = total - (h[:, 0].log() + (1 - h[:, 1:]).log().sum(dim=1)).mean()
    return total / len(views)


def make_loss(images: int, case: Case, device: torch.device) -> PIRLNCELoss:
    """Ours, Z known."""
    return PIRLNCELoss(
        images, DIM, case.candidates, TEMPERATURE, estimator=case.estimator, negatives=case.negatives,  # type: ignore[arg-type]
        memory_bank={"name": "ema_memory_bank", "dtype": case.dtype}, normalizer=2.2 * images,
    ).to(device)  # fmt: skip


def rows(settings: Settings) -> Iterator[Row]:
    """One row for time and one for memory in each case; on a GPU also what share of the copy bandwidth is reached."""
    for case in CASES[:6] if settings.quick else CASES:  # the others differ in size alone
        small = settings.quick and case.faster is None
        if small:
            case = case._replace(batch=min(case.batch, 8), candidates=min(case.candidates, 16_000))
        yield from _compare(case, 200_000 if small else 1_281_167, settings)
    if settings.device.type == "cuda":
        yield _share_of_bandwidth(200_000 if settings.quick else 1_281_167, settings)


def _compare(case: Case, images: int, settings: Settings) -> Iterator[Row]:
    torch.manual_seed(0)
    device = settings.device
    loss = make_loss(images, case, device)
    ids = torch.arange(case.batch, device=device)
    candidates = draw_negative_ids(ids, case.candidates, images)
    views = [torch.randn(case.batch, DIM, device=device, requires_grad=True) for _ in range(2)]
    output = dict(zip(("image", "patches"), views, strict=True))
    table = loss.memory_bank.rows

    def ours() -> None:
        loss(output, ids).backward()  # draws its negatives too

    def theirs() -> None:
        published_loss(views, ids, candidates, table, case.estimator, 2.2 * images).backward()

    seconds = interleaved({"ours": ours, "theirs": theirs}, settings.repeats, device=device)
    extra = {name: extra_peak_bytes(work, device) for name, work in (("ours", ours), ("theirs", theirs))}
    what = f"{case.negatives}, {case.estimator}, B {case.batch}, K {case.candidates:,}, n {images:,}, {case.dtype}"
    against = "a gathered (B, K + 1, D) for each view"
    yield less(what, against, seconds["ours"], seconds["theirs"], case.faster, detail=_floor(case, seconds["ours"]))
    if case.estimator == "nce":
        yield less(f"{what}: memory", against, max(extra["ours"], 1), extra["theirs"], case.smaller, "bytes")


def _floor(case: Case, seconds: float) -> str:
    gathered = case.candidates * (1 if case.negatives == "shared" else case.batch)
    megabytes = gathered * DIM * (2 if case.dtype == "bfloat16" else 4) / 1e6
    operations = 8 * case.batch * case.candidates * DIM / 1e9
    speed = f"{megabytes / 1e3 / seconds:.2g} GB/s, {operations / seconds:.2g} GFLOP/s"
    return f"floor: {megabytes:,.0f} MB of rows read once, {operations:.1f} GFLOP; ours: {speed}"


def _share_of_bandwidth(images: int, settings: Settings) -> Row:
    """Rows read, over what a plain copy moves in the same time, at a batch that the published way has no memory for."""
    case = Case(batch=256, candidates=8_000 if settings.quick else 32_000)
    device = settings.device
    loss = make_loss(images, case, device)
    ids = torch.arange(case.batch, device=device)
    output = {name: torch.randn(case.batch, DIM, device=device, requires_grad=True) for name in ("image", "patches")}
    source = torch.empty(1 << 28, device=device)
    target = torch.empty_like(source)
    seconds = interleaved(
        {"ours": lambda: loss(output, ids).backward(), "copy": lambda: target.copy_(source)},
        settings.repeats,
        3,
        device,
    )
    read = case.batch * case.candidates * DIM * 4
    bandwidth = 2 * source.numel() * 4 / seconds["copy"]
    return more(
        f"per_image, nce, B {case.batch}, K {case.candidates:,}: rows read", "what a copy moves",
        read / seconds["ours"] / 1e9, bandwidth / 1e9, 0.5, "GB/s", f"{read / 1e9:.2f} GB in {seconds['ours']:.4f} s",
    )  # fmt: skip


def to_profile(settings: Settings) -> Work:
    """The loss with negatives for each image."""
    case = Case(batch=8, candidates=16_000) if settings.quick else Case()
    loss = make_loss(200_000 if settings.quick else 1_281_167, case, settings.device)
    ids = torch.arange(case.batch, device=settings.device)
    views = {name: torch.randn(case.batch, DIM, device=settings.device, requires_grad=True) for name in loss.views}
    assert math.isfinite(float(loss(views, ids)))
    return lambda: loss(views, ids).backward()
