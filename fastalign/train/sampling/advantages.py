"""From a step's scores to the advantages of its tokens or responses. Always over the whole step, before it is
cut into minibatches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import fastalign
from fastalign.runtime.metric import Deviation, Total, variance_of
from fastalign.train.methods.base import Scored
from fastalign.train.metrics import Metrics
from fastalign.train.online_config import OnlineConfig


@dataclass
class Rewarded:
    """A step's responses in the order of their packs: what the models said of them, and what the reward did.
    All tensors on one device.

    scores: [S] as the reward gave them, NaN: not scorable. finished: [S] bool. lengths: [S] tokens of each
    response. groups: [S] the number of the response's prompt."""

    seen: Scored
    scores: Tensor
    finished: Tensor
    lengths: Tensor
    groups: Tensor


@dataclass
class Estimate:
    """advantages: [T], or [S] where `per_token` is False. returns: [T], for the value loss. mask: [T] bool,
    the rows that are learnt from. metrics: of the rewards."""

    advantages: Tensor
    mask: Tensor
    metrics: Metrics
    returns: Tensor | None = None
    per_token: bool = True


class Estimator(NamedTuple):
    """A way from rewards to advantages. `advantages`: (settings, step, rewards per token [T], metrics of the
    rewards) -> `Estimate`. `per_token`: one advantage per token, else one per response, relative to the
    others for the same prompt. `reads_values`: of a value head."""

    advantages: Callable[[OnlineConfig, Rewarded, Tensor, Metrics], Estimate]
    per_token: bool
    reads_values: bool = False


def estimate(estimator: str, config: OnlineConfig, step: Rewarded, kl_coef: float | Tensor) -> Estimate:
    """The advantages of a step by this row of `ESTIMATORS`. `kl_coef` is the coefficient of the moment."""
    rewards, metrics = shaped_rewards(config, step, kl_coef)
    return ESTIMATORS[estimator].advantages(config, step, rewards, metrics)


def _gae(config: OnlineConfig, step: Rewarded, rewards: Tensor, metrics: Metrics) -> Estimate:
    """Generalised advantage estimation on the value head, whitened (Schulman et al. 2016, arXiv
    1506.02438)."""
    packed, values = step.seen.packed, step.seen.policy["value"]
    rewards, bootstrap = _whitened(config, rewards, packed.mask), None
    if config.bootstrap_truncated:
        bootstrap = torch.where(step.finished, 0.0, values[packed.cu_seqlens[1:].long() - 1])
    gae = fastalign.gae(
        rewards,
        values,
        packed.cu_seqlens,
        mask=packed.mask,
        bootstrap=bootstrap,
        gamma=config.gamma,
        lam=config.lam,
    )
    returns, errors = (variance_of(x, packed.mask) for x in (gae.returns, gae.returns - values))
    metrics = {**metrics, "val/explained_variance": (1.0 - errors.m2 / returns.m2, (returns.m2 > 0).double())}
    return Estimate(
        fastalign.whiten(gae.advantages, packed.mask, moments=gae.moments), packed.mask, metrics, gae.returns
    )


def _reinforce_pp(config: OnlineConfig, step: Rewarded, rewards: Tensor, metrics: Metrics) -> Estimate:
    """Returns to go, whitened. With several samples per prompt their mean score goes off first
    (REINFORCE++-baseline)."""
    packed = step.seen.packed
    if config.samples_per_prompt > 1:
        scores = final_scores(config, step)
        means = scores - fastalign.group_advantages(scores, step.groups, kind="dr_grpo").advantages
        rewards = rewards - fastalign.shape_rewards(means, packed.cu_seqlens, mask=packed.mask)
    rewards = _whitened(config, rewards, packed.mask)
    returns = fastalign.returns_to_go(rewards, packed.cu_seqlens, mask=packed.mask, gamma=config.gamma)
    return Estimate(fastalign.whiten(returns, packed.mask), packed.mask, metrics)


def _returns(config: OnlineConfig, step: Rewarded, rewards: Tensor, metrics: Metrics) -> Estimate:
    """Returns to go as they are. What has no score is left out."""
    packed = step.seen.packed
    returns = fastalign.returns_to_go(rewards, packed.cu_seqlens, mask=packed.mask, gamma=config.gamma)
    mask = packed.mask & _of_tokens(~step.scores.isnan(), packed)
    return Estimate(torch.where(mask, returns, 0.0), mask, metrics)


def shaped_rewards(config: OnlineConfig, step: Rewarded, kl_coef: float | Tensor) -> tuple[Tensor, Metrics]:
    """Rewards per token [T] (score at the last one, KL and token rewards at each), and the metrics
    objective/*, per response."""
    packed, policy, fixed = step.seen.packed, step.seen.policy, step.seen.fixed
    scores = final_scores(config, step)
    in_reward = config.kl_in == "reward" and "ref_logprobs" in fixed
    penalty = (
        {
            "kl_coef": kl_coef,
            "kl_kind": config.kl_kind,
            "logprobs": policy["logprob"],
            "ref_logprobs": fixed["ref_logprobs"],
        }
        if in_reward
        else {}
    )
    rewards = fastalign.shape_rewards(scores, packed.cu_seqlens, mask=packed.mask, **penalty)
    if "dpo_logprobs" in fixed:  # RTO
        implicit = fastalign.token_rewards(
            fixed["dpo_logprobs"],
            fixed["ref_logprobs"],
            packed.cu_seqlens,
            mask=packed.mask,
            beta=config.dpo_coef,
        )
        rewards = rewards + implicit.rewards.clamp(-config.dpo_clip, config.dpo_clip)
    known = ~scores.isnan()
    totals = torch.where(known, fastalign.sequence_sum(rewards, packed.cu_seqlens, mask=packed.mask), 0.0)
    clean, count = torch.where(known, scores, 0.0), known.sum()
    metrics = {
        "objective/scores": (clean.sum(), count),
        "objective/scores_std": Deviation(*variance_of(clean, known)),
        "objective/non_score_reward": ((totals - clean).sum(), count),
        "objective/rlhf_reward": (totals.sum(), count),
        "objective/entropy": (policy["entropy"].sum(), len(scores)),
        "objective/length": (step.lengths.sum(), len(scores)),
        "num_eos": Total(step.finished.sum(), len(scores)),
        "num_unscored": Total((~known).sum(), len(scores)),
    }
    if "ref_logprobs" in fixed:
        kl, sequences = fastalign.mean_sequence_kl(
            policy["logprob"], fixed["ref_logprobs"], packed.cu_seqlens, mask=packed.mask
        )
        metrics["objective/kl"] = (kl * sequences, sequences)
    return rewards, metrics


def final_scores(config: OnlineConfig, step: Rewarded) -> Tensor:
    """[S]: the reward's scores, clipped, less the penalties of how the response ended."""
    scores = step.scores
    if config.overlong_buffer:
        scores = scores + fastalign.overlong_penalty(
            step.lengths, max_length=config.max_new_tokens, cache_length=config.overlong_buffer
        )
    ending = (
        {}
        if config.missing_eos_penalty is None
        else {"finished": step.finished, "missing_eos_penalty": config.missing_eos_penalty}
    )
    cu_seqlens, mask = step.seen.packed.cu_seqlens, step.seen.packed.mask
    placed = fastalign.shape_rewards(scores, cu_seqlens, mask=mask, score_clip=config.reward_clip, **ending)
    return fastalign.sequence_sum(placed, cu_seqlens, mask=mask)


def _whitened(config: OnlineConfig, rewards: Tensor, mask: Tensor) -> Tensor:
    """With --whiten-rewards the scored rewards divided by their standard deviation; their mean is not taken
    off, so that no reward stays none."""
    if not config.whiten_rewards:
        return rewards
    variance = variance_of(rewards, mask)
    scale = torch.where(
        variance.m2 > 0, torch.rsqrt(variance.m2 / (variance.count - 1.0).clamp(min=1.0)), 1.0
    )
    return torch.where(mask, rewards * scale.to(rewards.dtype), 0.0)


def _within_groups(
    config: OnlineConfig, step: Rewarded, rewards: Tensor, metrics: Metrics, *, kind: str
) -> Estimate:
    """One advantage per response, relative to the other responses for the same prompt
    (`fastalign.group_advantages`). What cannot be scored is left out.

    Which groups teach nothing is judged by the reward's own scores, as in DAPO: penalties for length or KL
    would make every group differ."""
    packed = step.seen.packed
    totals = fastalign.sequence_sum(rewards, packed.cu_seqlens, mask=packed.mask)
    group = fastalign.group_advantages(totals, step.groups, kind=kind)
    raw = fastalign.group_advantages(step.scores, step.groups, kind="dr_grpo")
    keep = raw.valid.clone()
    if config.drop_equal_groups:
        keep &= raw.informative
    if config.mask_truncated:
        keep &= step.finished
    mask = packed.mask & _of_tokens(keep, packed)
    metrics = {**metrics, "frac_zero_std": (raw.frac_zero_std, 1), "frac_kept": (keep.sum(), len(keep))}
    return Estimate(group.advantages, mask, metrics, per_token=False)


def _of_tokens(values: Tensor, packed: fastalign.PackedBatch) -> Tensor:
    """[S] -> [T]: the value of the sequence that a token is in."""
    return torch.repeat_interleave(values, packed.cu_seqlens.diff().long(), output_size=packed.mask.numel())


ESTIMATORS: dict[str, Estimator] = {
    "gae": Estimator(_gae, per_token=True, reads_values=True),
    "reinforce_pp": Estimator(_reinforce_pp, per_token=True),
    "returns": Estimator(_returns, per_token=True),
    **{
        kind: Estimator(partial(_within_groups, kind=kind), per_token=False)
        for kind in ("grpo", "dr_grpo", "rloo")
    },
}
