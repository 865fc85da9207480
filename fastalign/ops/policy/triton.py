"""The policy and value losses in Triton. Forward, one launch: a program per sequence (or per tile of tokens,
where sequences do not matter) reads its tokens once for their number and log-ratio if the loss needs these
first, then writes their slopes and one row of sums; the last program to finish adds the rows in index order.
Backward is elementwise. The formulas are in fastalign/ops/math/policy.py."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastalign.ops import columns

from fastalign.ops.math.columns import (  # isort: skip
    CLIP, GMPO, IS_MASK, IS_TRUNCATE, PART_M2, PART_MEAN, PART_WIDTH, POLICY_APPROX_KL, POLICY_CLIP_DUAL, POLICY_CLIP_HIGH,
    POLICY_CLIP_LOW, POLICY_ENTROPY, POLICY_IS_CLIPPED, POLICY_IS_WEIGHT, POLICY_ITEMS, POLICY_KL, POLICY_LOSS, POLICY_NONFINITE,
    POLICY_POLICY, POLICY_RATIO, POLICY_RATIO_M2, POLICY_SEQUENCES, POLICY_TOKENS, POLICY_WIDTH, RATIO_SEQ_MEAN, RATIO_SEQ_SUM,
    RATIO_TOKEN, SAPO, SEQ_MEAN_TOKEN_MEAN, TOKEN_MEAN, TOKEN_SUM, VALUE_CLIPPED, VALUE_ERROR, VALUE_ERROR_M2, VALUE_ERROR_SQ,
    VALUE_ITEMS, VALUE_LOSS, VALUE_NONFINITE, VALUE_RETURNS, VALUE_RETURNS_M2, VALUE_SEQUENCES, VALUE_TOKENS, VALUE_VALUE, VALUE_WIDTH,
)  # fmt: skip
from fastalign.ops.math.moments import merge_lanes, merge_parts, push_moments
from fastalign.ops.math.params import kernel_params
from fastalign.ops.math.policy import clamp_kl, clamp_log_ratio, kl_term, log_ratio, sequence_term, surrogate, token_divisor, value_error
from fastalign.ops.math.scalar import at_least_one, div, exp, is_finite, times_slope
from fastalign.ops.math.segment import scored_tokens, sequence_bounds
from fastalign.ops.policy.native import nothing
from fastalign.ops.policy.params import SCALAR_COUNT
from fastalign.runtime import ffi

BLOCK, ROWS = 512, 64  # tokens, and rows of sums, at a time
WIDTH = tl.constexpr(16)  # of a row, padded


@triton.jit
def _piece(cu_seqlens, k, tokens, TILE: tl.constexpr):
    """First token and end of program k."""
    if cu_seqlens is None:
        begin = k * TILE
        end = tl.minimum(begin + TILE, tokens)
    else:
        begin, end = sequence_bounds(cu_seqlens, k, tokens)
    return begin, end


@triton.jit
def _per(values, t, sequence, scored, PER_SEQUENCE: tl.constexpr):
    """A value per token, or the sequence's one."""
    if PER_SEQUENCE:
        v = tl.where(scored, tl.load(values + sequence), 0.0)
    else:
        v = tl.load(values + t, mask=scored, other=0.0)
    return v


@triton.jit
def _column(x, where):
    return tl.sum(tl.where(where, x.to(tl.float32), 0.0), 0)


@triton.jit
def _store_moments(part, count, shift, difference, square):
    _, mean, m2 = merge_lanes(count, shift, difference, square)
    tl.store(part + PART_MEAN, mean)
    tl.store(part + PART_M2, m2)


class Results(NamedTuple):
    """loss [], stats [STATS], and what they come of: rows [pieces, STATS], parts (mean and m2 of every row, fp64,
    for each m2 column), and the counter of programs that are done."""

    loss: tl.tensor
    stats: tl.tensor
    rows: tl.tensor
    parts: tl.tensor
    counter: tl.tensor


@triton.jit
def _reduce_rows(
    out, num_items, pieces, AGGREGATION: tl.constexpr, STATS: tl.constexpr, TOKENS: tl.constexpr,
    SEQUENCES: tl.constexpr, M2_AT: tl.constexpr, OTHER_M2_AT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """In the program that arrives last: the totals of all rows, the number of items and the loss. OTHER_M2_AT:
    -1 where there is one m2 column."""
    tl.debug_barrier()  # every thread's part of the row is written before this program is counted, and read after
    last = tl.atomic_add(out.counter, 1, sem="acq_rel") == tl.num_programs(0) - 1
    tl.debug_barrier()
    if last:
        c = tl.arange(0, WIDTH)
        totals = tl.zeros([ROWS, WIDTH], tl.float32)
        for first in range(0, pieces, ROWS):
            i = first + tl.arange(0, ROWS)
            totals += tl.load(out.rows + i[:, None] * STATS + c[None, :], mask=(i < pieces)[:, None] & (c < STATS)[None, :], other=0.0)
        total = tl.sum(totals, 0)
        PARTS: tl.constexpr = PART_WIDTH if OTHER_M2_AT < 0 else 2 * PART_WIDTH
        _, _, m2 = merge_parts(out.rows + TOKENS, STATS, out.parts + PART_MEAN, out.parts + PART_M2, PARTS, pieces, ROWS)
        total = tl.where(c == M2_AT, m2.to(tl.float32), total)
        if OTHER_M2_AT >= 0:
            other = out.parts + PART_WIDTH
            _, _, other_m2 = merge_parts(out.rows + TOKENS, STATS, other + PART_MEAN, other + PART_M2, PARTS, pieces, ROWS)
            total = tl.where(c == OTHER_M2_AT, other_m2.to(tl.float32), total)
        if AGGREGATION == TOKEN_SUM:
            items = 1.0
        elif num_items is not None:
            items = at_least_one(tl.load(num_items))
        else:
            items = at_least_one(tl.sum(tl.where(c == (TOKENS if AGGREGATION == TOKEN_MEAN else SEQUENCES), total, 0.0), 0))
        tl.store(out.stats + c, tl.where(c == POLICY_ITEMS, items, total), mask=c < STATS)
        tl.store(out.loss, div(tl.sum(tl.where(c == POLICY_LOSS, total, 0.0), 0), items))


# Neither sizes nor alignments compile anything anew; which tensors are given, and the kinds of the loss, do.
TENSORS = ["logprobs", "old_logprobs", "advantages", "cu_seqlens", "mask", "ref_logprobs", "entropy", "is_weight", "kl_coef",
           "entropy_coef", "num_items", "values", "old_values", "returns", "slopes", "entropy_slopes", "grad", "stats"]  # fmt: skip
SIZES = ["tokens", "pieces"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
def policy_fwd_kernel(
    logprobs, old_logprobs, advantages, cu_seqlens, mask, ref_logprobs, entropy, is_weight, kl_coef, entropy_coef, num_items,
    loss, slopes, entropy_slopes, stats, rows, parts, counter, tokens: tl.int32, pieces: tl.int32, p,
    TILE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """p: PolicyParams."""
    k = tl.program_id(0)
    begin, end = _piece(cu_seqlens, k, tokens, TILE)
    kl_scale, entropy_scale = p.kl_coef, p.entropy_coef
    if kl_coef is not None:
        kl_scale = tl.load(kl_coef)
    if entropy_coef is not None:
        entropy_scale = tl.load(entropy_coef)

    length, sequence_log_rho = 0.0, 0.0
    if p.ratio != RATIO_TOKEN or p.aggregation == SEQ_MEAN_TOKEN_MEAN:
        n, x = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in range(begin, end, BLOCK):
            t = start + tl.arange(0, BLOCK)
            scored = scored_tokens(mask, t, t < end)
            if p.ratio != RATIO_TOKEN:
                lp = tl.load(logprobs + t, mask=scored, other=0.0)
                if old_logprobs is not None:
                    a = _per(advantages, t, k, scored, p.advantages_per_sequence)
                    lr = log_ratio(lp, tl.load(old_logprobs + t, mask=scored, other=0.0))
                    x += tl.where(scored, sequence_term(p, lr, a), 0.0)
            n += scored.to(tl.float32)
        length = tl.sum(n, 0)
        sequence_log_rho = tl.sum(x, 0)
        if p.ratio != RATIO_SEQ_SUM:
            sequence_log_rho = div(sequence_log_rho, tl.maximum(length, 1.0))
        sequence_log_rho = clamp_log_ratio(p.surrogate, sequence_log_rho)
    divisor = token_divisor(p.aggregation, length, p.norm_length)

    zero = tl.zeros([BLOCK], tl.float32)
    s_loss, s_policy, s_tokens, s_ratio, s_approx = zero, zero, zero, zero, zero
    seen, shift, difference, square = zero, zero, zero, zero  # of the ratios
    s_low, s_high, s_dual, s_kl, s_entropy, s_weight, s_outside, s_bad = zero, zero, zero, zero, zero, zero, zero, zero
    for start in range(begin, end, BLOCK):
        t = start + tl.arange(0, BLOCK)
        scored = scored_tokens(mask, t, t < end)
        lp = tl.load(logprobs + t, mask=scored, other=0.0)
        a = _per(advantages, t, k, scored, p.advantages_per_sequence)
        lr = zero
        if old_logprobs is not None:
            lr = log_ratio(lp, tl.load(old_logprobs + t, mask=scored, other=0.0))
        log_rho = clamp_log_ratio(p.surrogate, lr) if p.ratio == RATIO_TOKEN else zero + sequence_log_rho
        rho = exp(log_rho)
        value, slope, low, high, dual = surrogate(p, lp, lr, log_rho, rho, a)
        if p.ratio == RATIO_SEQ_SUM and (p.surrogate == CLIP or p.surrogate == SAPO):
            slope *= length  # the sequence's one term, seen from each of its tokens
        if is_weight is not None:
            given = _per(is_weight, t, k, scored, p.is_per_sequence)
            outside = given > p.is_max
            used = given
            if p.is_mode == IS_TRUNCATE:
                used = tl.where(outside, p.is_max, given)
            if p.is_mode == IS_MASK:
                outside = outside | (given < p.is_min)
            value, slope = used * value, used * slope
            if p.is_mode == IS_MASK:
                value, slope = tl.where(outside, 0.0, value), tl.where(outside, 0.0, slope)
            s_weight += given
            s_outside += (outside & scored).to(tl.float32)
        total = value
        if ref_logprobs is not None:
            kl, kl_slope = kl_term(p.kl_kind, lp, tl.load(ref_logprobs + t, mask=scored, other=0.0))
            term, term_slope = clamp_kl(p.kl_kind, kl, kl_slope, p.kl_clamp)
            if p.kl_bias_correction:
                term, term_slope = rho * term, rho * (term + term_slope)
            total = tl.where(kl_scale != 0.0, total + kl_scale * term, total)
            slope = tl.where(kl_scale != 0.0, slope + kl_scale * term_slope, slope)
            s_kl += tl.where(scored, kl, 0.0)
        if entropy is not None:
            h = tl.load(entropy + t, mask=scored, other=0.0)
            total = tl.where(entropy_scale != 0.0, total - entropy_scale * h, total)
            s_entropy += h
        tl.store(slopes + t, tl.where(scored, div(slope, zero + divisor), 0.0), mask=t < end)
        if entropy_slopes is not None:
            tl.store(entropy_slopes + t, tl.where(scored, div(zero - entropy_scale, zero + divisor), 0.0), mask=t < end)
        s_loss += tl.where(scored, total, 0.0)
        s_policy += tl.where(scored, value, 0.0)
        s_tokens += scored.to(tl.float32)
        s_ratio += tl.where(scored, rho - 1.0, 0.0)
        seen, shift, difference, square = push_moments(rho, scored, seen, shift, difference, square)
        s_approx += tl.where(scored, lr * lr * 0.5, 0.0)
        s_low += (low & scored).to(tl.float32)
        s_high += (high & scored).to(tl.float32)
        s_dual += (dual & scored).to(tl.float32)
        s_bad += tl.where(is_finite(total), 0.0, scored.to(tl.float32))

    row = rows + k * POLICY_WIDTH
    count = tl.sum(s_tokens, 0)
    tl.store(row + POLICY_ITEMS, 0.0)
    tl.store(row + POLICY_LOSS, div(tl.sum(s_loss, 0), divisor))
    tl.store(row + POLICY_POLICY, div(tl.sum(s_policy, 0), divisor))
    tl.store(row + POLICY_TOKENS, count)
    tl.store(row + POLICY_SEQUENCES, 0.0 if cu_seqlens is None else tl.where(count > 0, 1.0, 0.0))
    tl.store(row + POLICY_RATIO, tl.sum(s_ratio, 0))
    tl.store(row + POLICY_RATIO_M2, 0.0)  # by _reduce_rows
    _store_moments(parts + PART_WIDTH * k, seen, shift, difference, square)
    tl.store(row + POLICY_APPROX_KL, tl.sum(s_approx, 0))
    n_low, n_high, n_dual = tl.sum(s_low, 0), tl.sum(s_high, 0), tl.sum(s_dual, 0)
    if (p.ratio == RATIO_SEQ_MEAN or p.ratio == RATIO_SEQ_SUM) and p.surrogate != GMPO:  # one ratio per sequence, which counts once
        n_low, n_high, n_dual = tl.minimum(n_low, 1.0), tl.minimum(n_high, 1.0), tl.minimum(n_dual, 1.0)
    tl.store(row + POLICY_CLIP_LOW, n_low)
    tl.store(row + POLICY_CLIP_HIGH, n_high)
    tl.store(row + POLICY_CLIP_DUAL, n_dual)
    tl.store(row + POLICY_KL, tl.sum(s_kl, 0))
    tl.store(row + POLICY_ENTROPY, tl.sum(s_entropy, 0))
    tl.store(row + POLICY_IS_WEIGHT, tl.sum(s_weight, 0))
    tl.store(row + POLICY_IS_CLIPPED, tl.sum(s_outside, 0))
    tl.store(row + POLICY_NONFINITE, tl.sum(s_bad, 0))
    out = Results(loss, stats, rows, parts, counter)
    _reduce_rows(out, num_items, pieces, p.aggregation, POLICY_WIDTH, POLICY_TOKENS, POLICY_SEQUENCES, POLICY_RATIO_M2, -1, ROWS)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
def value_fwd_kernel(
    values, old_values, returns, cu_seqlens, mask, num_items, loss, slopes, stats, rows, parts, counter,
    tokens: tl.int32, pieces: tl.int32, clip, norm_length, AGGREGATION: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0)
    begin, end = _piece(cu_seqlens, k, tokens, TILE)
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
        n_returns, of_returns, d_returns, sq_returns = push_moments(target, scored, n_returns, of_returns, d_returns, sq_returns)
        n_errors, of_errors, d_errors, sq_errors = push_moments(error, scored, n_errors, of_errors, d_errors, sq_errors)
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
    tl.store(row + VALUE_RETURNS_M2, 0.0)  # as VALUE_ERROR_M2, by _reduce_rows
    tl.store(row + VALUE_ERROR, tl.sum(s_error, 0))
    tl.store(row + VALUE_ERROR_SQ, tl.sum(s_error_sq, 0))
    tl.store(row + VALUE_ERROR_M2, 0.0)
    tl.store(row + VALUE_NONFINITE, tl.sum(s_bad, 0))
    _store_moments(parts + 2 * PART_WIDTH * k, n_returns, of_returns, d_returns, sq_returns)
    _store_moments(parts + (2 * k + 1) * PART_WIDTH, n_errors, of_errors, d_errors, sq_errors)
    out = Results(loss, stats, rows, parts, counter)
    _reduce_rows(out, num_items, pieces, AGGREGATION, VALUE_WIDTH, VALUE_TOKENS, VALUE_SEQUENCES, VALUE_RETURNS_M2, VALUE_ERROR_M2, ROWS)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
def policy_bwd_kernel(grad, slopes, entropy_slopes, stats, d_logprobs, d_entropy, tokens: tl.int64, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g, items = tl.load(grad), tl.zeros([BLOCK], tl.float32) + tl.load(stats + POLICY_ITEMS)
    tl.store(d_logprobs + t, div(times_slope(g, tl.load(slopes + t, mask=t < tokens, other=0.0)), items), mask=t < tokens)
    if entropy_slopes is not None:
        tl.store(d_entropy + t, div(times_slope(g, tl.load(entropy_slopes + t, mask=t < tokens, other=0.0)), items), mask=t < tokens)


def _pieces(tokens, cu_seqlens):
    return triton.cdiv(tokens, columns.POLICY_TILE) if cu_seqlens is None else cu_seqlens.shape[0] - 1


def policy_fwd(a):
    tokens, dtype, device = a.logprobs.shape[0], a.logprobs.dtype, a.logprobs.device
    loss, stats, slopes = (ffi.empty(shape, dtype, device) for shape in ((), (columns.POLICY_WIDTH,), (tokens,)))
    entropy_slopes = ffi.empty((tokens if a.with_entropy_grad else 0,), dtype, device)
    if tokens == 0:
        return loss.zero_(), slopes, entropy_slopes, nothing(stats)
    pieces = _pieces(tokens, a.cu_seqlens)
    rows = ffi.empty((pieces, columns.POLICY_WIDTH), dtype, device)
    parts = ffi.empty((pieces, len(columns.MOMENTS), columns.PART_WIDTH), torch.float64, device)
    with ffi.triton_device(device):
        policy_fwd_kernel[(pieces,)](
            a.logprobs, a.old_logprobs, a.advantages, a.cu_seqlens, a.mask, a.ref_logprobs, a.entropy, a.is_weight,
            a.kl_coef, a.entropy_coef, a.num_items, loss, slopes, entropy_slopes if a.with_entropy_grad else None,
            stats, rows, parts, ffi.counter(a.logprobs), tokens, pieces,
            kernel_params(a.params, SCALAR_COUNT), TILE=columns.POLICY_TILE, BLOCK=BLOCK, ROWS=ROWS,
            **ffi.launch_options(256, device, 128),
        )  # fmt: skip
    return loss, slopes, entropy_slopes, stats


def value_fwd(a):
    tokens, dtype, device = a.values.shape[0], a.values.dtype, a.values.device
    loss, slopes, stats = (ffi.empty(shape, dtype, device) for shape in ((), (tokens,), (columns.VALUE_WIDTH,)))
    if tokens == 0:
        return loss.zero_(), slopes, nothing(stats)
    pieces = _pieces(tokens, a.cu_seqlens)
    rows = ffi.empty((pieces, columns.VALUE_WIDTH), dtype, device)
    parts = ffi.empty((pieces, len(columns.VALUE_MOMENTS), columns.PART_WIDTH), torch.float64, device)
    with ffi.triton_device(device):
        value_fwd_kernel[(pieces,)](
            a.values, a.old_values, a.returns, a.cu_seqlens, a.mask, a.num_items, loss, slopes, stats, rows, parts,
            ffi.counter(a.values), tokens, pieces, a.clip, a.norm_length, AGGREGATION=a.aggregation, TILE=columns.POLICY_TILE,
            BLOCK=BLOCK, ROWS=ROWS, **ffi.launch_options(256, device),
        )  # fmt: skip
    return loss, slopes, stats


def policy_bwd(a):
    tokens, device, with_entropy = a.slopes.shape[0], a.slopes.device, a.entropy_slopes.numel() > 0
    d_logprobs, d_entropy = (ffi.empty(tuple(x.shape), x.dtype, device) for x in (a.slopes, a.entropy_slopes))
    if tokens:
        with ffi.triton_device(device):
            policy_bwd_kernel[(triton.cdiv(tokens, BLOCK),)](
                a.grad, a.slopes, a.entropy_slopes if with_entropy else None, a.stats, d_logprobs,
                d_entropy if with_entropy else None, tokens, BLOCK=BLOCK, **ffi.launch_options(256, device),
            )  # fmt: skip
    return d_logprobs, d_entropy
