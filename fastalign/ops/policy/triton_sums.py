"""What the kernels of the policy and value losses share: which tokens are a program's, its moments, and the
rows of sums, which the last program to finish adds up."""

from typing import NamedTuple

import triton
import triton.language as tl

from fastalign.ops import columns

from fastalign.ops.math.columns import (  # isort: skip
    PART_M2, PART_MEAN, PART_WIDTH, POLICY_ITEMS, POLICY_LOSS, TOKEN_MEAN, TOKEN_SUM,
)  # fmt: skip
from fastalign.ops.math.moments import merge_lanes, merge_parts
from fastalign.ops.math.scalar import div, one_if_zero
from fastalign.ops.math.segment import sequence_bounds

BLOCK, ROWS = 512, 64  # tokens, and rows of sums, at a time
WIDTH = tl.constexpr(16)  # of a row, padded

# Neither sizes nor alignments compile anything anew; which tensors are given, and the kinds of the loss, do.
TENSORS = ["logprobs", "old_logprobs", "advantages", "cu_seqlens", "mask", "ref_logprobs", "entropy", "is_weight", "kl_coef",
           "entropy_coef", "num_items", "values", "old_values", "returns", "slopes", "entropy_slopes", "grad", "stats"]  # fmt: skip
SIZES = ["tokens", "pieces"]


@triton.jit
def piece_bounds(cu_seqlens, k, tokens, TILE: tl.constexpr):
    """First token and end of program k."""
    if cu_seqlens is None:
        begin = k * TILE
        end = tl.minimum(begin + TILE, tokens)
    else:
        begin, end = sequence_bounds(cu_seqlens, k, tokens)
    return begin, end


@triton.jit
def store_moments(part, count, shift, difference, square):
    _, mean, m2 = merge_lanes(count, shift, difference, square)
    tl.store(part + PART_MEAN, mean)
    tl.store(part + PART_M2, m2)


class Results(NamedTuple):
    """loss [], stats [STATS], and what they come of: rows [pieces, STATS], parts (mean and m2 of every row,
    fp64, for each m2 column), and the counter of programs that are done."""

    loss: tl.tensor
    stats: tl.tensor
    rows: tl.tensor
    parts: tl.tensor
    counter: tl.tensor


@triton.jit
def reduce_rows(
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
            totals += tl.load(
                out.rows + i[:, None] * STATS + c[None, :],
                mask=(i < pieces)[:, None] & (c < STATS)[None, :],
                other=0.0,
            )
        total = tl.sum(totals, 0)
        PARTS: tl.constexpr = PART_WIDTH if OTHER_M2_AT < 0 else 2 * PART_WIDTH
        _, _, m2 = merge_parts(
            out.rows + TOKENS, STATS, out.parts + PART_MEAN, out.parts + PART_M2, PARTS, pieces, ROWS
        )
        total = tl.where(c == M2_AT, m2.to(tl.float32), total)
        if OTHER_M2_AT >= 0:
            other = out.parts + PART_WIDTH
            _, _, other_m2 = merge_parts(
                out.rows + TOKENS, STATS, other + PART_MEAN, other + PART_M2, PARTS, pieces, ROWS
            )
            total = tl.where(c == OTHER_M2_AT, other_m2.to(tl.float32), total)
        if AGGREGATION == TOKEN_SUM:
            items = 1.0
        elif num_items is not None:
            items = one_if_zero(tl.load(num_items))
        else:
            items = one_if_zero(
                tl.sum(tl.where(c == (TOKENS if AGGREGATION == TOKEN_MEAN else SEQUENCES), total, 0.0), 0)
            )
        tl.store(out.stats + c, tl.where(c == POLICY_ITEMS, items, total), mask=c < STATS)
        tl.store(out.loss, div(tl.sum(tl.where(c == POLICY_LOSS, total, 0.0), 0), items))


def piece_count(tokens, cu_seqlens):
    return triton.cdiv(tokens, columns.POLICY_TILE) if cu_seqlens is None else cu_seqlens.shape[0] - 1
