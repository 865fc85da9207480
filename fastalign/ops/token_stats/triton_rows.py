"""What the kernels over vocabulary rows share: how a row is addressed, scaled and labelled, and what is
written of it in the end."""

import triton
import triton.language as tl

from fastalign.ops.math.columns import (
    COL_M,
    COL_S0,
    COL_S1,
    COL_S2,
    COL_SZ,
    COL_TOP,
    COL_UMAX,
    COL_VALID,
    OUT_ENTROPY,
    OUT_IS_TOP1,
    OUT_LOG_SUM_SQ,
    OUT_LOGSUMEXP,
    OUT_MEAN_LOGIT,
    STATE_WIDTH,
)
from fastalign.ops.math.rows import is_far, row_entropy, row_log_sum_sq, row_logprob, row_logsumexp
from fastalign.ops.math.scalar import LN2, SUM_SHRINKS_BY, div, tanh
from fastalign.ops.token_stats.contract import OUTPUT_BITS

THREADS = 128
FWD_REGISTERS, PAIR_FWD_REGISTERS = 168, 168  # at least three programs per multiprocessor; see ffi.launch_options
PAIR_EVERYTHING_REGISTERS = 232  # two: with a softcap and every output, a row is alive both raw and capped
BWD_REGISTERS, PAIR_BWD_REGISTERS = 72, 80  # seven and six; six too for the entropy under a softcap
LABELS = tl.constexpr(32)  # labels of a row that are handled at once
# Which sums a row keeps: as few kernels as serve the usual losses, those with an entropy term, and everything.
ENTROPY, EVERYTHING = tl.constexpr(1), tl.constexpr(2)
EVERYTHING_BITS = sum(OUTPUT_BITS[name] for name in ("log_sum_sq_probs", "mean_logit", "is_top1"))


@triton.jit
def row_offset(row, base, inner, stride_outer, stride_inner):
    return base + row // inner * stride_outer + row % inner * stride_inner


@triton.jit
def row_scored(row, labels, mask, targets, ignore_index, vocab_total):
    """Whether the row counts, and whether one of its labels is neither ignored nor in the vocabulary; both
    int32."""
    scored, bad = 1, 0
    if mask is not None:
        scored = tl.load(mask + row).to(tl.int32)
    if labels is not None:
        some = 0
        for first in range(0, targets, LABELS):
            k = first + tl.arange(0, LABELS)
            y = tl.load(labels + row * targets + k, mask=k < targets, other=ignore_index)
            counts = y != ignore_index
            some = tl.maximum(some, tl.max(counts.to(tl.int32), 0))
            bad = tl.maximum(bad, tl.max((counts & ((y < 0) | (y >= vocab_total))).to(tl.int32), 0))
        scored = scored * some
    return scored, bad


@triton.jit
def capped(x, cap_scale, CAPPED: tl.constexpr):
    u = x.to(tl.float32)
    if CAPPED:
        u = tanh(u * cap_scale)
    return u


@triton.jit
def bits_per_unit(factor, temperature, temperature_ptr):
    t = temperature
    if temperature_ptr is not None:
        t = tl.load(temperature_ptr)
    return div(factor, t)


@triton.jit
def element(q, column, shift, SPAN: tl.constexpr):
    """The element of the row that a place of a tile holds. Not kept over the loop: registers are what limits
    the programs in flight."""
    return q - shift + tl.where(column < shift, SPAN, 0)


@triton.jit
def first_place(top, best, x, q, column, shift, vocab, SPAN: tl.constexpr):
    """Index and value of the row's first maximum, after one more tile. Of the raw logits: large ones are
    equal after tanh."""
    x = tl.where(element(q, column, shift, SPAN) < vocab, x.to(tl.float32), float("-inf"))
    largest = tl.max(tl.max(x, 0), 0)
    if (largest > best) | (top < 0):  # the first of a row of -inf is a maximum, too
        top = tl.min(tl.min(tl.where(x == largest, element(q, column, shift, SPAN), vocab), 0), 0)
    return top, tl.maximum(best, largest)


@triton.jit
def fold(x, SPAN: tl.constexpr):
    """Sum of a vector by halves, top half onto bottom half: rotating the vector changes no pair at any level."""
    for level in tl.static_range(1, 16):
        if SPAN >> level > 0:
            x = tl.sum(tl.reshape(x, (2, SPAN >> level)), 0)
    return tl.sum(x, 0)


@triton.jit
def row_coefficients(row, state, s0, c, labels, g_logprob, g_entropy, g_logsumexp, targets, ignore_index):
    """A and B of the coefficient contract in math/row_state.h from the upstream gradients, for p = e / s0 and
    log p = ln2 d - log s0: A still to be divided by s0, B for the factors e and d. And whether any of the
    upstream is not 0."""
    a, b, upstream = 0.0, 0.0, 0
    if g_logsumexp is not None:
        a = tl.load(g_logsumexp + row)
        upstream = (a != 0).to(tl.int32)
    if g_logprob is not None:
        for first_label in range(0, targets, LABELS):
            k = first_label + tl.arange(0, LABELS)
            counts = (k < targets) & (tl.load(labels + row * targets + k, mask=k < targets, other=ignore_index) != ignore_index)
            g = tl.load(g_logprob + row * targets + k, mask=counts, other=0.0)
            a -= tl.sum(g, 0)
            upstream = tl.maximum(upstream, tl.max((g != 0).to(tl.int32), 0))
    if g_entropy is not None:
        g_h = tl.load(g_entropy + row)
        upstream = tl.maximum(upstream, (g_h != 0).to(tl.int32))
        p = state + row * STATE_WIDTH
        m, s1, umax = tl.load(p + COL_M), tl.load(p + COL_S1), tl.load(p + COL_UMAX)
        a += tl.where(g_h == 0, 0.0, g_h * (tl.log(s0) - row_entropy(m, s0, s1, umax, c)))
        b = div(-g_h * LN2, s0)
    return a, b, upstream


@triton.jit
def gradient_origin(m, umax, c):
    """(base, m) of a row's exponents fma(u - base, c, -m): of a far row they count from max u, of the others
    from m."""
    far = is_far(umax, c)
    return tl.where(far, umax, 0.0), tl.where(far, 0.0, m)


@triton.jit
def add_labels(dx, u, q, q_begin, q_end, row, labels, g_logprob, targets, ignore_index, label_shift, c):
    """dx + [is a label] g c ln2, for the elements at q, all in [q_begin, q_end). An element at -inf gets
    nothing."""
    if g_logprob is not None:
        for k in range(targets):
            y = tl.load(labels + row * targets + k)
            at = y + label_shift
            if (y != ignore_index) & (at >= q_begin) & (at < q_end):
                g = tl.load(g_logprob + row * targets + k) * (c * LN2)
                dx += tl.where((q == at) & (u != float("-inf")), g, 0.0)
    return dx


# What differs from call to call compiles nothing anew: neither sizes nor the alignment of the small tensors.
SIZES = ["base", "inner", "stride_outer", "stride_inner", "ref_base", "ref_inner", "ref_stride_outer", "ref_stride_inner", "grad_base", "vocab",
         "pieces", "targets", "ignore_index", "vocab_start", "vocab_total"]  # fmt: skip
SMALL = ["labels", "mask", "temperature_ptr", "state_in", "target_in", "state", "g_logprob", "g_entropy", "g_logsumexp", "g_kl_policy_ref",
         "g_kl_ref_policy", "scale"]  # fmt: skip


@triton.jit
def finish_row(row, scored, m, s0, s1, s2, sz, umax, top, c, vocab_total, labels, entropy, logsumexp, log_sum_sq, mean_logit, is_top1, state,
               OUTPUTS: tl.constexpr):  # fmt: skip
    """Writes the policy row's state and what is finished from it, the log-probs excepted."""
    p = state + row * STATE_WIDTH
    tl.store(p + COL_M, m)
    tl.store(p + COL_S0, s0)
    tl.store(p + COL_S1, s1)
    tl.store(p + COL_S2, s2)
    tl.store(p + COL_SZ, sz)
    tl.store(p + COL_UMAX, umax)
    tl.store(p + COL_TOP, top * 1.0)
    tl.store(p + COL_VALID, scored * 1.0)
    if OUT_ENTROPY & OUTPUTS:
        tl.store(entropy + row, tl.where(scored != 0, row_entropy(m, s0, s1, umax, c), 0.0))
    if OUT_LOGSUMEXP & OUTPUTS:
        tl.store(logsumexp + row, tl.where(scored != 0, row_logsumexp(m, s0, umax, c), 0.0))
    if OUT_LOG_SUM_SQ & OUTPUTS:
        tl.store(log_sum_sq + row, tl.where(scored != 0, row_log_sum_sq(s0, s2), 0.0))
    if OUT_MEAN_LOGIT & OUTPUTS:
        tl.store(mean_logit + row, tl.where(scored != 0, div(sz, vocab_total.to(tl.float32)) * SUM_SHRINKS_BY * (c * LN2), 0.0))
    if OUT_IS_TOP1 & OUTPUTS:
        hit = tl.where(s0 != s0, s0, (top == tl.load(labels + row)).to(tl.float32))
        tl.store(is_top1 + row, tl.where(scored != 0, hit, 0.0))


@triton.jit
def finish_labels(row, scored, m, s0, umax, c, logits, offset, labels, target_in, target, logprob, vocab, targets, ignore_index, vocab_start,
                  cap_scale, WANTED: tl.constexpr, CAPPED: tl.constexpr):  # fmt: skip
    """Writes u of every label of a row and, if WANTED, its log-prob under the row's m and s0."""
    for first in range(0, targets, LABELS):
        k = first + tl.arange(0, LABELS)
        y = tl.where(scored != 0, tl.load(labels + row * targets + k, mask=k < targets, other=ignore_index), ignore_index)
        counts = y != ignore_index
        here = counts & (y >= vocab_start) & (y < vocab_start + vocab)
        u = capped(tl.load(logits + offset + (y - vocab_start), mask=here, other=0.0), cap_scale, CAPPED)
        u = tl.where(here, u, float("-inf"))
        if target_in is not None:
            u = tl.maximum(u, tl.load(target_in + row * targets + k, mask=k < targets, other=float("-inf")))
        tl.store(target + row * targets + k, u, mask=k < targets)
        if WANTED:
            tl.store(logprob + row * targets + k, tl.where(counts, row_logprob(m, s0, umax, u, c), 0.0), mask=k < targets)
