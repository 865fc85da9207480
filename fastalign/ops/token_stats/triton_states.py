"""The Triton kernels over row states without their logits."""

import triton
import triton.language as tl

from fastalign.ops.math.columns import COL_VALID, OUT_LOGPROB, OUT_REF_LOGPROB, STATE_WIDTH
from fastalign.ops.math.rows import (
    RefState,
    RowState,
    found_target,
    load_ref_state,
    load_state,
    merge_stored,
    merge_stored_ref,
    row_logprob,
    spoiled,
    spoiled_ref,
    store_ref_state,
    store_state,
)
from fastalign.ops.token_stats.contract import merge_shapes, output_shapes
from fastalign.ops.token_stats.triton_rows import (
    LABELS,
    Outputs,
    bits_per_unit,
    finish_kls,
    finish_row,
    row_scored,
    uncapped,
)
from fastalign.runtime import ffi

ROWS = 128  # that a program merges, and as many of the labels' logits

SIZES = ["parts", "rows", "entries", "targets", "ignore_index", "vocab_total"]
SMALL = ["states", "part_targets", "state", "target", "labels", "mask", "temperature"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SMALL)
def row_states_merge_kernel(
    states, part_targets, state, target, parts: tl.int32, rows: tl.int64, entries: tl.int64
):
    """Programs beyond the last row, and lanes, merge that one again: what they write is the same."""
    ROWS: tl.constexpr = 128
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(i, rows - 1)
    p = states + row * STATE_WIDTH
    s, r, valid = load_state(p), load_ref_state(p), tl.load(p + COL_VALID)
    without_ref = (r.m == 0) & (r.s0 == 0)  # a row of reference logits has mass where its m is 0
    m, s0, s1, s2, sz, umax, top, largest = s.m, s.s0, s.s1, s.s2, s.sz, s.umax, s.top, s.largest
    rm, r0, t, tr, ref_umax = r.m, r.s0, r.t, r.tr, r.umax
    for part in range(1, parts):
        p = states + (part * rows + row) * STATE_WIDTH
        before, ref_before = (
            RowState(m, s0, s1, s2, sz, umax, top, largest),
            RefState(rm, r0, t, tr, ref_umax),
        )
        here = load_state(p)
        r = merge_stored_ref(before, ref_before, here, load_ref_state(p))
        s = merge_stored(before, here)
        m, s0, s1, s2, sz, umax, top, largest = s.m, s.s0, s.s1, s.s2, s.sz, s.umax, s.top, s.largest
        rm, r0, t, tr, ref_umax = r.m, r.s0, r.t, r.tr, r.umax
        valid = tl.maximum(valid, tl.load(p + COL_VALID))
    p = state + row * STATE_WIDTH
    store_state(RowState(m, s0, s1, s2, sz, umax, top, largest), valid, p)
    rm, r0 = tl.where(without_ref, 0.0, rm), tl.where(without_ref, 0.0, r0)
    t, tr, ref_umax = (
        tl.where(without_ref, 0.0, t),
        tl.where(without_ref, 0.0, tr),
        tl.where(without_ref, 0.0, ref_umax),
    )
    store_ref_state(RefState(rm, r0, t, tr, ref_umax), p)
    if part_targets is not None:
        u = tl.load(part_targets + i, mask=i < entries, other=0.0)
        for part in range(1, parts):
            u = found_target(u, tl.load(part_targets + part * entries + i, mask=i < entries, other=0.0))
        tl.store(target + i, u, mask=i < entries)


@triton.jit
def _finish_logprobs(row, scored, s, c, labels, target, logprob, targets, ignore_index):
    for first in range(0, targets, LABELS):
        k = first + tl.arange(0, LABELS)
        inside, at = k < targets, row * targets + k
        counts = (scored != 0) & (tl.load(labels + at, mask=inside, other=ignore_index) != ignore_index)
        u = tl.load(target + at, mask=inside, other=float("-inf"))
        tl.store(logprob + at, tl.where(counts, row_logprob(s.m, s.s0, s.umax, u, c), 0.0), mask=inside)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=SMALL)
def row_states_finish_kernel(
    state, target, labels, mask, temperature, out, targets: tl.int32, ignore_index: tl.int64,
    vocab_total: tl.int32, scale, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """A program for each row. out: Outputs; scale: Scale."""
    row = tl.program_id(0).to(tl.int64)
    scored, bad = row_scored(row, labels, mask, targets, ignore_index, vocab_total)
    c = bits_per_unit(scale, temperature)
    p = state + row * STATE_WIDTH
    s, r = spoiled(load_state(p), bad), spoiled_ref(load_ref_state(p), bad)
    finish_row(row, scored, s, c, vocab_total, labels, out, OUTPUTS)
    finish_kls(row, scored, s, r, c, out, OUTPUTS)
    if OUT_LOGPROB & OUTPUTS:
        _finish_logprobs(row, scored, s, c, labels, target, out.logprob, targets, ignore_index)
    if OUT_REF_LOGPROB & OUTPUTS:  # behind the policy's targets
        behind = tl.num_programs(0).to(tl.int64) * targets
        _finish_logprobs(row, scored, r, c, labels, target + behind, out.ref_logprob, targets, ignore_index)


def merge(a):
    parts, rows, _ = a.states.shape
    dtype, device = a.states.dtype, a.states.device
    state, target = (ffi.empty(shape, dtype, device) for shape in merge_shapes(a))
    if rows:
        entries = target.numel()
        blocks = triton.cdiv(max(rows, entries), ROWS)
        with ffi.triton_device(device):
            row_states_merge_kernel[(blocks,)](
                a.states, a.targets, state, target, parts, rows, entries, **ffi.launch_options(ROWS, device)
            )
    return state, target


def finish(a):
    rows, dtype, device = a.state.shape[0], a.state.dtype, a.state.device
    results = tuple(ffi.empty(shape, dtype, device) for shape in output_shapes(rows, a.labels, a.outputs))
    if rows:
        targets = 0 if a.labels is None else a.labels.shape[1]
        with ffi.triton_device(device):
            row_states_finish_kernel[(rows,)](
                a.state, a.target, a.labels, a.mask, a.temperature_tensor, Outputs(*results), targets,
                a.ignore_index, a.vocab_total, uncapped(a), OUTPUTS=a.outputs,
                **ffi.launch_options(32, device),
            )  # fmt: skip
    return results
