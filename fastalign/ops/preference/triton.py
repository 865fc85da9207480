"""The pair kernel in Triton. Forward, one launch: a program per pair side sums its sequence, and the last one
to finish evaluates the table of all pairs in index order. Backward: a program per sequence walks the pairs in
index order. The formulas are in fastalign/ops/math/pair.py."""

import triton
import triton.language as tl

from fastalign.ops import columns
from fastalign.ops.math.columns import (
    CHOSEN,
    MEAN,
    SEQ_MEAN,
    SUM_KL,
    SUM_LENGTH,
    SUM_POLICY,
    SUM_RATIO,
    SUM_SFT,
    SUM_SFT_LENGTH,
    SUM_WIDTH,
    TAB_CHOSEN,
    TAB_KL_CHOSEN,
    TAB_KL_REJECTED,
    TAB_LOGIT,
    TAB_NLL,
    TAB_PAIR,
    TAB_REJECTED,
    TAB_REWARD_CHOSEN,
    TAB_REWARD_REJECTED,
    TAB_SFT,
    TAB_VALID,
    TABLE_WIDTH,
    TOKEN_MEAN_GLOBAL,
)
from fastalign.ops.math.pair import PairValues, SideSums, evaluate_pair
from fastalign.ops.math.params import kernel_params
from fastalign.ops.math.scalar import div, is_finite, one_if_zero, times_slope
from fastalign.ops.math.segment import scored_tokens, sequence_bounds, sequence_share
from fastalign.ops.preference.op import PairTensors, PairTokens
from fastalign.ops.preference.params import SCALAR_COUNT
from fastalign.runtime import ffi

TOKENS = 1024  # of a sequence, at a time
PAIRS = 128  # of the table, at a time


@triton.jit
def _sequence(pairs, i):
    """Sequence number of pair side i = 2 pair + side; without `pairs` they are the sequences in order."""
    s = i
    if pairs is not None:
        s = tl.load(pairs + i)
    return s


@triton.jit
def _token_ratio(logprob, ref_logprobs, t, scored, reference, low, high):
    """Each token's clamped log-ratio, and whether its gradient passes the clamp."""
    d = logprob
    if ref_logprobs is not None:
        r = tl.load(ref_logprobs + t, mask=scored, other=0.0)
        ratio = tl.where(reference == 1.0, tl.where(d == r, 0.0, d - r), d - reference * r)
        d = tl.where(reference == 0.0, d, ratio)
    return tl.where(d < low, low, tl.where(d > high, high, d)), (d < low) == (d > high)


@triton.jit
def _sides(i, cu_seqlens, pairs, tokens, sequences):
    """Of pair side i, side i % 2 of pair i // 2: whether the pair names sequences (CUDA does not check), its
    first token and end, those of the other side."""
    s, partner = _sequence(pairs, i), _sequence(pairs, i ^ 1)
    known = (s >= 0) & (s < sequences) & (partner >= 0) & (partner < sequences)
    begin, end = sequence_bounds(cu_seqlens, tl.where(known, s, 0), tokens)
    other_begin, other_end = sequence_bounds(cu_seqlens, tl.where(known, partner, 0), tokens)
    return known, begin, end, other_begin, other_end


@triton.jit
def _scored_between(mask, begin, end, TOKENS: tl.constexpr):
    n = tl.zeros([TOKENS], tl.int32)
    for start in range(begin, end, TOKENS):
        t = start + tl.arange(0, TOKENS)
        n += scored_tokens(mask, t, t < end).to(tl.int32)
    return tl.sum(n, 0).to(tl.float32)


@triton.jit
def _sum_side(
    row, logprobs, ref_logprobs, kl, mask, weights, known, begin, end, shorter, p, TOKENS: tl.constexpr
):
    """One row of the sums: of the tokens from begin to end, those beyond the first `shorter` weighed by
    ld_alpha. NaN where the sequence is not known."""
    policy, ratio = tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32)
    kl_sum, sft = tl.zeros([TOKENS], tl.float32), tl.zeros([TOKENS], tl.float32)
    length, sft_length, before = tl.zeros([TOKENS], tl.int32), tl.zeros([TOKENS], tl.int32), 0
    for start in range(begin, end, TOKENS):
        t = start + tl.arange(0, TOKENS)
        scored = scored_tokens(mask, t, t < end)
        one = scored.to(tl.int32)
        logprob = tl.load(logprobs + t, mask=t < end, other=0.0)
        w = tl.zeros([TOKENS], tl.float32) + 1.0
        if weights is not None:
            w = tl.load(weights + t, mask=scored, other=0.0)
        rank = (before + tl.cumsum(one, 0) - one).to(tl.float32)
        w = tl.where(rank < shorter, w, w * p.ld_alpha)
        d, _ = _token_ratio(
            logprob, ref_logprobs, t, scored, p.reference, p.token_clamp_low, p.token_clamp_high
        )
        # Selected, not multiplied: what masked tokens hold must not leak.
        policy += tl.where(scored, w * logprob, 0.0)
        ratio += tl.where(scored, w * d, 0.0)
        if kl is not None:
            kl_sum += tl.load(kl + t, mask=scored, other=0.0)
        # Every row but the last of a sequence predicts something.
        counted = (t < end - 1) if p.sft_include_prompt else scored
        sft += tl.where(counted, logprob, 0.0)
        sft_length += counted.to(tl.int32)
        length += one
        before += tl.sum(one, 0)

    nothing = tl.where(known, 0.0, float("nan"))
    tl.store(row + SUM_POLICY, tl.sum(policy, 0) + nothing)
    tl.store(row + SUM_RATIO, tl.sum(ratio, 0) + nothing)
    tl.store(row + SUM_LENGTH, tl.sum(length, 0).to(tl.float32))
    tl.store(row + SUM_KL, tl.sum(kl_sum, 0) + nothing)
    tl.store(row + SUM_SFT, tl.sum(sft, 0) + nothing)
    tl.store(row + SUM_SFT_LENGTH, tl.sum(sft_length, 0).to(tl.float32))


@triton.jit
def _own(values, per_pair, N: tl.constexpr, i, live, default):
    """Of pairs i the N-th of PairTensors, which holds one value for all unless bit N of per_pair is set;
    without it the parameters' number."""
    v = tl.zeros_like(i).to(tl.float32) + default
    if values is not None:
        v = tl.load(values + i * ((per_pair >> N) & 1), mask=live, other=0.0)
    return v


@triton.jit
def _side_sums(row, live):
    return SideSums(
        tl.load(row + SUM_RATIO, mask=live, other=0.0),
        tl.load(row + SUM_LENGTH, mask=live, other=0.0),
        tl.load(row + SUM_KL, mask=live, other=0.0),
    )


# Neither sizes nor alignments compile anything anew; which tensors are given, and the kinds of the loss, do.
# Triton specialises on whatever lies in a tuple: such arguments come one by one, in the order of their class.
SIZES = ["per_pair", "tokens", "sequences", "count", "grad_stride"]
TENSORS = [*PairTokens._fields, *PairTensors._fields, "sums", "grad", "table"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
def preference_fwd_kernel(
    logprobs, ref_logprobs, kl, cu_seqlens, pairs, mask, weights,
    beta, omega, soft_labels, gamma_ext, target, anchor, valid, num_items, num_sft_tokens, per_pair: tl.int32,
    sums, loss, pair_loss, table, counter, tokens: tl.int32, sequences: tl.int32, count: tl.int32, p,
    WITH_SUMS: tl.constexpr, WITH_TABLE: tl.constexpr, TOKENS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """p: PairParams."""
    last = WITH_TABLE
    if WITH_SUMS:
        side = tl.program_id(0)
        known, begin, end, other_begin, other_end = _sides(side, cu_seqlens, pairs, tokens, sequences)
        shorter = 0.0  # tokens of the partner, beyond which LD-DPO weighs by ld_alpha
        if p.ld_alpha != 1.0:
            shorter = _scored_between(mask, other_begin, other_end, TOKENS)
        _sum_side(
            sums + side * SUM_WIDTH,
            logprobs,
            ref_logprobs,
            kl,
            mask,
            weights,
            known,
            begin,
            end,
            shorter,
            p,
            TOKENS,
        )
        if WITH_TABLE:
            tl.debug_barrier()  # every thread's sums are written before this program is counted, and read after
            last = tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1
            tl.debug_barrier()
    if last:
        # Rows before their normalisers, and the counts that those need.
        pairs_here, sft_here = tl.zeros([PAIRS], tl.int32), tl.zeros([PAIRS], tl.float32)
        for first in range(0, count, PAIRS):
            i = first + tl.arange(0, PAIRS)
            live = i < count
            w, row = sums + i * (2 * SUM_WIDTH), table + i * TABLE_WIDTH
            win, lose = _side_sums(w, live), _side_sums(w + SUM_WIDTH, live)
            own = PairValues(
                _own(beta, per_pair, 0, i, live, p.beta),
                _own(omega, per_pair, 1, i, live, 1.0),
                _own(soft_labels, per_pair, 2, i, live, 1.0),
                _own(gamma_ext, per_pair, 3, i, live, 0.0),
                _own(target, per_pair, 4, i, live, p.target),
                _own(anchor, per_pair, 5, i, live, p.anchor),
            )
            value, d_w, d_l, d_kl_w, d_kl_l, reward_w, reward_l, h = evaluate_pair(win, lose, own, p)
            keep = live & ((win.length > 0) | (lose.length > 0))
            if valid is not None:
                keep = keep & (tl.load(valid + i, mask=live, other=0) != 0)
            if p.drop_nonfinite:
                sft = tl.load(w + SUM_SFT, mask=live, other=0.0)
                keep = (
                    keep
                    & is_finite(value)
                    & is_finite(h)
                    & is_finite(tl.where(p.sft_weight != 0.0, sft, 0.0))
                )
            tl.store(row + TAB_CHOSEN, tl.where(keep, d_w, 0.0), mask=live)
            tl.store(row + TAB_REJECTED, tl.where(keep, d_l, 0.0), mask=live)
            tl.store(row + TAB_KL_CHOSEN, tl.where(keep, d_kl_w, 0.0), mask=live)
            tl.store(row + TAB_KL_REJECTED, tl.where(keep, d_kl_l, 0.0), mask=live)
            tl.store(row + TAB_REWARD_CHOSEN, reward_w, mask=live)
            tl.store(row + TAB_REWARD_REJECTED, reward_l, mask=live)
            tl.store(row + TAB_LOGIT, h, mask=live)
            tl.store(row + TAB_VALID, keep.to(tl.float32), mask=live)
            tl.store(row + TAB_PAIR, tl.where(keep, value, 0.0), mask=live)
            pairs_here += keep.to(tl.int32)
            sft_here += tl.where(keep, tl.load(w + SUM_SFT_LENGTH, mask=live, other=0.0), 0.0)

        local = tl.sum(pairs_here, 0).to(tl.float32)
        items, sft_items = local, tl.sum(sft_here, 0)
        if num_items is not None:
            items = tl.load(num_items)
        if num_sft_tokens is not None:
            sft_items = tl.load(num_sft_tokens)
        pair_norm = one_if_zero(items) if p.reduction == MEAN else 1.0
        total = tl.zeros([PAIRS], tl.float32)
        tl.debug_barrier()
        for first in range(0, count, PAIRS):
            i = first + tl.arange(0, PAIRS)
            live = i < count
            w, row = sums + i * (2 * SUM_WIDTH), table + i * TABLE_WIDTH
            for column in tl.static_range(TAB_CHOSEN, TAB_SFT):
                tl.store(row + column, div(tl.load(row + column, mask=live, other=0.0), pair_norm), mask=live)
            kept = tl.load(row + TAB_VALID, mask=live, other=0.0) > 0
            value = div(tl.load(row + TAB_PAIR, mask=live, other=0.0), pair_norm)
            norm = tl.zeros([PAIRS], tl.float32) + (
                one_if_zero(sft_items) if p.sft_norm == TOKEN_MEAN_GLOBAL else one_if_zero(items)
            )
            if p.sft_norm == SEQ_MEAN:
                norm *= one_if_zero(tl.load(w + SUM_SFT_LENGTH, mask=live, other=0.0))
            if p.reduction != MEAN:
                norm = div(norm, one_if_zero(local))
            with_sft = kept & (tl.zeros([PAIRS], tl.float32) + p.sft_weight != 0.0)
            nll = tl.where(
                with_sft, div(-p.sft_weight * tl.load(w + SUM_SFT, mask=live, other=0.0), norm), 0.0
            )
            tl.store(row + TAB_SFT, tl.where(with_sft, div(-p.sft_weight, norm), 0.0), mask=live)
            tl.store(row + TAB_PAIR, value, mask=live)
            tl.store(row + TAB_NLL, nll, mask=live)
            tl.store(pair_loss + i, value + nll, mask=live)
            total += tl.where(live, value + nll, 0.0)
        tl.store(loss, tl.sum(total, 0))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
def preference_bwd_kernel(
    logprobs, ref_logprobs, kl, cu_seqlens, pairs, mask, weights, grad, sums, table, d_logprobs, d_kl,
    grad_stride: tl.int32, tokens: tl.int32, sequences: tl.int32, count: tl.int32, reference, ld_alpha,
    token_clamp_low, token_clamp_high, SFT_INCLUDE_PROMPT: tl.constexpr, TOKENS: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    begin, end = sequence_bounds(cu_seqlens, s, tokens)
    share_begin, share_end = sequence_share(cu_seqlens, s, sequences, tokens)
    first_pair, last_pair = 0, count
    if pairs is None:
        first_pair, last_pair = s // 2, tl.minimum(s // 2 + 1, count)
    clamps = (token_clamp_low > float("-inf")) | (token_clamp_high < float("inf"))
    before = 0
    for start in range(share_begin, share_end, TOKENS):
        t = start + tl.arange(0, TOKENS)
        own_token = (t >= begin) & (t < end)
        scored = scored_tokens(mask, t, own_token)
        one = scored.to(tl.int32)
        rank = (before + tl.cumsum(one, 0) - one).to(tl.float32)
        before += tl.sum(one, 0)
        slope, kl_slope, sft_slope = tl.zeros([TOKENS], tl.float32), 0.0, 0.0
        for block in range(first_pair, last_pair, PAIRS):
            # Find the blocks that name this sequence at once, then go through their pairs in order.
            i = block + tl.arange(0, PAIRS)
            live = i < last_pair
            named = 0
            if pairs is None:
                named = 1
            else:
                chosen, rejected = (
                    tl.load(pairs + 2 * i, mask=live, other=-1),
                    tl.load(pairs + 2 * i + 1, mask=live, other=-1),
                )
                named = tl.max(((chosen == s) | (rejected == s)).to(tl.int32), 0)
            if named != 0:
                for pair in range(block, tl.minimum(block + PAIRS, last_pair)):
                    g, row = tl.load(grad + pair * grad_stride), table + pair * TABLE_WIDTH
                    for side in tl.static_range(2):
                        here = _sequence(pairs, 2 * pair + side) == s
                        own = tl.where(here, times_slope(g, tl.load(row + TAB_CHOSEN + side)), 0.0)
                        partner_length = tl.load(sums + (2 * pair + 1 - side) * SUM_WIDTH + SUM_LENGTH)
                        slope += tl.where(rank < partner_length, own, times_slope(own, ld_alpha))
                        kl_slope += tl.where(here, times_slope(g, tl.load(row + TAB_KL_CHOSEN + side)), 0.0)
                        if side == CHOSEN:
                            sft_slope += tl.where(here, times_slope(g, tl.load(row + TAB_SFT)), 0.0)
        if weights is not None:
            slope = times_slope(slope, tl.load(weights + t, mask=scored, other=0.0))
        passes = scored
        if clamps:
            logprob = tl.load(logprobs + t, mask=scored, other=0.0)
            _, is_open = _token_ratio(
                logprob, ref_logprobs, t, scored, reference, token_clamp_low, token_clamp_high
            )
            passes = scored & is_open
        in_sft = (t < end - 1) if SFT_INCLUDE_PROMPT else scored
        gradient = tl.where(passes, slope, 0.0) + tl.where(in_sft, sft_slope, 0.0)
        tl.store(d_logprobs + t, tl.where(own_token, gradient, float("nan")), mask=t < share_end)
        if d_kl is not None:
            tl.store(
                d_kl + t,
                tl.where(own_token, tl.where(scored, kl_slope, 0.0), float("nan")),
                mask=t < share_end,
            )


def _per_pair(given):
    """Bit n: whether the n-th holds a value per pair, not one for all."""
    return sum((x is not None and x.numel() > 1) << n for n, x in enumerate(given))


def preference_fwd(a):
    t, given = a.tokens, a.given
    like = t.logprobs if a.sums is None else a.sums
    dtype, device, with_sums = like.dtype, like.device, a.sums is None
    out_sums = ffi.empty((a.count, 2, columns.SUM_WIDTH), dtype, device) if with_sums else a.sums.clone()
    loss = ffi.empty(() if a.table else (0,), dtype, device)
    pair_loss = ffi.empty((a.count,) if a.table else (0,), dtype, device)
    rows = ffi.empty((a.count, columns.TABLE_WIDTH) if a.table else (0,), dtype, device)
    if a.count == 0:
        return loss.zero_(), pair_loss, rows, out_sums
    tokens, sequences = (t.logprobs.shape[0], t.cu_seqlens.shape[0] - 1) if with_sums else (0, 0)
    with ffi.triton_device(device):
        preference_fwd_kernel[(2 * a.count if with_sums else 1,)](
            *t, *given, _per_pair(given), out_sums, loss, pair_loss, rows,
            ffi.counter(like) if with_sums and a.table else None, tokens, sequences, a.count,
            kernel_params(a.params, SCALAR_COUNT), WITH_SUMS=with_sums, WITH_TABLE=bool(a.table),
            TOKENS=TOKENS, PAIRS=PAIRS, **ffi.launch_options(PAIRS, device, 168),
        )  # fmt: skip
    return loss, pair_loss, rows, out_sums


def preference_bwd(a):
    t = a.tokens
    tokens, sequences, device = t.logprobs.shape[0], t.cu_seqlens.shape[0] - 1, t.logprobs.device
    d_logprobs = ffi.empty((tokens,), t.logprobs.dtype, device)
    d_kl = ffi.empty((tokens if a.with_kl else 0,), t.logprobs.dtype, device)
    p = a.params
    if tokens:
        with ffi.triton_device(device):
            preference_bwd_kernel[(sequences,)](
                *t, a.grad, a.sums, a.table, d_logprobs, d_kl if a.with_kl else None, a.grad.dim(), tokens,
                sequences, a.table.shape[0], p.reference, p.ld_alpha, p.token_clamp_low, p.token_clamp_high,
                SFT_INCLUDE_PROMPT=p.sft_include_prompt, TOKENS=TOKENS, PAIRS=PAIRS,
                **ffi.launch_options(PAIRS, device, 168),
            )  # fmt: skip
    return d_logprobs, d_kl
