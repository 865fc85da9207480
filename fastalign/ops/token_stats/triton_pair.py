"""The Triton kernels over a policy row and a reference row at once; addressing and reduction tree as in
triton_single.py.

Columns of a tile belong to elements by the policy row's shift. Where the reference row has the same shift
(TOGETHER, known to the launcher) it is read in the same 16-byte groups; elsewhere element by element, into
the same places: the same bits either way."""

from typing import NamedTuple

import triton
import triton.language as tl

from fastalign.ops.math.columns import (
    COL_M,
    COL_REF_M,
    COL_REF_S0,
    COL_REF_UMAX,
    COL_S0,
    COL_T,
    COL_UMAX,
    OUT_KL_POLICY_REF,
    OUT_KL_REF_POLICY,
    OUT_LOGPROB,
    OUT_REF_LOGPROB,
    STATE_WIDTH,
)
from fastalign.ops.math.rows import (
    RefState,
    RowState,
    has_kl_gradient,
    is_far,
    load_ref_state,
    load_state,
    merge_stored,
    merge_stored_ref,
    move_cross,
    reference_distance,
    reference_point,
    rescale,
    row_bits,
    s1_shift,
    spoiled,
    spoiled_ref,
    store_ref_state,
    store_state,
)
from fastalign.ops.math.scalar import LN2, SUM_SHARE, div, fma, narrow
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
    finish_kls,
    finish_labels,
    finish_row,
    first_place,
    fold,
    gradient_origin,
    row_coefficients,
    row_offset,
    row_scored,
)  # fmt: skip


@triton.jit
def _load_tile(
    logits,
    window,
    q,
    AHEAD: tl.constexpr,
    column,
    shift,
    offset,
    limit,
    vocab,
    SPAN: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """The tile that lies AHEAD of the places q: in 16-byte groups from the aligned window, the rotated part
    still missing; or, not WINDOWED, element by element, complete."""
    if WINDOWED:
        return tl.load(window + q + AHEAD, mask=q < limit - AHEAD, other=float("-inf"))
    else:
        e = element(q + AHEAD, column, shift, SPAN)
        return tl.load(logits + offset + e, mask=e < tl.minimum(vocab, limit), other=float("-inf"))


@triton.jit
def _rotate(x, window, q, column, shift, limit, SPAN: tl.constexpr, LANES: tl.constexpr):
    """Fills the columns in front with the elements beyond the window."""
    if shift != 0:
        beyond = tl.load(window + q + SPAN, mask=(q < limit - SPAN) & (column < LANES), other=float("-inf"))
        x = tl.where(column < shift, beyond, x)
    return x


@triton.jit
def _add(d, dr, s0, s1, s2, r0, t, tr, SUMS: tl.constexpr, WITH_T: tl.constexpr, WITH_TR: tl.constexpr):
    """The sums with a tile more, which lies d and dr bits from the reference points of both rows."""
    e, er = tl.exp2(d), tl.exp2(dr)
    if WITH_T:  # where there is no mass the difference may be infinite or NaN, and counts nothing
        t += tl.sum(tl.where(e == 0, 0.0, e * (d - dr)), 0)
    if WITH_TR:
        tr += tl.sum(tl.where(er == 0, 0.0, er * (d - dr)), 0)
    if SUMS >= ENTROPY:
        s1 += tl.sum(e * tl.maximum(d, -200.0), 0)
    s0 += tl.sum(e, 0)
    r0 += tl.sum(er, 0)
    if SUMS == EVERYTHING:
        s2 += tl.sum(e * e, 0)
    return s0, s1, s2, r0, t, tr


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SMALL)
def token_stats_pair_fwd_kernel(
    logits, ref, labels, mask, temperature, state_in, target_in, out, state, target, base: tl.int64,
    inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64, ref_base: tl.int64, ref_inner: tl.int64,
    ref_stride_outer: tl.int64, ref_stride_inner: tl.int64, vocab: tl.int32, targets: tl.int32,
    ignore_index: tl.int64, vocab_start: tl.int32, vocab_total: tl.int32, scale, OUTPUTS: tl.constexpr,
    SUMS: tl.constexpr, TOGETHER: tl.constexpr, LANES: tl.constexpr, SPAN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out: Outputs; scale: Scale."""
    row = tl.program_id(0).to(tl.int64)
    scored, bad = row_scored(row, labels, mask, targets, ignore_index, vocab_total)
    c = bits_per_unit(scale, temperature)
    offset = row_offset(row, base, inner, stride_outer, stride_inner)
    ref_offset = row_offset(row, ref_base, ref_inner, ref_stride_outer, ref_stride_inner)
    shift = (offset % LANES).to(tl.int32)
    window = logits + tl.multiple_of(offset - shift, LANES)
    ref_window = ref + tl.multiple_of(ref_offset - shift, LANES) if TOGETHER else ref
    limit = tl.multiple_of(
        (vocab + shift + (LANES - 1)) // LANES * LANES * scored, LANES
    )  # a row that does not count is not read
    column = tl.arange(0, SPAN)[None, :]
    place = tl.arange(0, DEPTH)[:, None] * SPAN + column
    WITH_T: tl.constexpr = OUT_KL_POLICY_REF & OUTPUTS != 0
    WITH_TR: tl.constexpr = OUT_KL_REF_POLICY & OUTPUTS != 0

    m = float("-inf")
    umax = float("-inf")
    rm = float("-inf")
    ref_umax = float("-inf")
    best = float("-inf")
    top = -1
    s0, s1, r0 = tl.zeros([SPAN], tl.float32), tl.zeros([SPAN], tl.float32), tl.zeros([SPAN], tl.float32)
    s2, sz = tl.zeros([SPAN], tl.float32), tl.zeros([SPAN], tl.float32)
    t, tr = tl.zeros([SPAN], tl.float32), tl.zeros([SPAN], tl.float32)
    TILE: tl.constexpr = DEPTH * SPAN
    next_x = _load_tile(logits, window, place, 0, column, shift, offset, limit, vocab, SPAN, True)
    next_y = _load_tile(ref, ref_window, place, 0, column, shift, ref_offset, limit, vocab, SPAN, TOGETHER)
    for start in range(0, vocab * scored, TILE):
        q = start + place
        x, y = next_x, next_y  # the next tiles are under way while these are worked on
        next_x = _load_tile(logits, window, q, TILE, column, shift, offset, limit, vocab, SPAN, True)
        next_y = _load_tile(ref, ref_window, q, TILE, column, shift, ref_offset, limit, vocab, SPAN, TOGETHER)
        x = _rotate(x, window, q, column, shift, limit, SPAN, LANES)
        if TOGETHER:
            y = _rotate(y, ref_window, q, column, shift, limit, SPAN, LANES)
        if SUMS == EVERYTHING:
            top, best = first_place(top, best, x, q, column, shift, vocab, SPAN)
        u, v = capped(x, scale), capped(y, scale)
        counted = u
        if start + TILE > vocab:  # the row ends in this tile
            inside = element(q, column, shift, SPAN) < vocab
            u, v = tl.where(inside, u, float("-inf")), tl.where(inside, v, float("-inf"))
            counted = tl.where(inside, u, 0.0)
        tile_max = tl.max(tl.max(u, 0), 0)
        if SUMS == EVERYTHING:
            sz += tl.sum(counted * SUM_SHARE, 0)
        umax = tl.maximum(umax, tile_max)
        ref_umax = tl.maximum(ref_umax, tl.max(tl.max(v, 0), 0))
        peak, ref_peak = reference_point(umax, c), reference_point(ref_umax, c)
        if (peak != m) | (ref_peak != rm):  # move the sums to the new reference points
            f, rf = rescale(m, peak), rescale(rm, ref_peak)
            by = reference_distance(m, peak) - reference_distance(rm, ref_peak)
            if WITH_T:
                t = move_cross(t, s0, by, f)
            if WITH_TR:
                tr = move_cross(tr, r0, by, rf)
            if SUMS >= ENTROPY:
                s1 = fma(s1_shift(m, peak, f), s0, s1) * f
            if SUMS == EVERYTHING:
                s2 = s2 * (f * f)
            s0, r0 = s0 * f, r0 * rf
            m, rm = peak, ref_peak
        # Add the tile. Where all is -inf so far there is no reference point: count from 0.
        d = fma(u, c, tl.where(peak == float("-inf"), 0.0, -peak))
        dr = fma(v, c, tl.where(ref_peak == float("-inf"), 0.0, -ref_peak))
        s0, s1, s2, r0, t, tr = _add(d, dr, s0, s1, s2, r0, t, tr, SUMS, WITH_T, WITH_TR)

    # Both rows once more where one of them is far, now that their maxima are known (math/row_state.h).
    far, ref_far = is_far(umax, c), is_far(ref_umax, c)
    m, rm = tl.where(far, umax * c, m), tl.where(ref_far, ref_umax * c, rm)
    again = far | ref_far
    s0, s1, s2 = tl.where(again, 0.0, s0), tl.where(again, 0.0, s1), tl.where(again, 0.0, s2)
    r0, t, tr = tl.where(again, 0.0, r0), tl.where(again, 0.0, t), tl.where(again, 0.0, tr)
    for start in range(0, tl.where(again, vocab * scored, 0), SPAN):
        inside = start + column < vocab
        x = tl.load(logits + offset + start + column, mask=inside, other=float("-inf"))
        y = tl.load(ref + ref_offset + start + column, mask=inside, other=float("-inf"))
        d = row_bits(tl.where(inside, capped(x, scale), float("-inf")), m, umax, c)
        dr = row_bits(tl.where(inside, capped(y, scale), float("-inf")), rm, ref_umax, c)
        s0, s1, s2, r0, t, tr = _add(d, dr, s0, s1, s2, r0, t, tr, SUMS, WITH_T, WITH_TR)
    ref_umax = tl.where(ref_far, ref_umax, 0.0)

    s0, r0 = fold(s0, SPAN), fold(r0, SPAN)
    t, tr = fold(t, SPAN) if WITH_T else 0.0, fold(tr, SPAN) if WITH_TR else 0.0
    s1 = fold(s1, SPAN) if SUMS >= ENTROPY else 0.0
    s2 = fold(s2, SPAN) if SUMS == EVERYTHING else 0.0
    sz = fold(sz, SPAN) if SUMS == EVERYTHING else 0.0
    top = tl.where(top >= 0, top + vocab_start, top)
    own, beside = RowState(m, s0, s1, s2, sz, umax, top, best), RefState(rm, r0, t, tr, ref_umax)
    if state_in is not None:
        before = state_in + row * STATE_WIDTH
        first, ref_first = load_state(before), load_ref_state(before)
        beside = merge_stored_ref(first, ref_first, own, beside)
        own = merge_stored(first, own)
    own, beside = spoiled(own, bad), spoiled_ref(beside, bad)
    store_state(own, scored, state + row * STATE_WIDTH)
    store_ref_state(beside, state + row * STATE_WIDTH)
    finish_row(row, scored, own, c, vocab_total, labels, out, OUTPUTS)
    finish_kls(row, scored, own, beside, c, out, OUTPUTS)
    if labels is not None:
        part = Part(vocab, targets, ignore_index, vocab_start)
        finish_labels(
            row,
            scored,
            own,
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
        # The reference's targets lie behind the policy's.
        behind = tl.num_programs(0).to(tl.int64) * targets
        ref_target_in = target_in
        if target_in is not None:
            ref_target_in = target_in + behind
        finish_labels(
            row, scored, beside, c, ref + ref_offset, labels, ref_target_in, target + behind, out.ref_logprob,
            part, scale, OUT_REF_LOGPROB & OUTPUTS,
        )  # fmt: skip


class Slope(NamedTuple):
    """Of a row: the origins of both rows' exponents, the coefficients of the gradient (of the KLs: kc, mean,
    k, ratio), and the bits per unit of u."""

    base_u: tl.tensor
    m: tl.tensor
    ref_base_u: tl.tensor
    rm: tl.tensor
    a: tl.tensor
    b: tl.tensor
    kc: tl.tensor
    mean: tl.tensor
    k: tl.tensor
    ratio: tl.tensor
    c: tl.tensor


@triton.jit
def _gradient(x, y, q, q_begin, q_end, row, z, labels, g_logprob, part, scale, WITH_ENTROPY: tl.constexpr):
    """As in triton_single.py, and the terms of the KLs:  e kc (d - dr - mean) + k (e - ratio er).  That with kc is left
    out where kc is 0."""
    u = capped(x, scale)
    d, dr = fma(u - z.base_u, z.c, -z.m), fma(capped(y, scale) - z.ref_base_u, z.c, -z.rm)
    e = tl.exp2(d)
    inside = z.a + tl.where(e == 0, 0.0, tl.where(z.kc == 0, 0.0, z.kc * (d - dr - z.mean)))
    if WITH_ENTROPY:  # e is 0 below -200, and 0 * -inf would be NaN
        inside = fma(tl.maximum(d, -200.0), z.b, inside)
    er = tl.where(u == float("-inf"), 0.0, tl.where(z.k == 0, 0.0, tl.exp2(dr)))
    dx = fma(z.k, fma(-z.ratio, er, e), e * inside)
    dx = add_labels(dx, u, q, q_begin, q_end, row, labels, g_logprob, part, z.c)
    if scale.capped:
        dx *= scale.cap_scale * (1.0 - u * u)
    return dx


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SMALL)
def token_stats_pair_bwd_kernel(
    logits, ref, grad, labels, mask, temperature, state, g_logprob, g_entropy, g_logsumexp, g_kl_policy_ref,
    g_kl_ref_policy, base: tl.int64, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64,
    ref_base: tl.int64, ref_inner: tl.int64, ref_stride_outer: tl.int64, ref_stride_inner: tl.int64,
    grad_base: tl.int64, vocab: tl.int32, pieces: tl.int32, targets: tl.int32, ignore_index: tl.int64,
    vocab_start: tl.int32, vocab_total: tl.int32, scale, tile, IN_PLACE: tl.constexpr,
):  # fmt: skip
    """scale: Scale; tile: Tile, whose slices are worked on one after another."""
    LANES: tl.constexpr = tile.lanes
    BLOCK: tl.constexpr = tile.span
    BLOCKS: tl.constexpr = tile.depth
    TOGETHER: tl.constexpr = tile.together
    row = (tl.program_id(0) // pieces).to(tl.int64)
    piece = tl.program_id(0) % pieces
    scored, _ = row_scored(row, labels, mask, targets, ignore_index, vocab_total)
    c = bits_per_unit(scale, temperature)
    p = state + row * STATE_WIDTH
    m, s0, rm, r0, t = (
        tl.load(p + COL_M),
        tl.load(p + COL_S0),
        tl.load(p + COL_REF_M),
        tl.load(p + COL_REF_S0),
        tl.load(p + COL_T),
    )

    base_u, m = gradient_origin(m, tl.load(p + COL_UMAX), c)
    ref_base_u, rm = gradient_origin(rm, tl.load(p + COL_REF_UMAX), c)
    a, b, upstream = row_coefficients(
        row, state, s0, c, labels, g_logprob, g_entropy, g_logsumexp, targets, ignore_index
    )
    g_p, g_r = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    if g_kl_policy_ref is not None:
        g_p = tl.load(g_kl_policy_ref + row)
    if g_kl_ref_policy is not None:
        g_r = tl.load(g_kl_ref_policy + row)
    upstream = tl.maximum(upstream, ((g_p != 0) | (g_r != 0)).to(tl.int32))
    slope = c * LN2  # of z in u
    a, b = div(a, s0) * slope, b * slope
    kc, mean, k, ratio = (
        div(g_p * LN2, s0) * slope,
        div(t, s0),
        div(g_r, s0) * slope,
        tl.where(g_r == 0, 1.0, div(s0, r0)),
    )
    defined = (s0 > 0) & has_kl_gradient(r0, t, g_p, g_r)
    # Rows that do not count, or that nothing flows back into, are zeros without reading; rows without a
    # gradient are NaN.
    live = (scored != 0) & ((upstream != 0) | ~defined)
    nan = tl.where(defined, 0.0, float("nan"))

    offset = row_offset(row, base, inner, stride_outer, stride_inner)
    ref_offset = row_offset(row, ref_base, ref_inner, ref_stride_outer, ref_stride_inner)
    shift = (offset % LANES).to(tl.int32)
    window = logits + tl.multiple_of(offset - shift, LANES)
    ref_window = ref + (tl.multiple_of(ref_offset - shift, LANES) if TOGETHER else ref_offset - shift)
    out_offset = offset if IN_PLACE else grad_base + row * vocab
    out = grad + tl.multiple_of(out_offset - shift, LANES)
    limit = tl.multiple_of((vocab + shift + (LANES - 1)) // LANES * LANES, LANES)
    # The whole groups lie in [first, last); the elements beside them, at both ends of the row, are handled by
    # themselves.
    first = tl.multiple_of((shift + (LANES - 1)) // LANES * LANES, LANES)
    last = tl.multiple_of((vocab + shift) // LANES * LANES, LANES)
    z = Slope(base_u, m, ref_base_u, rm, a, b, kc, mean, k, ratio, c)
    part = Part(vocab, targets, ignore_index, vocab_start - shift)
    WITH_ENTROPY: tl.constexpr = g_entropy is not None
    for start in range(piece * (BLOCKS * BLOCK), tl.minimum((piece + 1) * (BLOCKS * BLOCK), last), BLOCK):
        q = start + tl.arange(0, BLOCK)
        dx = tl.zeros([BLOCK], tl.float32)
        if live:
            x = tl.load(window + q, mask=q < limit, other=0.0)
            if TOGETHER:
                y = tl.load(ref_window + q, mask=q < limit, other=0.0)
            else:
                y = tl.load(ref_window + q, mask=(q >= shift) & (q < vocab + shift), other=0.0)
            dx = nan + _gradient(
                x, y, q, start, start + BLOCK, row, z, labels, g_logprob, part, scale, WITH_ENTROPY
            )
        tl.store(out + q, narrow(dx, grad.dtype.element_ty), mask=(q >= first) & (q < last))
    if LANES > 1 and piece == 0:
        i = tl.arange(0, 2 * LANES)
        q = tl.where(i < LANES, i, last - LANES + i)
        mine = (q < vocab + shift) & tl.where(i < LANES, (q >= shift) & (q < first), q >= first)
        dx = tl.zeros([2 * LANES], tl.float32)
        if live:
            x, y = tl.load(window + q, mask=mine, other=0.0), tl.load(ref_window + q, mask=mine, other=0.0)
            dx = nan + _gradient(x, y, q, 0, limit, row, z, labels, g_logprob, part, scale, WITH_ENTROPY)
        tl.store(out + q, narrow(dx, grad.dtype.element_ty), mask=mine)
