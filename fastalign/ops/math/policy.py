"""csrc/math/policy.h as @triton.jit functions; the rules of fastalign/ops/math/scalar.py hold."""

import triton
import triton.language as tl

from fastalign.ops.math.columns import (
    CISPO,
    GMPO,
    K3,
    K3_PLUS,
    REINFORCE,
    SAPO,
    SEQ_MEAN_TOKEN_MEAN,
    SEQ_MEAN_TOKEN_SUM_NORM,
    VESPO,
)
from fastalign.ops.math.scalar import div, exp, kl_estimate, sigmoid


@triton.jit
def clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def log_ratio(logprob, old_logprob):
    return tl.where(logprob == old_logprob, 0.0, logprob - old_logprob)


@triton.jit
def clamp_log_ratio(SURROGATE: tl.constexpr, x):
    return clamp(x, -18.420680743952367 if SURROGATE == VESPO else -20.0, 20.0)


@triton.jit
def sequence_term(p, lr, advantage):
    """What a sequence sums of a token; p: PolicyParams."""
    if p.surrogate == VESPO:
        term = clamp(lr, -20.0, 20.0)
    elif p.surrogate == GMPO:
        term = tl.where(
            advantage > 0,
            tl.where(lr > p.ratio_max, p.ratio_max, lr),
            tl.where(lr < p.ratio_min, p.ratio_min, lr),
        )
    else:
        term = lr
    return term


@triton.jit
def surrogate(p, logprob, lr, log_rho, rho, a):
    """Value and slope of a token's surrogate, and which bound holds: low, high, dual; p: PolicyParams."""
    positive, negative, never = a > 0, a < 0, rho < -1.0
    low, high, dual = never, never, never
    if p.surrogate == REINFORCE:
        value, slope = -a * logprob, -a
    elif p.surrogate == CISPO:
        low, high = rho < p.ratio_min, rho > p.ratio_max
        w = clamp(rho, p.ratio_min, p.ratio_max)
        value, slope = -w * a * logprob, -w * a
    elif p.surrogate == SAPO:
        tau = tl.where(positive, p.tau_pos, p.tau_neg)
        x = tau * (rho - 1.0)
        s = sigmoid(x)
        value, slope = -a * div(4.0 + tl.zeros_like(tau), tau) * s, -4.0 * a * rho * s * sigmoid(-x)
    elif p.surrogate == GMPO:
        low, high = (lr < p.ratio_min) & negative, (lr > p.ratio_max) & positive
        value, slope = -a * rho, tl.where(low | high, 0.0, -a * rho)
    elif p.surrogate == VESPO:
        k, lam = tl.where(negative, p.k_neg, p.k_pos), tl.where(negative, p.lam_neg, p.lam_pos)
        phi = exp(lam + k * log_rho - lam * rho)
        value, slope = -phi * a * logprob, -phi * a
    else:
        low, high, dual = (
            negative & (rho < p.ratio_min),
            positive & (rho > p.ratio_max),
            negative & (rho > p.dual_clip),
        )
        held = tl.where(dual, p.dual_clip, tl.where(high, p.ratio_max, tl.where(low, p.ratio_min, rho)))
        value, slope = -a * held, tl.where(low | high | dual, 0.0, -a * rho)
    return value, slope, low, high, dual


@triton.jit
def kl_term(KIND: tl.constexpr, logprob, ref_logprob):
    """Value and slope of the KL estimate; k3+ has the slope of k2."""
    value, slope = kl_estimate(K3 if KIND == K3_PLUS else KIND, logprob, ref_logprob)
    if KIND == K3_PLUS:
        slope = log_ratio(logprob, ref_logprob)
    return value, slope


@triton.jit
def clamp_kl(KIND: tl.constexpr, value, slope, bound):
    """What the loss adds of an estimate: clamped to +-bound, without gradient where it is; k3+ keeps the
    slope of k2."""
    held = clamp(value, -bound, bound)
    if KIND != K3_PLUS:
        slope = tl.where((value > bound) | (value < -bound), 0.0, slope)
    return held, slope


@triton.jit
def value_error(value, old_value, target, clip, CLIPPED: tl.constexpr):
    """Half the squared error, its slope, the error, and whether the clipped branch holds."""
    error = value - target
    square, slope, clipped = error * error, error, tl.abs(error) < 0.0  # never
    if CLIPPED:
        held = clamp(value, old_value - clip, old_value + clip) - target
        clipped = held * held > square
        square, slope = tl.where(clipped, held * held, square), tl.where(clipped, 0.0, error)
    return 0.5 * square, slope, error, clipped


@triton.jit
def token_divisor(AGGREGATION: tl.constexpr, length, norm_length):
    """What a token's term is divided by, before the number of items."""
    divisor = tl.full([], 1.0, tl.float32)
    if AGGREGATION == SEQ_MEAN_TOKEN_MEAN:
        divisor = tl.maximum(length, 1.0)
    elif AGGREGATION == SEQ_MEAN_TOKEN_SUM_NORM:
        divisor *= norm_length
    return divisor
