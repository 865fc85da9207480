"""Between sampling and the policy loss: rewards per token, returns, whitening, the adaptive KL coefficient.

A rollout goes `shape_rewards` -> `gae` (or `returns_to_go`) -> `whiten` -> `policy_loss`. Everything here is
a constant of the loss: inputs are detached, results carry no gradient. Nothing synchronises with the
device."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.ops.kl_estimate.op import KINDS
from fastalign.packing import sequence_sum
from fastalign.policy.kl_estimate import kl_estimate
from fastalign.runtime.checks import (
    check_choice,
    check_cu_seqlens,
    check_cu_seqlens_outside_ops,
    check_number,
    check_same_device,
    check_shape,
    one_element,
    per_token,
    row_mask,
    shown,
)


def shape_rewards(
    scores: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor,
    logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float | Tensor = 0.0,
    kl_kind: str | None = None,
    score_clip: float | None = None,
    finished: Tensor | None = None,
    missing_eos_penalty: float | None = None,
) -> Tensor:
    """Rewards per token from a score per sequence and a KL penalty per token (RLHF, Ouyang et al. 2022, arXiv 2203.02155):

    r_t = -kl_coef kl_t + 1[t is the sequence's last scored row] score_i.

    In this order: the score is clipped to [-score_clip, score_clip], a sequence that did not finish loses
    missing_eos_penalty, the KL penalty is added. The last scored row is the one that predicts the
    end-of-sequence token, or the last token of a response that was cut off.

    Args:
        scores: [S], the reward model's. cu_seqlens: [S + 1] int32, from 0 to T.
        mask: [T] bool, row-aligned: the response's rows. Others get exactly 0, whatever the other tensors
            hold there.
        logprobs, ref_logprobs: [T], of the sampled tokens under the policy that sampled them and under the
            reference, both divided by the sampling temperature. kl_kind: k1 (None), k2, k3 or abs, see
            `kl_estimate`. Only k1 in the reward has the gradient of KL(policy || ref).
        kl: [T], a penalty to use in their place, such as `token_stats`' exact KL.
        kl_coef: a number or a tensor of one element (`AdaptiveKLController.value`). The number 0: no penalty,
            and none of the three is needed.
        score_clip: > 0, or None: not clipped.
        finished: [S] bool, whether the response ended by itself; needed with missing_eos_penalty (>= 0,
            subtracted from the score).

    Returns:
        [T] fp32 (fp64 if scores are fp64). A sequence without scored rows has no place for its score: it is
        dropped. To scale the rewards, divide them by their standard deviation; `whiten(rewards, mask,
        shift_mean=False)`, TRL's whiten_rewards, moves tokens without a reward.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, unknown kl_kind, numbers out of range, missing or
            contradictory arguments.
    """
    scores = per_token("scores", scores).detach()
    cu_seqlens = check_cu_seqlens(cu_seqlens, scores)
    check_shape("scores", scores, (cu_seqlens.shape[0] - 1,))
    if not isinstance(mask, Tensor) or mask.dim() != 1:
        raise TypeError("mask must be a tensor [T]: the response's rows, of which the last gets the score")
    mask = row_mask(mask, mask)
    check_same_device("mask", mask, "scores", scores)
    check_cu_seqlens_outside_ops(cu_seqlens, mask.numel())
    if score_clip is not None:
        check_number("score_clip", score_clip, above=0.0)
        scores = scores.clamp(-score_clip, score_clip)
    if (finished is None) != (missing_eos_penalty is None):
        raise ValueError("finished and missing_eos_penalty go together: one was given without the other")
    if missing_eos_penalty is not None:
        check_number("missing_eos_penalty", missing_eos_penalty, low=0.0)
        check_shape("finished", finished, tuple(scores.shape))
        check_same_device("finished", finished, "scores", scores)
        scores = torch.where(finished.to(torch.bool), scores, scores - missing_eos_penalty)
    if kl_kind is not None:
        check_choice("kl_kind", kl_kind, KINDS)
        if kl is not None:
            raise ValueError(f"kl_kind={kl_kind!r} has no effect: kl is given, and used as it is")
    rewards = _at_last_scored_row(scores, cu_seqlens, mask)
    if isinstance(kl_coef, Tensor):
        kl_coef = one_element("kl_coef", kl_coef, rewards)
    else:
        check_number("kl_coef", kl_coef, low=0.0)
        if kl_coef == 0:
            return rewards
    penalty = _penalty(logprobs, ref_logprobs, kl, kl_kind or "k1", rewards)
    # A coefficient that happens to be 0 is no penalty, also where the estimate is infinite.
    return torch.where(mask & (kl_coef != 0), rewards - kl_coef * penalty, rewards)


def _penalty(
    logprobs: Tensor | None, ref_logprobs: Tensor | None, kl: Tensor | None, kind: str, like: Tensor
) -> Tensor:
    if kl is not None:
        if logprobs is not None or ref_logprobs is not None:
            raise ValueError(
                "kl is given, so logprobs and ref_logprobs must not be: the penalty is one or the other"
            )
        return per_token("kl", kl, like).detach()
    if logprobs is None or ref_logprobs is None:
        raise ValueError("kl_coef is not 0: logprobs and ref_logprobs are needed, or kl")
    return kl_estimate(
        per_token("logprobs", logprobs, like).detach(),
        per_token("ref_logprobs", ref_logprobs, like).detach(),
        kind,
    )


def _at_last_scored_row(scores: Tensor, cu_seqlens: Tensor, mask: Tensor) -> Tensor:
    """[T]: each sequence's score at its last scored row, 0 elsewhere. Gathers only: no order of additions, no
    shape that depends on data."""
    tokens = mask.shape[0]
    if tokens == 0 or scores.shape[0] == 0:
        return scores.new_zeros(tokens)
    row = torch.arange(tokens, device=mask.device)
    last_so_far = torch.where(mask, row, -1).cummax(0).values
    last = last_so_far[
        (cu_seqlens[1:].long() - 1).clamp(min=0)
    ]  # of a sequence without scored rows: another's, or -1
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row.to(torch.int32), right=True).clamp(
        max=scores.shape[0] - 1
    )
    return torch.where(mask & (last[sequence] == row), scores[sequence], 0.0)


def mean_sequence_kl(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """(mean over sequences of the sum of k1 = logprobs - ref_logprobs, number of sequences), 0-dim, over all
    ranks of `group`: what `AdaptiveKLController.update` takes. Sequences without scored rows do not count."""
    k1 = kl_estimate(
        per_token("logprobs", logprobs).detach(), per_token("ref_logprobs", ref_logprobs).detach(), "k1"
    )
    sums = sequence_sum(k1, cu_seqlens, mask=mask)
    filled = sequence_sum(torch.ones_like(k1), cu_seqlens, mask=mask) > 0
    total = torch.stack([torch.where(filled, sums, 0.0).double().sum(), filled.sum(dtype=torch.float64)])
    if group is not None:
        dist.all_reduce(total, group=group)
    return total[0] / total[1].clamp(min=1.0), total[1]


class AdaptiveKLController:
    """A KL coefficient that follows a target (Ziegler et al. 2019, arXiv 1909.08593):

    value <- value (1 + clip(current_kl / target - 1, -0.2, 0.2) n_steps / horizon),

    with current_kl the mean KL of the rollout's sequences and n_steps their number, over all ranks:
    `controller.update(*mean_sequence_kl(...))`. An update at most halves or doubles the value, whatever
    n_steps / horizon is (the formula alone goes below 0 beyond 5): it is finite and never negative. A
    measurement that is NaN changes nothing. `value` starts as a number and becomes a 0-dim tensor with the
    first update by tensors, so nothing waits for the device."""

    def __init__(self, init_kl_coef: float = 0.2, target: float = 6.0, horizon: float = 10000):
        check_number("init_kl_coef", init_kl_coef, low=0.0)
        check_number("target", target, above=0.0)
        check_number("horizon", horizon, above=0.0)
        self.value: float | Tensor = float(init_kl_coef)
        self.target, self.horizon = float(target), float(horizon)

    def update(self, current_kl: float | Tensor, n_steps: float | Tensor) -> None:
        """current_kl, n_steps: numbers or tensors of one element; n_steps >= 0."""
        current_kl, n_steps = _measured("current_kl", current_kl), _measured("n_steps", n_steps)
        if not isinstance(n_steps, Tensor) and n_steps < 0:
            raise ValueError(f"n_steps={n_steps!r} is out of range; legal: >= 0")
        error = _clip(current_kl / self.target - 1.0, -0.2, 0.2)
        value = self.value * _clip(1.0 + error * n_steps / self.horizon, 0.5, 2.0)
        if isinstance(value, Tensor):
            self.value = torch.where(value.isfinite(), value, self.value)
        elif math.isfinite(value):
            self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value.clone() if isinstance(self.value, Tensor) else self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not isinstance(state, Mapping) or set(state) != {"value"}:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else shown(state)
            raise ValueError(f"state has entries {found}; legal: value")
        value = _measured("value", state["value"])
        check_number("value", float(value), low=0.0)
        self.value = value.clone() if isinstance(value, Tensor) else value


def _measured(name: str, value: Any) -> float | Tensor:
    """A number, NumPy's included, as a float; a tensor of one element, detached, with no dimensions."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"{name} must be a number or a tensor of one element, got shape {tuple(value.shape)}"
            )
        return value.detach().reshape(())
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a tensor of one element, got {shown(value)}")
    return float(value)


def _clip(x: float | Tensor, low: float, high: float) -> float | Tensor:
    """x in [low, high]; NaN stays NaN."""
    return x.clamp(low, high) if isinstance(x, Tensor) else min(max(x, low), high)
