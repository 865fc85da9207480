"""Group advantages, DAPO's overlong penalty and dynamic sampling: against loops, degenerate groups, groups
that span ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

import fastalign as fa
from fastalign.policy.groups import KINDS, dynamic_sampling_mask, group_advantages, overlong_penalty


def loop(rewards, groups, kind, eps=1e-4, greedy=None, lengths=None):
    """One Python loop per group, in Python floats."""
    out, centred = [0.0] * len(rewards), [0.0] * len(rewards)
    valid = [not math.isnan(r) for r in rewards]
    for g in set(groups):
        where = [i for i, x in enumerate(groups) if x == g and valid[i]]
        values = [rewards[i] for i in where]
        for i in where:
            if max(values) == min(values):
                continue
            mean = sum(values) / len(values)
            centred[i] = rewards[i] - mean
            std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
            others = [rewards[j] for j in where if j != i]
            out[i] = {"grpo": centred[i] / (std + eps), "rloo": rewards[i] - sum(others) / len(others)}.get(
                kind, centred[i]
            )
    if kind == "reinforce_plus_plus":
        tokens = [c for c, v, n in zip(centred, valid, lengths or [1] * len(centred)) if v for _ in range(n)]
        mean = sum(tokens) / len(tokens)
        variance = sum((c - mean) ** 2 for c in tokens) / (len(tokens) - 1)
        out = [(c - mean) / math.sqrt(variance + eps**2) if v else 0.0 for c, v in zip(centred, valid)]
    if kind == "remax":
        out = [r - b if v else 0.0 for r, b, v in zip(rewards, greedy, valid)]
    return torch.tensor(out, dtype=torch.float64)


REWARDS = [1.0, 0.5, 3.0, math.nan, 2.0, 2.0, 2.0, -1.0, 7.0, math.nan, 0.1, 0.1, 4.0]
GROUPS = [
    5,
    5,
    -2,
    5,
    9,
    9,
    9,
    5,
    3,
    3,
    -2,
    -2,
    -2,
]  # 9: equal rewards; 3: one valid reward; a NaN in 5 and in 3
GREEDY = [float(i % 3) for i in range(len(REWARDS))]
LENGTHS = [3, 1, 4, 9, 5, 2, 6, 5, 3, 5, 0, 9, 7]


def own(kind, like, rows=slice(None)):
    """The tensors that this kind needs besides."""
    if kind == "remax":
        return {"greedy_rewards": torch.tensor(GREEDY, dtype=like.dtype)[rows]}
    return {"lengths": torch.tensor(LENGTHS)[rows]} if kind == "reinforce_plus_plus" else {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_against_a_loop(kind, dtype):
    rewards = torch.tensor(REWARDS, dtype=dtype)
    got = group_advantages(rewards, torch.tensor(GROUPS), kind=kind, **own(kind, rewards))
    want = loop(rewards.tolist(), GROUPS, kind, greedy=GREEDY, lengths=LENGTHS)
    assert got.advantages.dtype == dtype
    assert float((got.advantages.double() - want).abs().max()) < 4 * torch.finfo(dtype).eps * 4.0
    assert got.valid.tolist() == [not math.isnan(r) for r in REWARDS]
    assert got.informative.tolist() == [g in (5, -2) and not math.isnan(r) for g, r in zip(GROUPS, REWARDS)]
    assert float(got.frac_zero_std) == 0.5  # groups 9 and 3 of four
    order = torch.randperm(len(REWARDS))
    again = group_advantages(
        rewards[order], torch.tensor(GROUPS)[order], kind=kind, **own(kind, rewards, order)
    )
    assert torch.allclose(again.advantages, got.advantages[order], atol=1e-6)


def test_reinforce_plus_plus_whitens_tokens_as_the_peers_do():
    """verl's `compute_reinforce_plus_plus_baseline_outcome_advantage`: every token carries its sequence's
    centred reward, then masked_whiten; over sequences as an option."""
    rewards, groups, lengths = (
        torch.tensor([1.0, 0.0, 0.5, 3.0], dtype=torch.float64),
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([1, 30, 4, 2]),
    )
    got = group_advantages(rewards, groups, kind="reinforce_plus_plus", lengths=lengths, eps=1e-4)
    centred = rewards - torch.tensor([0.5, 0.5, 1.75, 1.75], dtype=torch.float64)
    tokens = torch.repeat_interleave(centred, lengths)
    want = (centred - tokens.mean()) * torch.rsqrt(tokens.var() + 1e-8)
    assert torch.allclose(got.advantages, want)
    assert torch.allclose(torch.repeat_interleave(got.advantages, lengths), fa.whiten(tokens))
    once = group_advantages(
        rewards, groups, kind="reinforce_plus_plus", whiten_over="sequences", eps=1e-4
    ).advantages
    assert torch.allclose(once, (centred - centred.mean()) * torch.rsqrt(centred.var() + 1e-8))
    assert not torch.allclose(once, want, atol=0.1)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "remax"])
def test_degenerate_groups_give_exact_zeros(kind):
    """Equal rewards whose mean is not exact in fp32, groups of one, only NaN, no sequences."""
    for rewards, groups in (
        ([0.1] * 7, [0] * 7),
        ([5.0], [3]),
        ([math.nan, math.nan], [1, 1]),
        ([], []),
        ([1.0, 2.0, 3.0], [0, 1, 2]),
    ):
        needs = {"lengths": torch.full((len(rewards),), 2)} if kind == "reinforce_plus_plus" else {}
        got = group_advantages(
            torch.tensor(rewards), torch.tensor(groups, dtype=torch.long), kind=kind, eps=0.0, **needs
        )
        assert not bool(got.advantages.any()) and not bool(got.informative.any()), (kind, rewards)
        assert torch.isfinite(got.frac_zero_std)


def test_rloo_is_the_centred_reward_stretched():  # spec 17
    rewards, groups = torch.randn(12), torch.arange(12) // 4
    rloo, centred = (group_advantages(rewards, groups, kind=k).advantages for k in ("rloo", "dr_grpo"))
    assert torch.allclose(rloo, centred * 4 / 3)


def test_no_gradient_and_use_in_a_loss():
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0], requires_grad=True)
    got = group_advantages(rewards, torch.tensor([0, 0, 1, 1]))
    assert not got.advantages.requires_grad
    lp = torch.full((8,), -1.0, requires_grad=True)
    cu, mask = torch.tensor([0, 2, 4, 6, 8], dtype=torch.int32), torch.ones(8, dtype=torch.bool)
    out = fa.policy_loss(lp, None, got.advantages, loss="grpo", cu_seqlens=cu, mask=mask)
    (g,) = torch.autograd.grad(out.loss, lp)
    assert g[:2].lt(0).all() and g[2:4].gt(0).all() and not g[4:].any()


def test_overlong_penalty():
    lengths = torch.tensor([0, 16384, 16385, 18432, 20480, 20481, 10**6])
    got = overlong_penalty(lengths)
    assert got.tolist() == [0.0, 0.0, -1 / 4096, -0.5, -1.0, -1.0, -1.0]
    assert overlong_penalty(torch.tensor([3, 5, 7]), max_length=6, cache_length=4).tolist() == [
        -0.25,
        -0.75,
        -1.0,
    ]
    with pytest.raises(ValueError, match="cache_length"):
        overlong_penalty(lengths, max_length=10, cache_length=11)


def test_dynamic_sampling():
    keep = dynamic_sampling_mask(
        torch.tensor([1.0, 1.0, 0.0, 1.0, math.nan, 0.0]), torch.tensor([0, 0, 1, 1, 1, 2])
    )
    assert keep.tolist() == [False, False, True, True, False, False]


def test_errors_name_themselves():
    r, g = torch.ones(3), torch.zeros(3, dtype=torch.long)
    for error, words, call in (
        (ValueError, "kind='ppo' is unknown; legal: grpo", lambda: group_advantages(r, g, kind="ppo")),
        (ValueError, "groups has shape", lambda: group_advantages(r, g[:2])),
        (TypeError, "groups must be integers", lambda: group_advantages(r, r)),
        (TypeError, "rewards must be a floating tensor", lambda: group_advantages(g, g)),
        (
            ValueError,
            "greedy_rewards belongs to kind='remax'",
            lambda: group_advantages(r, g, greedy_rewards=r),
        ),
        (ValueError, "kind='remax' needs greedy_rewards", lambda: group_advantages(r, g, kind="remax")),
        (ValueError, "eps", lambda: group_advantages(r, g, eps=-1.0)),
        (
            ValueError,
            "whitens over tokens and needs lengths",
            lambda: group_advantages(r, g, kind="reinforce_plus_plus"),
        ),
        (
            ValueError,
            "lengths has shape",
            lambda: group_advantages(r, g, kind="reinforce_plus_plus", lengths=g[:2]),
        ),
        (
            TypeError,
            "lengths must be integers",
            lambda: group_advantages(r, g, kind="reinforce_plus_plus", lengths=r),
        ),
        (ValueError, "belong to kind='reinforce_plus_plus'", lambda: group_advantages(r, g, lengths=g)),
        (
            ValueError,
            "belong to kind='reinforce_plus_plus'",
            lambda: group_advantages(r, g, whiten_over="sequences"),
        ),
        (ValueError, "whiten_over='batch' is unknown", lambda: group_advantages(r, g, whiten_over="batch")),
        (
            ValueError,
            "no effect with whiten_over",
            lambda: group_advantages(r, g, kind="reinforce_plus_plus", lengths=g, whiten_over="sequences"),
        ),
    ):
        with pytest.raises(error, match=words):
            call()


def _rank(rank):
    mine = (
        slice(0, 5) if rank == 0 else slice(5, None)
    )  # groups span both ranks, which hold different numbers of sequences
    for kind in KINDS:
        rewards = torch.tensor(REWARDS)
        whole = group_advantages(rewards, torch.tensor(GROUPS), kind=kind, **own(kind, rewards))
        part = group_advantages(
            rewards[mine],
            torch.tensor(GROUPS[mine]),
            kind=kind,
            **own(kind, rewards, mine),
            group=dist.group.WORLD,
        )
        for name in ("advantages", "valid", "informative"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[mine]), (kind, name)
        assert torch.equal(part.frac_zero_std, whole.frac_zero_std)


def test_groups_across_ranks():
    on_ranks(2, _rank)
