"""Row ops in Triton: one program streams one vocabulary row forward; backward is elementwise over pieces of rows.

16-byte loads at any V and stride. A row starts at any element, so programs count in aligned coordinates: q = element + shift, where LANES
elements are 16 bytes and shift < LANES is the row's distance from the boundary before it. Every address is then a known multiple of LANES plus
q, and masks are rounded out to whole groups of LANES: the two facts that the compiler needs to emit wide loads. The rest of a 16-byte chunk
that holds an element of the row is readable memory; what it holds is discarded. Stores are masked exactly.

The reduction tree depends on V and the dtype alone, not on shift. Tiles are cut at fixed elements of the row: DEPTH slices of SPAN elements. A
slice lies rotated by shift in the SPAN columns of its tile: its last `shift` elements, which lie beyond the aligned window, go to the columns
in front, which the window left to elements of the slice before. Each column keeps its own running sums, which see the same elements in the
same order whatever the shift, and in the end the columns are folded in halves, a tree that rotation does not change.
"""

import math

import triton
import triton.language as tl

from fastalign import ffi
from fastalign.ops.token_stats.api import OUTPUT_BITS, STATE_WIDTH, forward_shapes
from fastalign.registry import BackendError
from fastalign.triton_math import LN2, div, fma, merge, narrow, rescale, row_entropy, row_log_sum_sq, row_logprob, s1_shift, tanh

THREADS = 128
FWD_REGISTERS, BWD_REGISTERS = 168, 72  # at least three and seven programs per multiprocessor; see ffi.launch_options
LABELS = tl.constexpr(32)  # labels of a row that are handled at once
COLUMNS = tl.constexpr(STATE_WIDTH)
# Which sums a row keeps: as few kernels as serve the usual losses, those with an entropy term, and everything.
ENTROPY, EVERYTHING = tl.constexpr(1), tl.constexpr(2)
EVERYTHING_BITS = sum(OUTPUT_BITS[name] for name in ("log_sum_sq_probs", "mean_logit", "is_top1"))


@triton.jit
def _row_offset(row, base, inner, stride_outer, stride_inner):
    return base + row // inner * stride_outer + row % inner * stride_inner


@triton.jit
def _scored(row, labels, mask, targets, ignore_index, vocab_total):
    """Whether the row counts, and whether one of its labels is neither ignored nor in the vocabulary; both int32."""
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
def _capped(x, cap_scale, CAPPED: tl.constexpr):
    u = x.to(tl.float32)
    if CAPPED:
        u = tanh(u * cap_scale)
    return u


@triton.jit
def _bits_per_unit(factor, temperature, temperature_ptr):
    t = temperature
    if temperature_ptr is not None:
        t = tl.load(temperature_ptr)
    return div(factor, t)


@triton.jit
def _element(q, column, shift, SPAN: tl.constexpr):
    """The element of the row that a place of a tile holds. Not kept over the loop: registers are what limits the programs in flight."""
    return q - shift + tl.where(column < shift, SPAN, 0)


@triton.jit
def _fold(x, SPAN: tl.constexpr):
    """Sum of a vector by halves, top half onto bottom half: rotating the vector changes no pair at any level."""
    for level in tl.static_range(1, 16):
        if SPAN >> level > 0:
            x = tl.sum(tl.reshape(x, (2, SPAN >> level)), 0)
    return tl.sum(x, 0)


# What differs from call to call compiles nothing anew: neither sizes nor the alignment of the small tensors.
SIZES = ["base", "inner", "stride_outer", "stride_inner", "grad_base", "vocab", "pieces", "targets", "ignore_index", "vocab_start",
         "vocab_total"]  # fmt: skip
SMALL = ["labels", "mask", "temperature_ptr", "state_in", "target_in", "state", "g_logprob", "g_entropy", "g_logsumexp"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SMALL)
def token_stats_fwd_kernel(
    logits, labels, mask, temperature_ptr, state_in, target_in, logprob, entropy, logsumexp, log_sum_sq, mean_logit, is_top1, state, target,
    base: tl.int64, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64, vocab: tl.int32, targets: tl.int32,
    ignore_index: tl.int64, vocab_start: tl.int32, vocab_total: tl.int32, factor, cap_scale, temperature,
    OUTPUTS: tl.constexpr, SUMS: tl.constexpr, CAPPED: tl.constexpr, LANES: tl.constexpr, SPAN: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scored, bad = _scored(row, labels, mask, targets, ignore_index, vocab_total)
    c = _bits_per_unit(factor, temperature, temperature_ptr)
    offset = _row_offset(row, base, inner, stride_outer, stride_inner)
    shift = (offset % LANES).to(tl.int32)
    window = logits + tl.multiple_of(offset - shift, LANES)
    limit = tl.multiple_of((vocab + shift + (LANES - 1)) // LANES * LANES * scored, LANES)  # a row that does not count is not read
    column = tl.arange(0, SPAN)[None, :]
    place = tl.arange(0, DEPTH)[:, None] * SPAN + column

    m, umax, top = float("-inf"), float("-inf"), -1
    s0, s1 = tl.zeros([SPAN], tl.float32), tl.zeros([SPAN], tl.float32)
    s2, sz = tl.zeros([SPAN], tl.float32), tl.zeros([SPAN], tl.float32)
    TILE: tl.constexpr = DEPTH * SPAN
    next_x = tl.load(window + place, mask=place < limit, other=float("-inf"))
    later_x = tl.load(window + place + TILE, mask=place + TILE < limit, other=float("-inf"))
    for start in range(0, vocab * scored, TILE):
        q = start + place
        x, next_x = next_x, later_x  # two tiles are under way while one is worked on
        later_x = tl.load(window + q + 2 * TILE, mask=q + 2 * TILE < limit, other=float("-inf"))
        if shift != 0:
            beyond = tl.load(window + q + SPAN, mask=(q + SPAN < limit) & (column < LANES), other=float("-inf"))
            x = tl.where(column < shift, beyond, x)
        u = _capped(x, cap_scale, CAPPED)
        counted = u
        if start + TILE > vocab:  # the row ends in this tile
            inside = _element(q, column, shift, SPAN) < vocab
            u = tl.where(inside, u, float("-inf"))
            counted = tl.where(inside, u, 0.0)
        tile_max = tl.max(tl.max(u, 0), 0)
        if SUMS == EVERYTHING:
            if tile_max > umax:
                top = tl.min(tl.min(tl.where(u == tile_max, _element(q, column, shift, SPAN), vocab), 0), 0)
            sz += tl.sum(counted, 0)

        # Move the sums to the new reference point, add the tile. Where all is -inf so far there is no reference point: count from 0.
        umax = tl.maximum(umax, tile_max)
        peak = umax * c
        d = fma(u, c, tl.where(umax == float("-inf"), 0.0, -peak))
        e = tl.exp2(d)
        f = rescale(m, peak)
        if SUMS >= ENTROPY:  # e is 0 below -200, and 0 * -inf would be NaN
            s1 = fma(fma(s1_shift(m, peak, f), s0, s1), f, tl.sum(e * tl.maximum(d, -200.0), 0))
        s0 = fma(s0, f, tl.sum(e, 0))
        if SUMS == EVERYTHING:
            s2 = fma(s2, f * f, tl.sum(e * e, 0))
        m = peak

    s0 = _fold(s0, SPAN)
    s1 = _fold(s1, SPAN) if SUMS >= ENTROPY else 0.0
    s2 = _fold(s2, SPAN) if SUMS == EVERYTHING else 0.0
    sz = _fold(sz, SPAN) if SUMS == EVERYTHING else 0.0
    top = tl.where(top >= 0, top + vocab_start, top)
    if state_in is not None:
        p = state_in + row * COLUMNS
        m, s0, s1, s2, sz, umax, top = merge(
            tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3), tl.load(p + 4), tl.load(p + 5), tl.load(p + 6).to(tl.int32),
            m, s0, s1, s2, sz, umax, top,
        )  # fmt: skip
    s0 = tl.where(bad != 0, float("nan"), s0)

    p = state + row * COLUMNS
    tl.store(p, m)
    tl.store(p + 1, s0)
    tl.store(p + 2, s1)
    tl.store(p + 3, s2)
    tl.store(p + 4, sz)
    tl.store(p + 5, umax)
    tl.store(p + 6, top.to(tl.float32))
    tl.store(p + 7, scored.to(tl.float32))
    for i in tl.static_range(8, COLUMNS):
        tl.store(p + i, 0.0)

    if OUTPUTS & 2:
        tl.store(entropy + row, tl.where(scored != 0, row_entropy(s0, s1), 0.0))
    if OUTPUTS & 4:
        tl.store(logsumexp + row, tl.where(scored != 0, fma(m, LN2, tl.log(s0)), 0.0))
    if OUTPUTS & 8:
        tl.store(log_sum_sq + row, tl.where(scored != 0, row_log_sum_sq(s0, s2), 0.0))
    if OUTPUTS & 16:
        tl.store(mean_logit + row, tl.where(scored != 0, div(sz, vocab_total.to(tl.float32)) * (c * LN2), 0.0))
    if OUTPUTS & 32:
        hit = tl.where(s0 != s0, s0, (top == tl.load(labels + row)).to(tl.float32))
        tl.store(is_top1 + row, tl.where(scored != 0, hit, 0.0))
    if labels is not None:
        for first in range(0, targets, LABELS):
            k = first + tl.arange(0, LABELS)
            y = tl.where(scored != 0, tl.load(labels + row * targets + k, mask=k < targets, other=ignore_index), ignore_index)
            counts = y != ignore_index
            here = counts & (y >= vocab_start) & (y < vocab_start + vocab)
            u = _capped(tl.load(logits + offset + (y - vocab_start), mask=here, other=0.0), cap_scale, CAPPED)
            u = tl.where(here, u, float("-inf"))
            if target_in is not None:
                u = tl.maximum(u, tl.load(target_in + row * targets + k, mask=k < targets, other=float("-inf")))
            tl.store(target + row * targets + k, u, mask=k < targets)
            if OUTPUTS & 1:
                tl.store(logprob + row * targets + k, tl.where(counts, row_logprob(m, s0, u, c), 0.0), mask=k < targets)


@triton.jit
def _gradient(x, q, q_begin, q_end, row, m, a, b, labels, g_logprob, targets, ignore_index, label_shift, c, cap_scale,
              WITH_ENTROPY: tl.constexpr, CAPPED: tl.constexpr):  # fmt: skip
    """dx of the elements at q, all in [q_begin, q_end):  e (a + b d) + [is a label] g c ln2,  d = u c - m,  e = 2^d;  times du/dx under a cap."""
    u = _capped(x, cap_scale, CAPPED)
    d = fma(u, c, -m)
    e = tl.exp2(d)
    if WITH_ENTROPY:  # e is 0 below -200, and 0 * -inf would be NaN
        dx = e * fma(tl.maximum(d, -200.0), b, a)
    else:
        dx = e * a
    if g_logprob is not None:
        for k in range(targets):
            y = tl.load(labels + row * targets + k)
            at = y + label_shift
            if (y != ignore_index) & (at >= q_begin) & (at < q_end):
                g = tl.load(g_logprob + row * targets + k) * (c * LN2)
                dx += tl.where((q == at) & (u != float("-inf")), g, 0.0)
    if CAPPED:
        dx *= cap_scale * (1.0 - u * u)
    return dx


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SMALL)
def token_stats_bwd_kernel(
    logits, grad, labels, mask, temperature_ptr, state, g_logprob, g_entropy, g_logsumexp,
    base: tl.int64, inner: tl.int64, stride_outer: tl.int64, stride_inner: tl.int64, grad_base: tl.int64, vocab: tl.int32, pieces: tl.int32,
    targets: tl.int32, ignore_index: tl.int64, vocab_start: tl.int32, vocab_total: tl.int32, factor, cap_scale, temperature,
    IN_PLACE: tl.constexpr, CAPPED: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // pieces).to(tl.int64)
    piece = tl.program_id(0) % pieces
    scored, _ = _scored(row, labels, mask, targets, ignore_index, vocab_total)
    c = _bits_per_unit(factor, temperature, temperature_ptr)
    m, s0 = tl.load(state + row * COLUMNS), tl.load(state + row * COLUMNS + 1)

    # A and B from the upstream gradients, by the coefficient contract of math/row_state.h; here p = e / s0 and log p = ln2 d - log s0.
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
        s1 = tl.load(state + row * COLUMNS + 2)
        a += tl.where(g_h == 0, 0.0, g_h * (tl.log(s0) - row_entropy(s0, s1)))
        b = div(-g_h * LN2, s0)
        upstream = tl.maximum(upstream, (g_h != 0).to(tl.int32))
    a, b = div(a, s0) * (c * LN2), b * (c * LN2)  # and the slope of z in u
    # Rows that do not count, or that nothing flows back into, are zeros without reading; NaN rows and rows without mass are NaN.
    live = (scored != 0) & ((upstream != 0) | (s0 != s0) | (s0 == 0))

    offset = _row_offset(row, base, inner, stride_outer, stride_inner)
    shift = (offset % LANES).to(tl.int32)
    window = logits + tl.multiple_of(offset - shift, LANES)
    out_offset = offset if IN_PLACE else grad_base + row * vocab
    out = grad + tl.multiple_of(out_offset - shift, LANES)
    limit = tl.multiple_of((vocab + shift + (LANES - 1)) // LANES * LANES, LANES)
    # The whole groups lie in [first, last); the elements beside them, at both ends of the row, are handled by themselves.
    first = tl.multiple_of((shift + (LANES - 1)) // LANES * LANES, LANES)
    last = tl.multiple_of((vocab + shift) // LANES * LANES, LANES)
    label_shift = shift - vocab_start
    WITH_ENTROPY: tl.constexpr = g_entropy is not None
    for start in range(piece * (BLOCKS * BLOCK), tl.minimum((piece + 1) * (BLOCKS * BLOCK), last), BLOCK):
        q = start + tl.arange(0, BLOCK)
        dx = tl.zeros([BLOCK], tl.float32)
        if live:
            x = tl.load(window + q, mask=q < limit, other=0.0)
            dx = _gradient(x, q, start, start + BLOCK, row, m, a, b, labels, g_logprob, targets, ignore_index, label_shift, c, cap_scale,
                           WITH_ENTROPY, CAPPED)  # fmt: skip
        tl.store(out + q, narrow(dx, grad.dtype.element_ty), mask=(q >= first) & (q < last))
    if LANES > 1 and piece == 0:
        i = tl.arange(0, 2 * LANES)
        q = tl.where(i < LANES, i, last - LANES + i)
        mine = (q < vocab + shift) & tl.where(i < LANES, (q >= shift) & (q < first), q >= first)
        dx = tl.zeros([2 * LANES], tl.float32)
        if live:
            x = tl.load(window + q, mask=mine, other=0.0)
            dx = _gradient(x, q, 0, limit, row, m, a, b, labels, g_logprob, targets, ignore_index, label_shift, c, cap_scale,
                           WITH_ENTROPY, CAPPED)  # fmt: skip
        tl.store(out + q, narrow(dx, grad.dtype.element_ty), mask=mine)


def token_stats_fwd(logits, labels, mask, temperature_tensor, factor, cap_scale, temperature, ignore_index, outputs, vocab_start, vocab_total,
                    state_in, target_in, ref_logits=None):  # fmt: skip
    if ref_logits is not None:
        raise BackendError("the Triton kernels do not take reference logits yet")
    rows, vocab, device = math.prod(logits.shape[:-1]), logits.shape[-1], logits.device
    targets = 0 if labels is None else labels.shape[1]
    *results, state, target = (ffi.empty(s, ffi.acc_dtype(logits.dtype), device) for s in forward_shapes(logits, labels, outputs))
    if rows:
        view, base, lanes = ffi.aligned(logits)
        sums = 2 if outputs & EVERYTHING_BITS else int(outputs & OUTPUT_BITS["entropy"] > 0)
        with ffi.triton_device(device):
            token_stats_fwd_kernel[(rows,)](
                view, labels, mask, temperature_tensor, state_in, target_in, *results[:6], state, target,
                base, *ffi.row_layout(logits)[1:], vocab, targets, ignore_index, vocab_start, vocab_total, factor, cap_scale, temperature,
                # A thread has 16 bytes of each slice of a tile, 16 elements in all.
                OUTPUTS=outputs, SUMS=sums, CAPPED=cap_scale != 0, LANES=lanes, SPAN=THREADS * 16 // logits.element_size(),
                DEPTH=logits.element_size(), **ffi.launch_options(THREADS, device, FWD_REGISTERS),
            )  # fmt: skip
    return (*results, state, target)


def _shared_lanes(logits, base, lanes, grad_base, grad_lanes):
    """Elements that the backward kernel moves at once: 16 bytes of them where each row of the logits and its gradient, which is contiguous, have the
    same alignment, else 1."""
    rows, inner, stride_outer, stride_inner = ffi.row_layout(logits)
    vocab = logits.shape[-1]
    skews = [base - grad_base, 0 if rows == 1 else stride_inner - vocab, 0 if rows <= inner else stride_outer - inner * vocab]
    return lanes if lanes == grad_lanes and all(skew % lanes == 0 for skew in skews) else 1


def _backward(grad, logits, labels, mask, temperature_tensor, factor, cap_scale, temperature, ignore_index, vocab_start, vocab_total, state,
              g_logprob, g_entropy, g_logsumexp, ref_logits=None, *_):  # fmt: skip
    if ref_logits is not None:
        raise BackendError("the Triton kernels do not take reference logits yet")
    if logits.numel() == 0:
        return
    rows, vocab, device = math.prod(logits.shape[:-1]), logits.shape[-1], logits.device
    view, base, lanes = ffi.aligned(logits)
    grad_view, grad_base, grad_lanes = ffi.aligned(grad)
    in_place = grad is logits
    lanes = lanes if in_place else _shared_lanes(logits, base, lanes, grad_base, grad_lanes)
    block, blocks = 2 * THREADS * 16 // logits.element_size(), 8
    pieces = triton.cdiv(vocab + lanes - 1, blocks * block)
    with ffi.triton_device(device):
        token_stats_bwd_kernel[(rows * pieces,)](
            view, grad_view, labels, mask, temperature_tensor, state, g_logprob, g_entropy, g_logsumexp,
            base, *ffi.row_layout(logits)[1:], grad_base, vocab, pieces, 0 if labels is None else labels.shape[1], ignore_index, vocab_start,
            vocab_total, factor, cap_scale, temperature,
            IN_PLACE=in_place, CAPPED=cap_scale != 0, LANES=lanes, BLOCK=block, BLOCKS=blocks,
            **ffi.launch_options(THREADS, device, BWD_REGISTERS),
        )  # fmt: skip


def token_stats_bwd(logits, *rest):
    grad = ffi.empty(tuple(logits.shape), logits.dtype, logits.device)
    _backward(grad, logits, *rest)
    return grad


def token_stats_bwd_(logits, *rest):
    _backward(logits, logits, *rest)


def token_stats_fused(*args):
    raise BackendError("the Triton kernels do not take reference logits yet")


token_stats_fused_ = scale_rows_ = token_stats_fused
