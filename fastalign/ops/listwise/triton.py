"""The list kernel in Triton: a program per list, and the last one to finish applies the normalisers, which
count all lists, and reduces the loss, both in a fixed order. The formulas are in
fastalign/ops/math/list.py."""

from typing import NamedTuple

import triton
import triton.language as tl

from fastalign.ops import columns
from fastalign.ops.listwise.op import ListTensors
from fastalign.ops.listwise.params import LIST_SCALAR_COUNT
from fastalign.ops.math.columns import (
    LIST_BEST,
    LIST_CORRECT,
    LIST_MARGIN,
    LIST_NLL,
    LIST_PAIRS,
    LIST_TABLE_WIDTH,
    LIST_TERM,
    LIST_TOP,
    LIST_VALID,
    LIST_WORST,
    MAX_LIST,
    MEAN,
    SEQ_MEAN,
    SUM_LENGTH,
    SUM_POLICY,
    SUM_RATIO,
    SUM_WIDTH,
    TOKEN_MEAN_GLOBAL,
)
from fastalign.ops.math.list import all_finite, evaluate_list
from fastalign.ops.math.params import kernel_params
from fastalign.ops.math.scalar import div, is_finite, one_if_zero, power
from fastalign.runtime import ffi

BLOCK = 256  # sequences or lists that the last program looks at together


@triton.jit
def _bounds(list_offsets, lists, sequences, n, live):
    """First sequence and number of responses of lists n; -1 responses where the list does not lie inside, is
    too long, or is the first (the last) and leaves out sequences. The values of list_offsets cannot be
    checked without a synchronisation."""
    begin, end = (
        tl.load(list_offsets + n, mask=live, other=0),
        tl.load(list_offsets + n + 1, mask=live, other=0),
    )
    good = (begin >= 0) & (end >= begin) & (end <= sequences) & (end - begin <= MAX_LIST)
    good = good & ((n > 0) | (begin == 0)) & ((n < lists - 1) | (end == sequences))
    return begin, tl.where(good, end - begin, -1)


@triton.jit
def _sft_weight(p, count):
    return (
        p.sft_weight
        * power(one_if_zero(count - 1.0), p.sft_power)
        * tl.where((count > 1) | (p.sft_power == 0), 1.0, 0.0)
    )


class Results(NamedTuple):
    """What the last program finishes."""

    loss: tl.tensor
    list_loss: tl.tensor
    slopes: tl.tensor
    table: tl.tensor


# Neither sizes nor alignments compile anything anew; which tensors are given, and the kind of the loss, do.
SIZES = ["beta_stride", "sequences", "lists"]
TENSORS = [
    "sums",
    "list_offsets",
    "scores",
    *ListTensors._fields,
    "loss",
    "list_loss",
    "slopes",
    "rewards",
    "table",
]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=TENSORS)
def listwise_fwd_kernel(
    sums, list_offsets, scores, beta, num_items, num_sft_tokens, loss, list_loss, slopes, rewards, table,
    counter, beta_stride: tl.int32, sequences: tl.int32, lists: tl.int32, p, K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """p: ListParams."""
    n = tl.program_id(0)
    begin, count = _bounds(list_offsets, lists, sequences, n, True)
    row, i = table + n.to(tl.int64) * LIST_TABLE_WIDTH, tl.arange(0, K)
    if (
        count < 0
    ):  # it must count, or its NaN would be dropped. Such lists and their neighbours together write every sequence.
        first = tl.where(n == 0, 0, tl.minimum(tl.maximum(begin, 0), sequences))
        last = tl.where(
            n == lists - 1, sequences, tl.minimum(tl.maximum(tl.load(list_offsets + n + 1), 0), sequences)
        )
        for start in range(first, last, K):
            tl.store(slopes + start + i, float("nan"), mask=start + i < last)
            tl.store(rewards + start + i, float("nan"), mask=start + i < last)
        column = tl.arange(0, 16)
        blank = tl.where(column == LIST_TERM, float("nan"), tl.where(column == LIST_VALID, 1.0, 0.0))
        tl.store(row + column, blank, mask=column < LIST_TABLE_WIDTH)
    else:
        live, at = i < count, begin + i
        of = sums + at * SUM_WIDTH
        policy, ratio = (
            tl.load(of + SUM_POLICY, mask=live, other=0.0),
            tl.load(of + SUM_RATIO, mask=live, other=0.0),
        )
        length, r = tl.load(of + SUM_LENGTH, mask=live, other=0.0), tl.load(scores + at, mask=live, other=0.0)
        b = p.beta
        if beta is not None:
            b = tl.load(beta + n * beta_stride)
        norm = power(tl.maximum(length, 1.0), p.length_norm)
        s = b * div(ratio, norm)
        tl.store(rewards + at, s, mask=live)
        best = tl.argmax(tl.where(live, r, float("-inf")), 0)
        lowest = tl.min(tl.where(live, r, float("inf")), 0)
        worst = tl.max(tl.where(live & (r == lowest), i, 0), 0)
        values, slope, pairs, correct, margin = evaluate_list(
            p.kind, p.link, p.pair_gain, s, r, live, p.target, p.reward_temperature
        )
        all_pairs = tl.sum(pairs, 0)
        scale = div(p.list_weight, tl.maximum(all_pairs, 1.0)) if p.pair_mean else p.list_weight
        bad = tl.where(all_finite(r, live), 0.0, float("nan"))
        term = tl.where(p.list_weight == 0.0, 0.0, scale * tl.sum(values, 0)) + bad
        slope = tl.where(p.list_weight == 0.0, 0.0, scale * div(slope * b, norm)) + bad
        best_sum = tl.sum(tl.where(i == best, policy, 0.0), 0)
        nll = tl.where(p.sft_weight == 0.0, 0.0, -_sft_weight(p, count.to(tl.float32)) * best_sum)
        keep = tl.max(length, 0) > 0
        if p.drop_nonfinite:
            keep = keep & all_finite(s, live) & is_finite(term) & is_finite(nll)
        tl.store(slopes + at, tl.where(keep, slope, 0.0), mask=live)
        top = tl.sum(tl.where(i == best, tl.where((pairs > 0) & (pairs == correct), 1.0, 0.0), 0.0), 0)
        tl.store(row + LIST_TERM, term)
        tl.store(row + LIST_NLL, nll)
        tl.store(row + LIST_VALID, keep.to(tl.float32))
        tl.store(row + LIST_PAIRS, all_pairs)
        tl.store(row + LIST_CORRECT, tl.sum(correct, 0))
        tl.store(row + LIST_MARGIN, tl.sum(margin, 0))
        tl.store(row + LIST_TOP, top)
        tl.store(row + LIST_BEST, best.to(tl.float32))
        tl.store(row + LIST_WORST, worst.to(tl.float32))
    tl.debug_barrier()  # every thread's results are written before this program is counted, and read after
    last_one = tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1
    tl.debug_barrier()
    if last_one:
        out = Results(loss, list_loss, slopes, table)
        _normalise(sums, list_offsets, num_items, num_sft_tokens, out, sequences, lists, p, BLOCK)


@triton.jit
def _normalise(sums, list_offsets, num_items, num_sft_tokens, out, sequences, lists, p, BLOCK: tl.constexpr):
    """Divides everything by the normalisers and sums the loss. The slopes of lists that do not count are 0
    already."""
    lane = tl.arange(0, BLOCK)
    lists_here, tokens_here = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, lists, BLOCK):
        n = start + lane
        live = n < lists
        begin, count = _bounds(list_offsets, lists, sequences, n, live)
        row = out.table + n.to(tl.int64) * LIST_TABLE_WIDTH
        kept = live & (tl.load(row + LIST_VALID, mask=live, other=0.0) > 0)
        best = begin + tl.load(row + LIST_BEST, mask=live, other=0.0).to(tl.int32)
        lists_here += kept.to(tl.int32)
        tokens_here += tl.load(
            sums + best.to(tl.int64) * SUM_WIDTH + SUM_LENGTH, mask=kept & (count > 0), other=0.0
        )
    local = tl.sum(lists_here, 0).to(tl.float32)
    items, tokens = local, tl.sum(tokens_here, 0)
    if num_items is not None:
        items = tl.load(num_items)
    if num_sft_tokens is not None:
        tokens = tl.load(num_sft_tokens)
    norm = one_if_zero(items) if p.reduction == MEAN else 1.0
    for start in range(0, sequences, BLOCK):
        at = start + lane
        tl.store(
            out.slopes + at,
            div(tl.load(out.slopes + at, mask=at < sequences, other=0.0), norm),
            mask=at < sequences,
        )
    tl.debug_barrier()  # the best responses' slopes are changed below, by other threads
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, lists, BLOCK):
        n = start + lane
        live = n < lists
        begin, count = _bounds(list_offsets, lists, sequences, n, live)
        row = out.table + n.to(tl.int64) * LIST_TABLE_WIDTH
        kept = live & (tl.load(row + LIST_VALID, mask=live, other=0.0) > 0)
        best = begin + tl.load(row + LIST_BEST, mask=live, other=0.0).to(tl.int32)
        with_best = kept & (count > 0)
        divisor = tl.zeros([BLOCK], tl.float32) + (
            one_if_zero(tokens) if p.sft_norm == TOKEN_MEAN_GLOBAL else one_if_zero(items)
        )
        if p.sft_norm == SEQ_MEAN:
            divisor *= one_if_zero(
                tl.load(sums + best.to(tl.int64) * SUM_WIDTH + SUM_LENGTH, mask=with_best, other=0.0)
            )
        if p.reduction != MEAN:
            divisor = div(divisor, one_if_zero(local))
        term = tl.where(kept, div(tl.load(row + LIST_TERM, mask=live, other=0.0), norm), 0.0)
        nll = tl.where(kept, div(tl.load(row + LIST_NLL, mask=live, other=0.0), divisor), 0.0)
        weight = div(_sft_weight(p, count.to(tl.float32)), divisor)
        slope = tl.load(out.slopes + best, mask=with_best, other=0.0)
        tl.store(out.slopes + best, tl.where(p.sft_weight == 0.0, slope, slope - weight), mask=with_best)
        tl.store(row + LIST_TERM, term, mask=live)
        tl.store(row + LIST_NLL, nll, mask=live)
        tl.store(out.list_loss + n, term + nll, mask=live)
        total += tl.where(live, term + nll, 0.0)
    tl.store(out.loss, tl.sum(total, 0))


def listwise_fwd(a):
    sequences, lists, device = a.sums.shape[0], a.list_offsets.shape[0] - 1, a.sums.device
    shapes = ((), (lists,), (sequences,), (sequences,), (lists, columns.LIST_TABLE_WIDTH))
    loss, list_loss, slopes, rewards, table = (ffi.empty(s, a.sums.dtype, device) for s in shapes)
    if lists == 0:
        return loss.zero_(), list_loss, slopes.fill_(float("nan")), rewards.fill_(float("nan")), table
    beta_stride = 0 if a.given.beta is None or a.given.beta.numel() == 1 else a.given.beta.stride(0)
    with ffi.triton_device(device):
        listwise_fwd_kernel[(lists,)](
            a.sums, a.list_offsets, a.scores, *a.given, loss, list_loss, slopes, rewards, table,
            ffi.counter(a.sums), beta_stride, sequences, lists, kernel_params(a.params, LIST_SCALAR_COUNT),
            K=columns.MAX_LIST, BLOCK=BLOCK, **ffi.launch_options(BLOCK, device),
        )  # fmt: skip
    return loss, list_loss, slopes, rewards, table
