"""The fast ways to the loss against the plain one: values and gradients, at the sizes that break things, and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pirl_plugin.functional import nce, nce_blocks, nce_triton
from pirl_plugin.losses import PIRLNCELoss
from pirl_plugin.speed.measuring import extra_peak_bytes

ESTIMATORS = ["nce", "softmax", "infonce"]
LOG_Z = 1.3
# views, images, negatives, rows, dimensions: one image, one negative, more negatives than rows, odd ones
SIZES = [(2, 3, 11, 20, 4), (1, 1, 2, 5, 3), (2, 5, 40, 7, 8), (2, 1, 33, 50, 5), (1, 7, 1, 9, 2)]


def case(size: tuple[int, ...], shared: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries of up to norm 6, so that some h are near 1; rows; ids with own ones among them, but never these alone."""
    views, images, count, total, dim = size
    generator = torch.Generator().manual_seed(sum(size))
    rows = F.normalize(torch.randn(total, dim, generator=generator), dim=1).to(dtype)
    queries = 6 * F.normalize(torch.randn(views, images, dim, generator=generator, dtype=torch.float64), dim=-1)
    own = torch.arange(images) % total
    ids = torch.randint(total, (count,) if shared else (images, count), generator=generator)
    if count > 1:
        ids[..., 0] = own[0]
        ids[..., 1] = (own[0] + 1) % total if images == 1 else total - 1
    else:
        ids[...] = total - 1
    return queries, rows, own, ids


def plain(queries: Tensor, rows: Tensor, ids: Tensor, own: Tensor, estimator: str) -> Tensor:
    """The published way: all rows gathered, ``(B, K, D)``, then the formulas."""
    gathered = rows[ids].to(queries.dtype).expand(queries.shape[1], -1, -1)
    negative = torch.einsum("vbd,bkd->vbk", queries, gathered)
    negative = negative.masked_fill(ids == own.unsqueeze(1), -torch.inf)
    positive = torch.einsum("vbd,bd->vb", queries, rows[own].to(queries.dtype))
    losses = [
        nce.nce(p, m, LOG_Z, len(rows)) if estimator == "nce" else getattr(nce, estimator)(p, m)
        for p, m in zip(positive, negative, strict=True)
    ]
    return torch.stack(losses)


def fast(module: ModuleType, queries: Tensor, rows: Tensor, ids: Tensor, own: Tensor, estimator: str) -> Tensor:
    positive = torch.einsum("vbd,bd->vb", queries, rows[own].to(queries.dtype))
    return module.contrast(queries, positive, rows, ids, own, estimator, LOG_Z).losses


def value_and_gradient(losses: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Every loss weighs differently, so that none can stand for another."""
    weights = torch.linspace(0.5, 2, losses.numel(), dtype=losses.dtype).view_as(losses)
    return losses, torch.autograd.grad((losses * weights).sum(), queries)[0]


@pytest.mark.parametrize("hot_rows", [1, 7, 4096])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shared", [False, True])
def test_blocks_equal_the_plain_way(
    monkeypatch: pytest.MonkeyPatch, hot_rows: int, estimator: str, shared: bool
) -> None:
    monkeypatch.setattr(nce_blocks, "_HOT_ROWS", hot_rows)
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            queries, rows, own, ids = case(size, shared, dtype)
            queries.requires_grad_()
            expected = value_and_gradient(plain(queries, rows, ids, own, estimator), queries)
            ours = value_and_gradient(fast(nce_blocks, queries, rows, ids, own, estimator), queries)
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_logits_and_candidates_leave_out_the_own_image(estimator: str) -> None:
    queries, rows, own, ids = case((2, 3, 11, 20, 4), False, torch.float32)
    positive = torch.zeros(2, 3, dtype=torch.float64)
    outcome = nce_blocks.contrast(queries, positive, rows, ids, own, estimator, LOG_Z)
    counts = ids != own.unsqueeze(1)
    logits = torch.einsum("vbd,bkd->vbk", queries, rows[ids].double())
    torch.testing.assert_close(outcome.candidates, counts.sum(dim=1).double().expand(2, -1))
    torch.testing.assert_close(outcome.logits, (logits * counts).sum(dim=2))
    everything = nce_blocks.contrast(queries, positive, rows, ids, None, estimator, LOG_Z)
    assert (everything.candidates == 11).all()
    torch.testing.assert_close(everything.logits, logits.sum(dim=2))


@pytest.mark.parametrize("negatives", ["per_image", "shared"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_loss_takes_the_fast_way_once_z_is_known(
    monkeypatch: pytest.MonkeyPatch, estimator: str, negatives: str
) -> None:
    torch.manual_seed(0)
    loss = PIRLNCELoss(50, 8, num_negatives=12, estimator=estimator, negatives=negatives, normalizer_steps=2)
    taken: list[str] = []
    way = nce_blocks.contrast
    monkeypatch.setattr(nce_blocks, "contrast", lambda *arguments: taken.append("fast") or way(*arguments))
    batch = {view: torch.randn(4, 8, requires_grad=True) for view in ("image", "patches")}
    for _ in range(3):
        taken.append("call")
        loss(batch, torch.arange(4))
    assert taken == (["call", "call", "call", "fast"] if estimator == "nce" else ["call", "fast"] * 3)
    early = PIRLNCELoss(50, 8, num_negatives=12, estimator=estimator, normalizer_steps=2)
    loss.load_state_dict(early.state_dict())  # Z is open again
    taken.clear()
    loss(batch, torch.arange(4))
    assert taken == ([] if estimator == "nce" else ["fast"])


@pytest.mark.parametrize("negatives", ["per_image", "shared"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_loss_is_the_same_both_ways(monkeypatch: pytest.MonkeyPatch, estimator: str, negatives: str) -> None:
    """The whole of it: weights of the views, drawn negatives, gradients and statistics."""
    loss = PIRLNCELoss(50, 8, 12, estimator=estimator, negatives=negatives, lam=0.3, normalizer=60.0)
    batch = {view: torch.randn(4, 8, requires_grad=True) for view in ("image", "patches")}

    def plainly(queries: Tensor, positive: Tensor, rows: Tensor, ids: Tensor, own: Tensor, *_: object) -> object:
        negative = nce.without_own(nce.candidate_logits(queries, rows, ids), ids, own)
        return loss._plain(positive, negative, z_is_known=True)

    outcomes = []
    for way in (nce_blocks.contrast, plainly):
        monkeypatch.setattr(nce_blocks, "contrast", way)
        torch.manual_seed(3)
        value = loss(batch, torch.tensor([3, 7, 0, 49]))
        outcomes.append((value, torch.autograd.grad(value, list(batch.values())), loss.last_statistics))
    torch.testing.assert_close(outcomes[0], outcomes[1])


def test_neither_pass_holds_the_rows_of_all_images() -> None:
    """(16, 4096, 128) in float32 would be 33.5 MB; one block of 2048 rows is 1 MB, the rows of one image 2 MB."""
    loss = {name: PIRLNCELoss(5000, 128, 4096, estimator=name, normalizer=9e3) for name in ESTIMATORS}
    batch = {view: torch.randn(16, 128, requires_grad=True) for view in ("image", "patches")}
    ids = torch.arange(16)
    for estimator in ESTIMATORS:
        assert extra_peak_bytes(lambda name=estimator: loss[name](batch, ids).backward()) < 12e6  # type: ignore[misc]


# -- the GPU's kernel --------------------------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(nce_triton.triton is None, reason="triton is not installed")


@needs_triton
def test_the_kernel_equals_the_plain_way() -> None:
    """In triton's interpreter, which has to be chosen before triton is imported."""
    command = [sys.executable, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "28 cases" in done.stdout


def run_kernel() -> None:
    """Several tiles and several spans in the last size; float32 against float64."""
    cases = 0
    for size in [*SIZES, (2, 2, 300, 70, 8), (2, 3, 70, 50, 12)]:
        for dtype in (torch.float32, torch.bfloat16):
            for estimator in ("nce", "infonce"):
                queries, rows, own, ids = case(size, False, dtype)
                queries = queries.requires_grad_()
                expected = value_and_gradient(plain(queries, rows, ids, own, estimator), queries)
                single = queries.detach().float().requires_grad_()
                ours = value_and_gradient(fast(nce_triton, single, rows, ids, own, estimator), single)
                for left, right in zip(ours, expected, strict=True):
                    torch.testing.assert_close(left.double(), right, rtol=2e-5, atol=2e-5)
                cases += 1
    print(cases, "cases")


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_the_kernel_compiles_for_gpus_that_are_not_here() -> None:
    """What the interpreter lets pass, the compiler refuses; it needs no GPU."""
    if torch.version.cuda is None:
        pytest.skip("torch without CUDA")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {"queries": "*fp32", "rows": "*bf16", "ids": "*i64", "excluded": "*i64", "offset": "*fp32"}
    signature = {**pointers, "sums": "*fp32", "weighted": "*fp32"}
    signature |= dict.fromkeys(("images", "splits", "count", "span", "dim"), "i32")
    signature |= dict.fromkeys(("VIEWS", "DIM", "TILE", "INFONCE"), "constexpr")
    for infonce in (False, True):
        constants = {"VIEWS": 2, "DIM": 128, "TILE": nce_triton._TILE, "INFONCE": infonce}
        source = ASTSource(fn=nce_triton._kernel, signature=signature, constexprs=constants)
        assert len(nce_triton.triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]) > 1000


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("estimator", ["nce", "infonce"])
def test_on_a_gpu_the_kernel_equals_the_plain_way(estimator: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    for size in SIZES:
        queries, rows, own, ids = (x.cuda() for x in case(size, False, torch.float32))
        queries = queries.requires_grad_()
        expected = value_and_gradient(plain(queries, rows, ids, own, estimator).cpu(), queries)
        single = queries.detach().float().requires_grad_()
        assert nce_triton.usable(single, ids, estimator)
        ours = value_and_gradient(fast(nce_triton, single, rows, ids, own, estimator).cpu(), single)
        for left, right in zip(ours, expected, strict=True):
            torch.testing.assert_close(left.double(), right, rtol=2e-5, atol=2e-5)


if __name__ == "__main__":
    run_kernel()
