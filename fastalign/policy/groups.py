"""Advantages from groups of samples of one prompt, DAPO's reward shaping and its filter: plain PyTorch on one
value per sequence.

Rewards are [S]. `groups` names each sequence's group: integers [S], any values, in any order; with `group=`
(a process group) a prompt's samples may lie on several ranks: equal numbers mean the same prompt everywhere,
and every rank gets the advantages of its own sequences."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastalign.runtime.checks import check_choice, check_number, check_same_device, check_shape

KINDS = ("grpo", "dr_grpo", "rloo", "reinforce_plus_plus", "remax")


class GroupAdvantages(NamedTuple):
    """advantages: [S], in the rewards' type (fp32 at least). valid: [S] bool, False where the reward was not
    finite. informative: [S] bool, True where the sequence's group holds two valid rewards that differ: what
    DAPO keeps. frac_zero_std: 0-dim, the share of groups (of those with a valid reward, over all ranks) whose
    rewards are all equal."""

    advantages: Tensor
    valid: Tensor
    informative: Tensor
    frac_zero_std: Tensor


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    *,
    kind: str = "grpo",
    eps: float = 1e-4,
    greedy_rewards: Tensor | None = None,
    lengths: Tensor | None = None,
    whiten_over: str = "tokens",
    group: dist.ProcessGroup | None = None,
) -> GroupAdvantages:
    """One advantage per sequence, from the rewards r of its group of G samples:

    - grpo (arXiv 2402.03300): (r - mean) / (std + eps), std unbiased.
    - dr_grpo (arXiv 2503.20783): r - mean.
    - rloo (arXiv 2402.14740): r - mean of the others = G / (G - 1) (r - mean).
    - reinforce_plus_plus (arXiv 2501.03262, its baseline variant): x = r - mean, then (x - mean(x)) /
      sqrt(var(x) + eps^2), where every token of a
      valid sequence carries its x (verl, OpenRLHF, NeMo: long responses count more), or with
      whiten_over="sequences" every valid sequence once.
    - remax (arXiv 2310.10505): r - greedy_rewards, the reward of the greedy answer to the same prompt.

    A group whose valid rewards are all equal (max == min) gets exactly 0, a group of one 0 as well (except
    with remax, which needs no group). A reward that is not finite (unscorable) is left out of every statistic
    and gets 0.

    Args:
        rewards: [S] floating. groups: [S] integers. eps: of grpo and reinforce_plus_plus. greedy_rewards:
            [S], for remax only.
        lengths: [S] integers >= 0, the numbers of scored tokens; for reinforce_plus_plus over tokens, which
            needs them.
        whiten_over: "tokens" or "sequences", of reinforce_plus_plus. Both are unbiased variances, over that
            many tokens or sequences.
        group: process group over which the samples of a prompt, and the batch of reinforce_plus_plus, are
            spread; ranks may hold different numbers of sequences.

    Returns:
        GroupAdvantages, detached; statistics in fp64. Only with `group` it waits for the device: ranks
        exchange their sizes.

    Raises:
        ValueError, TypeError: unknown kind, shapes, types, greedy_rewards or lengths missing or superfluous.
    """
    check_choice("kind", kind, KINDS)
    check_number("eps", eps, low=0.0)
    rewards = _rewards("rewards", rewards)
    check_shape("groups", groups, tuple(rewards.shape))
    check_same_device("groups", groups, "rewards", rewards)
    if groups.dtype.is_floating_point or groups.dtype == torch.bool:
        raise TypeError(f"groups must be integers, got {groups.dtype}")
    if kind == "remax" and greedy_rewards is None:
        raise ValueError(
            "kind='remax' needs greedy_rewards [S], the reward of the greedy answer to each sequence's "
            "prompt; got None"
        )
    if kind != "remax" and greedy_rewards is not None:
        raise ValueError(f"greedy_rewards belongs to kind='remax' and to no other; got kind={kind!r}")
    weights = _weights(kind, lengths, whiten_over, rewards)
    every, ids, start = rewards.double(), groups.long(), 0
    if group is not None:
        every, ids, weights, start = _gather(every, ids, weights, group)
    valid, ids = torch.isfinite(every), _renumbered(ids)
    count, mean, m2, low, high = _moments(every, ids, valid)
    differ = high > low
    centred = torch.where(valid & differ[ids], every - mean[ids], 0.0)
    if kind == "grpo":
        out = centred / (torch.sqrt(m2 / (count - 1.0).clamp(min=1.0))[ids] + eps)
        out = torch.where(differ[ids], out, 0.0)  # 0 / 0 without eps
    elif kind == "rloo":
        out = centred * (count / (count - 1.0).clamp(min=1.0))[ids]
    elif kind == "reinforce_plus_plus":
        weights = torch.where(valid, weights, 0.0)
        n = weights.sum()
        shifted = torch.where(valid, centred - (weights * centred).sum() / n.clamp(min=1.0), 0.0)
        variance = (weights * shifted * shifted).sum() / (n - 1.0).clamp(min=1.0)
        out = torch.where(variance > 0, shifted / torch.sqrt(variance + eps * eps), 0.0)
    else:
        out = centred
    mine = slice(start, start + rewards.shape[0])
    out, own_valid = out[mine], valid[mine]
    if greedy_rewards is not None:
        baseline = _rewards("greedy_rewards", greedy_rewards)
        check_shape("greedy_rewards", baseline, tuple(rewards.shape))
        own_valid = own_valid & torch.isfinite(baseline)
        out = torch.where(own_valid, rewards.double() - baseline.double(), 0.0)
    filled = count > 0
    share = (filled & ~differ).sum() / filled.sum().clamp(min=1)
    return GroupAdvantages(
        out.to(rewards.dtype), own_valid, (valid & differ[ids])[mine], share.to(rewards.dtype)
    )


def overlong_penalty(lengths: Tensor, *, max_length: int = 20480, cache_length: int = 4096) -> Tensor:
    """DAPO's soft punishment of long responses (arXiv 2503.14476, eq. 13), to be added to the rewards.

    0 up to max_length - cache_length, then ((max_length - cache_length) - length) / cache_length, and -1
    beyond max_length.

    Args:
        lengths: [S] numbers of response tokens. max_length, cache_length: tokens, 0 < cache_length <=
            max_length.

    Returns:
        [S] fp32.
    """
    check_number("max_length", max_length, above=0)
    check_number("cache_length", cache_length, above=0, high=max_length)
    soft = (max_length - cache_length - lengths.double()) / cache_length
    return torch.where(lengths > max_length, -1.0, soft.clamp(-1.0, 0.0)).float()


def dynamic_sampling_mask(
    rewards: Tensor, groups: Tensor, *, group: dist.ProcessGroup | None = None
) -> Tensor:
    """DAPO's dynamic sampling (arXiv 2503.14476): [S] bool, True where the sequence's group holds two valid
    rewards that differ. The others have no gradient; sample prompts until enough sequences are True."""
    return group_advantages(rewards, groups, kind="dr_grpo", group=group).informative


def _rewards(name: str, rewards: Tensor | None) -> Tensor:
    if not isinstance(rewards, Tensor) or not rewards.dtype.is_floating_point or rewards.dim() != 1:
        raise TypeError(f"{name} must be a floating tensor of shape [S], got {rewards!r}")
    return rewards.detach().to(torch.float64 if rewards.dtype == torch.float64 else torch.float32)


def _renumbered(ids: Tensor) -> Tensor:
    """Numbers 0, 1, 2, ... in the order of the ids, equal where these are equal; without a shape that depends
    on the data, as torch.unique has."""
    order = ids.argsort(stable=True)
    ranked = ids[order]
    steps = torch.cat([torch.zeros_like(ranked[:1]), (ranked[1:] != ranked[:-1]).long()])
    return torch.empty_like(ids).scatter_(0, order, steps.cumsum(0))


def _moments(x: Tensor, ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """count, mean, sum of squared deviations, smallest and largest valid value of every group."""
    zero = torch.zeros_like(x)  # as many groups as there are values, at most
    kept = torch.where(valid, x, 0.0)
    count = zero.index_add(0, ids, valid.double())
    mean = zero.index_add(0, ids, kept) / count.clamp(min=1.0)
    deviation = torch.where(valid, x - mean[ids], 0.0)
    m2 = zero.index_add(0, ids, deviation * deviation)
    low = (zero + torch.inf).scatter_reduce(0, ids, torch.where(valid, x, torch.inf), "amin")
    high = (zero - torch.inf).scatter_reduce(0, ids, torch.where(valid, x, -torch.inf), "amax")
    return count, mean, m2, low, high


def _weights(kind: str, lengths: Tensor | None, whiten_over: str, rewards: Tensor) -> Tensor:
    """How often each sequence counts in the mean and variance of reinforce_plus_plus, fp64."""
    check_choice("whiten_over", whiten_over, ("tokens", "sequences"))
    by_tokens = kind == "reinforce_plus_plus" and whiten_over == "tokens"
    if by_tokens and lengths is None:
        raise ValueError(
            "kind='reinforce_plus_plus' whitens over tokens and needs lengths [S], their number in each "
            "sequence; got None "
            "(whiten_over='sequences' counts every sequence once)"
        )
    if kind != "reinforce_plus_plus" and (lengths is not None or whiten_over != "tokens"):
        raise ValueError(
            f"lengths and whiten_over belong to kind='reinforce_plus_plus' and to no other; got kind={kind!r}"
        )
    if not by_tokens:
        if lengths is not None:
            raise ValueError("lengths has no effect with whiten_over='sequences'")
        return torch.ones_like(rewards, dtype=torch.float64)
    check_shape("lengths", lengths, tuple(rewards.shape))
    check_same_device("lengths", lengths, "rewards", rewards)
    if lengths.dtype.is_floating_point or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    return lengths.double()


def _gather(
    x: Tensor, ids: Tensor, weights: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Values, group numbers and weights of all ranks, in rank order, and where this rank's begin. Ranks
    exchange their sizes first."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    size = torch.tensor([x.shape[0]], device=x.device)
    sizes = [torch.zeros_like(size) for _ in range(world)]
    dist.all_gather(sizes, size, group=group)
    counts = [int(s) for s in sizes]
    longest = max(counts)
    parts = []
    for tensor in (x, ids, weights):
        padded = tensor.new_zeros(longest)
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in range(world)]
        dist.all_gather(gathered, padded, group=group)
        parts.append(torch.cat([g[:c] for g, c in zip(gathered, counts)]))
    return parts[0], parts[1], parts[2], sum(counts[:rank])
