"""The Triton kernels over a policy row and a reference row at once; addressing and reduction tree as in triton.py.

Columns of a tile belong to elements by the policy row's shift. Where the reference row has the same shift
(TOGETHER, known to the launcher) it is read in the same 16-byte groups; elsewhere element by element, into
the same places: the same bits either way."""

import triton
import triton.language as tl

from fastalign.ops.math.columns import (
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
    OUT_KL_POLICY_REF,
    OUT_KL_REF_POLICY,
    OUT_LOGPROB,
    OUT_REF_LOGPROB,
    STATE_WIDTH,
)
from fastalign.ops.math.rows import (
    has_kl_gradient,
    is_far,
    is_peaked,
    merge,
    merge_ref,
    move_cross,
    reference_distance,
    reference_point,
    rescale,
    row_bits,
    row_kl_policy_ref,
    row_kl_ref_policy,
    s1_shift,
)
from fastalign.ops.math.scalar import LN2, SUM_SHARE, div, fma, narrow, times_slope
from fastalign.ops.token_stats.triton_rows import (
    ENTROPY,
    EVERYTHING,
    SIZES,
    SMALL,
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
)  # fmt: skip


@triton.jit
def _load_tile(logits, window, q, AHEAD: tl.constexpr, column, shift, offset, limit, vocab, SPAN: tl.constexpr, WINDOWED: tl.constexpr):
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
    logits, ref, labels, mask, temperature_ptr, state_in, target_in, ref_target_in, logprob, entropy, logsumexp, log_sum_sq, mean_logit, is_top1,
    ref_logprob, kl_policy_ref, kl_ref_policy, state, target, ref_target,
    base: tl.int64, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64, ref_base: tl.int64, ref_inner: tl.int64,
    ref_stride_outer: tl.int64, ref_stride_inner: tl.int64, vocab: tl.int32, targets: tl.int32, ignore_index: tl.int64, vocab_start: tl.int32,
    vocab_total: tl.int32, factor, cap_scale, temperature,
    OUTPUTS: tl.constexpr, SUMS: tl.constexpr, CAPPED: tl.constexpr, LANES: tl.constexpr, TOGETHER: tl.constexpr, SPAN: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scored, bad = row_scored(row, labels, mask, targets, ignore_index, vocab_total)
    c = bits_per_unit(factor, temperature, temperature_ptr)
    offset = row_offset(row, base, inner, stride_outer, stride_inner)
    ref_offset = row_offset(row, ref_base, ref_inner, ref_stride_outer, ref_stride_inner)
    shift = (offset % LANES).to(tl.int32)
    window = logits + tl.multiple_of(offset - shift, LANES)
    ref_window = ref + tl.multiple_of(ref_offset - shift, LANES) if TOGETHER else ref
    limit = tl.multiple_of((vocab + shift + (LANES - 1)) // LANES * LANES * scored, LANES)  # a row that does not count is not read
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
        u, v = capped(x, cap_scale, CAPPED), capped(y, cap_scale, CAPPED)
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
        d = row_bits(tl.where(inside, capped(x, cap_scale, CAPPED), float("-inf")), m, umax, c)
        dr = row_bits(tl.where(inside, capped(y, cap_scale, CAPPED), float("-inf")), rm, ref_umax, c)
        s0, s1, s2, r0, t, tr = _add(d, dr, s0, s1, s2, r0, t, tr, SUMS, WITH_T, WITH_TR)
    ref_umax = tl.where(ref_far, ref_umax, 0.0)

    s0, r0 = fold(s0, SPAN), fold(r0, SPAN)
    t, tr = fold(t, SPAN) if WITH_T else 0.0, fold(tr, SPAN) if WITH_TR else 0.0
    s1 = fold(s1, SPAN) if SUMS >= ENTROPY else 0.0
    s2 = fold(s2, SPAN) if SUMS == EVERYTHING else 0.0
    sz = fold(sz, SPAN) if SUMS == EVERYTHING else 0.0
    top = tl.where(top >= 0, top + vocab_start, top)
    p = state + row * STATE_WIDTH
    if state_in is not None:
        before = state_in + row * STATE_WIDTH
        am, a0 = tl.load(before + COL_M), tl.load(before + COL_S0)
        bm, b0 = m, s0
        m, s0, s1, s2, sz, umax, top = merge(
            am, a0, tl.load(before + COL_S1), tl.load(before + COL_S2), tl.load(before + COL_SZ), tl.load(before + COL_UMAX),
            tl.load(before + COL_TOP).to(tl.int32), bm, b0, s1, s2, sz, umax, top,
        )  # fmt: skip
        ref_am, ref_bm = tl.load(before + COL_REF_M), rm
        rm, r0, t, tr = merge_ref(
            m, am, a0, ref_am, tl.load(before + COL_REF_S0), tl.load(before + COL_T), tl.load(before + COL_TR), bm, b0, ref_bm, r0, t, tr
        )
        ref_umax = tl.where(rm == ref_am, tl.load(before + COL_REF_UMAX), ref_umax)
    s0, r0 = tl.where(bad != 0, float("nan"), s0), tl.where(bad != 0, float("nan"), r0)
    finish_row(row, scored, m, s0, s1, s2, sz, umax, top, c, vocab_total, labels, entropy, logsumexp, log_sum_sq, mean_logit, is_top1, state,
               OUTPUTS)  # fmt: skip
    tl.store(p + COL_REF_M, rm)
    tl.store(p + COL_REF_S0, r0)
    tl.store(p + COL_T, t)
    tl.store(p + COL_TR, tr)
    tl.store(p + COL_REF_UMAX, ref_umax)
    peaked = is_peaked(m, s0, umax, c)
    if WITH_T:
        tl.store(kl_policy_ref + row, tl.where(scored != 0, row_kl_policy_ref(s0, r0, t, peaked), 0.0))
    if WITH_TR:
        tl.store(kl_ref_policy + row, tl.where(scored != 0, row_kl_ref_policy(s0, r0, tr, peaked), 0.0))
    if labels is not None:
        finish_labels(row, scored, m, s0, umax, c, logits, offset, labels, target_in, target, logprob, vocab, targets, ignore_index, vocab_start,
                      cap_scale, OUT_LOGPROB & OUTPUTS, CAPPED)  # fmt: skip
        finish_labels(row, scored, rm, r0, ref_umax, c, ref, ref_offset, labels, ref_target_in, ref_target, ref_logprob, vocab, targets, ignore_index,
                      vocab_start, cap_scale, OUT_REF_LOGPROB & OUTPUTS, CAPPED)  # fmt: skip


@triton.jit
def _gradient(x, y, q, q_begin, q_end, row, base_u, m, ref_base_u, rm, a, b, kc, mean, k, ratio, labels, g_logprob, targets, ignore_index,
              label_shift, c, cap_scale, WITH_ENTROPY: tl.constexpr, CAPPED: tl.constexpr):  # fmt: skip
    """As in triton.py, and the terms of the KLs:  e kc (d - dr - mean) + k (e - ratio er).  That with kc is left out where kc is 0."""
    u = capped(x, cap_scale, CAPPED)
    d, dr = fma(u - base_u, c, -m), fma(capped(y, cap_scale, CAPPED) - ref_base_u, c, -rm)
    e = tl.exp2(d)
    inside = a + tl.where(e == 0, 0.0, tl.where(kc == 0, 0.0, kc * (d - dr - mean)))
    if WITH_ENTROPY:  # e is 0 below -200, and 0 * -inf would be NaN
        inside = fma(tl.maximum(d, -200.0), b, inside)
    er = tl.where(u == float("-inf"), 0.0, tl.where(k == 0, 0.0, tl.exp2(dr)))
    dx = fma(k, fma(-ratio, er, e), e * inside)
    dx = add_labels(dx, u, q, q_begin, q_end, row, labels, g_logprob, targets, ignore_index, label_shift, c)
    if CAPPED:
        dx *= cap_scale * (1.0 - u * u)
    return dx


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SMALL)
def token_stats_pair_bwd_kernel(
    logits, ref, grad, labels, mask, temperature_ptr, state, g_logprob, g_entropy, g_logsumexp, g_kl_policy_ref, g_kl_ref_policy,
    base: tl.int64, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64, ref_base: tl.int64, ref_inner: tl.int64,
    ref_stride_outer: tl.int64, ref_stride_inner: tl.int64, grad_base: tl.int64, vocab: tl.int32, pieces: tl.int32, targets: tl.int32,
    ignore_index: tl.int64, vocab_start: tl.int32, vocab_total: tl.int32, factor, cap_scale, temperature,
    IN_PLACE: tl.constexpr, CAPPED: tl.constexpr, LANES: tl.constexpr, TOGETHER: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // pieces).to(tl.int64)
    piece = tl.program_id(0) % pieces
    scored, _ = row_scored(row, labels, mask, targets, ignore_index, vocab_total)
    c = bits_per_unit(factor, temperature, temperature_ptr)
    p = state + row * STATE_WIDTH
    m, s0, rm, r0, t = tl.load(p + COL_M), tl.load(p + COL_S0), tl.load(p + COL_REF_M), tl.load(p + COL_REF_S0), tl.load(p + COL_T)

    base_u, m = gradient_origin(m, tl.load(p + COL_UMAX), c)
    ref_base_u, rm = gradient_origin(rm, tl.load(p + COL_REF_UMAX), c)
    a, b, upstream = row_coefficients(row, state, s0, c, labels, g_logprob, g_entropy, g_logsumexp, targets, ignore_index)
    g_p, g_r = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    if g_kl_policy_ref is not None:
        g_p = tl.load(g_kl_policy_ref + row)
    if g_kl_ref_policy is not None:
        g_r = tl.load(g_kl_ref_policy + row)
    upstream = tl.maximum(upstream, ((g_p != 0) | (g_r != 0)).to(tl.int32))
    slope = c * LN2  # of z in u
    a, b = div(a, s0) * slope, b * slope
    kc, mean, k, ratio = div(g_p * LN2, s0) * slope, div(t, s0), div(g_r, s0) * slope, tl.where(g_r == 0, 1.0, div(s0, r0))
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
    label_shift = shift - vocab_start
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
            dx = nan + _gradient(x, y, q, start, start + BLOCK, row, base_u, m, ref_base_u, rm, a, b, kc, mean, k, ratio, labels, g_logprob,
                                 targets, ignore_index, label_shift, c, cap_scale, WITH_ENTROPY, CAPPED)  # fmt: skip
        tl.store(out + q, narrow(dx, grad.dtype.element_ty), mask=(q >= first) & (q < last))
    if LANES > 1 and piece == 0:
        i = tl.arange(0, 2 * LANES)
        q = tl.where(i < LANES, i, last - LANES + i)
        mine = (q < vocab + shift) & tl.where(i < LANES, (q >= shift) & (q < first), q >= first)
        dx = tl.zeros([2 * LANES], tl.float32)
        if live:
            x, y = tl.load(window + q, mask=mine, other=0.0), tl.load(ref_window + q, mask=mine, other=0.0)
            dx = nan + _gradient(x, y, q, 0, limit, row, base_u, m, ref_base_u, rm, a, b, kc, mean, k, ratio, labels, g_logprob, targets,
                                 ignore_index, label_shift, c, cap_scale, WITH_ENTROPY, CAPPED)  # fmt: skip
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
            window + q, narrow(times_slope(by, tl.load(window + q, mask=inside, other=0.0).to(tl.float32)), x.dtype.element_ty), mask=inside
        )
        if LANES > 1 and piece == 0:
            i = tl.arange(0, 2 * LANES)
            edge = tl.where(i < LANES, i, last - LANES + i)
            mine = (edge < vocab + shift) & tl.where(i < LANES, (edge >= shift) & (edge < first), edge >= first)
            dx = times_slope(by, tl.load(window + edge, mask=mine, other=0.0).to(tl.float32))
            tl.store(window + edge, narrow(dx, x.dtype.element_ty), mask=mine)
