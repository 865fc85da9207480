"""The definition of the policy and value losses in plain PyTorch; the twin of csrc/math/policy.h, function by
function."""

from __future__ import annotations

import math

import torch

from fastalign.ops.columns import (
    CISPO,
    CLIP,
    GMPO,
    IS_MASK,
    IS_TRUNCATE,
    K2,
    K3,
    K3_PLUS,
    POLICY_ITEMS,
    RATIO_SEQ_MEAN,
    RATIO_SEQ_SUM,
    RATIO_TOKEN,
    REINFORCE,
    SAPO,
    SEQ_MEAN_TOKEN_MEAN,
    SEQ_MEAN_TOKEN_SUM_NORM,
    STATS,
    TOKEN_MEAN,
    TOKEN_SUM,
    VALUE_STATS,
    VESPO,
)
from fastalign.ops.kl_estimate.reference import value_and_slope
from fastalign.ops.sequence_sum.reference import _segments
from fastalign.ops.slopes import times_slope

LOG_W_MIN = math.log(1e-8)  # of vespo


def log_ratio(p, logprobs, old_logprobs, advantages):
    """What a sequence sums: each token's log-ratio, of gmpo clipped on the side that A's sign allows, of
    vespo clamped; and whether it is open."""
    lr = torch.where(logprobs == old_logprobs, torch.zeros_like(logprobs), logprobs - old_logprobs)
    if p.surrogate == GMPO:
        high, low = (advantages > 0) & (lr > p.ratio_max), ~(advantages > 0) & (lr < p.ratio_min)
        term = torch.where(
            high, torch.full_like(lr, p.ratio_max), torch.where(low, torch.full_like(lr, p.ratio_min), lr)
        )
        return lr, term, high, low
    none = torch.zeros_like(lr, dtype=torch.bool)
    return lr, torch.clamp(lr, -20.0, 20.0) if p.surrogate == VESPO else lr, none, none


def choose(where, x, y, like):
    """x where true, else y: numbers, in the type of `like` (torch.where alone would make fp32 of two
    numbers)."""
    return torch.where(where, torch.full_like(like, x), torch.full_like(like, y))


def surrogate(p, logprobs, log_rho, advantages, high, low):
    """Value, d value / d log-prob (through the token's own ratio), and the clip flags: low, high, dual."""
    a, none = advantages, torch.zeros_like(high)
    rho = torch.exp(log_rho)
    if p.surrogate == REINFORCE:
        return -a * logprobs, -a, none, none, none
    if p.surrogate == CISPO:
        w = torch.clamp(rho, p.ratio_min, p.ratio_max)
        return -w * a * logprobs, -w * a, rho < p.ratio_min, rho > p.ratio_max, none
    if p.surrogate == SAPO:
        tau = choose(a > 0, p.tau_pos, p.tau_neg, rho)
        s, n = torch.sigmoid(tau * (rho - 1.0)), torch.sigmoid(-tau * (rho - 1.0))
        return -a * (4.0 / tau) * s, -a * 4.0 * s * n * rho, none, none, none
    if p.surrogate == GMPO:
        low = low & (a < 0)
        return -a * rho, torch.where(high | low, torch.zeros_like(rho), -a * rho), low, high, none
    if p.surrogate == VESPO:
        k, lam = choose(a >= 0, p.k_pos, p.k_neg, rho), choose(a >= 0, p.lam_pos, p.lam_neg, rho)
        phi = torch.exp(lam + k * log_rho - lam * rho)
        return -phi * a * logprobs, -phi * a, none, none, none
    high, low, dual = (
        (a > 0) & (rho > p.ratio_max),
        (a < 0) & (rho < p.ratio_min),
        (a < 0) & (rho > p.dual_clip),
    )
    held = torch.where(dual, torch.full_like(rho, p.dual_clip), choose(high, p.ratio_max, p.ratio_min, rho))
    clipped = high | low | dual
    return (
        -a * torch.where(clipped, held, rho),
        torch.where(clipped, torch.zeros_like(rho), -a * rho),
        low,
        high,
        dual,
    )


def kl_term(p, logprobs, ref_logprobs):
    """Value and slope of the KL estimate; k3+ has the slope of k2."""
    value, slope = value_and_slope(logprobs, ref_logprobs, K3 if p.kl_kind == K3_PLUS else p.kl_kind)
    return value, value_and_slope(logprobs, ref_logprobs, K2)[1] if p.kl_kind == K3_PLUS else slope


def clamp_kl(p, value, slope):
    """What the loss adds of an estimate: clamped to +-kl_clamp, without gradient where it is (k3+ keeps the
    slope of k2)."""
    outside = value.abs() > p.kl_clamp
    value = torch.clamp(value, -p.kl_clamp, p.kl_clamp)
    return value, slope if p.kl_kind == K3_PLUS else torch.where(outside, torch.zeros_like(slope), slope)


def divisors(aggregation, norm_length, length):
    """What a token's term is divided by, before the number of items."""
    if aggregation == SEQ_MEAN_TOKEN_MEAN:
        return torch.clamp(length, min=1.0)
    return torch.full_like(length, norm_length if aggregation == SEQ_MEAN_TOKEN_SUM_NORM else 1.0)


def clips_sequences(p):
    """Whether a sequence has one ratio, so that a bound holds for all of it: it then counts once among the
    clipped. gmpo clips tokens."""
    return p.ratio in (RATIO_SEQ_MEAN, RATIO_SEQ_SUM) and p.surrogate != GMPO


def one_if_zero(x):
    return torch.where(x > 0, x, torch.ones_like(x))


class Layout:
    """Sequence numbers, mask and sums over sequences; without cu_seqlens all tokens are one sequence."""

    def __init__(self, like, cu_seqlens, mask):
        tokens, device = like.shape[0], like.device
        self.packed = cu_seqlens is not None
        self.sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.index = (
            torch.zeros(tokens, dtype=torch.long, device=device)
            if cu_seqlens is None
            else _segments(cu_seqlens, tokens)
        )
        self.scored = torch.ones(tokens, dtype=torch.bool, device=device) if mask is None else mask
        self.lengths = self.sums(torch.ones_like(like))

    def keep(self, x):
        """Masked entries become 0, whatever they hold."""
        return None if x is None else torch.where(self.scored, x, torch.zeros_like(x))

    def sums(self, x):
        total = torch.zeros(self.sequences, dtype=torch.float64, device=x.device)
        return total.index_add(0, self.index, self.keep(x).double()).to(x.dtype)

    def total(self, x):
        return self.keep(x.to(self.lengths.dtype)).double().sum().to(self.lengths.dtype)

    def m2(self, x):
        """Sum of the scored tokens' squared deviations from their mean."""
        mean = self.keep(x).double().sum() / self.scored.sum().clamp(min=1)
        return self.keep((x.double() - mean) ** 2).sum().to(x.dtype)

    def items(self, aggregation, num_items):
        """The denominator of the mean: tokens, sequences with a scored token, or 1."""
        if aggregation == TOKEN_SUM:
            return torch.ones_like(self.lengths.sum())
        if num_items is not None:
            return one_if_zero(num_items)
        return one_if_zero(self.lengths.sum() if aggregation == TOKEN_MEAN else self.filled())

    def filled(self):
        """Sequences with a scored token; 0 where none are known."""
        return (self.lengths > (0 if self.packed else math.inf)).to(self.lengths.dtype).sum()


def policy_fwd(a):
    p = a.params
    at = Layout(a.logprobs, a.cu_seqlens, a.mask)
    lp, ref, h = at.keep(a.logprobs), at.keep(a.ref_logprobs), at.keep(a.entropy)
    old = lp if a.old_logprobs is None else at.keep(a.old_logprobs)
    advantage = at.keep(a.advantages[at.index] if p.advantages_per_sequence else a.advantages)
    kl_coef = p.kl_coef if a.kl_coef is None else a.kl_coef
    entropy_coef = p.entropy_coef if a.entropy_coef is None else a.entropy_coef

    lr, term, high, low = log_ratio(p, lp, old, advantage)
    length = at.lengths[at.index]
    if p.ratio == RATIO_TOKEN:
        log_rho = term
    else:
        log_rho = at.sums(term)[at.index] / (
            torch.ones_like(length) if p.ratio == RATIO_SEQ_SUM else torch.clamp(length, min=1.0)
        )
    log_rho = torch.clamp(log_rho, LOG_W_MIN if p.surrogate == VESPO else -20.0, 20.0)
    rho = torch.exp(log_rho)
    value, slope, low, high, dual = surrogate(p, lp, log_rho, advantage, high, low)
    if p.ratio == RATIO_SEQ_SUM and p.surrogate in (
        CLIP,
        SAPO,
    ):  # the sequence's one term, seen from each of its tokens
        slope = slope * length
    weight = torch.ones_like(lp)
    outside = torch.zeros_like(lp, dtype=torch.bool)
    if a.is_weight is not None:
        weight = at.keep(a.is_weight[at.index] if p.is_per_sequence else a.is_weight)
        outside = (weight > p.is_max) | ((weight < p.is_min) if p.is_mode == IS_MASK else False)
    used = weight
    if p.is_mode == IS_TRUNCATE:
        used = torch.clamp(weight, max=p.is_max)
    value, slope = used * value, used * slope
    if p.is_mode == IS_MASK:
        value, slope = (torch.where(outside, torch.zeros_like(x), x) for x in (value, slope))

    total = value
    kl = torch.zeros_like(lp)
    if ref is not None:
        kl, kl_slope = kl_term(p, lp, ref)
        on = torch.zeros_like(lp) + kl_coef != 0
        kl_value, kl_slope = clamp_kl(p, kl, kl_slope)
        if p.kl_bias_correction:
            kl_value, kl_slope = rho * kl_value, rho * (kl_value + kl_slope)
        total = torch.where(on, total + kl_coef * kl_value, total)
        slope = torch.where(on, slope + kl_coef * kl_slope, slope)
    if h is not None:
        on = torch.zeros_like(lp) + entropy_coef != 0
        total = torch.where(on, total - entropy_coef * h, total)

    divisor = divisors(p.aggregation, p.norm_length, length)
    items = at.items(p.aggregation, a.num_items)
    loss, policy = at.total(total / divisor), at.total(value / divisor)
    clips = [
        (at.sums(flag.to(lp.dtype)) > 0).to(lp.dtype).sum() if clips_sequences(p) else at.total(flag)
        for flag in (low, high, dual)
    ]
    given_weight = torch.zeros_like(lp) if a.is_weight is None else weight
    stats = {
        "items": items, "loss": loss, "policy": policy, "tokens": at.lengths.sum(), "sequences": at.filled(), "ratio": at.total(rho - 1.0),
        "ratio_m2": at.m2(rho), "approx_kl": at.total(lr * lr / 2.0), "clip_low": clips[0], "clip_high": clips[1],
        "clip_dual": clips[2], "kl": at.total(kl), "entropy": at.total(torch.zeros_like(lp) if h is None else h),
        "is_weight": at.total(given_weight), "is_clipped": at.total(outside), "nonfinite": at.total(~torch.isfinite(total)),
    }  # fmt: skip
    entropy_slopes = a.logprobs.new_empty(0)
    if a.with_entropy_grad:
        entropy_slopes = at.keep(-entropy_coef * torch.ones_like(lp) / divisor)
    return (
        loss / items,
        at.keep(slope / divisor),
        entropy_slopes,
        torch.stack([stats[name] for name in STATS]),
    )


def value_fwd(a):
    at = Layout(a.values, a.cu_seqlens, a.mask)
    v, target = at.keep(a.values), at.keep(a.returns)
    error = v - target
    each, slope, clipped = error * error / 2.0, error, torch.zeros_like(at.scored)
    if a.old_values is not None:
        old = at.keep(a.old_values)
        held = (
            torch.where(v < old - a.clip, old - a.clip, torch.where(v > old + a.clip, old + a.clip, v))
            - target
        )
        clipped = held * held > error * error
        each, slope = (
            torch.where(clipped, held * held / 2.0, each),
            torch.where(clipped, torch.zeros_like(error), error),
        )
    divisor = divisors(a.aggregation, a.norm_length, at.lengths[at.index])
    items, loss = at.items(a.aggregation, a.num_items), at.total(each / divisor)
    stats = {
        "items": items, "loss": loss, "tokens": at.lengths.sum(), "sequences": at.filled(), "clipped": at.total(clipped), "value": at.total(v),
        "returns": at.total(target), "returns_m2": at.m2(target), "error": at.total(error), "error_sq": at.total(error * error),
        "error_m2": at.m2(error),
        "nonfinite": at.total(~torch.isfinite(each)),
    }  # fmt: skip
    return loss / items, at.keep(slope / divisor), torch.stack([stats[name] for name in VALUE_STATS])


def policy_bwd(a):
    return times_slope(a.grad, a.slopes) / a.stats[POLICY_ITEMS], times_slope(
        a.grad, a.entropy_slopes
    ) / a.stats[POLICY_ITEMS]
