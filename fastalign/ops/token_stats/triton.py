"""Row ops in Triton: the launchers. The kernels over logits alone are in triton_single.py, those over a
policy row and a reference row in triton_pair.py, those on row states in triton_states.py, and what they share
in triton_rows.py."""

import math

import triton

from fastalign.ops.token_stats import triton_pair, triton_single, triton_states
from fastalign.ops.token_stats.contract import OUTPUT_BITS, TokenStatsFwd, forward_shapes
from fastalign.ops.token_stats.triton_rows import (
    BWD_REGISTERS,
    EVERYTHING,
    EVERYTHING_BITS,
    FWD_REGISTERS,
    PAIR_BWD_REGISTERS,
    PAIR_EVERYTHING_REGISTERS,
    PAIR_FWD_REGISTERS,
    THREADS,
    Outputs,
    scale_of,
    tile_of,
)
from fastalign.runtime import ffi


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
        sums = (
            EVERYTHING.value if a.outputs & EVERYTHING_BITS else int(a.outputs & OUTPUT_BITS["entropy"] > 0)
        )
        numbers = (vocab, targets, r.ignore_index, r.vocab_start, r.vocab_total, scale_of(r))
        # A thread has 16 bytes of each slice of a tile, 16 elements in all.
        itemsize = r.logits.element_size()
        out = Outputs(*(x if a.outputs >> bit & 1 else None for bit, x in enumerate(results)))
        around = (r.labels, r.mask, r.temperature_tensor, a.state_in, a.target_in, out, state, target)
        kinds = {
            "OUTPUTS": a.outputs,
            "SUMS": sums,
            "LANES": lanes,
            "SPAN": THREADS * 16 // itemsize,
            "DEPTH": itemsize,
        }
        with ffi.triton_device(device):
            if r.ref_logits is None:
                triton_single.token_stats_fwd_kernel[(rows,)](
                    view, *around, *layout, *numbers, **kinds,
                    **ffi.launch_options(THREADS, device, FWD_REGISTERS),
                )  # fmt: skip
            else:
                ref, *ref_layout = _of_reference(r.ref_logits)
                together = _share_alignment(r.logits, r.ref_logits, lanes)
                registers = (
                    PAIR_EVERYTHING_REGISTERS
                    if sums == EVERYTHING.value and r.cap_scale
                    else PAIR_FWD_REGISTERS
                )
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
        strides.append(
            (0 if rows == 1 else step, 0 if rows <= inner else outer if own_inner == inner else inner * step)
        )
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
            triton_single.token_stats_bwd_kernel[(rows * pieces,)](
                view, *around, g.g_logprob, g.g_entropy, g.g_logsumexp, *layout, *numbers,
                IN_PLACE=in_place, LANES=lanes, BLOCK=block, BLOCKS=blocks, **options,
            )  # fmt: skip
        else:
            ref, *ref_layout = _of_reference(r.ref_logits)
            together = _share_alignment(r.logits, r.ref_logits, lanes)
            triton_pair.token_stats_pair_bwd_kernel[(rows * pieces,)](
                view, ref, *around, *g, *layout, *ref_layout, *numbers,
                tile_of(lanes, block, blocks, together), IN_PLACE=in_place, **options,
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
        triton_single.scale_rows_kernel[(rows * pieces,)](
            view, a.scale, base, *ffi.row_layout(a.x)[1:], vocab, pieces, LANES=lanes, BLOCK=block,
            **ffi.launch_options(THREADS, a.x.device),
        )  # fmt: skip
