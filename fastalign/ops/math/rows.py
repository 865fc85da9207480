"""csrc/math/row_state.h as @triton.jit functions: row states, their merge, and what follows from them; the
rules of scalar.py hold."""

from typing import NamedTuple

import triton
import triton.language as tl

from fastalign.ops.math.columns import (
    COL_LARGEST,
    COL_M,
    COL_REF_M,
    COL_REF_S0,
    COL_REF_UMAX,
    COL_S0,
    COL_S1,
    COL_S2,
    COL_SZ,
    COL_T,
    COL_TOP,
    COL_TR,
    COL_UMAX,
    COL_VALID,
)
from fastalign.ops.math.scalar import LN2, div, fma, is_finite


class RowState(NamedTuple):
    """Of a row or a part of one; the columns of the same names."""

    m: tl.tensor
    s0: tl.tensor
    s1: tl.tensor
    s2: tl.tensor
    sz: tl.tensor
    umax: tl.tensor
    top: tl.tensor
    largest: tl.tensor


class RefState(NamedTuple):
    """Of the reference row beside it, with the cross sums t and tr."""

    m: tl.tensor
    s0: tl.tensor
    t: tl.tensor
    tr: tl.tensor
    umax: tl.tensor


@triton.jit
def load_state(p):
    """A row's state, which begins at p."""
    return RowState(
        tl.load(p + COL_M), tl.load(p + COL_S0), tl.load(p + COL_S1), tl.load(p + COL_S2),
        tl.load(p + COL_SZ), tl.load(p + COL_UMAX), tl.load(p + COL_TOP).to(tl.int32),
        tl.load(p + COL_LARGEST),
    )  # fmt: skip


@triton.jit
def load_ref_state(p):
    """The reference part of it."""
    return RefState(
        tl.load(p + COL_REF_M),
        tl.load(p + COL_REF_S0),
        tl.load(p + COL_T),
        tl.load(p + COL_TR),
        tl.load(p + COL_REF_UMAX),
    )


@triton.jit
def store_state(s, valid, p):
    tl.store(p + COL_M, s.m)
    tl.store(p + COL_S0, s.s0)
    tl.store(p + COL_S1, s.s1)
    tl.store(p + COL_S2, s.s2)
    tl.store(p + COL_SZ, s.sz)
    tl.store(p + COL_UMAX, s.umax)
    tl.store(p + COL_TOP, s.top * 1.0)
    tl.store(p + COL_LARGEST, s.largest)
    tl.store(p + COL_VALID, valid * 1.0)


@triton.jit
def store_ref_state(r, p):
    tl.store(p + COL_REF_M, r.m)
    tl.store(p + COL_REF_S0, r.s0)
    tl.store(p + COL_T, r.t)
    tl.store(p + COL_TR, r.tr)
    tl.store(p + COL_REF_UMAX, r.umax)


@triton.jit
def spoiled(s, bad):
    """A state whose row has a label that is neither ignored nor in the vocabulary: NaN."""
    return RowState(s.m, tl.where(bad != 0, float("nan"), s.s0), s.s1, s.s2, s.sz, s.umax, s.top, s.largest)


@triton.jit
def spoiled_ref(r, bad):
    return RefState(r.m, tl.where(bad != 0, float("nan"), r.s0), r.t, r.tr, r.umax)


@triton.jit
def rescale(old, new):
    return tl.where(old == new, 1.0, tl.exp2(old - new))


@triton.jit
def s1_shift(old, new, factor):
    return tl.where((old == new) | (factor == 0), 0.0, old - new)


@triton.jit
def merge(a, b):
    m = tl.where(a.m > b.m, a.m, b.m)
    fa, fb = rescale(a.m, m), rescale(b.m, m)
    s0 = a.s0 * fa + b.s0 * fb
    s1 = (a.s1 + s1_shift(a.m, m, fa) * a.s0) * fa + (b.s1 + s1_shift(b.m, m, fb) * b.s0) * fb
    s2 = a.s2 * fa * fa + b.s2 * fb * fb
    umax = tl.where(b.umax > a.umax, b.umax, a.umax)
    # Of finished states: umax will not do, as large logits are equal after tanh.
    take_b = (b.largest > a.largest) | (
        (b.largest == a.largest) & (b.top >= 0) & ((a.top < 0) | (b.top < a.top))
    )
    top, largest = tl.where(take_b, b.top, a.top), tl.where(take_b, b.largest, a.largest)
    return RowState(m, s0, s1, s2, a.sz + b.sz, umax, top, largest)


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
def merge_ref(m, a, ra, b, rb):
    """The reference part of merge(PairState, PairState) of a, ra and b, rb; m is the reference point of the
    merged policy row."""
    rm = tl.where(ra.m > rb.m, ra.m, rb.m)
    fa, da = rescale(ra.m, rm), reference_distance(a.m, m) - reference_distance(ra.m, rm)
    fb, db = rescale(rb.m, rm), reference_distance(b.m, m) - reference_distance(rb.m, rm)
    t = move_cross(ra.t, a.s0, da, rescale(a.m, m)) + move_cross(rb.t, b.s0, db, rescale(b.m, m))
    tr = move_cross(ra.tr, ra.s0, da, fa) + move_cross(rb.tr, rb.s0, db, fb)
    return RefState(rm, ra.s0 * fa + rb.s0 * fb, t, tr, tl.where(rm == ra.m, ra.umax, rb.umax))


@triton.jit
def _set_apart(ma, ua, mb, ub):
    far = is_finite(ua) & is_finite(ub) & (ua != 0) & (ub != 0)
    far = far & ((tl.abs(ma) < 1073741824.0) == 0) & ((tl.abs(mb) < 1073741824.0) == 0)
    peak = tl.where(ua > ub, ua, ub)
    below_a = tl.where(ua == peak, 0.0, (0.5 * ua - 0.5 * peak) * div(ma, ua) * 2.0)
    below_b = tl.where(ub == peak, 0.0, (0.5 * ub - 0.5 * peak) * div(mb, ub) * 2.0)
    return tl.where(far, below_a, ma), tl.where(far, below_b, mb)


@triton.jit
def _at(s, m):
    return RowState(m, s.s0, s.s1, s.s2, s.sz, s.umax, s.top, s.largest)


@triton.jit
def _ref_at(r, m):
    return RefState(m, r.s0, r.t, r.tr, r.umax)


@triton.jit
def merge_stored(a, b):
    ma, mb = _set_apart(a.m, a.umax, b.m, b.umax)
    return _at(merge(_at(a, ma), _at(b, mb)), tl.where(a.m > b.m, a.m, b.m))


@triton.jit
def merge_stored_ref(a, ra, b, rb):
    """The reference part of merge_stored(PairState, PairState)."""
    ma, mb = _set_apart(a.m, a.umax, b.m, b.umax)
    rma, rmb = _set_apart(ra.m, ra.umax, rb.m, rb.umax)
    r = merge_ref(tl.where(ma > mb, ma, mb), _at(a, ma), _ref_at(ra, rma), _at(b, mb), _ref_at(rb, rmb))
    umax = tl.where(
        (rma == rmb) & (r.umax == 0), rb.umax, r.umax
    )  # m is -inf of a far row's and an empty one's
    return RefState(tl.where(ra.m > rb.m, ra.m, rb.m), r.s0, r.t, r.tr, umax)


@triton.jit
def found_target(before, here):
    return tl.where(here == float("-inf"), before, here)


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
    lp = tl.where(
        tl.exp2(d) == s0, 0.0, fma(d, LN2, -tl.log(s0))
    )  # exactly 0 where the label has all the mass
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
