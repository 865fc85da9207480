"""The contract of generalised advantage estimation, on every backend. Truth: the loop over tokens in Python floats, which are fp64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fastalign as fa
from fastalign.testing import assert_close

DISCOUNTS = [(1.0, 1.0), (1.0, 0.95), (0.99, 0.95), (0.9, 0.0), (0.0, 0.7), (1.0, 0.0), (0.97, 1.0)]
PACKS = [[0, 5], [0, 0, 1, 1, 4, 40, 40, 169], [0], [0, 0, 0], [0, 1024, 1025, 3072, 5200]]  # tiles of the kernels: 1024


def loop(rewards, values, cu_seqlens, mask=None, bootstrap=None, gamma=1.0, lam=0.95):
    """(advantages, returns)"""
    r, v = rewards.double().tolist(), values.double().tolist()
    advantages, returns = [0.0] * len(r), [0.0] * len(r)
    for i, (lo, hi) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        next_value, next_advantage = 0.0 if bootstrap is None else float(bootstrap[i]), 0.0
        for t in reversed(range(lo, hi)):
            if mask is not None and not bool(mask[t]):
                continue
            delta = r[t] + gamma * next_value - v[t]
            next_value, next_advantage = v[t], delta + gamma * lam * next_advantage
            advantages[t], returns[t] = next_advantage, next_advantage + v[t]
    return torch.tensor(advantages, dtype=torch.float64), torch.tensor(returns, dtype=torch.float64)


def make(cu, device="cpu", seed=0):
    """rewards, values, cu_seqlens, mask with holes, bootstrap. Runs of the mask are long and short, and some sequences end unscored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = cu[-1]
    runs = torch.rand(tokens // 9 + 1, generator=generator).repeat_interleave(9)[:tokens]
    mask = (runs < 0.7) & (torch.rand(tokens, generator=generator) < 0.95)
    tensors = (torch.randn(tokens, generator=generator), torch.randn(tokens, generator=generator), torch.tensor(cu, dtype=torch.int32), mask,
               torch.randn(len(cu) - 1, generator=generator))  # fmt: skip
    return tuple(t.to(device) for t in tensors)


def check(rewards, values, cu_seqlens, **options):
    out = fa.gae(rewards, values, cu_seqlens, **options)
    truth = loop(rewards, values, cu_seqlens, **options)
    with fa.use_backend("reference"):  # plain PyTorch in the same type
        plain = fa.gae(rewards, values, cu_seqlens, **options)
    # Sums over a horizon of returns and values, each rounded: the scale is the largest, and fp64 to 1e-5 is what users were promised.
    size = max([1.0, *(float(t.abs().max()) for t in truth if t.numel())])
    for got, want, baseline, what in zip(out, truth, plain, ("advantages", "returns")):
        assert_close(got, want, baseline, what=what, scale=2.0 * size)
        assert not want.numel() or float((got.double().cpu() - want).abs().max()) <= 1e-5 * size
    check_moments(out, options.get("mask"))
    return out


def check_moments(out, mask=None):
    x = (out.advantages if mask is None else out.advantages[mask]).double()
    mean = x.mean() if x.numel() else x.new_zeros(())
    assert (
        float(out.count) == x.numel()
        and {m.shape for m in out.moments} == {()}
        and {m.dtype for m in out.moments} == {out.advantages.dtype}
    )
    m2 = ((x - mean) ** 2).sum()
    assert_close(out.mean, mean, scale=float(x.abs().max()) if x.numel() else 1.0)
    assert_close(out.m2, m2, scale=4.0 * max(float(m2), 1e-30))
    if not x.numel():
        assert [float(m) for m in out.moments] == [0.0] * 3


@pytest.mark.parametrize("cu", PACKS, ids=str)
def test_equals_the_loop(backend, device, cu):  # rows 36, 38; K4
    rewards, values, cu_seqlens, mask, bootstrap = make(cu, device)
    for gamma, lam in DISCOUNTS if cu[-1] < 1000 else DISCOUNTS[:3]:
        check(torch.where(mask, rewards, math.nan), values, cu_seqlens, mask=mask, bootstrap=bootstrap, gamma=gamma, lam=lam)
    check(rewards, values, cu_seqlens)
    check(rewards, values, cu_seqlens, mask=torch.zeros_like(mask), bootstrap=bootstrap)


def test_by_hand(backend, device):  # K3
    """One and two tokens, terminal and truncated; the bootstrap is discounted once."""
    cu = torch.tensor([0, 1, 3], dtype=torch.int32, device=device)
    r, v, b = (torch.tensor(x, device=device) for x in ([3.0, 1.0, 2.0], [0.5, 0.25, -1.0], [8.0, 4.0]))
    for boot, end in ((None, (0.0, 0.0)), (b, (8.0, 4.0))):
        out = fa.gae(r, v, cu, bootstrap=boot, gamma=0.5, lam=0.25)
        last = 2.0 + 0.5 * end[1] + 1.0
        first = 1.0 + 0.5 * -1.0 - 0.25
        want = [3.0 + 0.5 * end[0] - 0.5, first + 0.125 * last, last]
        assert out.advantages.tolist() == want and out.returns.tolist() == [a + x for a, x in zip(want, v.tolist())]


def test_holes_are_no_steps(backend, device):
    """K1: with and without its unscored tokens a sequence is the same; a reward at the end is not decayed by the tokens that follow it."""
    rewards, values, cu_seqlens, mask, bootstrap = make([0, 60, 200], device)
    dense = torch.tensor([0, int(mask[:60].sum()), int(mask.sum())], dtype=torch.int32, device=device)
    for gamma, lam in ((0.9, 0.8), (0.0, 0.0)):
        out = fa.gae(rewards, values, cu_seqlens, mask=mask, bootstrap=bootstrap, gamma=gamma, lam=lam)
        want = fa.gae(rewards[mask], values[mask], dense, bootstrap=bootstrap, gamma=gamma, lam=lam)
        for got, expected in zip(out[:2], want):
            assert_close(got[mask], expected.double(), scale=8.0)
            assert bool((got[~mask] == 0).all())
    r = torch.tensor([0.0, 7.0, 9.0, 9.0], device=device)  # rewards of unscored tokens are dropped
    out = fa.gae(r, torch.zeros_like(r), torch.tensor([0, 4], dtype=torch.int32, device=device), mask=r == 7.0, gamma=0.0)
    assert out.returns.tolist() == [0.0, 7.0, 0.0, 0.0]


def test_nothing_leaks(backend, device):  # K2, row 36
    """The bits of a sequence depend on its scored tokens alone: not on its neighbours, its place, or what unscored tokens hold."""
    cu = [0, 3, 1300, 1300, 2400]
    rewards, values, cu_seqlens, mask, bootstrap = make(cu, device)
    out = fa.gae(rewards, values, cu_seqlens, mask=mask, bootstrap=bootstrap)
    for garbage in (math.nan, math.inf):
        dirty = (torch.where(mask, x, garbage) for x in (rewards, values))
        for got, want in zip(fa.gae(*dirty, cu_seqlens, mask=mask, bootstrap=bootstrap), out):
            assert torch.equal(got, want)
    for i, (lo, hi) in enumerate(itertools.pairwise(cu)):
        own = torch.tensor([0, hi - lo], dtype=torch.int32, device=device)
        alone = fa.gae(rewards[lo:hi], values[lo:hi], own, mask=mask[lo:hi], bootstrap=bootstrap[i : i + 1])
        for got, want in zip(alone[:2], out):
            assert torch.equal(got, want[lo:hi]), i
    poisoned = torch.arange(2400, device=device) >= 1300
    bad = fa.gae(torch.where(poisoned, math.nan, rewards), values, cu_seqlens, mask=mask, bootstrap=bootstrap)
    assert torch.equal(bad.advantages[:1300], out.advantages[:1300]) and bool(torch.isnan(bad.mean))


def test_two_runs_are_equal(backend, device):  # row 42
    rewards, values, cu_seqlens, mask, bootstrap = make([0, 700, 2500, 2501], device)
    runs = [fa.gae(rewards, values, cu_seqlens, mask=mask, bootstrap=bootstrap) for _ in range(2)]
    for a, b in zip(*runs):
        assert torch.equal(a, b)


def test_gamma_and_lam_as_tensors(backend, device):
    rewards, values, cu_seqlens, mask, bootstrap = make([0, 30, 77], device)
    want = fa.gae(rewards, values, cu_seqlens, mask=mask, gamma=0.5, lam=0.75)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        gamma, lam = (torch.tensor(x, device=device, dtype=dtype) for x in (0.5, 0.75))
        for got, expected in zip(fa.gae(rewards, values, cu_seqlens, mask=mask, gamma=gamma, lam=lam), want):
            assert torch.equal(got, expected)


def test_moments(backend, device):
    """Means far from 0, equal values, one value, and many short sequences (more than one block of the merge)."""
    for cu in ([0, 800, 2000], list(range(0, 1200, 2)), [0, 1]):
        rewards, values, cu_seqlens, *_ = make(cu, device, seed=3)
        check_moments(fa.gae(rewards + 100.0, values, cu_seqlens, gamma=0.9))
    ones = torch.full((1500,), 1.3, device=device)
    equal = fa.gae(ones, torch.zeros_like(ones), torch.tensor([0, 7, 1500], dtype=torch.int32, device=device), gamma=0.0)
    assert float(equal.count) == 1500 and abs(float(equal.mean) - 1.3) < 1e-6 and float(equal.m2) < 1e-8


def test_input_types_and_layouts(backend, device, row_dtypes):  # rows 17, 23
    rewards, values, cu_seqlens, mask, bootstrap = make([0, 30, 77], device)
    for dtype in row_dtypes:
        out = fa.gae(rewards.to(dtype), values.to(dtype), cu_seqlens, mask=mask, bootstrap=bootstrap.to(dtype))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert {x.dtype for x in out} == {wide}
        want = fa.gae(*(x.to(dtype).to(wide) for x in (rewards, values)), cu_seqlens, mask=mask, bootstrap=bootstrap.to(dtype).to(wide))
        assert torch.equal(out.advantages, want.advantages) and torch.equal(out.returns, want.returns)
        if dtype == torch.float64:
            truth = loop(rewards.double(), values.double(), cu_seqlens, mask, bootstrap)
            assert float((out.advantages.cpu() - truth[0]).abs().max()) < 1e-13
            assert fa.gae(rewards, values.double(), cu_seqlens).returns.dtype == torch.float64
    want = fa.gae(rewards, values, cu_seqlens, mask=mask)
    strided = [torch.stack([x, x], -1)[:, 1] for x in (rewards, values, mask)]
    shifted = [torch.cat([x[:1], x])[1:] for x in (rewards, values, mask)]
    for r, v, m in (strided, shifted):
        assert torch.equal(fa.gae(r, v, cu_seqlens.long(), mask=m).advantages, want.advantages)
    assert torch.equal(
        fa.gae(rewards[:1].expand(77), values, cu_seqlens).returns, fa.gae(rewards[:1].repeat(77), values, cu_seqlens).returns
    )


def test_advantages_are_constants(backend, device):
    rewards, values, cu_seqlens, *_ = make([0, 9], device)
    out = fa.gae(rewards.requires_grad_(), values.requires_grad_(), cu_seqlens)
    assert not any(x.requires_grad for x in out)


def test_a_long_sequence(backend, device, slow_backend):  # row 38
    tokens = 10_000 if backend == "reference" else 30_000 if slow_backend else 1_000_000
    rewards, values, cu_seqlens, *_ = make([0, 5, tokens], device)
    out = fa.gae(rewards, values, cu_seqlens, gamma=1.0, lam=1.0)
    want = rewards[5:].double().flip(0).cumsum(0).flip(0)
    size = float(want.abs().max())
    assert float((out.returns[5:].double() - want).abs().max()) <= 1e-5 * size
    check_moments(out)


@pytest.mark.parametrize(
    "change,error,words",
    [
        ({"gamma": 1.01}, ValueError, "gamma=1.01 is out of range; legal: finite >= 0 and <= 1"),
        ({"lam": -0.1}, ValueError, "lam=-0.1 is out of range"),
        ({"lam": math.nan}, ValueError, "lam=nan is out of range"),
        ({"gamma": torch.tensor(1.5)}, ValueError, "gamma=1.5 is out of range"),
        ({"lam": torch.ones(2)}, ValueError, r"lam has shape \(2,\); legal here: \(\)"),
        ({"gamma": "1"}, TypeError, "gamma must be a number"),
        ({"values": torch.ones(4)}, ValueError, r"values has shape \(4,\); legal here: \(5,\)"),
        ({"rewards": torch.ones(5, 1)}, ValueError, r"rewards must be 1-D"),
        ({"rewards": torch.ones(5, dtype=torch.int64)}, TypeError, "rewards must be floating point"),
        ({"values": torch.ones(5, dtype=torch.int64)}, TypeError, "values must be floating point"),
        ({"mask": torch.ones(6, dtype=torch.bool)}, ValueError, r"mask has shape \(6,\)"),
        ({"bootstrap": torch.ones(1)}, ValueError, r"bootstrap has shape \(1,\); legal here: \(2,\)"),
        ({"bootstrap": 0.0}, TypeError, "bootstrap must be a tensor"),
        ({"cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32)}, ValueError, "end at the number of tokens"),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens must be int32"),
    ],
    ids=str,
)
def test_errors(backend, device, change, error, words):
    if device != "cpu":
        return
    arguments = {"rewards": torch.ones(5), "values": torch.ones(5), "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32)}
    with pytest.raises(error, match=words):
        fa.gae(**{**arguments, **change})


def test_prefix_sums_stay_in_their_sequence(backend, device):  # of token_rewards: a return to go, read backwards
    lp = torch.tensor([-1.0, -math.inf, -1.0, -2.0, math.nan, 0.0, -1.0, -1.0], device=device)
    ref = torch.tensor([-2.0, -1.0, -3.0, -2.5, -1.0, -1.0, -1.0, -1.5], device=device)
    cu = torch.tensor([0, 2, 4, 4, 6, 8], dtype=torch.int32, device=device)
    got = fa.token_rewards(lp, ref, cu, beta=0.1).prefix_sums
    want = torch.tensor([0.1, -math.inf, 0.2, 0.25, math.nan, math.nan, 0.0, 0.05], dtype=torch.float64)
    assert_close(got, want)
    # A large sum before a sequence takes no digits from it.
    lp = torch.cat([torch.full((50,), 2.0**40), torch.full((50,), 2.0**-10)]).to(device)
    cu = torch.tensor([0, 50, 100], dtype=torch.int32, device=device)
    got = fa.token_rewards(lp, torch.zeros_like(lp), cu, beta=1.0).prefix_sums[50:]
    assert got.tolist() == [2.0**-10 * n for n in range(1, 51)]
