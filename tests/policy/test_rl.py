"""Rewards, returns-to-go, whitening and the adaptive KL coefficient against their formulas; whitening on two
gloo processes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

import fastalign as fa
from fastalign.testing import assert_close, make_batch

# --- shape_rewards ------------------------------------------------------------------------------------------


def sequences():
    """cu_seqlens and mask: an interior hole, unscored tails, an empty sequence, one without scored rows, one
    that is one scored row."""
    cu_seqlens = torch.tensor([0, 6, 6, 9, 12, 13], dtype=torch.int32)
    mask = torch.tensor([0, 1, 0, 1, 1, 0, 0, 0, 0, 1, 1, 0, 1], dtype=torch.bool)
    return cu_seqlens, mask, {0: 4, 3: 10, 4: 12}  # sequence -> its last scored row


def test_score_lands_on_the_last_scored_row():
    cu_seqlens, mask, last = sequences()
    scores = torch.tensor([1.0, 2.0, 3.0, -4.0, 5.0])
    want = torch.zeros(13)
    for i, row in last.items():
        want[row] = scores[i]
    assert torch.equal(fa.shape_rewards(scores, cu_seqlens, mask=mask), want)
    none = torch.zeros(1, dtype=torch.int32)
    assert fa.shape_rewards(scores[:0], none, mask=mask[:0]).shape == (0,)
    assert fa.shape_rewards(scores[:2], torch.zeros(3, dtype=torch.int32), mask=mask[:0]).shape == (0,)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_rewards_by_formula(kind):
    cu_seqlens, mask, last = sequences()
    scores = torch.tensor([3.0, 1.0, 1.0, -8.0, 0.5], requires_grad=True)
    logprobs, ref = -torch.rand(13) - 0.1, -torch.rand(13) - 0.1
    finished = torch.tensor([True, True, True, False, False])
    options = {
        "kl_coef": 0.3,
        "kl_kind": kind,
        "score_clip": 2.0,
        "finished": finished,
        "missing_eos_penalty": 1.5,
    }
    got = fa.shape_rewards(
        scores,
        cu_seqlens,
        mask=mask,
        logprobs=torch.where(mask, logprobs, math.nan),
        ref_logprobs=ref,
        **options,
    )
    estimate = {
        "k1": lambda d: d,
        "k2": lambda d: d * d / 2,
        "k3": lambda d: math.exp(-d) - 1 + d,
        "abs": abs,
    }[kind]
    want = [-0.3 * estimate(float(a) - float(b)) if m else 0.0 for a, b, m in zip(logprobs, ref, mask)]
    for i, row in last.items():
        want[row] += min(max(float(scores[i].detach()), -2.0), 2.0) - (0.0 if finished[i] else 1.5)
    assert_close(got, torch.tensor(want, dtype=torch.float64))
    assert not got.requires_grad and got.dtype == torch.float32
    tensor = fa.shape_rewards(
        scores,
        cu_seqlens,
        mask=mask,
        logprobs=logprobs,
        ref_logprobs=ref,
        **{**options, "kl_coef": torch.tensor(0.3)},
    )
    assert_close(tensor, got.double())
    exact = fa.kl_estimate(logprobs, ref, kind)
    given = fa.shape_rewards(
        scores, cu_seqlens, mask=mask, kl=exact, **{k: v for k, v in options.items() if k != "kl_kind"}
    )
    assert torch.equal(given, got)


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"mask": None}, TypeError, "mask must be a tensor"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, "end at the number of tokens"),
        ({"scores": torch.ones(3)}, ValueError, r"scores has shape \(3,\); legal here: \(2,\)"),
        ({"kl_coef": -1.0}, ValueError, "kl_coef=-1.0 is out of range"),
        ({"kl_coef": 0.1}, ValueError, "logprobs and ref_logprobs are needed, or kl"),
        ({"kl_coef": 0.1, "kl": torch.ones(5), "logprobs": torch.ones(5)}, ValueError, "one or the other"),
        (
            {"kl_coef": 0.1, "logprobs": torch.ones(5), "ref_logprobs": torch.ones(5), "kl_kind": "k9"},
            ValueError,
            "kl_kind='k9'",
        ),
        ({"kl_kind": "k9"}, ValueError, "kl_kind='k9' is unknown; legal: k1, k2, k3, abs"),
        (
            {"kl_coef": 0.1, "kl": torch.ones(5), "kl_kind": "k1"},
            ValueError,
            "kl_kind='k1' has no effect: kl is given",
        ),
        (
            {"kl_coef": torch.ones(2), "kl": torch.ones(5)},
            ValueError,
            r"kl_coef must be a number or a tensor of one element, got shape \(2,\)",
        ),
        ({"score_clip": 0.0}, ValueError, "score_clip=0.0 is out of range"),
        ({"missing_eos_penalty": 1.0}, ValueError, "finished and missing_eos_penalty go together"),
        ({"finished": torch.ones(3), "missing_eos_penalty": 1.0}, ValueError, r"finished has shape \(3,\)"),
    ],
    ids=str,
)
def test_shape_rewards_errors(change, error, words):
    arguments = {
        "scores": torch.ones(2),
        "cu_seqlens": torch.tensor([0, 2, 5]),
        "mask": torch.ones(5, dtype=torch.bool),
    }
    with pytest.raises(error, match=words):
        fa.shape_rewards(**{**arguments, **change})


def test_a_coefficient_that_is_a_tensor_is_a_constant():
    cu_seqlens, mask, _ = sequences()
    scores, kl = torch.arange(5.0), torch.rand(13)
    want = fa.shape_rewards(scores, cu_seqlens, mask=mask, kl=kl, kl_coef=0.25)
    for coef in (
        torch.tensor(0.25, requires_grad=True),
        torch.tensor([0.25], dtype=torch.float64),
        torch.tensor(0.25, dtype=torch.bfloat16),
    ):
        got = fa.shape_rewards(scores, cu_seqlens, mask=mask, kl=kl, kl_coef=coef)
        assert torch.equal(got, want) and got.dtype == torch.float32 and not got.requires_grad


# --- returns_to_go ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_returns_to_go(gamma):
    cu_seqlens, mask, _ = sequences()
    rewards = torch.randn(13)
    got = fa.returns_to_go(torch.where(mask, rewards, math.nan), cu_seqlens, mask=mask, gamma=gamma)
    want, following, bounds = [0.0] * 13, 0.0, cu_seqlens.tolist()
    for t in reversed(range(13)):
        if t + 1 in bounds:
            following = 0.0
        if mask[t]:
            want[t] = following = float(rewards[t]) + gamma * following
    assert_close(got, torch.tensor(want, dtype=torch.float64), scale=4.0)
    assert torch.equal(
        fa.gae(rewards, torch.zeros(13), cu_seqlens, mask=mask, gamma=gamma, lam=1.0).advantages, got
    )


# --- whiten -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_whiten(shift_mean, offset):
    x = (torch.randn(50) + offset).requires_grad_()
    mask = torch.rand(50) < 0.7
    got = fa.whiten(torch.where(mask, x, math.nan), mask, shift_mean=shift_mean)
    kept = x.detach()[mask].double()
    want = (kept - kept.mean()) / torch.sqrt(kept.var() + 1e-8) + (0.0 if shift_mean else kept.mean())
    assert_close(got[mask], want)
    assert bool((got[~mask] == 0).all()) and not got.requires_grad and got.dtype == torch.float32
    full = fa.whiten(x.detach().double().view(5, 10), shift_mean=shift_mean)
    assert full.shape == (5, 10) and full.dtype == torch.float64
    everything = x.detach().double()
    shift = 0.0 if shift_mean else everything.mean()
    torch.testing.assert_close(
        full.flatten(), (everything - everything.mean()) / torch.sqrt(everything.var() + 1e-8) + shift
    )


def test_whiten_degenerate():  # row 35
    assert fa.whiten(torch.empty(0)).shape == (0,)
    assert fa.whiten(torch.tensor([math.nan, 2.0]), torch.tensor([False, False])).tolist() == [0.0, 0.0]
    assert fa.whiten(torch.tensor([math.nan, 2.0]), torch.tensor([False, True])).tolist() == [0.0, 0.0]
    assert fa.whiten(torch.tensor([7.0]), shift_mean=False).tolist() == [7.0]
    assert fa.whiten(torch.tensor([7.0, 7.0]), shift_mean=False).tolist() == [7.0, 7.0]
    assert fa.whiten(torch.full((9,), 0.1)).abs().max() < 1e-9
    two = fa.whiten(torch.tensor([1.0, 3.0]))
    assert_close(two, torch.tensor([-1.0, 1.0], dtype=torch.float64) / math.sqrt(2.0 + 1e-8))
    with pytest.raises(TypeError, match="x must be a floating-point tensor, got torch.int64"):
        fa.whiten(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"moments \(mean\) has shape \(1,\)"):
        fa.whiten(torch.ones(3), moments=(torch.tensor(3.0), torch.ones(1), torch.tensor(0.0)))
    with pytest.raises(ValueError, match="moments has 2 entries; legal: 3"):
        fa.whiten(torch.ones(3), moments=(torch.tensor(3.0), torch.tensor(0.0)))


def test_whiten_with_the_moments_of_gae():
    batch = make_batch(4, max_len=60)
    out = fa.gae(batch.logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask)
    for shift_mean in (True, False):
        got = fa.whiten(out.advantages, batch.packed.mask, moments=out.moments, shift_mean=shift_mean)
        want = fa.whiten(out.advantages.double(), batch.packed.mask, shift_mean=shift_mean)
        assert_close(got, want, scale=float(want.abs().max()))


def test_rollout_compiles():
    """Rewards to whitened advantages without a graph break, and without a compilation per size."""
    import torch._dynamo.testing

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def rollout(scores, values, logprobs, ref, cu_seqlens, mask, gamma):
        rewards = fa.shape_rewards(
            scores, cu_seqlens, mask=mask, logprobs=logprobs, ref_logprobs=ref, kl_coef=0.1, score_clip=5.0
        )
        out = fa.gae(rewards, values, cu_seqlens, mask=mask, gamma=gamma)
        return fa.whiten(out.advantages, mask, moments=out.moments), fa.whiten(
            fa.returns_to_go(rewards, cu_seqlens, mask=mask), mask
        )

    compiled = torch.compile(rollout, fullgraph=True, dynamic=True, backend=counter)
    for pairs in (2, 3, 5, 8):
        batch = make_batch(pairs, seed=pairs)
        arguments = (torch.randn(2 * pairs), batch.kl_ref_policy, batch.logprobs, batch.ref_logprobs, batch.packed.cu_seqlens,
                     batch.packed.mask, torch.tensor(0.99))  # fmt: skip
        for a, b in zip(compiled(*arguments), rollout(*arguments)):
            assert_close(a, b.double(), scale=8.0)
    assert counter.frame_count <= 2


# --- the KL coefficient -------------------------------------------------------------------------------------


def test_mean_sequence_kl():
    cu_seqlens, mask, last = sequences()
    logprobs, ref = torch.randn(13), torch.randn(13)
    d = torch.where(mask, logprobs.double() - ref.double(), 0.0)
    mean, count = fa.mean_sequence_kl(torch.where(mask, logprobs, math.nan), ref, cu_seqlens, mask=mask)
    assert float(count) == len(last) == 3  # of five sequences two have no scored row
    assert_close(mean.float(), (d.sum() / 3), scale=4.0)
    mean, count = fa.mean_sequence_kl(logprobs, ref, cu_seqlens, mask=torch.zeros_like(mask))
    assert float(mean) == float(count) == 0.0


def test_adaptive_kl_controller():
    numbers, tensors = (fa.AdaptiveKLController(0.2, target=6.0, horizon=10000) for _ in range(2))
    value = 0.2
    for kl, n in ((6.0, 256), (6.6, 256), (100.0, 512), (0.0, 64), (-3.0, 64)):
        value *= 1.0 + min(max(kl / 6.0 - 1.0, -0.2), 0.2) * n / 10000
        numbers.update(kl, n)
        tensors.update(torch.tensor(kl, dtype=torch.float64), torch.tensor(n))
        assert numbers.value == pytest.approx(value, rel=1e-14) and float(tensors.value) == pytest.approx(
            value, rel=1e-14
        )
    for controller in (numbers, tensors):
        resumed = fa.AdaptiveKLController()
        resumed.load_state_dict(controller.state_dict())
        controller.update(9.0, 100)
        resumed.update(9.0, 100)
        assert float(resumed.value) == float(controller.value)
    with pytest.raises(ValueError, match="legal: value"):
        numbers.load_state_dict({"kl": 1.0})
    with pytest.raises(ValueError, match="target=0 is out of range"):
        fa.AdaptiveKLController(target=0)


@pytest.mark.parametrize("wrap", [float, torch.tensor], ids=["numbers", "tensors"])
@pytest.mark.parametrize("horizon", [1e-300, 4.0, 100.0, 1e4])
def test_the_kl_coefficient_stays_in_its_range(wrap, horizon):
    """n_steps / horizon beyond 5 would make the formula negative: an update at most halves or doubles."""
    for kl, factor in ((0.0, 0.5), (1e30, 2.0), (math.inf, 2.0), (-math.inf, 0.5)):
        controller = fa.AdaptiveKLController(0.2, 6.0, horizon)
        controller.update(wrap(kl), wrap(1000.0))
        want = 0.2 * (factor if horizon < 200 else 1.0 + (0.2 if factor > 1 else -0.2) * 1000 / horizon)
        assert float(controller.value) == pytest.approx(want, rel=1e-6)
    controller = fa.AdaptiveKLController(0.2, 6.0, horizon)
    for _ in range(3000):  # neither 0 / 0 nor infinity at the ends of the range
        controller.update(wrap(1e9), wrap(1000.0))
    assert 0.2 < float(controller.value) < math.inf
    before = float(controller.value)
    for kl, n in ((math.nan, 10.0), (1.0, math.nan)):
        controller.update(wrap(kl), wrap(n))
        assert float(controller.value) == before
    controller.update(wrap(0.0), wrap(1000.0))
    assert 0.0 < float(controller.value) < before


def test_what_the_controller_refuses():
    for name in ("init_kl_coef", "target", "horizon"):
        for bad in (-1.0, math.nan, math.inf, 10**400, 10**5000, True, "1", None):
            with pytest.raises((ValueError, TypeError), match=f"^{name}[ =]") as caught:
                fa.AdaptiveKLController(**{name: bad})
            assert len(str(caught.value)) < 200
    controller = fa.AdaptiveKLController()
    for bad in ((True, 1), ("1", 1), (None, 1), (1.0, -1), (torch.ones(2), 1), (1.0, torch.ones(2))):
        with pytest.raises((ValueError, TypeError), match="current_kl|n_steps"):
            controller.update(*bad)
    for bad in (-1.0, math.nan, math.inf, "x", None, torch.tensor(-1.0), torch.ones(2)):
        with pytest.raises((ValueError, TypeError), match="value"):
            controller.load_state_dict({"value": bad})
    for bad in (None, [], {}, {"value": 1.0, "more": 1}):
        with pytest.raises(ValueError, match="legal: value"):
            controller.load_state_dict(bad)
    assert controller.value == 0.2


# --- across ranks -------------------------------------------------------------------------------------------


def _rollout():
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(20, generator=generator), 50.0 + torch.randn(20, generator=generator)
    return rewards, values, torch.rand(20, generator=generator) < 0.8, [0, 3, 9, 20]


def _worker(rank):
    group = dist.group.WORLD
    rewards, values, mask, cu = _rollout()
    here = slice(cu[0], cu[2]) if rank == 0 else slice(cu[2], cu[3])
    local = torch.tensor([c - here.start for c in (cu[:3] if rank == 0 else cu[2:])], dtype=torch.int32)
    out = fa.gae(rewards[here], values[here], local, mask=mask[here])
    whitened = fa.whiten(out.advantages, mask[here], group=group)
    by_moments = fa.whiten(out.advantages, mask[here], group=group, moments=out.moments, shift_mean=False)
    one_sided = fa.whiten(
        out.advantages, mask[here] & (rank == 0), group=group
    )  # rank 1 has nothing to whiten
    kl, count = fa.mean_sequence_kl(rewards[here], values[here], local, mask=mask[here], group=group)
    return whitened, by_moments, one_sided, float(kl), float(count)


def test_whitening_over_ranks_is_that_of_the_whole_rollout():  # row 44
    results = on_ranks(2, _worker)
    rewards, values, mask, cu = _rollout()
    cu_seqlens = torch.tensor(cu, dtype=torch.int32)
    out = fa.gae(rewards, values, cu_seqlens, mask=mask)
    whitened, by_moments, one_sided, kl, count = (
        torch.cat(x) if isinstance(x[0], torch.Tensor) else x for x in zip(results[0], results[1])
    )
    assert_close(whitened, fa.whiten(out.advantages.double(), mask), scale=4.0)
    assert_close(
        by_moments,
        fa.whiten(out.advantages.double(), mask, shift_mean=False),
        scale=float(out.mean.abs()) + 4.0,
    )
    first = mask & (torch.arange(20) < cu[2])
    assert_close(one_sided, fa.whiten(out.advantages.double(), first), scale=4.0)
    want, number = fa.mean_sequence_kl(rewards, values, cu_seqlens, mask=mask)
    assert kl[0] == kl[1] == pytest.approx(float(want), rel=1e-12) and count == (float(number),) * 2
