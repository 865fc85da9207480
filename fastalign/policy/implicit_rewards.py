"""A DPO model read as a reward per token. Everything here is a constant of the loss: inputs are detached,
results carry no gradient."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastalign.policy.advantages import returns_to_go
from fastalign.policy.rewards import shape_rewards
from fastalign.runtime.checks import (
    check_cu_seqlens,
    check_cu_seqlens_outside_ops,
    check_number,
    per_token,
    row_mask,
)


class TokenRewards(NamedTuple):
    """rewards: [T]; prefix_sums: [T], from the sequence's first row up to and with this one. See
    `token_rewards`."""

    rewards: Tensor
    prefix_sums: Tensor


def token_rewards(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    beta: float = 0.1,
) -> TokenRewards:
    """The token rewards that a DPO policy implies (Rafailov et al. 2024, "From r to Q*", arXiv 2404.12358):

    r_t = beta (logprobs_t - ref_logprobs_t) = r(s_t, y_t) + V*(s_t+1) - V*(s_t), the soft advantage; its sum over a prefix is the return so far plus
    V*(s_t+1) - V*(s_0).

    Args:
        logprobs, ref_logprobs: [T], of the labels under the DPO policy and its reference. cu_seqlens: [S + 1]
            int32, from 0 to T.
        mask: [T] bool, row-aligned; other rows have reward 0, whatever the log-probs hold there. beta: > 0,
            DPO's.

    Returns:
        TokenRewards, fp32 (fp64 for fp64 log-probs). Equal infinities count as a log-ratio of 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, malformed cu_seqlens, beta out of range.
    """
    check_number("beta", beta, above=0.0)
    logprobs = per_token("logprobs", logprobs).detach()
    ref_logprobs = per_token("ref_logprobs", ref_logprobs, logprobs).detach()
    cu_seqlens, mask, tokens = (
        check_cu_seqlens(cu_seqlens, logprobs),
        row_mask(mask, logprobs),
        logprobs.shape[0],
    )
    check_cu_seqlens_outside_ops(cu_seqlens, tokens)
    scored = logprobs != ref_logprobs if mask is None else mask & (logprobs != ref_logprobs)
    rewards = torch.where(scored, beta * (logprobs - ref_logprobs), 0.0)
    back = tokens - cu_seqlens.flip(0)

    def prefix(x: Tensor) -> Tensor:
        # A sum over a prefix is a return to go on the reversed batch. A difference of sums over the whole
        # batch would carry one sequence's NaN into the next, and lose digits.
        return returns_to_go(x.flip(0), back).flip(0)

    # Of infinities a return to go knows only that they spoil a sum; how many of either sign stand before a
    # token says what the sum is.
    finite = prefix(torch.where(rewards.isinf(), 0.0, rewards))
    above, below = (
        torch.where(prefix((rewards == sign * math.inf).to(rewards.dtype)) > 0, math.inf, 0.0)
        for sign in (1, -1)
    )
    return TokenRewards(rewards, finite + above - below)


def rto_rewards(
    dpo_logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    cu_seqlens: Tensor,
    scores: Tensor,
    *,
    mask: Tensor,
    beta: float = 0.05,
    clip: float | None = 0.05,
    kl_coef: float = 0.01,
    score_clip: float | None = 10.0,
) -> Tensor:
    """Rewards of reinforced token optimisation, for PPO (RTO, Zhong et al. 2024, arXiv 2404.18922):

    r_t = clip(beta (dpo_logprobs_t - ref_logprobs_t)) - kl_coef (old_logprobs_t - ref_logprobs_t) + 1[t is the last scored row] score_i.

    Args:
        dpo_logprobs, old_logprobs, ref_logprobs: [T], of the sampled tokens under the DPO policy, the policy
            that sampled them and the reference.
        cu_seqlens: [S + 1] int32. scores: [S], the reward model's. mask: [T] bool, row-aligned: the
            response's rows, others get exactly 0.
        clip: the DPO reward is clipped to [-clip, clip] after it was scaled by beta; None: not. score_clip:
            likewise for the scores.
        kl_coef: >= 0.

    Returns:
        [T] fp32 (fp64 if scores are fp64), see `shape_rewards`, whose errors these are too.
    """
    shaped = shape_rewards(
        scores,
        cu_seqlens,
        mask=mask,
        logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        kl_kind="k1",
        score_clip=score_clip,
    )
    dense = token_rewards(dpo_logprobs, ref_logprobs, cu_seqlens, mask=mask, beta=beta).rewards.to(
        shaped.dtype
    )
    if clip is not None:
        check_number("clip", clip, above=0.0)
        dense = dense.clamp(-clip, clip)
    return shaped + dense
