"""The PIRL loss: worked by hand, against slow float64 loops, and in the cases that break."""

import math

import pytest
import torch
import torch.nn.functional as F
from classy_vision.losses import build_loss

from pirl_plugin.functional import nce
from pirl_plugin.functional.sampling import draw_negative_ids, draw_shared_ids
from pirl_plugin.losses import PIRLNCELoss
from pirl_plugin.schema import ConfigError

ESTIMATORS = ["nce", "softmax", "infonce"]


def make_loss(**arguments):
    torch.manual_seed(0)
    return PIRLNCELoss(**{"num_images": 50, "dim": 8, "num_negatives": 12, "temperature": 0.3, **arguments})


def make_batch(dtype=torch.float64, dim=8):
    generator = torch.Generator().manual_seed(1)
    views = {
        name: torch.randn(5, dim, generator=generator, dtype=dtype, requires_grad=True) for name in ("image", "patches")
    }
    return views, torch.tensor([3, 7, 0, 49, 21])


def slow_loss(loss, views, ids, negative_ids, log_z=None):
    """Eq. 3-5 one image and one candidate at a time, float64, straight from the definitions."""
    rows = loss.memory_bank.rows.double()
    total = 0.0
    for view, weight in (("image", 1 - loss.lam), ("patches", loss.lam)):
        for b, image_id in enumerate(ids.tolist()):
            q = views[view][b] / views[view][b].norm()
            candidates = negative_ids[b] if negative_ids.ndim == 2 else negative_ids
            candidates = [k for k in candidates.tolist() if k != image_id]
            positive = (q @ rows[image_id] / loss.temperature).exp()
            others = [(q @ rows[k] / loss.temperature).exp() for k in candidates]
            if loss.estimator == "nce":
                noise = len(candidates) / loss.num_images
                h = [p / math.exp(log_z) / (p / math.exp(log_z) + noise) for p in (positive, *others)]
            else:
                h = [p / (positive + sum(others)) for p in (positive, *others)]
            value = -h[0].log()
            if loss.estimator != "infonce":
                value = value - sum((1 - p).log() for p in h[1:])
            total = total + weight * value / len(ids)
    return total


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(5, 12), (12,)])
def test_agrees_with_a_slow_float64_loop_values_and_gradients(estimator, lam, shape):
    loss = make_loss(estimator=estimator, lam=lam, normalizer=70.0)
    views, ids = make_batch()
    negative_ids = torch.randint(50, shape, generator=torch.Generator().manual_seed(2))
    negative_ids.view(-1)[0] = 3  # the first image's own id: to be left out
    value = loss(views, ids, negative_ids=negative_ids)
    expected = slow_loss(loss, views, ids, negative_ids, math.log(70.0))
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    used = [view for view, weight in (("image", 1 - lam), ("patches", lam)) if weight > 0]
    ours = torch.autograd.grad(value, [views[v] for v in used])
    slow = torch.autograd.grad(expected, [views[v] for v in used])
    torch.testing.assert_close(ours, slow, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_float32_is_within_1e6_of_float64(estimator):
    loss = make_loss(estimator=estimator, temperature=0.07, normalizer=110.0)
    views, ids = make_batch()
    negative_ids = draw_negative_ids(ids, 12, 50)
    value = loss({k: v.float() for k, v in views.items()}, ids, negative_ids=negative_ids)
    assert value.dtype == torch.float32
    expected = slow_loss(loss, views, ids, negative_ids, math.log(110.0)).item()
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_softmax_of_two_orthogonal_images_by_hand():
    """tau=1, s+=1, s-=0: h = [e, 1] / (e + 1), so Eq. 4 gives -2 log(e / (e + 1))."""
    value = nce.softmax(torch.tensor([1.0]), torch.tensor([[0.0]]))
    assert value.item() == pytest.approx(-2 * math.log(math.e / (math.e + 1)))


def test_nce_by_hand():
    """n=4, N=2, Z=4, logits 0: P = 1/4 and N * P_n = 1/2, so h = 1/3 and the loss is log 3 + 2 log(3/2)."""
    value = nce.nce(torch.zeros(1), torch.zeros(1, 2), math.log(4), 4)
    assert value.item() == pytest.approx(math.log(3) + 2 * math.log(1.5))


def test_infonce_that_tells_nothing_apart_is_log_of_the_candidates():
    assert nce.infonce(torch.zeros(3), torch.zeros(3, 7)).tolist() == pytest.approx([math.log(8)] * 3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("negatives", ["per_image", "shared"])
def test_finite_at_temperature_001_in_bf16_autocast(estimator, negatives):
    loss = make_loss(estimator=estimator, negatives=negatives, temperature=0.01)
    rows = loss.memory_bank.rows
    rows[1] = -rows[0]  # the extremes: similarities of 1 and of -1
    layer = torch.nn.Linear(8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        f = layer(torch.randn(6, 8))
        assert f.dtype == torch.bfloat16
        views = {"image": f, "patches": torch.cat([rows[:2], -rows[:2], rows[2:4]]) + 0 * f}
        value = loss(views, torch.tensor([0, 1, 0, 1, 2, 3]))
    value.backward()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert torch.isfinite(layer.weight.grad).all()
    assert layer.weight.grad.abs().sum() > 0


def test_a_negative_that_takes_all_the_probability_is_still_pushed_away():
    """Eq. 4 at h(q, m') -> 1: the gradient of -log(1 - h) by the logit tends to h = 1, not to 0."""
    negatives = torch.tensor([[100.0, 0.0]], requires_grad=True)
    loss = nce.softmax(torch.zeros(1), negatives) - nce.infonce(torch.zeros(1), negatives)
    (gradient,) = torch.autograd.grad(loss.sum(), negatives)
    assert loss.item() == pytest.approx(100 - math.log(2), rel=1e-5)
    assert gradient[0, 0].item() == pytest.approx(1.0, abs=1e-4)


def test_gathered_logits_equal_the_plain_gather_for_every_chunk_size():
    queries = F.normalize(torch.randn(2, 3, 4, dtype=torch.float64), dim=-1).requires_grad_()
    rows, ids = torch.randn(20, 4), torch.randint(20, (3, 11))
    plain = torch.einsum("vbd,bkd->vbk", queries, rows[ids].double()) / 0.2
    weights = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * weights).sum(), queries)
    for chunk in (1, 4, 11, 100):
        logits = nce.candidate_logits(queries / 0.2, rows, ids, chunk)
        torch.testing.assert_close(logits, plain)
        torch.testing.assert_close(torch.autograd.grad((logits * weights).sum(), queries), expected)


@pytest.mark.parametrize(("num_images", "num_negatives"), [(3, 2), (3, 1), (2, 1), (40, 17), (40, 39)])
def test_drawn_negatives_never_hold_the_own_image(num_images, num_negatives):
    ids = torch.arange(num_images).repeat(50)
    drawn = draw_negative_ids(ids, num_negatives, num_images)
    assert drawn.shape == (len(ids), num_negatives)
    assert not (drawn == ids.unsqueeze(1)).any()
    assert set(drawn.flatten().tolist()) == set(range(num_images))


def test_drawn_negatives_are_uniform_over_the_others():
    drawn = draw_negative_ids(torch.tensor([2]), 60_000, 7)  # asks for more than 6 others only here, to count
    counts = torch.bincount(drawn[0], minlength=7)
    assert counts[2] == 0
    assert (counts[[0, 1, 3, 4, 5, 6]] - 10_000).abs().max() < 500  # 5.5 standard deviations


def test_all_the_others_are_taken_once_where_the_dataset_has_no_more():
    assert draw_negative_ids(torch.tensor([1, 0]), 2, 3).tolist() == [[0, 2], [1, 2]]
    assert draw_shared_ids(2, 3, torch.device("cpu")).tolist() == [0, 1, 2]


def test_shared_and_per_image_agree_where_both_take_every_other_image():
    views, ids = make_batch()
    values = [
        make_loss(negatives=mode, num_negatives=49, normalizer=9.0)(views, ids) for mode in ("shared", "per_image")
    ]
    torch.testing.assert_close(values[0], values[1])


def test_more_negatives_than_images_are_clipped_with_a_warning():
    with pytest.warns(UserWarning, match="using all 49"):
        loss = make_loss(num_negatives=4096)
    assert loss.num_negatives == 49


def test_normalizer_is_n_times_the_mean_of_the_first_training_batch_then_kept():
    loss = make_loss(lam=0.5)
    views, ids = make_batch()
    negative_ids = draw_negative_ids(ids, 12, 50)
    loss.eval()(views, ids, negative_ids=negative_ids)
    assert loss.normalizer == 0  # evaluation never sets it
    loss.train()(views, ids, negative_ids=negative_ids)
    candidates = torch.cat([ids.unsqueeze(1), negative_ids], dim=1)
    logits = [
        F.normalize(views[v], dim=1).unsqueeze(1) @ loss.memory_bank.rows[candidates].double().mT / 0.3 for v in views
    ]
    expected = 50 * torch.stack(logits).exp().mean().item()
    assert loss.normalizer == pytest.approx(expected, rel=1e-9)
    loss({name: -view for name, view in views.items()}, ids)
    assert loss.normalizer == pytest.approx(expected, rel=1e-9)


def test_normalizer_over_several_batches_is_their_mean():
    single = []
    views, ids = make_batch()
    draws = [draw_negative_ids(ids, 12, 50) for _ in range(3)]
    for draw in draws:
        loss = make_loss()
        loss(views, ids, negative_ids=draw)
        single.append(loss.normalizer)
    loss = make_loss(normalizer_steps=3)
    for draw in [*draws, draws[0]]:
        loss(views, ids, negative_ids=draw)
    assert loss.normalizer == pytest.approx(sum(single) / 3, rel=1e-9)


@pytest.mark.parametrize("bank", ["ema_memory_bank", "sharded_ema_memory_bank"])
def test_a_normalizer_that_is_known_is_not_estimated_again(monkeypatch, bank):
    """On every way to the loss: of a whole bank on the CPU, and of all logits, as of a split one."""
    loss = make_loss(normalizer_steps=2, memory_bank={"name": bank})
    views, ids = make_batch()
    calls, update = [], loss._update_normalizer
    monkeypatch.setattr(loss, "_update_normalizer", lambda *logits: calls.append(1) or update(*logits))
    values = []
    for _ in range(4):
        torch.manual_seed(3)
        values.append(loss(views, ids).item())
        known = loss.normalizer
    assert len(calls) == 2
    assert values[2:] == pytest.approx(values[1:3])  # the same draw and, from the second batch on, the same Z
    loss.load_state_dict({**loss.state_dict(), "normalizer_batches": torch.tensor(1)}, strict=False)
    loss(views, ids)
    assert len(calls) == 3  # a restored one may not be known yet
    assert loss.normalizer != known


def test_state_dict_restores_bank_and_normalizer():
    loss, other = make_loss(), PIRLNCELoss(num_images=50, dim=8, num_negatives=12, temperature=0.3)
    views, ids = make_batch()
    loss(views, ids)
    loss.memory_bank.update(ids, views["image"])
    other.set_classy_state(loss.get_classy_state())
    assert other.normalizer == loss.normalizer > 0
    assert torch.equal(other.memory_bank.rows, loss.memory_bank.rows)
    other({name: -view for name, view in views.items()}, ids)
    assert other.normalizer == loss.normalizer  # restored, not estimated anew


def test_forward_leaves_the_bank_alone():
    loss = make_loss()
    before = loss.memory_bank.rows.clone()
    loss(*make_batch()).backward()
    assert torch.equal(loss.memory_bank.rows, before)


def test_lam_zero_needs_no_transformed_view_and_lam_half_does():
    views, ids = make_batch()
    only_image = {"image": views["image"]}
    assert torch.isfinite(make_loss(lam=0.0)(only_image, ids))
    with pytest.raises(KeyError, match="patches"):
        make_loss(lam=0.5)(only_image, ids)


def test_the_dictionary_of_the_design_builds_through_classy_vision():
    loss = build_loss(
        {
            "name": "pirl_nce", "num_images": 5000, "dim": 128, "num_negatives": 3200, "temperature": 0.07, "lam": 0.5,
            "estimator": "nce", "negatives": "per_image", "memory_bank": {"name": "ema_memory_bank", "momentum": 0.5},
        }
    )  # fmt: skip
    assert loss.memory_bank.rows.shape == (5000, 128)
    views = {"image": torch.randn(4, 128), "patches": torch.randn(4, 128)}
    assert loss(views, torch.arange(4)).ndim == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lam": 1.5}, "lam: must be less than or equal to 1"),
        ({"temperature": 0.0}, "temperature: must be greater than 0"),
        ({"estimator": "sofmax"}, "Did you mean 'softmax'"),
        ({"num_negatve": 3}, "Did you mean 'num_negatives'"),
        ({"memory_bank": {"name": "ema_memory_bnk"}}, "Did you mean 'ema_memory_bank'"),
        ({"memory_bank": {"name": "ema_memory_bank", "momentum": 2.0}}, "memory_bank.momentum"),
    ],
)
def test_a_mistake_in_the_configuration_is_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        build_loss({"name": "pirl_nce", "num_images": 50, **wrong})


def test_ids_outside_the_bank_are_refused():
    views, ids = make_batch()
    with pytest.raises(IndexError, match=r"Image id 50 is outside the memory bank; the bank has 50 rows"):
        make_loss()(views, ids + 1)
