"""The formulas of csrc/math/list.h as @triton.jit functions; the rules of fastalign/ops/math/scalar.py hold
here too. A list lies in one block of `s`, `r`, `live`, [K] each with K = MAX_LIST; pairs of responses are [K,
K] with i along the first axis."""

import triton
import triton.language as tl

from fastalign.ops.math.columns import GAIN_LAMBDA, INFONCA, NCA, PAIRWISE, PLACKETT_LUCE, PRO
from fastalign.ops.math.pair import link
from fastalign.ops.math.scalar import div, exp, is_finite, log1p, sigmoid, softplus


@triton.jit
def logsumexp(x, where):
    """Over the last axis, of the entries in `where`; 0 where there is none."""
    axis: tl.constexpr = len(x.shape) - 1
    inside = tl.where(where, x, float("-inf"))
    m = tl.max(inside, axis)
    some = tl.max(where.to(tl.int32), axis) > 0
    # NaN is lost in tl.max, and comes back through exp.
    e = exp(inside - (tl.expand_dims(m, axis) if axis == 1 else m))
    return tl.where(some, m + tl.log(tl.sum(tl.where(where, e, 0.0), axis)), 0.0)


@triton.jit
def evaluate_list(
    KIND: tl.constexpr, LINK: tl.constexpr, GAIN: tl.constexpr, s, r, live, target, temperature
):
    """The responses' shares of the term [K] and d term / d s [K], before list_weight and the division of
    pair_mean; and for the metrics the number of pairs of each response with the ones of a lower score, how
    many of them are right, and their differences of s."""
    k = tl.arange(0, s.shape[0])
    s_i, s_j, r_i, r_j = s[:, None], s[None, :], r[:, None], r[None, :]
    both = live[:, None] & live[None, :]
    above = both & (r_i > r_j)
    pairs, correct = (
        tl.sum(above.to(tl.int32), 1).to(tl.float32),
        tl.sum((above & (s_i > s_j)).to(tl.int32), 1).to(tl.float32),
    )
    margin = tl.sum(tl.where(above, s_i - s_j, 0.0), 1)
    if KIND == PAIRWISE:
        value, slope = link(LINK, s_i - s_j, target, 1.0, tl.zeros_like(s_i - s_j) + 0.5)
        if GAIN == GAIN_LAMBDA:
            rank = 1 + tl.sum(
                (both & ((s_j > s_i) | ((s_j == s_i) & (k[None, :] < k[:, None])))).to(tl.int32), 1
            )
            discount = div(1.0, log1p(rank.to(tl.float32)))
            label = tl.exp2(r)
            gain = tl.abs(label[:, None] - label[None, :]) * tl.abs(discount[:, None] - discount[None, :])
            value, slope = gain * value, gain * slope
        slope = tl.where(above, slope, 0.0)
        values, slopes = tl.sum(tl.where(above, value, 0.0), 1), tl.sum(slope, 1) - tl.sum(slope, 0)
    elif KIND == PLACKETT_LUCE:
        in_order = above | (both & (r_i == r_j) & (k[:, None] <= k[None, :]))
        tail = logsumexp(s_j + tl.zeros_like(s_i), in_order)
        share = exp(tl.where(in_order, s_j - tail[:, None], float("-inf")))
        values, slopes = tail - s, tl.sum(share, 0) - 1.0
    elif KIND == PRO:
        own = r - tl.min(tl.where(live, r, float("inf")), 0)
        has_term = live & (own > 0)
        diagonal = k[:, None] == k[None, :]
        factor = tl.where(diagonal, own[:, None], r_i - r_j)
        member = has_term[:, None] & (above | diagonal)
        z = tl.where(member, s_j * factor, 0.0)
        lse = logsumexp(z, member)
        share = exp(tl.where(member, z - lse[:, None], float("-inf")))
        own = tl.where(has_term, own, 0.0)
        values = tl.where(has_term, lse - s * own, 0.0)
        slopes = tl.sum(tl.where(member, share * factor, 0.0), 0) - own
    else:
        scaled = div(r, temperature)
        log_p = scaled - logsumexp(scaled, live)
        prob = exp(log_p)
        if KIND == NCA:
            count = tl.sum(live.to(tl.int32), 0).to(tl.float32)
            values = tl.where(prob > 0, prob * softplus(-s), 0.0) + div(softplus(s), count)
            slopes = div(sigmoid(s), count) - prob * sigmoid(-s)
        else:
            log_q = s - logsumexp(s, live)
            q = exp(log_q)
            if KIND == INFONCA:
                values, slopes = tl.where(prob == 0, 0.0, -prob * log_q), q - prob
            else:  # exo
                gap = tl.where(q == 0, 0.0, log_q - log_p)
                values = q * gap
                slopes = q * (gap - tl.sum(tl.where(live, values, 0.0), 0))
    return tl.where(live, values, 0.0), tl.where(live, slopes, 0.0), pairs, correct, margin


@triton.jit
def all_finite(x, where):
    return tl.min(is_finite(tl.where(where, x, 0.0)).to(tl.int32), 0) > 0
