"""csrc/math/row_state.h as @triton.jit functions: row states, their merge, and what follows from them; the
rules of scalar.py hold."""

import triton
import triton.language as tl

from fastalign.ops.math.scalar import LN2, div, fma, is_finite


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
    """fl(umax c), while a row is swept. Far below zero, at mask values like -1e30, its rounding error alone
    overflows exp2: there it is -inf, and nothing has mass, unless the row turns out to be far
    (math/row_state.h)."""
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
