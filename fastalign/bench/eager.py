"""The same computations in plain PyTorch, as trainers write them: the baselines, eager and through
torch.compile."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.1  # of the preference loss that is measured
CLIP, KL_COEF = 0.2, 0.04  # of the policy losses


def log_softmax_gather(logits: Tensor, labels: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def linear_log_softmax_gather(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return log_softmax_gather(F.linear(hidden, weight), labels)


def gather_minus_logsumexp(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return -F.cross_entropy(logits, labels, reduction="none")


def logprob_and_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[2, N]"""
    log_p = F.log_softmax(logits, dim=-1)
    return torch.stack([log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)])


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(policy || reference) per row, in fp32 (bf16 log-probs cannot hold the difference of two near
    models); fp64 stays."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_p, log_q = F.log_softmax(logits, dim=-1, dtype=dtype), F.log_softmax(ref_logits, dim=-1, dtype=dtype)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def exact_kl_rounded(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """The same in the logits' own dtype."""
    log_p, log_q = F.log_softmax(logits, dim=-1), F.log_softmax(ref_logits, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def segment_sum(x: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """`sequence` [T]: the number of each token's sequence, made beforehand and not counted in the time."""
    return x.new_zeros(sequences).index_add(0, sequence, x)


def dpo_loss(logprobs: Tensor, ref_logprobs: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    ratios = segment_sum(logprobs - ref_logprobs, sequence, sequences)
    return -F.logsigmoid(BETA * (ratios[0::2] - ratios[1::2])).mean()


def plackett_luce_loss(logprobs: Tensor, ref_logprobs: Tensor, sequence: Tensor, scores: Tensor) -> Tensor:
    """`scores` [L, K]: lists of equal length."""
    ratios = segment_sum(logprobs - ref_logprobs, sequence, scores.numel()).view(scores.shape)
    s = BETA * ratios.gather(-1, scores.argsort(stable=True, dim=-1, descending=True))
    return (s.flip(-1).logcumsumexp(-1).flip(-1) - s).sum(-1).mean()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    d = logprobs - ref_logprobs
    return torch.expm1(-d) + d


def ppo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip: float = CLIP
) -> Tensor:
    ratio = torch.exp(logprobs - old_logprobs)
    loss = torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 1.0 - clip, 1.0 + clip))
    return torch.where(mask, loss, 0.0).sum() / mask.sum()


def dpo_loss_of_sums(sums: Tensor, ref_sums: Tensor) -> Tensor:
    """`sums` [2P]: the chosen responses, then the rejected ones. A sum over the pairs."""
    chosen, rejected = (sums - ref_sums).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).sum()


def grpo_loss(
    logprobs: Tensor, ref_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> Tensor:
    """Padded: [S, L], `advantages` [S]. A sum over the sequences of the mean over their tokens."""
    ratio, advantages = torch.exp(logprobs - old_logprobs), advantages.unsqueeze(-1)
    loss = torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 1.0 - CLIP, 1.0 + CLIP))
    loss = loss + KL_COEF * k3(logprobs, ref_logprobs)
    return ((loss * mask).sum(-1) / mask.sum(-1)).sum()


def gae_loop(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns), [B, L] each, no holes: the loop over time steps of trainers on padded
    batches."""
    advantages, next_value, next_advantage = (
        [],
        torch.zeros_like(rewards[:, 0]),
        torch.zeros_like(rewards[:, 0]),
    )
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages.append(next_advantage)
    result = torch.stack(advantages[::-1], dim=1)
    return result, result + values


def gae_doubling(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """`gae_loop` in log2(L) operations on whole tensors, for sequences on which a loop would not end: after n
    of them an advantage holds 2^n terms of its sum."""
    advantages, factor, shift = rewards - values, gamma * lam, 1
    advantages[:, :-1] += gamma * values[:, 1:]
    while shift < rewards.shape[1]:
        advantages = torch.cat(
            [advantages[:, :-shift] + factor * advantages[:, shift:], advantages[:, -shift:]], dim=1
        )
        factor, shift = factor * factor, 2 * shift
    return advantages, advantages + values


def gae_masked_loop(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """The same where trainers allow for holes: `mask` [B, L], 1.0 at tokens and 0.0 at those to be passed
    over, is multiplied in at every step."""
    advantages, next_value, next_advantage = (
        [],
        torch.zeros_like(rewards[:, 0]),
        torch.zeros_like(rewards[:, 0]),
    )
    for t in reversed(range(rewards.shape[1])):
        there, passed = mask[:, t], 1.0 - mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * there + passed * next_advantage
        next_value = values[:, t] * there + passed * next_value
        advantages.append(next_advantage)
    result = torch.stack(advantages[::-1], dim=1)
    return result, result + values
