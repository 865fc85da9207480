"""The formulas of csrc/math as @triton.jit functions, once: here scalar.h, row_state.h, affine.h and moments.h; pair.h, list.h and policy.h in
triton_math_pair.py, triton_math_list.py and triton_math_policy.py. Kernels stand in ops/*/triton.py.

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
SUM_SHARE, SUM_SHRINKS_BY = tl.constexpr(2.0**-24), tl.constexpr(2.0**24)  # of the sum of a row's logits
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
def times_slope(gradient, slope):
    """gradient * slope; a slope of exactly 0 passes nothing on, not even an infinite gradient."""
    return tl.where(slope == 0, 0.0, gradient * slope)


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
        x = tl.where(-d > 20.0, 20.0, -d)
        m = expm1(x)
        value, slope = tl.where(tl.abs(d) < 0.05, series, m - x), -m
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
    """fl(umax c), while a row is swept. Far below zero, at mask values like -1e30, its rounding error alone overflows exp2: there it is -inf, and
    nothing has mass, unless the row turns out to be far (math/row_state.h)."""
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
def is_far(umax, c):
    return is_finite(umax) & ((tl.abs(umax * c) < 1073741824.0) == 0)


@triton.jit
def far_bits(u, umax, c):
    """(u - umax) c: halves first, so that no finite u overflows before it must."""
    return (0.5 * u - 0.5 * umax) * c * 2.0


@triton.jit
def row_bits(u, m, umax, c):
    """Exponents of a finished row; of one without mass counted from 0."""
    return tl.where(is_far(umax, c), far_bits(u, umax, c), fma(u, c, tl.where(m == float("-inf"), 0.0, -m)))


@triton.jit
def row_logprob(m, s0, umax, target_u, c):
    d = fma(target_u, c, -m)
    lp = tl.where(tl.exp2(d) == s0, 0.0, fma(d, LN2, -tl.log(s0)))  # exactly 0 where the label has all the mass
    lp = tl.where(is_far(umax, c), (0.5 * target_u - 0.5 * umax) * (c * LN2) * 2.0 - tl.log(s0), lp)
    return tl.where(lp > 0, 0.0, lp)


@triton.jit
def is_peaked(m, s0, umax, c):
    """Whether the largest element has all the mass, to rounding."""
    return s0 == tl.exp2(row_bits(umax, m, umax, c))


@triton.jit
def is_one_hot(m, s0, s1, umax, c):
    """Whether it has, and every other one has none at all."""
    d = row_bits(umax, m, umax, c)
    return (s0 == tl.exp2(d)) & (s1 == tl.exp2(d) * d)


@triton.jit
def row_entropy(m, s0, s1, umax, c):
    h = fma(div(s1, s0), -LN2, tl.log(s0))
    return tl.where((h < 0) | is_one_hot(m, s0, s1, umax, c), 0.0, h)


@triton.jit
def row_logsumexp(m, s0, umax, c):
    return tl.where(is_far(umax, c), fma(umax, c * LN2, tl.log(s0)), fma(m, LN2, tl.log(s0)))


@triton.jit
def row_log_sum_sq(s0, s2):
    v = tl.log(s2) - 2.0 * tl.log(s0)
    return tl.where(v > 0, 0.0, v)


@triton.jit
def clamp_kl(v, log_ratio, peaked):
    return tl.where((v < 0) | (peaked & (v < 2.384185791015625e-7 * (1.0 + tl.abs(log_ratio)))), 0.0, v)


@triton.jit
def row_kl_policy_ref(s0, r0, t, peaked):
    log_ratio = tl.log(div(s0, r0))
    return clamp_kl(fma(div(t, s0), LN2, -log_ratio), log_ratio, peaked)


@triton.jit
def row_kl_ref_policy(s0, r0, tr, peaked):
    log_ratio = tl.log(div(s0, r0))
    return clamp_kl(fma(div(tr, r0), -LN2, log_ratio), log_ratio, peaked)


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


@triton.jit
def sequence_share(cu_seqlens, i, sequences, tokens):
    """The tokens that sequence i has to write, first and last + 1: its own, and those that boundaries which have changed would leave to nobody."""
    begin, end = sequence_bounds(cu_seqlens, i, tokens)
    return tl.where(i == 0, 0, begin), tl.where(i == sequences - 1, tokens, end)


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
def moved_m2(count, mean, m2, new_mean):
    return m2 + count * (mean - new_mean) * (mean - new_mean)


@triton.jit
def merge_lanes(count, shift, total, square):
    """Count, mean and m2 of all lanes' sums, in fp64: the lanes' means may lie far from 0 against their deviations."""
    count, total = count.to(tl.float64), total.to(tl.float64)
    mean = total / tl.where(count > 0, count, 1.0)
    m2 = square.to(tl.float64) - mean * total
    mean += shift.to(tl.float64)
    n = tl.sum(count, 0)
    center = tl.sum(count * mean, 0) / tl.where(n > 0, n, 1.0)
    return n, center, tl.sum(moved_m2(count, mean, tl.where(m2 < 0, 0.0, m2), center), 0)


@triton.jit
def merge_parts(counts, count_stride, means, m2s, stride, parts, BLOCK: tl.constexpr):
    """Count, mean and m2 of all parts, in index order, in fp64. Part i's numbers lie at counts + i count_stride, means + i stride, m2s + i stride."""
    lane = tl.arange(0, BLOCK)
    n, weighted, squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, parts, BLOCK):
        i, inside = start + lane, start + lane < parts
        count = tl.load(counts + i * count_stride, mask=inside, other=0.0).to(tl.float64)
        n += count
        weighted += count * tl.load(means + i * stride, mask=inside, other=0.0)
    all_count = tl.sum(n, 0)
    center = tl.sum(weighted, 0) / tl.where(all_count > 0, all_count, 1.0)
    for start in range(0, parts, BLOCK):
        i, inside = start + lane, start + lane < parts
        count = tl.load(counts + i * count_stride, mask=inside, other=0.0).to(tl.float64)
        mean, m2 = tl.load(means + i * stride, mask=inside, other=0.0), tl.load(m2s + i * stride, mask=inside, other=0.0)
        squares += moved_m2(count, mean, m2, center)
    return all_count, center, tl.sum(squares, 0)


@triton.jit
def at_least_one(x):
    return tl.where(x > 0, x, 1.0)
