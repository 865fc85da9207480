"""Row ops in Triton: one program streams one vocabulary row forward; backward is elementwise over pieces of rows.

16-byte loads at any V and stride. A row starts at any element, so programs count in aligned coordinates: q = element + shift, where shift < LANES is
the row's distance from a 16-byte boundary and LANES the elements of 16 bytes. Every address is then a known multiple of LANES plus q, and masks are
rounded out to whole groups of LANES (the rest of a 16-byte chunk that holds an element of the row is readable memory; what it holds is discarded),
which is what the compiler needs to emit wide loads. Stores are masked exactly.

The reduction tree depends on V and the dtype alone, not on the shift. Tiles are cut at fixed elements of the row, DEPTH slices of SPAN elements. A
slice lies rotated by `shift` in the SPAN columns of a tile: its last `shift` elements, which lie in the next aligned window, are loaded into the
columns at the front that the window's foreign elements leave free. Each column keeps its own running sums over the whole row: it sees the same
elements in the same order, whatever the shift. At the end the columns are folded in halves, a tree that a rotation does not change.
"""
import math

import torch
import triton
import triton.language as tl

from fastalign import ffi
from fastalign.ops.token_stats.api import OUTPUT_BITS, STATE_WIDTH
from fastalign.triton_math import LN2, div, fma, merge, narrow, rescale, row_entropy, row_log_sum_sq, row_logprob, s1_shift, tanh

# Sizes that vary from call to call, never specialised on. All of them are 64-bit in the compiled signature: a large value compiles nothing anew.
_SIZES = ("base", "inner", "stride_outer", "stride_inner", "grad_base", "grad_inner", "grad_stride_outer", "grad_stride_inner", "vocab", "targets",
          "ignore_index", "vocab_start", "vocab_total", "pieces")  # fmt: skip
_STATE: tl.constexpr = tl.constexpr(STATE_WIDTH)
_LABELS = tl.constexpr(32)  # labels of a row that are handled at once


@triton.jit
def _row_offset(row, base, inner, stride_outer, stride_inner):
    return base + row // inner * stride_outer + row % inner * stride_inner


@triton.jit
def _scored(row, labels, mask, targets, ignore_index, vocab_total):
    """(the row counts, one of its labels is neither ignored nor in the vocabulary), as int32."""
    scored, bad = 1, 0
    if mask is not None:
        scored = tl.load(mask + row).to(tl.int32)
    if labels is not None:
        some = 0
        for first in range(0, targets, _LABELS):
            k = first + tl.arange(0, _LABELS)
            y = tl.load(labels + row * targets + k, mask=k < targets, other=ignore_index)
            some = tl.maximum(some, tl.max((y != ignore_index).to(tl.int32), 0))
            bad = tl.maximum(bad, tl.max(((y != ignore_index) & ((y < 0) | (y >= vocab_total))).to(tl.int32), 0))
        scored = scored * some
    return scored, bad


@triton.jit
def _fold(x, SPAN: tl.constexpr):
    """Sum of a vector by halves, top half onto bottom half: the same pairs at every level if the vector is rotated."""
    for level in tl.static_range(SPAN.bit_length() - 1):
        x = tl.sum(tl.reshape(x, (2, SPAN >> (level + 1))), 0)
    return tl.sum(x, 0)
