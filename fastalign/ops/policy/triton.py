"""The policy loss in Triton. Forward, one launch: a program per sequence (or per tile of tokens, where
sequences do not matter) reads its tokens once for their number and log-ratio if the loss needs these first,
then writes their slopes and one row of sums; the last program to finish adds the rows in index order
(triton_sums.py). Backward, which the value loss (triton_value.py) shares, is elementwise. The formulas are in
fastalign/ops/math/policy.py."""

import torch
import triton
import triton.language as tl

from fastalign.ops import columns

from fastalign.ops.math.columns import (  # isort: skip
    CLIP, GMPO, IS_MASK, IS_TRUNCATE, PART_WIDTH, POLICY_APPROX_KL, POLICY_CLIP_DUAL, POLICY_CLIP_HIGH,
    POLICY_CLIP_LOW, POLICY_ENTROPY, POLICY_IS_CLIPPED, POLICY_IS_WEIGHT, POLICY_ITEMS, POLICY_KL,
    POLICY_LOSS, POLICY_NONFINITE, POLICY_POLICY, POLICY_RATIO, POLICY_RATIO_M2, POLICY_SEQUENCES,
    POLICY_TOKENS, POLICY_WIDTH, RATIO_SEQ_MEAN, RATIO_SEQ_SUM, RATIO_TOKEN, SAPO, SEQ_MEAN_TOKEN_MEAN,
)  # fmt: skip
from fastalign.ops.math.moments import push_moments
from fastalign.ops.math.params import kernel_params
from fastalign.ops.math.policy import (
    clamp_kl,
    clamp_log_ratio,
    kl_term,
    log_ratio,
    sequence_term,
    surrogate,
    token_divisor,
)
from fastalign.ops.math.scalar import div, exp, is_finite, times_slope
from fastalign.ops.math.segment import scored_tokens
from fastalign.ops.policy import triton_value
from fastalign.ops.policy.params import SCALAR_COUNT, nothing
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

value_fwd = triton_value.value_fwd


@triton.jit
def _per(values, t, sequence, scored, PER_SEQUENCE: tl.constexpr):
    """A value per token, or the sequence's one."""
    if PER_SEQUENCE:
        v = tl.where(scored, tl.load(values + sequence), 0.0)
    else:
        v = tl.load(values + t, mask=scored, other=0.0)
    return v


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
def policy_fwd_kernel(
    logprobs, old_logprobs, advantages, cu_seqlens, mask, ref_logprobs, entropy, is_weight, kl_coef,
    entropy_coef, num_items, loss, slopes, entropy_slopes, stats, rows, parts, counter, tokens: tl.int32,
    pieces: tl.int32, p, TILE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """p: PolicyParams."""
    k = tl.program_id(0)
    begin, end = piece_bounds(cu_seqlens, k, tokens, TILE)
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
    s_low, s_high, s_dual, s_kl, s_entropy, s_weight, s_outside, s_bad = (
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
        zero,
    )
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
            tl.store(
                entropy_slopes + t,
                tl.where(scored, div(zero - entropy_scale, zero + divisor), 0.0),
                mask=t < end,
            )
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
    tl.store(row + POLICY_RATIO_M2, 0.0)  # by reduce_rows
    store_moments(parts + PART_WIDTH * k, seen, shift, difference, square)
    tl.store(row + POLICY_APPROX_KL, tl.sum(s_approx, 0))
    n_low, n_high, n_dual = tl.sum(s_low, 0), tl.sum(s_high, 0), tl.sum(s_dual, 0)
    if (
        p.ratio == RATIO_SEQ_MEAN or p.ratio == RATIO_SEQ_SUM
    ) and p.surrogate != GMPO:  # one ratio per sequence, which counts once
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
    reduce_rows(
        out,
        num_items,
        pieces,
        p.aggregation,
        POLICY_WIDTH,
        POLICY_TOKENS,
        POLICY_SEQUENCES,
        POLICY_RATIO_M2,
        -1,
        ROWS,
    )


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
def policy_bwd_kernel(
    grad, slopes, entropy_slopes, stats, d_logprobs, d_entropy, tokens: tl.int64, BLOCK: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g, items = tl.load(grad), tl.zeros([BLOCK], tl.float32) + tl.load(stats + POLICY_ITEMS)
    tl.store(
        d_logprobs + t,
        div(times_slope(g, tl.load(slopes + t, mask=t < tokens, other=0.0)), items),
        mask=t < tokens,
    )
    if entropy_slopes is not None:
        tl.store(
            d_entropy + t,
            div(times_slope(g, tl.load(entropy_slopes + t, mask=t < tokens, other=0.0)), items),
            mask=t < tokens,
        )


def policy_fwd(a):
    tokens, dtype, device = a.logprobs.shape[0], a.logprobs.dtype, a.logprobs.device
    loss, stats, slopes = (
        ffi.empty(shape, dtype, device) for shape in ((), (columns.POLICY_WIDTH,), (tokens,))
    )
    entropy_slopes = ffi.empty((tokens if a.with_entropy_grad else 0,), dtype, device)
    if tokens == 0:
        return loss.zero_(), slopes, entropy_slopes, nothing(stats)
    pieces = piece_count(tokens, a.cu_seqlens)
    rows = ffi.empty((pieces, columns.POLICY_WIDTH), dtype, device)
    parts = ffi.empty((pieces, len(columns.MOMENTS), columns.PART_WIDTH), torch.float64, device)
    with ffi.triton_device(device):
        policy_fwd_kernel[(pieces,)](
            a.logprobs, a.old_logprobs, a.advantages, a.cu_seqlens, a.mask, a.ref_logprobs, a.entropy,
            a.is_weight, a.kl_coef, a.entropy_coef, a.num_items, loss, slopes,
            entropy_slopes if a.with_entropy_grad else None, stats, rows, parts, ffi.counter(a.logprobs),
            tokens, pieces, kernel_params(a.params, SCALAR_COUNT), TILE=columns.POLICY_TILE, BLOCK=BLOCK,
            ROWS=ROWS, **ffi.launch_options(256, device, 128),
        )  # fmt: skip
    return loss, slopes, entropy_slopes, stats


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
