"""What the kernels over vocabulary rows share: how a row is addressed, scaled and labelled, and what is
written of it in the end."""

from functools import lru_cache
from typing import NamedTuple

import triton
import triton.language as tl

from fastalign.ops.math.columns import (
    COL_M,
    COL_S1,
    COL_UMAX,
    OUT_ENTROPY,
    OUT_IS_TOP1,
    OUT_KL_POLICY_REF,
    OUT_KL_REF_POLICY,
    OUT_LOG_SUM_SQ,
    OUT_LOGSUMEXP,
    OUT_MEAN_LOGIT,
    STATE_WIDTH,
)
from fastalign.ops.math.rows import (
    found_target,
    is_far,
    is_peaked,
    row_entropy,
    row_kl_policy_ref,
    row_kl_ref_policy,
    row_log_sum_sq,
    row_logprob,
    row_logsumexp,
)
from fastalign.ops.math.scalar import LN2, SUM_SHRINKS_BY, div, tanh
from fastalign.ops.token_stats.contract import OUTPUT_BITS

THREADS = 128
FWD_REGISTERS, PAIR_FWD_REGISTERS = (
    168,
    168,
)  # at least three programs per multiprocessor; see ffi.launch_options
PAIR_EVERYTHING_REGISTERS = 232  # two: with a softcap and every output, a row is alive both raw and capped
BWD_REGISTERS, PAIR_BWD_REGISTERS = 72, 80  # seven and six; six too for the entropy under a softcap
LABELS = tl.constexpr(32)  # labels of a row that are handled at once
# Which sums a row keeps: as few kernels as serve the usual losses, those with an entropy term, and
# everything.
ENTROPY, EVERYTHING = tl.constexpr(1), tl.constexpr(2)
EVERYTHING_BITS = sum(OUTPUT_BITS[name] for name in ("log_sum_sq_probs", "mean_logit", "is_top1"))


class Scale(NamedTuple):
    """From raw logits to bits: the numbers of Rows, and at compile time whether there is a softcap."""

    factor: float
    cap_scale: float
    temperature: float
    capped: tl.constexpr


class Outputs(NamedTuple):
    """The results of a forward kernel in the order of OUTPUT_BITS, None where they are not asked for."""

    logprob: tl.tensor
    entropy: tl.tensor
    logsumexp: tl.tensor
    log_sum_sq: tl.tensor
    mean_logit: tl.tensor
    is_top1: tl.tensor
    ref_logprob: tl.tensor
    kl_policy_ref: tl.tensor
    kl_ref_policy: tl.tensor


class Tile(NamedTuple):
    """How a kernel goes through a row, at compile time: `depth` slices of `span` elements, in groups of
    `lanes`; together: the reference row in the same groups."""

    lanes: tl.constexpr
    span: tl.constexpr
    depth: tl.constexpr
    together: tl.constexpr


class Part(NamedTuple):
    """Which labels a row has, and which part of the vocabulary the logits are; first: the label of place
    0."""

    vocab: tl.tensor
    targets: tl.tensor
    ignore_index: tl.tensor
    first: tl.tensor


@lru_cache
def tile_of(lanes, span, depth, together=False):
    return Tile(*(tl.constexpr(x) for x in (lanes, span, depth, together)))


@lru_cache
def _decided(capped):
    return tl.constexpr(capped)


def scale_of(rows):
    return Scale(rows.factor, rows.cap_scale, rows.temperature, _decided(rows.cap_scale != 0))


def uncapped(numbers):
    """The same where no softcap is left to apply."""
    return Scale(numbers.factor, 0.0, numbers.temperature, _decided(False))


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
    return scored, bad * scored


@triton.jit
def capped(x, scale):
    u = x.to(tl.float32)
    if scale.capped:
        u = tanh(u * scale.cap_scale)
    return u


@triton.jit
def bits_per_unit(scale, temperature):
    """Per unit of `capped`; temperature: a tensor that stands in place of the number, or None."""
    t = scale.temperature
    if temperature is not None:
        t = tl.load(temperature)
    return div(scale.factor, t)


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
    """Sum of a vector by halves, top half onto bottom half: rotating the vector changes no pair at any
    level."""
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
            counts = (k < targets) & (
                tl.load(labels + row * targets + k, mask=k < targets, other=ignore_index) != ignore_index
            )
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
def add_labels(dx, u, q, q_begin, q_end, row, labels, g_logprob, part, c):
    """dx + [is a label] g c ln2, for the elements at q, all in [q_begin, q_end). An element at -inf gets
    nothing."""
    if g_logprob is not None:
        for k in range(part.targets):
            y = tl.load(labels + row * part.targets + k)
            at = y - part.first
            if (y != part.ignore_index) & (at >= q_begin) & (at < q_end):
                g = tl.load(g_logprob + row * part.targets + k) * (c * LN2)
                dx += tl.where((q == at) & (u != float("-inf")), g, 0.0)
    return dx


# What differs from call to call compiles nothing anew: neither sizes nor the alignment of the small tensors.
SIZES = ["base", "inner", "stride_outer", "stride_inner", "ref_base", "ref_inner", "ref_stride_outer", "ref_stride_inner", "grad_base", "vocab",
         "pieces", "targets", "ignore_index", "vocab_start", "vocab_total"]  # fmt: skip
SMALL = ["labels", "mask", "temperature", "state_in", "target_in", "state", "g_logprob", "g_entropy", "g_logsumexp", "g_kl_policy_ref",
         "g_kl_ref_policy", "scale"]  # fmt: skip


@triton.jit
def finish_row(row, scored, s, c, vocab_total, labels, out, OUTPUTS: tl.constexpr):
    """Writes what is finished from the policy row's state, the log-probs excepted. s: RowState; out:
    Outputs."""
    if OUT_ENTROPY & OUTPUTS:
        tl.store(out.entropy + row, tl.where(scored != 0, row_entropy(s.m, s.s0, s.s1, s.umax, c), 0.0))
    if OUT_LOGSUMEXP & OUTPUTS:
        tl.store(out.logsumexp + row, tl.where(scored != 0, row_logsumexp(s.m, s.s0, s.umax, c), 0.0))
    if OUT_LOG_SUM_SQ & OUTPUTS:
        tl.store(out.log_sum_sq + row, tl.where(scored != 0, row_log_sum_sq(s.s0, s.s2), 0.0))
    if OUT_MEAN_LOGIT & OUTPUTS:
        mean = div(s.sz, vocab_total.to(tl.float32)) * SUM_SHRINKS_BY * (c * LN2)
        tl.store(out.mean_logit + row, tl.where(scored != 0, mean, 0.0))
    if OUT_IS_TOP1 & OUTPUTS:
        hit = tl.where(s.s0 != s.s0, s.s0, (s.top == tl.load(labels + row)).to(tl.float32))
        tl.store(out.is_top1 + row, tl.where(scored != 0, hit, 0.0))


@triton.jit
def finish_kls(row, scored, s, r, c, out, OUTPUTS: tl.constexpr):
    """Writes the KLs of both rows' states s and r. out: Outputs."""
    peaked = is_peaked(s.m, s.s0, s.umax, c)
    if OUT_KL_POLICY_REF & OUTPUTS:
        kl = row_kl_policy_ref(s.s0, r.s0, r.t, peaked)
        tl.store(out.kl_policy_ref + row, tl.where(scored != 0, kl, 0.0))
    if OUT_KL_REF_POLICY & OUTPUTS:
        kl = row_kl_ref_policy(s.s0, r.s0, r.tr, peaked)
        tl.store(out.kl_ref_policy + row, tl.where(scored != 0, kl, 0.0))


@triton.jit
def finish_labels(
    row, scored, s, c, logits, labels, target_in, target, logprob, part, scale, WANTED: tl.constexpr
):
    """Writes u of every label of the row that begins at `logits` and, if WANTED, its log-prob under the row's
    state s. part: Part."""
    for first in range(0, part.targets, LABELS):
        k = first + tl.arange(0, LABELS)
        inside, at = k < part.targets, row * part.targets + k
        y = tl.where(
            scored != 0, tl.load(labels + at, mask=inside, other=part.ignore_index), part.ignore_index
        )
        counts = y != part.ignore_index
        here = counts & (y >= part.first) & (y < part.first + part.vocab)
        u = capped(tl.load(logits + (y - part.first), mask=here, other=0.0), scale)
        u = tl.where(here, u, float("-inf"))
        if target_in is not None:
            u = found_target(tl.load(target_in + at, mask=inside, other=float("-inf")), u)
        tl.store(target + at, u, mask=inside)
        if WANTED:
            tl.store(logprob + at, tl.where(counts, row_logprob(s.m, s.s0, s.umax, u, c), 0.0), mask=inside)
