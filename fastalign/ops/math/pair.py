"""csrc/math/pair.h as @triton.jit functions; the rules of fastalign/ops/math/scalar.py hold."""

from typing import NamedTuple

import triton
import triton.language as tl

from fastalign.ops.math.columns import (
    ALPHA,
    DISCOPOP,
    EXO,
    EXP,
    HARD,
    HINGE,
    LINEAR,
    LOGODDS,
    LOGSIG,
    NEGEXP,
    NO_LINK,
    ROBUST,
    SAVAGE,
    SIGMOID,
    SOFT,
    SQUARED,
    TRUNCQUAD,
)
from fastalign.ops.math.scalar import div, exp, expm1, log1mexp, log1p, power, relu, sigmoid, softplus


@triton.jit
def exp80(x):
    return exp(tl.where(x > 80.0, 80.0, x))


@triton.jit
def transform(KIND: tl.constexpr, a, alpha):
    """phi(a), phi'(a): identity, logsig, negexp, alpha, logodds."""
    if KIND == LOGSIG:
        value, slope = -softplus(-a), sigmoid(-a)
    elif KIND == NEGEXP:
        slope = exp80(-a)
        value = -slope
    elif KIND == ALPHA:
        x = -alpha * a
        x = tl.where(x > 80.0, 80.0, x)
        value, slope = div(-expm1(x), alpha), exp(x)
    elif KIND == LOGODDS:
        held = a >= -1e-6
        x = tl.where(held, -1e-6, a)
        value, slope = x - log1mexp(x), tl.where(held, 0.0, div(-1.0, expm1(x)))
    else:
        value, slope = a, tl.zeros_like(a) + 1.0
    return value, slope


@triton.jit
def link(KIND: tl.constexpr, h, t, tau, prob):
    """f(h), f'(h): logistic, hinge, squared, exp, truncquad, savage, sigmoid, linear, exo, discopop."""
    if KIND == HINGE:
        value, slope = relu(t - h), tl.where(h < t, -1.0, tl.where(h == h, 0.0, h))
    elif KIND == SQUARED:
        value, slope = (h - t) * (h - t), 2.0 * (h - t)
    elif KIND == EXP:
        value = exp80(-h)
        slope = -value
    elif KIND == TRUNCQUAD:
        r = relu(t - h)
        value, slope = r * r, -2.0 * r
    elif KIND == SAVAGE:
        s = sigmoid(-h)
        value, slope = s * s, -2.0 * sigmoid(h) * s * s
    elif KIND == SIGMOID:
        value = sigmoid(-h)
        slope = -sigmoid(h) * value
    elif KIND == LINEAR:
        value, slope = -h, tl.zeros_like(h) - 1.0
    elif KIND == EXO:
        s, n, log_p, log_n = sigmoid(h), sigmoid(-h), tl.log(prob), log1p(-prob)
        value = s * (-softplus(-h) - log_p) + n * (-softplus(h) - log_n)
        slope = s * n * (h - (log_p - log_n))
    elif KIND == DISCOPOP:
        x = div(h, tau)
        s, n, soft = sigmoid(x), sigmoid(-x), softplus(-h)
        se, sne = exp80(-h - softplus(-x)), exp80(-h - softplus(-x) - softplus(x))
        value, slope = n * soft + se, -n * sigmoid(-h) - se + div(sne - s * n * soft, tau)
    else:
        value, slope = softplus(-h), -sigmoid(-h)
    return value, slope


@triton.jit
def weigh_labels(
    LINK: tl.constexpr,
    LABELS: tl.constexpr,
    LABEL_ENTROPY: tl.constexpr,
    h,
    target,
    tau,
    soft,
    label_smoothing,
):
    """The pair term c_pos f(h) + c_neg f(-h) and its slope; labels: hard, smooth, robust, soft. Exo takes the
    label as its target instead."""
    value, slope = link(LINK, h, target, tau, soft)
    if LABELS != HARD and LINK != EXO:
        c_pos, c_neg = soft, 1.0 - soft
        if LABELS == ROBUST:
            d = 1.0 - 2.0 * label_smoothing
            c_pos, c_neg = div(soft, d), div(-label_smoothing, d) + tl.zeros_like(soft)
        back, back_slope = link(LINK, -h, target, tau, soft)
        value = c_pos * value + tl.where(c_neg == 0, 0.0, c_neg * back)
        slope = c_pos * slope - tl.where(c_neg == 0, 0.0, c_neg * back_slope)
    if LABEL_ENTROPY:  # cross-entropy minus the label's own entropy: a KL divergence
        n = 1.0 - soft
        value += tl.where(soft > 0, soft * tl.log(soft), 0.0) + tl.where(n > 0, n * tl.log(n), 0.0)
    return value, slope


@triton.jit
def point_term(LINK: tl.constexpr, u, target, tau, prob, k_pos, k_neg):
    """k_pos psi(u) + k_neg psi(-u) and its slope in u."""
    up, up_slope = link(LINK, u, target, tau, prob)
    down, down_slope = link(LINK, -u, target, tau, prob)
    value = tl.where(k_pos == 0, 0.0, k_pos * up) + tl.where(k_neg == 0, 0.0, k_neg * down)
    slope = tl.where(k_pos == 0, 0.0, k_pos * up_slope) - tl.where(k_neg == 0, 0.0, k_neg * down_slope)
    return value, slope


class SideSums(NamedTuple):
    """What the formula reads of a side's sums."""

    ratio: tl.tensor
    length: tl.tensor
    kl: tl.tensor


class PairValues(NamedTuple):
    """A pair's own values, or the preset's."""

    beta: tl.tensor
    omega: tl.tensor
    soft_label: tl.tensor
    gamma_ext: tl.tensor
    target: tl.tensor
    anchor: tl.tensor


@triton.jit
def evaluate_pair(win, lose, x, p):
    """win, lose: SideSums of the chosen and the rejected response; x: PairValues; p: PairParams. Loss of a
    pair, its slopes in (win.ratio, lose.ratio, win.kl, lose.kl), the two rewards and the logit; before the
    normalisers."""
    beta_l = tl.where(p.beta_rejected == p.beta_rejected, p.beta_rejected, x.beta)  # NaN: the same as beta
    norm_w, norm_l = (
        power(tl.maximum(win.length, 1.0), p.length_norm),
        power(tl.maximum(lose.length, 1.0), p.length_norm),
    )
    a_w, a_l = div(win.ratio, norm_w), div(lose.ratio, norm_l)
    g_w, dg_w = transform(p.transform, a_w, p.transform_alpha)
    g_l, dg_l = transform(p.transform, a_l, p.transform_alpha)

    # Options that are off must not touch infinite sums: selected, not multiplied by 0.
    with_kl = (p.kl_chosen != 0.0) | (p.kl_rejected != 0.0)
    margin = p.gamma + x.beta * p.gamma_beta_ratio + x.gamma_ext - p.len_coef * (win.length - lose.length)
    margin += tl.where(p.pos_penalty != 0.0, x.beta * p.pos_penalty * relu(-a_w), 0.0)
    margin += tl.where(with_kl, x.beta * (p.kl_rejected * lose.kl - p.kl_chosen * win.kl), 0.0)
    h = x.beta * g_w - beta_l * g_l - margin

    soft = x.soft_label if p.labels == SOFT else tl.zeros_like(h) + (1.0 - p.label_smoothing)
    loss, dh = weigh_labels(p.link, p.labels, p.label_entropy, h, x.target, p.tau, soft, p.label_smoothing)
    loss, dh = (
        tl.where(p.pair_weight != 0.0, loss * p.pair_weight, 0.0),
        tl.where(p.pair_weight != 0.0, dh * p.pair_weight, 0.0),
    )
    slope_w, slope_l = dh * x.beta * dg_w, -dh * beta_l * dg_l
    slope_w += tl.where(p.pos_penalty != 0.0, tl.where(a_w < 0, dh * x.beta * p.pos_penalty, 0.0), 0.0)

    if p.point_link != NO_LINK:
        beta_pt = tl.where(p.point_beta == p.point_beta, p.point_beta, x.beta)
        scale = power(beta_pt, p.point_beta_power)
        t_w = x.soft_label - 0.5 if p.point_soft_target else p.point_target
        t_l = 0.5 - x.soft_label if p.point_soft_target else p.point_target
        prob = tl.zeros_like(h) + (1.0 - p.label_smoothing)
        value_w, du_w = point_term(
            p.point_link, beta_pt * g_w - x.anchor, t_w, p.tau, prob, p.chosen_pos, p.chosen_neg
        )
        value_l, du_l = point_term(
            p.point_link, beta_pt * g_l - x.anchor, t_l, p.tau, prob, p.rejected_pos, p.rejected_neg
        )
        loss += scale * value_w + scale * value_l
        slope_w += scale * du_w * beta_pt * dg_w
        slope_l += scale * du_l * beta_pt * dg_l

    d_kl_w = tl.where(with_kl, x.omega * dh * x.beta * p.kl_chosen, 0.0)
    if p.detach_kl_chosen:
        d_kl_w = tl.zeros_like(h)
    d_kl_l = tl.where(with_kl, -x.omega * dh * x.beta * p.kl_rejected, 0.0)
    reward_w = x.beta * (a_w + tl.where(with_kl, win.kl, 0.0))
    reward_l = beta_l * (a_l + tl.where(with_kl, lose.kl, 0.0))
    slope_w, slope_l = div(x.omega * slope_w, norm_w), div(x.omega * slope_l, norm_l)
    return x.omega * loss, slope_w, slope_l, d_kl_w, d_kl_l, reward_w, reward_l, h
