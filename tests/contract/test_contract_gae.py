"""The contract of generalised advantage estimation, on every backend. Truth: the loop over tokens in Python
floats, which are fp64."""

from __future__ import annotations

import math

import pytest
import torch
from checks.gae import (
    PACKS,
    check_by_hand,
    check_equals_the_loop,
    check_holes_are_no_steps,
    check_moments,
    check_moments_of_awkward_values,
    check_nothing_leaks,
    check_two_runs_are_equal,
    gae_loop,
    make_gae_batch,
)

import fastalign as fa
from fastalign.testing import assert_close


@pytest.mark.parametrize("cu", PACKS, ids=str)
def test_equals_the_loop(backend, device, cu):  # rows 36, 38; K4
    check_equals_the_loop(device, cu)


def test_by_hand(backend, device):  # K3
    check_by_hand(device)


def test_holes_are_no_steps(backend, device):
    check_holes_are_no_steps(device)


def test_nothing_leaks(backend, device):  # K2, row 36
    check_nothing_leaks(device)


def test_two_runs_are_equal(backend, device):  # row 42
    check_two_runs_are_equal(device)


def test_gamma_and_lam_as_tensors(backend, device):
    rewards, values, cu_seqlens, mask, bootstrap = make_gae_batch([0, 30, 77], device)
    want = fa.gae(rewards, values, cu_seqlens, mask=mask, gamma=0.5, lam=0.75)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        gamma, lam = (torch.tensor(x, device=device, dtype=dtype) for x in (0.5, 0.75))
        for got, expected in zip(fa.gae(rewards, values, cu_seqlens, mask=mask, gamma=gamma, lam=lam), want):
            assert torch.equal(got, expected)


def test_moments(backend, device):
    check_moments_of_awkward_values(device)


def test_input_types_and_layouts(backend, device, row_dtypes):  # rows 17, 23
    rewards, values, cu_seqlens, mask, bootstrap = make_gae_batch([0, 30, 77], device)
    for dtype in row_dtypes:
        out = fa.gae(
            rewards.to(dtype), values.to(dtype), cu_seqlens, mask=mask, bootstrap=bootstrap.to(dtype)
        )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert {x.dtype for x in out} == {wide}
        want = fa.gae(
            *(x.to(dtype).to(wide) for x in (rewards, values)),
            cu_seqlens,
            mask=mask,
            bootstrap=bootstrap.to(dtype).to(wide),
        )
        assert torch.equal(out.advantages, want.advantages) and torch.equal(out.returns, want.returns)
        if dtype == torch.float64:
            truth = gae_loop(rewards.double(), values.double(), cu_seqlens, mask, bootstrap)
            assert float((out.advantages.cpu() - truth[0]).abs().max()) < 1e-13
            assert fa.gae(rewards, values.double(), cu_seqlens).returns.dtype == torch.float64
    want = fa.gae(rewards, values, cu_seqlens, mask=mask)
    strided = [torch.stack([x, x], -1)[:, 1] for x in (rewards, values, mask)]
    shifted = [torch.cat([x[:1], x])[1:] for x in (rewards, values, mask)]
    for r, v, m in (strided, shifted):
        assert torch.equal(fa.gae(r, v, cu_seqlens.long(), mask=m).advantages, want.advantages)
    assert torch.equal(
        fa.gae(rewards[:1].expand(77), values, cu_seqlens).returns,
        fa.gae(rewards[:1].repeat(77), values, cu_seqlens).returns,
    )


def test_advantages_are_constants(backend, device):
    rewards, values, cu_seqlens, *_ = make_gae_batch([0, 9], device)
    out = fa.gae(rewards.requires_grad_(), values.requires_grad_(), cu_seqlens)
    assert not any(x.requires_grad for x in out)


def test_a_long_sequence(backend, device, slow_backend):  # row 38
    tokens = 10_000 if backend == "reference" else 30_000 if slow_backend else 1_000_000
    rewards, values, cu_seqlens, *_ = make_gae_batch([0, 5, tokens], device)
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
        (
            {"cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32)},
            ValueError,
            "end at the number of tokens",
        ),
        ({"cu_seqlens": torch.tensor([0.0, 5.0])}, TypeError, "cu_seqlens must be int32"),
    ],
    ids=str,
)
def test_errors(backend, device, change, error, words):
    if device != "cpu":
        return
    arguments = {
        "rewards": torch.ones(5),
        "values": torch.ones(5),
        "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32),
    }
    with pytest.raises(error, match=words):
        fa.gae(**{**arguments, **change})


def test_prefix_sums_stay_in_their_sequence(
    backend, device
):  # of token_rewards: a return to go, read backwards
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
