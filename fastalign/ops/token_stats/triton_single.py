"""The Triton kernels over logits alone: one program streams one vocabulary row forward; backward is
elementwise over pieces of rows.

16-byte loads at any V and stride. A row starts at any element, so programs count in aligned coordinates: q =
element + shift, where LANES elements are 16 bytes and shift < LANES is the row's distance from the boundary
before it. Every address is then a known multiple of LANES plus q, and masks are rounded out to whole groups
of LANES: the two facts that the compiler needs to emit wide loads. In loops a mask compares q itself with a
bound, `q < limit - C` and never `q + C < limit`: Triton 3.6 does not see that the sum, too, runs in whole
groups, and loads element by element. The rest of a 16-byte chunk that holds an element of the row is readable
memory; what it holds is discarded. Stores are masked exactly.

The reduction tree depends on V and the dtype alone, not on shift. Tiles are cut at fixed elements of the row:
DEPTH slices of SPAN elements. A slice lies rotated by shift in the SPAN columns of its tile: its last `shift`
elements, which lie beyond the aligned window, go to the columns in front, which the window left to elements
of the slice before. Each column keeps its own running sums, which see the same elements in the same order
whatever the shift, and in the end the columns are folded in halves, a tree that rotation does not change.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastalign.ops.math.columns import COL_M, COL_REF_M, COL_S0, COL_UMAX, OUT_LOGPROB, STATE_WIDTH
from fastalign.ops.math.rows import (
    RowState,
    far_bits,
    is_far,
    load_state,
    merge_stored,
    reference_point,
    rescale,
    s1_shift,
    spoiled,
    store_state,
)
from fastalign.ops.math.scalar import LN2, SUM_SHARE, div, fma, narrow, times_slope
from fastalign.ops.token_stats.triton_rows import (
    ENTROPY,
    EVERYTHING,
    SIZES,
    SMALL,
    Part,
    add_labels,
    bits_per_unit,
    capped,
    element,
    finish_labels,
    finish_row,
    first_place,
    fold,
    gradient_origin,
    row_coefficients,
    row_offset,
    row_scored,
)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SMALL)
def token_stats_fwd_kernel(
    logits, labels, mask, temperature, state_in, target_in, out, state, target, base: tl.int64,
    inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64, vocab: tl.int32, targets: tl.int32,
    ignore_index: tl.int64, vocab_start: tl.int32, vocab_total: tl.int32, scale, OUTPUTS: tl.constexpr,
    SUMS: tl.constexpr, LANES: tl.constexpr, SPAN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out: Outputs; scale: Scale."""
    row = tl.program_id(0).to(tl.int64)
    scored, bad = row_scored(row, labels, mask, targets, ignore_index, vocab_total)
    c = bits_per_unit(scale, temperature)
    offset = row_offset(row, base, inner, stride_outer, stride_inner)
    shift = (offset % LANES).to(tl.int32)
    window = logits + tl.multiple_of(offset - shift, LANES)
    limit = tl.multiple_of(
        (vocab + shift + (LANES - 1)) // LANES * LANES * scored, LANES
    )  # a row that does not count is not read
    column = tl.arange(0, SPAN)[None, :]
    place = tl.arange(0, DEPTH)[:, None] * SPAN + column

    m = float("-inf")
    umax = float("-inf")
    best = float("-inf")
    top = -1
    s0, s1 = tl.zeros([SPAN], tl.float32), tl.zeros([SPAN], tl.float32)
    s2, sz = tl.zeros([SPAN], tl.float32), tl.zeros([SPAN], tl.float32)
    TILE: tl.constexpr = DEPTH * SPAN
    next_x = tl.load(window + place, mask=place < limit, other=float("-inf"))
    later_x = tl.load(window + place + TILE, mask=place < limit - TILE, other=float("-inf"))
    for start in range(0, vocab * scored, TILE):
        q = start + place
        x, next_x = next_x, later_x  # two tiles are under way while one is worked on
        later_x = tl.load(window + q + 2 * TILE, mask=q < limit - 2 * TILE, other=float("-inf"))
        if shift != 0:
            beyond = tl.load(
                window + q + SPAN, mask=(q < limit - SPAN) & (column < LANES), other=float("-inf")
            )
            x = tl.where(column < shift, beyond, x)
        if SUMS == EVERYTHING:
            top, best = first_place(top, best, x, q, column, shift, vocab, SPAN)
        u = capped(x, scale)
        counted = u
        if start + TILE > vocab:  # the row ends in this tile
            inside = element(q, column, shift, SPAN) < vocab
            u = tl.where(inside, u, float("-inf"))
            counted = tl.where(inside, u, 0.0)
        tile_max = tl.max(tl.max(u, 0), 0)
        if SUMS == EVERYTHING:
            sz += tl.sum(counted * SUM_SHARE, 0)

        # Move the sums to the new reference point, add the tile. Where all is -inf so far there is no
        # reference point: count from 0.
        umax = tl.maximum(umax, tile_max)
        peak = reference_point(umax, c)
        d = fma(u, c, tl.where(peak == float("-inf"), 0.0, -peak))
        e = tl.exp2(d)
        f = rescale(m, peak)
        if SUMS >= ENTROPY:  # e is 0 below -200, and 0 * -inf would be NaN
            s1 = fma(fma(s1_shift(m, peak, f), s0, s1), f, tl.sum(e * tl.maximum(d, -200.0), 0))
        s0 = fma(s0, f, tl.sum(e, 0))
        if SUMS == EVERYTHING:
            s2 = fma(s2, f * f, tl.sum(e * e, 0))
        m = peak

    # A far row once more, now that its maximum is known (math/row_state.h), as slowly as the fewest registers
    # allow.
    far = is_far(umax, c)
    s0, s1, s2 = tl.where(far, 0.0, s0), tl.where(far, 0.0, s1), tl.where(far, 0.0, s2)
    m = tl.where(far, umax * c, m)
    for start in range(0, tl.where(far, vocab * scored, 0), SPAN):
        inside = start + column < vocab
        x = tl.load(logits + offset + start + column, mask=inside, other=float("-inf"))
        d = far_bits(tl.where(inside, capped(x, scale), float("-inf")), umax, c)
        e = tl.exp2(d)
        s0 += tl.sum(e, 0)
        if SUMS >= ENTROPY:
            s1 += tl.sum(e * tl.maximum(d, -200.0), 0)
        if SUMS == EVERYTHING:
            s2 += tl.sum(e * e, 0)

    s0 = fold(s0, SPAN)
    s1 = fold(s1, SPAN) if SUMS >= ENTROPY else 0.0
    s2 = fold(s2, SPAN) if SUMS == EVERYTHING else 0.0
    sz = fold(sz, SPAN) if SUMS == EVERYTHING else 0.0
    top = tl.where(top >= 0, top + vocab_start, top)
    s = RowState(m, s0, s1, s2, sz, umax, top, best)
    if state_in is not None:
        s = merge_stored(load_state(state_in + row * STATE_WIDTH), s)
    s = spoiled(s, bad)
    store_state(s, scored, state + row * STATE_WIDTH)
    finish_row(row, scored, s, c, vocab_total, labels, out, OUTPUTS)
    for i in tl.static_range(COL_REF_M, STATE_WIDTH):
        tl.store(state + row * STATE_WIDTH + i, 0.0)
    if labels is not None:
        part = Part(vocab, targets, ignore_index, vocab_start)
        finish_labels(
            row,
            scored,
            s,
            c,
            logits + offset,
            labels,
            target_in,
            target,
            out.logprob,
            part,
            scale,
            OUT_LOGPROB & OUTPUTS,
        )


class Slope(NamedTuple):
    """Of a row: the origin of its exponents, the coefficients of the gradient, and the bits per unit of u."""

    base_u: tl.tensor
    m: tl.tensor
    a: tl.tensor
    b: tl.tensor
    c: tl.tensor


@triton.jit
def _gradient(x, q, q_begin, q_end, row, z, labels, g_logprob, part, scale, WITH_ENTROPY: tl.constexpr):
    """dx of the elements at q, all in [q_begin, q_end):  e (a + b d) + [is a label] g c ln2,
    d = (u - base_u) c - m,  e = 2^d;  times du/dx under a cap. z: Slope."""
    u = capped(x, scale)
    d = fma(u - z.base_u, z.c, -z.m)
    e = tl.exp2(d)
    if WITH_ENTROPY:  # e is 0 below -200, and 0 * -inf would be NaN
        dx = e * fma(tl.maximum(d, -200.0), z.b, z.a)
    else:
        dx = e * z.a
    dx = add_labels(dx, u, q, q_begin, q_end, row, labels, g_logprob, part, z.c)
    if scale.capped:
        dx *= scale.cap_scale * (1.0 - u * u)
    return dx


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SMALL)
def token_stats_bwd_kernel(
    logits, grad, labels, mask, temperature, state, g_logprob, g_entropy, g_logsumexp, base: tl.int64,
    inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64, grad_base: tl.int64, vocab: tl.int32,
    pieces: tl.int32, targets: tl.int32, ignore_index: tl.int64, vocab_start: tl.int32, vocab_total: tl.int32,
    scale, IN_PLACE: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """scale: Scale."""
    row = (tl.program_id(0) // pieces).to(tl.int64)
    piece = tl.program_id(0) % pieces
    scored, _ = row_scored(row, labels, mask, targets, ignore_index, vocab_total)
    c = bits_per_unit(scale, temperature)
    p = state + row * STATE_WIDTH
    m, s0 = tl.load(p + COL_M), tl.load(p + COL_S0)

    base_u, m = gradient_origin(m, tl.load(p + COL_UMAX), c)
    a, b, upstream = row_coefficients(
        row, state, s0, c, labels, g_logprob, g_entropy, g_logsumexp, targets, ignore_index
    )
    a, b = div(a, s0) * (c * LN2), b * (c * LN2)  # and the slope of z in u
    # Rows that do not count, or that nothing flows back into, are zeros without reading; NaN rows and rows
    # without mass are NaN.
    live = (scored != 0) & ((upstream != 0) | (s0 != s0) | (s0 == 0))

    offset = row_offset(row, base, inner, stride_outer, stride_inner)
    shift = (offset % LANES).to(tl.int32)
    window = logits + tl.multiple_of(offset - shift, LANES)
    out_offset = offset if IN_PLACE else grad_base + row * vocab
    out = grad + tl.multiple_of(out_offset - shift, LANES)
    limit = tl.multiple_of((vocab + shift + (LANES - 1)) // LANES * LANES, LANES)
    # The whole groups lie in [first, last); the elements beside them, at both ends of the row, are handled by
    # themselves.
    first = tl.multiple_of((shift + (LANES - 1)) // LANES * LANES, LANES)
    last = tl.multiple_of((vocab + shift) // LANES * LANES, LANES)
    z, part = Slope(base_u, m, a, b, c), Part(vocab, targets, ignore_index, vocab_start - shift)
    WITH_ENTROPY: tl.constexpr = g_entropy is not None
    for start in range(piece * (BLOCKS * BLOCK), tl.minimum((piece + 1) * (BLOCKS * BLOCK), last), BLOCK):
        q = start + tl.arange(0, BLOCK)
        dx = tl.zeros([BLOCK], tl.float32)
        if live:
            x = tl.load(window + q, mask=q < limit, other=0.0)
            dx = _gradient(x, q, start, start + BLOCK, row, z, labels, g_logprob, part, scale, WITH_ENTROPY)
        tl.store(out + q, narrow(dx, grad.dtype.element_ty), mask=(q >= first) & (q < last))
    if LANES > 1 and piece == 0:
        i = tl.arange(0, 2 * LANES)
        q = tl.where(i < LANES, i, last - LANES + i)
        mine = (q < vocab + shift) & tl.where(i < LANES, (q >= shift) & (q < first), q >= first)
        dx = tl.zeros([2 * LANES], tl.float32)
        if live:
            x = tl.load(window + q, mask=mine, other=0.0)
            dx = _gradient(x, q, 0, limit, row, z, labels, g_logprob, part, scale, WITH_ENTROPY)
        tl.store(out + q, narrow(dx, grad.dtype.element_ty), mask=mine)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SMALL)
def scale_rows_kernel(x, scale, base: tl.int64, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64, vocab: tl.int32,
                      pieces: tl.int32, LANES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    by = tl.load(scale)
    if by != 1.0:
        row = (tl.program_id(0) // pieces).to(tl.int64)
        offset = row_offset(row, base, inner, stride_outer, stride_inner)
        shift = (offset % LANES).to(tl.int32)
        window = x + tl.multiple_of(offset - shift, LANES)
        # As in the backward kernels: whole groups by themselves, the ends of the row by the first piece.
        first = tl.multiple_of((shift + (LANES - 1)) // LANES * LANES, LANES)
        last = tl.multiple_of((vocab + shift) // LANES * LANES, LANES)
        piece = tl.program_id(0) % pieces
        q = piece * BLOCK + tl.arange(0, BLOCK)
        inside = (q >= first) & (q < last)
        tl.store(
            window + q,
            narrow(
                times_slope(by, tl.load(window + q, mask=inside, other=0.0).to(tl.float32)),
                x.dtype.element_ty,
            ),
            mask=inside,
        )
        if LANES > 1 and piece == 0:
            i = tl.arange(0, 2 * LANES)
            edge = tl.where(i < LANES, i, last - LANES + i)
            mine = (edge < vocab + shift) & tl.where(
                i < LANES, (edge >= shift) & (edge < first), edge >= first
            )
            dx = times_slope(by, tl.load(window + edge, mask=mine, other=0.0).to(tl.float32))
            tl.store(window + edge, narrow(dx, x.dtype.element_ty), mask=mine)
