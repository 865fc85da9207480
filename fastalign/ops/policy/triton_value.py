"""The value loss in Triton: a program per sequence, or per tile of tokens, as the policy loss in
triton.py."""

import torch
import triton
import triton.language as tl

from fastalign.ops import columns

from fastalign.ops.math.columns import (  # isort: skip
    PART_WIDTH, SEQ_MEAN_TOKEN_MEAN, VALUE_CLIPPED, VALUE_ERROR, VALUE_ERROR_M2, VALUE_ERROR_SQ,
    VALUE_ITEMS, VALUE_LOSS, VALUE_NONFINITE, VALUE_RETURNS, VALUE_RETURNS_M2, VALUE_SEQUENCES,
    VALUE_TOKENS, VALUE_VALUE, VALUE_WIDTH,
)  # fmt: skip
from fastalign.ops.math.moments import push_moments
from fastalign.ops.math.policy import token_divisor, value_error
from fastalign.ops.math.scalar import div, is_finite
from fastalign.ops.math.segment import scored_tokens
from fastalign.ops.policy.params import nothing
from fastalign.ops.policy.triton_sums import (
    BLOCK,
    ROWS,
    SIZES,
    TENSORS,
    Results,
    piece_bounds,
    piece_count,
    reduce_rows,
    store_moments,
)
from fastalign.runtime import ffi


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
def value_fwd_kernel(
    values, old_values, returns, cu_seqlens, mask, num_items, loss, slopes, stats, rows, parts, counter,
    tokens: tl.int32, pieces: tl.int32, clip, norm_length, AGGREGATION: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0)
    begin, end = piece_bounds(cu_seqlens, k, tokens, TILE)
    zero = tl.zeros([BLOCK], tl.float32)
    length = 0.0
    if AGGREGATION == SEQ_MEAN_TOKEN_MEAN:
        n = zero
        for start in range(begin, end, BLOCK):
            t = start + tl.arange(0, BLOCK)
            n += scored_tokens(mask, t, t < end).to(tl.float32)
        length = tl.sum(n, 0)
    divisor = token_divisor(AGGREGATION, length, norm_length)

    s_loss, s_tokens, s_clipped, s_value, s_returns = zero, zero, zero, zero, zero
    s_error, s_error_sq, s_bad = zero, zero, zero
    n_returns, of_returns, d_returns, sq_returns = zero, zero, zero, zero
    n_errors, of_errors, d_errors, sq_errors = zero, zero, zero, zero
    for start in range(begin, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        scored = scored_tokens(mask, t, t < end)
        v, target = tl.load(values + t, mask=scored, other=0.0), tl.load(returns + t, mask=scored, other=0.0)
        old = v
        if old_values is not None:
            old = tl.load(old_values + t, mask=scored, other=0.0)
        each, slope, error, clipped = value_error(v, old, target, clip, old_values is not None)
        tl.store(slopes + t, tl.where(scored, div(slope, zero + divisor), 0.0), mask=t < end)
        s_loss += tl.where(scored, each, 0.0)
        s_tokens += scored.to(tl.float32)
        s_clipped += (clipped & scored).to(tl.float32)
        s_value += v
        s_returns += target
        n_returns, of_returns, d_returns, sq_returns = push_moments(
            target, scored, n_returns, of_returns, d_returns, sq_returns
        )
        n_errors, of_errors, d_errors, sq_errors = push_moments(
            error, scored, n_errors, of_errors, d_errors, sq_errors
        )
        s_error += error
        s_error_sq += error * error
        s_bad += tl.where(is_finite(each), 0.0, scored.to(tl.float32))

    row = rows + k * VALUE_WIDTH
    count = tl.sum(s_tokens, 0)
    tl.store(row + VALUE_ITEMS, 0.0)
    tl.store(row + VALUE_LOSS, div(tl.sum(s_loss, 0), divisor))
    tl.store(row + VALUE_TOKENS, count)
    tl.store(row + VALUE_SEQUENCES, 0.0 if cu_seqlens is None else tl.where(count > 0, 1.0, 0.0))
    tl.store(row + VALUE_CLIPPED, tl.sum(s_clipped, 0))
    tl.store(row + VALUE_VALUE, tl.sum(s_value, 0))
    tl.store(row + VALUE_RETURNS, tl.sum(s_returns, 0))
    tl.store(row + VALUE_RETURNS_M2, 0.0)  # as VALUE_ERROR_M2, by reduce_rows
    tl.store(row + VALUE_ERROR, tl.sum(s_error, 0))
    tl.store(row + VALUE_ERROR_SQ, tl.sum(s_error_sq, 0))
    tl.store(row + VALUE_ERROR_M2, 0.0)
    tl.store(row + VALUE_NONFINITE, tl.sum(s_bad, 0))
    store_moments(parts + 2 * PART_WIDTH * k, n_returns, of_returns, d_returns, sq_returns)
    store_moments(parts + (2 * k + 1) * PART_WIDTH, n_errors, of_errors, d_errors, sq_errors)
    out = Results(loss, stats, rows, parts, counter)
    reduce_rows(
        out,
        num_items,
        pieces,
        AGGREGATION,
        VALUE_WIDTH,
        VALUE_TOKENS,
        VALUE_SEQUENCES,
        VALUE_RETURNS_M2,
        VALUE_ERROR_M2,
        ROWS,
    )


def value_fwd(a):
    tokens, dtype, device = a.values.shape[0], a.values.dtype, a.values.device
    loss, slopes, stats = (
        ffi.empty(shape, dtype, device) for shape in ((), (tokens,), (columns.VALUE_WIDTH,))
    )
    if tokens == 0:
        return loss.zero_(), slopes, nothing(stats)
    pieces = piece_count(tokens, a.cu_seqlens)
    rows = ffi.empty((pieces, columns.VALUE_WIDTH), dtype, device)
    parts = ffi.empty((pieces, len(columns.VALUE_MOMENTS), columns.PART_WIDTH), torch.float64, device)
    with ffi.triton_device(device):
        value_fwd_kernel[(pieces,)](
            a.values, a.old_values, a.returns, a.cu_seqlens, a.mask, a.num_items, loss, slopes, stats, rows,
            parts, ffi.counter(a.values), tokens, pieces, a.clip, a.norm_length, AGGREGATION=a.aggregation,
            TILE=columns.POLICY_TILE, BLOCK=BLOCK, ROWS=ROWS, **ffi.launch_options(256, device),
        )  # fmt: skip
    return loss, slopes, stats
