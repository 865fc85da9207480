"""From a step's scores to the advantages of its tokens or responses. Always over the whole step, before it is cut into minibatches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import fastalign
from fastalign.runtime.metric import Deviation, Total, variance_of
from fastalign.train.methods.base import Scored
from fastalign.train.metrics import Metrics
from fastalign.train.online_config import OnlineConfig


@dataclass
class Rewarded:
    """A step's responses in the order of their packs: what the models said of them, and what the reward did. All tensors on one device.

    scores: [S] as the reward gave them, NaN: not scorable. finished: [S] bool. lengths: [S] tokens of each response. groups: [S] the
    number of the response's prompt."""

    seen: Scored
    scores: Tensor
    finished: Tensor
    lengths: Tensor
    groups: Tensor


@dataclass
class Estimate:
    """advantages: [T], or [S] where `per_token` is False. returns: [T], for the value loss. mask: [T] bool, the rows that are learnt from.
    metrics: of the rewards."""

    advantages: Tensor
    mask: Tensor
    metrics: Metrics
    returns: Tensor | None = None
    per_token: bool = True


def estimate(method: str, config: OnlineConfig, step: Rewarded, kl_coef: float | Tensor) -> Estimate:
    """The advantages of a step by the method of this name. `kl_coef` is the coefficient of the moment."""
    rewards, metrics = shaped_rewards(config, step, kl_coef)
    packed, per_token = step.seen.packed, method in ("ppo", "reinforce_pp")
    if not per_token:
        return _within_groups(method, config, step, rewards, metrics)
    if method == "reinforce_pp" and config.samples_per_prompt > 1:  # REINFORCE++-baseline: less the mean score of the prompt's responses
        scores = final_scores(config, step)
        means = scores - fastalign.group_advantages(scores, step.groups, kind="dr_grpo").advantages
        rewards = rewards - fastalign.shape_rewards(means, packed.cu_seqlens, mask=packed.mask)
    if config.whiten_rewards:
        rewards = _over_deviation(rewards, packed.mask)
    if method == "reinforce_pp":
        returns = fastalign.returns_to_go(rewards, packed.cu_seqlens, mask=packed.mask, gamma=config.gamma)
        return Estimate(fastalign.whiten(returns, packed.mask), packed.mask, metrics)
    values = step.seen.policy["value"]
    bootstrap = None
    if config.bootstrap_truncated:
        bootstrap = torch.where(step.finished, 0.0, values[packed.cu_seqlens[1:].long() - 1])
    gae = fastalign.gae(rewards, values, packed.cu_seqlens, mask=packed.mask, bootstrap=bootstrap, gamma=config.gamma, lam=config.lam)
    returns, errors = (variance_of(x, packed.mask) for x in (gae.returns, gae.returns - values))
    metrics = {**metrics, "val/explained_variance": (1.0 - errors.m2 / returns.m2, (returns.m2 > 0).double())}
    return Estimate(fastalign.whiten(gae.advantages, packed.mask, moments=gae.moments), packed.mask, metrics, gae.returns)


def shaped_rewards(config: OnlineConfig, step: Rewarded, kl_coef: float | Tensor) -> tuple[Tensor, Metrics]:
    """Rewards per token [T] (score at the last one, KL and token rewards at each), and the metrics objective/*, per response."""
    packed, policy, fixed = step.seen.packed, step.seen.policy, step.seen.fixed
    scores = final_scores(config, step)
    in_reward = config.kl_in == "reward" and "ref_logprobs" in fixed
    penalty = (
        {"kl_coef": kl_coef, "kl_kind": config.kl_kind, "logprobs": policy["logprob"], "ref_logprobs": fixed["ref_logprobs"]}
        if in_reward
        else {}
    )
    rewards = fastalign.shape_rewards(scores, packed.cu_seqlens, mask=packed.mask, **penalty)
    if "dpo_logprobs" in fixed:  # RTO
        implicit = fastalign.token_rewards(
            fixed["dpo_logprobs"], fixed["ref_logprobs"], packed.cu_seqlens, mask=packed.mask, beta=config.dpo_coef
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
        kl, sequences = fastalign.mean_sequence_kl(policy["logprob"], fixed["ref_logprobs"], packed.cu_seqlens, mask=packed.mask)
        metrics["objective/kl"] = (kl * sequences, sequences)
    return rewards, metrics


def final_scores(config: OnlineConfig, step: Rewarded) -> Tensor:
    """[S]: the reward's scores, clipped, less the penalties of how the response ended."""
    scores = step.scores
    if config.overlong_buffer:
        scores = scores + fastalign.overlong_penalty(step.lengths, max_length=config.max_new_tokens, cache_length=config.overlong_buffer)
    ending = {} if config.missing_eos_penalty is None else {"finished": step.finished, "missing_eos_penalty": config.missing_eos_penalty}
    cu_seqlens, mask = step.seen.packed.cu_seqlens, step.seen.packed.mask
    placed = fastalign.shape_rewards(scores, cu_seqlens, mask=mask, score_clip=config.reward_clip, **ending)
    return fastalign.sequence_sum(placed, cu_seqlens, mask=mask)


def _over_deviation(rewards: Tensor, mask: Tensor) -> Tensor:
    """The scored rewards divided by their standard deviation; their mean is not taken off, so that no reward stays none."""
    variance = variance_of(rewards, mask)
    scale = torch.where(variance.m2 > 0, torch.rsqrt(variance.m2 / (variance.count - 1.0).clamp(min=1.0)), 1.0)
    return torch.where(mask, rewards * scale.to(rewards.dtype), 0.0)


def _within_groups(method: str, config: OnlineConfig, step: Rewarded, rewards: Tensor, metrics: Metrics) -> Estimate:
    """One advantage per response, relative to the other responses for the same prompt. What cannot be scored is left out.

    Which groups teach nothing is judged by the reward's own scores, as in DAPO: penalties for length or KL would make every group differ."""
    packed = step.seen.packed
    totals = fastalign.sequence_sum(rewards, packed.cu_seqlens, mask=packed.mask)
    kind = method if method == "rloo" else "grpo" if config.scale_rewards and config.loss != "dr_grpo" else "dr_grpo"
    group = fastalign.group_advantages(totals, step.groups, kind=kind)
    raw = fastalign.group_advantages(step.scores, step.groups, kind="dr_grpo")
    keep = raw.valid.clone()
    if config.drop_equal_groups:
        keep &= raw.informative
    if config.mask_truncated:
        keep &= step.finished
    mask = packed.mask & torch.repeat_interleave(keep, packed.cu_seqlens.diff().long(), output_size=packed.mask.numel())
    metrics = {**metrics, "frac_zero_std": (raw.frac_zero_std, 1), "frac_kept": (keep.sum(), len(keep))}
    return Estimate(group.advantages, mask, metrics, per_token=False)
