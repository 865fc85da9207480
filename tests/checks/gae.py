"""Checks of generalised advantage estimation. Truth: the loop over tokens in Python floats, which are
fp64."""

from __future__ import annotations

import itertools
import math

import torch

import fastalign as fa
from fastalign.testing import assert_close

DISCOUNTS = [(1.0, 1.0), (1.0, 0.95), (0.99, 0.95), (0.9, 0.0), (0.0, 0.7), (1.0, 0.0), (0.97, 1.0)]
PACKS = [
    [0, 5],
    [0, 0, 1, 1, 4, 40, 40, 169],
    [0],
    [0, 0, 0],
    [0, 1024, 1025, 3072, 5200],
]  # tiles of the kernels: 1024


def gae_loop(rewards, values, cu_seqlens, mask=None, bootstrap=None, gamma=1.0, lam=0.95):
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


def make_gae_batch(cu, device="cpu", seed=0):
    """rewards, values, cu_seqlens, mask with holes, bootstrap. Runs of the mask are long and short, and some
    sequences end unscored."""
    generator = torch.Generator().manual_seed(seed)
    tokens = cu[-1]
    runs = torch.rand(tokens // 9 + 1, generator=generator).repeat_interleave(9)[:tokens]
    mask = (runs < 0.7) & (torch.rand(tokens, generator=generator) < 0.95)
    tensors = (torch.randn(tokens, generator=generator), torch.randn(tokens, generator=generator), torch.tensor(cu, dtype=torch.int32), mask,
               torch.randn(len(cu) - 1, generator=generator))  # fmt: skip
    return tuple(t.to(device) for t in tensors)


def check_gae(rewards, values, cu_seqlens, **options):
    out = fa.gae(rewards, values, cu_seqlens, **options)
    truth = gae_loop(rewards, values, cu_seqlens, **options)
    with fa.use_backend("reference"):  # plain PyTorch in the same type
        plain = fa.gae(rewards, values, cu_seqlens, **options)
    # Sums over a horizon of returns and values, each rounded: the scale is the largest, and fp64 to 1e-5 is
    # what users were promised.
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


def check_equals_the_loop(device, cu):
    rewards, values, cu_seqlens, mask, bootstrap = make_gae_batch(cu, device)
    for gamma, lam in DISCOUNTS if cu[-1] < 1000 else DISCOUNTS[:3]:
        check_gae(
            torch.where(mask, rewards, math.nan),
            values,
            cu_seqlens,
            mask=mask,
            bootstrap=bootstrap,
            gamma=gamma,
            lam=lam,
        )
    check_gae(rewards, values, cu_seqlens)
    check_gae(rewards, values, cu_seqlens, mask=torch.zeros_like(mask), bootstrap=bootstrap)


def check_by_hand(device):
    """One and two tokens, terminal and truncated; the bootstrap is discounted once."""
    cu = torch.tensor([0, 1, 3], dtype=torch.int32, device=device)
    r, v, b = (torch.tensor(x, device=device) for x in ([3.0, 1.0, 2.0], [0.5, 0.25, -1.0], [8.0, 4.0]))
    for boot, end in ((None, (0.0, 0.0)), (b, (8.0, 4.0))):
        out = fa.gae(r, v, cu, bootstrap=boot, gamma=0.5, lam=0.25)
        last = 2.0 + 0.5 * end[1] + 1.0
        first = 1.0 + 0.5 * -1.0 - 0.25
        want = [3.0 + 0.5 * end[0] - 0.5, first + 0.125 * last, last]
        assert out.advantages.tolist() == want and out.returns.tolist() == [
            a + x for a, x in zip(want, v.tolist())
        ]


def check_holes_are_no_steps(device):
    """K1: with and without its unscored tokens a sequence is the same; a reward at the end is not decayed by
    the tokens that follow it."""
    rewards, values, cu_seqlens, mask, bootstrap = make_gae_batch([0, 60, 200], device)
    dense = torch.tensor([0, int(mask[:60].sum()), int(mask.sum())], dtype=torch.int32, device=device)
    for gamma, lam in ((0.9, 0.8), (0.0, 0.0)):
        out = fa.gae(rewards, values, cu_seqlens, mask=mask, bootstrap=bootstrap, gamma=gamma, lam=lam)
        want = fa.gae(rewards[mask], values[mask], dense, bootstrap=bootstrap, gamma=gamma, lam=lam)
        for got, expected in zip(out[:2], want):
            assert_close(got[mask], expected.double(), scale=8.0)
            assert bool((got[~mask] == 0).all())
    r = torch.tensor([0.0, 7.0, 9.0, 9.0], device=device)  # rewards of unscored tokens are dropped
    out = fa.gae(
        r,
        torch.zeros_like(r),
        torch.tensor([0, 4], dtype=torch.int32, device=device),
        mask=r == 7.0,
        gamma=0.0,
    )
    assert out.returns.tolist() == [0.0, 7.0, 0.0, 0.0]


def check_nothing_leaks(device):
    """The bits of a sequence depend on its scored tokens alone: not on its neighbours, its place, or what
    unscored tokens hold."""
    cu = [0, 3, 1300, 1300, 2400]
    rewards, values, cu_seqlens, mask, bootstrap = make_gae_batch(cu, device)
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


def check_two_runs_are_equal(device):
    rewards, values, cu_seqlens, mask, bootstrap = make_gae_batch([0, 700, 2500, 2501], device)
    runs = [fa.gae(rewards, values, cu_seqlens, mask=mask, bootstrap=bootstrap) for _ in range(2)]
    for a, b in zip(*runs):
        assert torch.equal(a, b)


def check_moments_of_awkward_values(device):
    """Means far from 0, equal values, one value, and many short sequences (more than one block of the
    merge)."""
    for cu in ([0, 800, 2000], list(range(0, 1200, 2)), [0, 1]):
        rewards, values, cu_seqlens, *_ = make_gae_batch(cu, device, seed=3)
        check_moments(fa.gae(rewards + 100.0, values, cu_seqlens, gamma=0.9))
    ones = torch.full((1500,), 1.3, device=device)
    equal = fa.gae(
        ones, torch.zeros_like(ones), torch.tensor([0, 7, 1500], dtype=torch.int32, device=device), gamma=0.0
    )
    assert float(equal.count) == 1500 and abs(float(equal.mean) - 1.3) < 1e-6 and float(equal.m2) < 1e-8
