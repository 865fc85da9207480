"""Row ops in Triton: one program streams one vocabulary row forward; backward is elementwise over pieces of rows.

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

import math
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
from fastalign.ops.math.scalar import LN2, SUM_SHARE, div, fma, narrow
from fastalign.ops.token_stats import (
    triton_pair,
    triton_states,
)
from fastalign.ops.token_stats.contract import (
    OUTPUT_BITS,
    TokenStatsFwd,
    forward_shapes,
)
from fastalign.ops.token_stats.triton_rows import (
    BWD_REGISTERS,
    ENTROPY,
    EVERYTHING,
    EVERYTHING_BITS,
    FWD_REGISTERS,
    PAIR_BWD_REGISTERS,
    PAIR_EVERYTHING_REGISTERS,
    PAIR_FWD_REGISTERS,
    SIZES,
    SMALL,
    THREADS,
    Outputs,
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
    scale_of,
    tile_of,
)  # fmt: skip
from fastalign.runtime import ffi


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SMALL)
def token_stats_fwd_kernel(
    logits, labels, mask, temperature, state_in, target_in, out, state, target, base: tl.int64, inner: tl.int64,
    stride_outer: tl.int64, stride_inner: tl.int64, vocab: tl.int32, targets: tl.int32, ignore_index: tl.int64,
    vocab_start: tl.int32, vocab_total: tl.int32, scale, OUTPUTS: tl.constexpr, SUMS: tl.constexpr,
    LANES: tl.constexpr, SPAN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out: Outputs; scale: Scale."""
    row = tl.program_id(0).to(tl.int64)
    scored, bad = row_scored(row, labels, mask, targets, ignore_index, vocab_total)
    c = bits_per_unit(scale, temperature)
    offset = row_offset(row, base, inner, stride_outer, stride_inner)
    shift = (offset % LANES).to(tl.int32)
    window = logits + tl.multiple_of(offset - shift, LANES)
    limit = tl.multiple_of((vocab + shift + (LANES - 1)) // LANES * LANES * scored, LANES)  # a row that does not count is not read
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
            beyond = tl.load(window + q + SPAN, mask=(q < limit - SPAN) & (column < LANES), other=float("-inf"))
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
        finish_labels(row, scored, s, c, logits + offset, labels, target_in, target, out.logprob, part, scale, OUT_LOGPROB & OUTPUTS)


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
    a, b, upstream = row_coefficients(row, state, s0, c, labels, g_logprob, g_entropy, g_logsumexp, targets, ignore_index)
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


def token_stats_fwd(a):
    r = a.rows
    rows, vocab, device = math.prod(r.logits.shape[:-1]), r.logits.shape[-1], r.logits.device
    targets = 0 if r.labels is None else r.labels.shape[1]
    acc = ffi.acc_dtype(r.logits.dtype)
    *results, state, target = (ffi.empty(shape, acc, device) for shape in forward_shapes(r, a.outputs))
    if rows:
        view, base, lanes = ffi.aligned(r.logits)
        _, inner, outer, step = ffi.row_layout(r.logits)
        layout = (base, inner, outer, step)
        sums = EVERYTHING.value if a.outputs & EVERYTHING_BITS else int(a.outputs & OUTPUT_BITS["entropy"] > 0)
        numbers = (vocab, targets, r.ignore_index, r.vocab_start, r.vocab_total, scale_of(r))
        # A thread has 16 bytes of each slice of a tile, 16 elements in all.
        itemsize = r.logits.element_size()
        out = Outputs(*(x if a.outputs >> bit & 1 else None for bit, x in enumerate(results)))
        around = (r.labels, r.mask, r.temperature_tensor, a.state_in, a.target_in, out, state, target)
        kinds = {"OUTPUTS": a.outputs, "SUMS": sums, "LANES": lanes, "SPAN": THREADS * 16 // itemsize, "DEPTH": itemsize}
        with ffi.triton_device(device):
            if r.ref_logits is None:
                token_stats_fwd_kernel[(rows,)](
                    view, *around, *layout, *numbers, **kinds,
                    **ffi.launch_options(THREADS, device, FWD_REGISTERS),
                )  # fmt: skip
            else:
                ref, *ref_layout = _of_reference(r.ref_logits)
                together = _share_alignment(r.logits, r.ref_logits, lanes)
                registers = PAIR_EVERYTHING_REGISTERS if sums == EVERYTHING.value and r.cap_scale else PAIR_FWD_REGISTERS
                triton_pair.token_stats_pair_fwd_kernel[(rows,)](
                    view, ref, *around, *layout, *ref_layout, *numbers, TOGETHER=together, **kinds,
                    **ffi.launch_options(THREADS, device, registers),
                )  # fmt: skip
    return (*results, state, target)


def _of_reference(logits):
    """Where the reference rows are: from where, base, inner, outer and inner stride."""
    view, base, _ = ffi.aligned(logits)
    _, inner, outer, step = ffi.row_layout(logits)
    return view, base, inner, outer, step


def _share_alignment(logits, other, lanes):
    """Whether row r of both tensors, whatever r, lies equally far behind a boundary of `lanes` elements."""
    (_, base, own_lanes), (_, other_base, other_lanes) = ffi.aligned(logits), ffi.aligned(other)
    layouts = [ffi.row_layout(logits), ffi.row_layout(other)]
    inner = min(layout[1] for layout in layouts)
    skews = [base - other_base]
    strides = []
    for rows, own_inner, outer, step in layouts:
        if own_inner != inner and own_inner < rows:  # not rows of `inner`
            return lanes == 1
        strides.append((0 if rows == 1 else step, 0 if rows <= inner else outer if own_inner == inner else inner * step))
    skews += [a - b for a, b in zip(*strides)]
    return lanes == 1 or (own_lanes == other_lanes and all(skew % lanes == 0 for skew in skews))


def _backward(r, state, g, grad):
    if r.logits.numel() == 0:
        return
    rows, vocab, device = math.prod(r.logits.shape[:-1]), r.logits.shape[-1], r.logits.device
    view, base, lanes = ffi.aligned(r.logits)
    grad_view, grad_base, _ = ffi.aligned(grad)
    in_place = grad is r.logits
    if not in_place and not _share_alignment(r.logits, grad, lanes):
        lanes = 1
    block, blocks = 2 * THREADS * 16 // r.logits.element_size(), 8
    pieces = triton.cdiv(vocab + lanes - 1, blocks * block)
    _, inner, outer, step = ffi.row_layout(r.logits)
    layout, targets = (base, inner, outer, step), 0 if r.labels is None else r.labels.shape[1]
    numbers = (grad_base, vocab, pieces, targets, r.ignore_index, r.vocab_start, r.vocab_total, scale_of(r))
    around = (grad_view, r.labels, r.mask, r.temperature_tensor, state)
    slim = r.ref_logits is None and (r.cap_scale == 0 or g.g_entropy is None)
    options = ffi.launch_options(THREADS, device, BWD_REGISTERS if slim else PAIR_BWD_REGISTERS)
    with ffi.triton_device(device):
        if r.ref_logits is None:
            token_stats_bwd_kernel[(rows * pieces,)](
                view, *around, g.g_logprob, g.g_entropy, g.g_logsumexp, *layout, *numbers,
                IN_PLACE=in_place, LANES=lanes, BLOCK=block, BLOCKS=blocks, **options,
            )  # fmt: skip
        else:
            ref, *ref_layout = _of_reference(r.ref_logits)
            together = _share_alignment(r.logits, r.ref_logits, lanes)
            triton_pair.token_stats_pair_bwd_kernel[(rows * pieces,)](
                view, ref, *around, *g, *layout, *ref_layout, *numbers, tile_of(lanes, block, blocks, together),
                IN_PLACE=in_place, **options,
            )  # fmt: skip


row_states_merge, row_states_finish = triton_states.merge, triton_states.finish


def _grad_of(logits):
    return ffi.empty(tuple(logits.shape), logits.dtype, logits.device)


def token_stats_bwd(a):
    grad = _grad_of(a.rows.logits)
    _backward(a.rows, a.state, a.upstream, grad)
    return grad


def token_stats_bwd_(a):
    _backward(a.rows, a.state, a.upstream, a.rows.logits)


def _fused(a, grad):
    *results, state, _ = token_stats_fwd(TokenStatsFwd(a.rows, a.outputs, None, None))
    _backward(a.rows, state, a.upstream, grad)
    return tuple(results)


def token_stats_fused(a):
    grad = _grad_of(a.rows.logits)
    return *_fused(a, grad), grad


def token_stats_fused_(a):
    return _fused(a, a.rows.logits)


def scale_rows_(a):
    if a.x.numel() == 0:
        return
    rows, vocab = math.prod(a.x.shape[:-1]), a.x.shape[-1]
    view, base, lanes = ffi.aligned(a.x)
    block = 2 * THREADS * 16 // a.x.element_size()
    pieces = triton.cdiv(vocab + lanes - 1, block)
    with ffi.triton_device(a.x.device):
        triton_pair.scale_rows_kernel[(rows * pieces,)](
            view, a.scale, base, *ffi.row_layout(a.x)[1:], vocab, pieces, LANES=lanes, BLOCK=block,
            **ffi.launch_options(THREADS, a.x.device),
        )  # fmt: skip
