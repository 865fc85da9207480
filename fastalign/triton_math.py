"""The formulas of csrc/math as @triton.jit functions, once: scalar.h, row_state.h, pair.h, policy.h. Kernels stand in ops/*/triton.py.

Rules that hold for every function here. No libdevice: Triton's interpreter has none. What must be rounded once says `fma`, and kernels are compiled
without fusion of their own, so the interpreter, NVIDIA and AMD do the same arithmetic. Selections are tl.where and written so that NaN survives.
Kinds (transform, link, labels) are constexpr: a run uses one loss, so one small kernel per loss is compiled at first use, instead of one that
holds every formula and branches at run time. Numbers (beta, margins, weights) are run-time arguments and never cause a compilation.
"""

import triton
import triton.language as tl

from fastalign.ffi import TRITON_INTERPRETED

LN2 = tl.constexpr(0.69314718055994531)
LOG2E = tl.constexpr(1.4426950216293335)  # log2(e) in fp32
LOG2E_REST = tl.constexpr(1.9259629911266175e-8)  # and what fp32 left out
FINITE = tl.constexpr(3.4028234663852886e38)
INTERPRETED = tl.constexpr(TRITON_INTERPRETED)

# --- scalar.h ---------------------------------------------------------------------------------------------------------------------------


@triton.jit
def fma(x, y, z):
    if INTERPRETED:  # before Triton 3.9 the interpreter rounds twice; a product of two fp32 is exact in fp64
        return (tl.cast(x, tl.float64) * tl.cast(y, tl.float64) + tl.cast(z, tl.float64)).to(tl.float32)
    else:
        return tl.math.fma(x, y, z)


@triton.jit
def div(x, y):
    return tl.math.div_rn(x, y)  # `/` is 2 ulp on NVIDIA


@triton.jit
def relu(x):
    return tl.where(x > 0, x, tl.where(x != x, x, 0.0))


@triton.jit
def exp(x):
    # tl.exp rounds x log2(e) to fp32, an error that grows with |x|: put back what the product lost.
    t = x * LOG2E
    lost = fma(x, LOG2E, -t) + x * LOG2E_REST
    e = tl.exp2(t)
    return tl.where(tl.abs(t) < 126.0, fma(e, lost * LN2, e), e)


@triton.jit
def expm1(x):
    # The Taylor series where exp(x) - 1 would cancel; the ninth term is below half an ulp at 1/2.
    r = 1.0 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320)))))))
    return tl.where(tl.abs(x) < 0.5, x * r, exp(x) - 1.0)


@triton.jit
def log1p(x):
    # log(1 + x) = 2 atanh(x / (2 + x)) where adding 1 would lose digits of x. Beyond, the sum is exact or harmless.
    s = div(x, 2.0 + x)
    q = s * s
    r = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return tl.where(tl.abs(x) < 0.5, 2.0 * s * r, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    # A fitted odd polynomial (error below 3e-9) up to 0.6; beyond, 1 - 2 / (e^2x + 1), which does not cancel there. For every element of capped
    # logits, hence no more accurate than needed: an approximate exp2 and division.
    a = tl.abs(x)
    q = a * a
    p = q * (
        -0.33333298563957214
        + q * (0.13331924378871918 + q * (-0.053783826529979706 + q * (0.02079596184194088 + q * -0.005895147565752268)))
    )
    t = tl.where(a < 0.6, fma(a, p, a), 1.0 - 2.0 / (tl.exp2(a * 2.885390081777927) + 1.0))
    return tl.where(x < 0, -t, t)


@triton.jit
def softplus(x):
    return relu(x) + log1p(exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    e = exp(-tl.abs(x))
    return div(tl.where(x >= 0, 1.0, e), 1.0 + e)


@triton.jit
def log1mexp(x):
    return tl.where(x < -LN2, log1p(-exp(x)), tl.log(-expm1(x)))


@triton.jit
def is_finite(x):
    return tl.abs(x) <= FINITE


@triton.jit
def power(x, y):
    """x ** y for x > 0; exact for y = 0 and y = 1."""
    return tl.where(y == 0, 1.0, tl.where(y == 1, x, exp(y * tl.log(x))))


@triton.jit
def kl_estimate(KIND: tl.constexpr, logprob, ref_logprob):
    """Value and slope of k1, k2, k3, abs; see scalar.h."""
    d = tl.where(logprob == ref_logprob, 0.0, logprob - ref_logprob)
    if KIND == 0:
        value, slope = d, tl.zeros_like(d) + 1.0
    elif KIND == 1:
        value, slope = d * d * 0.5, d
    elif KIND == 3:
        value, slope = tl.abs(d), tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))
    else:
        series = d * d * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d * (1 / 720)))))
        m = expm1(tl.where(-d > 20.0, 20.0, -d))
        value, slope = tl.where(tl.abs(d) < 0.05, series, m + d), -m
    return value, slope


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 to the storage type, rounded to nearest even, once."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter's own conversion truncates
        u = x.to(tl.uint32, bitcast=True)
        u = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, u).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


# --- row_state.h ------------------------------------------------------------------------------------------------------------------------


@triton.jit
def rescale(old, new):
    return tl.where(old == new, 1.0, tl.exp2(old - new))


@triton.jit
def s1_shift(old, new, factor):
    return tl.where((old == new) | (factor == 0), 0.0, old - new)


@triton.jit
def merge(ma, a0, a1, a2, az, ua, ta, mb, b0, b1, b2, bz, ub, tb):
    m = tl.where(ma > mb, ma, mb)
    fa, fb = rescale(ma, m), rescale(mb, m)
    s0 = a0 * fa + b0 * fb
    s1 = (a1 + s1_shift(ma, m, fa) * a0) * fa + (b1 + s1_shift(mb, m, fb) * b0) * fb
    s2 = a2 * fa * fa + b2 * fb * fb
    take_b = (ub > ua) | ((ub == ua) & (tb >= 0) & ((ta < 0) | (tb < ta)))
    return m, s0, s1, s2, az + bz, tl.where(take_b, ub, ua), tl.where(take_b, tb, ta)


@triton.jit
def reference_point(umax, c):
    """fl(umax c). Far below zero, at mask values like -1e30, its rounding error alone overflows exp2: there it is -inf, and nothing has mass."""
    m = umax * c
    return tl.where(m < -1073741824.0, float("-inf"), m)


@triton.jit
def reference_distance(old, new):
    return tl.where(old == new, 0.0, old - new)


@triton.jit
def move_cross(cross, mass, shift, factor):
    return tl.where(factor == 0, 0.0, tl.where(mass == 0, cross, fma(shift, mass, cross)) * factor)


@triton.jit
def merge_ref(m, ma, a0, rma, ra0, at, atr, mb, b0, rmb, rb0, bt, btr):
    """The reference part of merge(PairState, PairState); m is the reference point of the merged policy row."""
    rm = tl.where(rma > rmb, rma, rmb)
    fa, da = rescale(rma, rm), reference_distance(ma, m) - reference_distance(rma, rm)
    fb, db = rescale(rmb, rm), reference_distance(mb, m) - reference_distance(rmb, rm)
    t = move_cross(at, a0, da, rescale(ma, m)) + move_cross(bt, b0, db, rescale(mb, m))
    return rm, ra0 * fa + rb0 * fb, t, move_cross(atr, ra0, da, fa) + move_cross(btr, rb0, db, fb)


@triton.jit
def row_logprob(m, s0, target_u, c):
    lp = fma(fma(target_u, c, -m), LN2, -tl.log(s0))
    return tl.where(lp > 0, 0.0, lp)


@triton.jit
def row_entropy(s0, s1):
    h = fma(div(s1, s0), -LN2, tl.log(s0))
    return tl.where(h < 0, 0.0, h)


@triton.jit
def row_log_sum_sq(s0, s2):
    v = tl.log(s2) - 2.0 * tl.log(s0)
    return tl.where(v > 0, 0.0, v)


@triton.jit
def row_kl_policy_ref(s0, r0, t):
    v = fma(div(t, s0), LN2, -tl.log(div(s0, r0)))
    return tl.where(v < 0, 0.0, v)


@triton.jit
def row_kl_ref_policy(s0, r0, tr):
    v = fma(div(tr, r0), -LN2, tl.log(div(s0, r0)))
    return tl.where(v < 0, 0.0, v)


@triton.jit
def has_kl_gradient(r0, t, g_kl_policy_ref, g_kl_ref_policy):
    """The part of `has_gradient` that concerns the KLs."""
    without = (g_kl_policy_ref == 0) & (g_kl_ref_policy == 0)
    return (without | (r0 > 0)) & ((g_kl_policy_ref == 0) | is_finite(t))


# --- packed sequences -------------------------------------------------------------------------------------------------------------------


@triton.jit
def sequence_bounds(cu_seqlens, i, tokens):
    """First and last + 1 token of sequence i, inside [0, tokens] whatever cu_seqlens holds (its values are not checked on the device)."""
    begin = tl.minimum(tl.maximum(tl.load(cu_seqlens + i), 0), tokens)
    return begin, tl.minimum(tl.maximum(tl.load(cu_seqlens + i + 1), begin), tokens)


# --- affine.h, moments.h ----------------------------------------------------------------------------------------------------------------


@triton.jit
def compose(inner_a, inner_b, outer_a, outer_b):
    """The map outer(inner(x)) of x -> a x + b; in the order of a forward scan, which has the inner one first."""
    return inner_a * outer_a, fma(outer_a, inner_b, outer_b)


@triton.jit
def gae_map(reward, value, gamma, lam):
    return gamma * lam, fma(lam, reward, (1.0 - lam) * value)


@triton.jit
def push_moments(x, counted, count, shift, total, square):
    """Adds x, where it is counted, to the sums of each lane."""
    shift = tl.where(counted & (count == 0), x, shift)
    d = tl.where(counted, x - shift, 0.0)
    return count + tl.where(counted, 1.0, 0.0), shift, total + d, square + d * d


@triton.jit
def lane_moments(count, shift, total, square):
    """Count, mean and m2 of each lane's sums."""
    mean = div(total, at_least_one(count))
    m2 = square - mean * total
    return count, shift + mean, tl.where(m2 < 0, 0.0, m2)


@triton.jit
def moved_m2(count, mean, m2, new_mean):
    return m2 + count * (mean - new_mean) * (mean - new_mean)


@triton.jit
def at_least_one(x):
    return tl.where(x > 0, x, 1.0)


# --- policy.h ---------------------------------------------------------------------------------------------------------------------------


@triton.jit
def clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def log_ratio(logprob, old_logprob):
    return tl.where(logprob == old_logprob, 0.0, logprob - old_logprob)


@triton.jit
def clamp_log_ratio(SURROGATE: tl.constexpr, x):
    return clamp(x, -18.420680743952367 if SURROGATE == 5 else -20.0, 20.0)


@triton.jit
def sequence_term(SURROGATE: tl.constexpr, lr, advantage, ratio_min, ratio_max):
    """What a sequence sums of a token."""
    if SURROGATE == 5:
        term = clamp(lr, -20.0, 20.0)
    elif SURROGATE == 4:
        term = tl.where(advantage > 0, tl.where(lr > ratio_max, ratio_max, lr), tl.where(lr < ratio_min, ratio_min, lr))
    else:
        term = lr
    return term


@triton.jit
def surrogate(
    SURROGATE: tl.constexpr, logprob, lr, log_rho, rho, a, ratio_min, ratio_max, dual_clip, tau_pos, tau_neg, k_pos, lam_pos, k_neg, lam_neg
):
    """Value and slope of a token's surrogate, and which bound holds: low, high, dual."""
    positive, negative, never = a > 0, a < 0, rho < -1.0
    low, high, dual = never, never, never
    if SURROGATE == 1:
        value, slope = -a * logprob, -a
    elif SURROGATE == 2:
        low, high = rho < ratio_min, rho > ratio_max
        w = clamp(rho, ratio_min, ratio_max)
        value, slope = -w * a * logprob, -w * a
    elif SURROGATE == 3:
        tau = tl.where(positive, tau_pos, tau_neg)
        x = tau * (rho - 1.0)
        s = sigmoid(x)
        value, slope = -a * div(4.0 + tl.zeros_like(tau), tau) * s, -4.0 * a * rho * s * sigmoid(-x)
    elif SURROGATE == 4:
        low, high = (lr < ratio_min) & (positive == never), (lr > ratio_max) & positive
        value, slope = -a * rho, tl.where(low | high, 0.0, -a * rho)
    elif SURROGATE == 5:
        k, lam = tl.where(negative, k_neg, k_pos), tl.where(negative, lam_neg, lam_pos)
        phi = exp(lam + k * log_rho - lam * rho)
        value, slope = -phi * a * logprob, -phi * a
    else:
        low, high, dual = negative & (rho < ratio_min), positive & (rho > ratio_max), negative & (rho > dual_clip)
        held = tl.where(dual, dual_clip, tl.where(high, ratio_max, tl.where(low, ratio_min, rho)))
        value, slope = -a * held, tl.where(low | high | dual, 0.0, -a * rho)
    return value, slope, low, high, dual


@triton.jit
def kl_term(KIND: tl.constexpr, logprob, ref_logprob):
    """Value and slope of the KL estimate; kind 4, k3+, has the slope of k2."""
    value, slope = kl_estimate(2 if KIND == 4 else KIND, logprob, ref_logprob)
    if KIND == 4:
        slope = log_ratio(logprob, ref_logprob)
    return value, slope


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
    if AGGREGATION == 1:
        divisor = tl.maximum(length, 1.0)
    elif AGGREGATION == 3:
        divisor *= norm_length
    return divisor


# --- pair.h -----------------------------------------------------------------------------------------------------------------------------


@triton.jit
def exp80(x):
    return exp(tl.where(x > 80.0, 80.0, x))


@triton.jit
def transform(KIND: tl.constexpr, a, alpha):
    """phi(a), phi'(a): identity, logsig, negexp, alpha, logodds."""
    if KIND == 1:
        value, slope = -softplus(-a), sigmoid(-a)
    elif KIND == 2:
        slope = exp80(-a)
        value = -slope
    elif KIND == 3:
        x = -alpha * a
        x = tl.where(x > 80.0, 80.0, x)
        value, slope = div(-expm1(x), alpha), exp(x)
    elif KIND == 4:
        held = a >= -1e-6
        x = tl.where(held, -1e-6, a)
        value, slope = x - log1mexp(x), tl.where(held, 0.0, div(-1.0, expm1(x)))
    else:
        value, slope = a, tl.zeros_like(a) + 1.0
    return value, slope


@triton.jit
def link(KIND: tl.constexpr, h, t, tau, prob):
    """f(h), f'(h): logistic, hinge, squared, exp, truncquad, savage, sigmoid, linear, exo, discopop."""
    if KIND == 1:
        value, slope = relu(t - h), tl.where(h < t, -1.0, h - h)
    elif KIND == 2:
        value, slope = (h - t) * (h - t), 2.0 * (h - t)
    elif KIND == 3:
        value = exp80(-h)
        slope = -value
    elif KIND == 4:
        r = relu(t - h)
        value, slope = r * r, -2.0 * r
    elif KIND == 5:
        s = sigmoid(-h)
        value, slope = s * s, -2.0 * sigmoid(h) * s * s
    elif KIND == 6:
        value = sigmoid(-h)
        slope = -sigmoid(h) * value
    elif KIND == 7:
        value, slope = -h, tl.zeros_like(h) - 1.0
    elif KIND == 8:
        s, n, log_p, log_n = sigmoid(h), sigmoid(-h), tl.log(prob), log1p(-prob)
        value = s * (-softplus(-h) - log_p) + n * (-softplus(h) - log_n)
        slope = s * n * (h - (log_p - log_n))
    elif KIND == 9:
        x = div(h, tau)
        s, n, soft = sigmoid(x), sigmoid(-x), softplus(-h)
        se, sne = exp80(-h - softplus(-x)), exp80(-h - softplus(-x) - softplus(x))
        value, slope = n * soft + se, -n * sigmoid(-h) - se + div(sne - s * n * soft, tau)
    else:
        value, slope = softplus(-h), -sigmoid(-h)
    return value, slope


@triton.jit
def weigh_labels(LINK: tl.constexpr, LABELS: tl.constexpr, LABEL_ENTROPY: tl.constexpr, h, target, tau, soft, label_smoothing):
    """The pair term c_pos f(h) + c_neg f(-h) and its slope; labels: hard, smooth, robust, soft. Exo takes the label as its target instead."""
    value, slope = link(LINK, h, target, tau, soft)
    if LABELS != 0 and LINK != 8:
        c_pos, c_neg = soft, 1.0 - soft
        if LABELS == 2:
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


@triton.jit
def evaluate_pair(
    ratio_w, length_w, kl_w, ratio_l, length_l, kl_l,               # sums of the two sides
    beta, omega, soft_label, gamma_ext, target, anchor,             # per pair
    length_norm, transform_alpha, beta_rejected, gamma, gamma_beta_ratio, len_coef, pos_penalty, kl_chosen, kl_rejected, tau, label_smoothing,
    pair_weight, point_beta, point_beta_power, point_target, chosen_pos, chosen_neg, rejected_pos, rejected_neg,
    TRANSFORM: tl.constexpr, LINK: tl.constexpr, LABELS: tl.constexpr, LABEL_ENTROPY: tl.constexpr, DETACH_KL_CHOSEN: tl.constexpr,
    POINT_LINK: tl.constexpr, POINT_SOFT_TARGET: tl.constexpr,
):  # fmt: skip
    """Loss of a pair, its slopes in (ratio_w, ratio_l, kl_w, kl_l), the two rewards and the logit; before the normalisers."""
    beta_l = tl.where(beta_rejected == beta_rejected, beta_rejected, beta)  # NaN: the same as beta
    norm_w, norm_l = power(tl.maximum(length_w, 1.0), length_norm), power(tl.maximum(length_l, 1.0), length_norm)
    a_w, a_l = div(ratio_w, norm_w), div(ratio_l, norm_l)
    g_w, dg_w = transform(TRANSFORM, a_w, transform_alpha)
    g_l, dg_l = transform(TRANSFORM, a_l, transform_alpha)

    # Options that are off must not touch infinite sums: selected, not multiplied by 0.
    with_kl = (kl_chosen != 0.0) | (kl_rejected != 0.0)
    margin = gamma + beta * gamma_beta_ratio + gamma_ext - len_coef * (length_w - length_l)
    margin += tl.where(pos_penalty != 0.0, beta * pos_penalty * relu(-a_w), 0.0)
    margin += tl.where(with_kl, beta * (kl_rejected * kl_l - kl_chosen * kl_w), 0.0)
    h = beta * g_w - beta_l * g_l - margin

    soft = soft_label if LABELS == 3 else tl.zeros_like(h) + (1.0 - label_smoothing)
    loss, dh = weigh_labels(LINK, LABELS, LABEL_ENTROPY, h, target, tau, soft, label_smoothing)
    loss, dh = tl.where(pair_weight != 0.0, loss * pair_weight, 0.0), tl.where(pair_weight != 0.0, dh * pair_weight, 0.0)
    slope_w, slope_l = dh * beta * dg_w, -dh * beta_l * dg_l
    slope_w += tl.where(pos_penalty != 0.0, tl.where(a_w < 0, dh * beta * pos_penalty, 0.0), 0.0)

    if POINT_LINK >= 0:
        beta_pt = tl.where(point_beta == point_beta, point_beta, beta)
        scale = power(beta_pt, point_beta_power)
        t_w = soft_label - 0.5 if POINT_SOFT_TARGET else point_target
        t_l = 0.5 - soft_label if POINT_SOFT_TARGET else point_target
        prob = tl.zeros_like(h) + (1.0 - label_smoothing)
        value_w, du_w = point_term(POINT_LINK, beta_pt * g_w - anchor, t_w, tau, prob, chosen_pos, chosen_neg)
        value_l, du_l = point_term(POINT_LINK, beta_pt * g_l - anchor, t_l, tau, prob, rejected_pos, rejected_neg)
        loss += scale * value_w + scale * value_l
        slope_w += scale * du_w * beta_pt * dg_w
        slope_l += scale * du_l * beta_pt * dg_l

    d_kl_w = tl.where(with_kl, omega * dh * beta * kl_chosen, 0.0)
    if DETACH_KL_CHOSEN:
        d_kl_w = tl.zeros_like(h)
    d_kl_l = tl.where(with_kl, -omega * dh * beta * kl_rejected, 0.0)
    reward_w, reward_l = beta * (a_w + tl.where(with_kl, kl_w, 0.0)), beta_l * (a_l + tl.where(with_kl, kl_l, 0.0))
    return omega * loss, div(omega * slope_w, norm_w), div(omega * slope_l, norm_l), d_kl_w, d_kl_l, reward_w, reward_l, h
