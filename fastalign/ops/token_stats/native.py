"""Row ops through the compiled extension: C++ on the CPU, CUDA C++ on NVIDIA. One signature for both."""

from __future__ import annotations

from fastalign.ops.token_stats.contract import forward_shapes, merge_shapes, output_shapes
from fastalign.runtime import ffi


def _row_args(r):
    """The RowArgs that both argument structs of csrc/ops.h begin with."""
    labels = r.labels
    return (
        ffi.rows_view(r.logits), ffi.rows_view(r.ref_logits), ffi.DTYPE_CODES[r.logits.dtype],
        ffi.ptr(labels), 0 if labels is None else labels.shape[1], ffi.ptr(r.mask), r.ignore_index, r.factor,
        r.cap_scale, ffi.ptr(r.temperature_tensor), r.temperature, r.vocab_start, r.vocab_total,
    )  # fmt: skip


def _forward(r, outputs, state_in, target_in):
    """(outputs, state, target, the TokenStatsArgs of csrc/ops.h)"""
    acc, device = ffi.acc_dtype(r.logits.dtype), r.logits.device
    *results, state, target = (ffi.empty(shape, acc, device) for shape in forward_shapes(r, outputs))
    arguments = (
        *_row_args(r), *(ffi.ptr(x) for x in results), outputs, ffi.ptr(state_in), ffi.ptr(target_in),
        ffi.ptr(state), ffi.ptr(target),
    )  # fmt: skip
    return results, state, target, arguments


def _backward(r, state, upstream, grad):
    """The TokenStatsBackwardArgs of csrc/ops.h."""
    return (*_row_args(r), ffi.rows_view(grad), ffi.ptr(state), *(ffi.ptr(g) for g in upstream))


def row_states_merge(backend, a):
    parts, rows, _ = a.states.shape
    dtype, device = a.states.dtype, a.states.device
    state, target = results = tuple(ffi.empty(shape, dtype, device) for shape in merge_shapes(a))
    entries = target.numel()
    if rows:
        ffi.launch(backend, "row_states_merge", a.states, (
            ffi.ptr(a.states), ffi.ptr(a.targets), parts, rows, entries, ffi.DTYPE_CODES[dtype],
            ffi.ptr(state), ffi.ptr(target),
        ))  # fmt: skip
    return results


def row_states_finish(backend, a):
    rows, dtype, device = a.state.shape[0], a.state.dtype, a.state.device
    results = tuple(ffi.empty(shape, dtype, device) for shape in output_shapes(rows, a.labels, a.outputs))
    if rows:
        ffi.launch(backend, "row_states_finish", a.state, (
            *(ffi.ptr(x) for x in results), ffi.ptr(a.state), ffi.ptr(a.target), rows, ffi.DTYPE_CODES[dtype],
            ffi.ptr(a.labels), 0 if a.labels is None else a.labels.shape[1], ffi.ptr(a.mask), a.ignore_index,
            a.factor, ffi.ptr(a.temperature_tensor), a.temperature, a.vocab_total,
        ))  # fmt: skip
    return results


def _grad_of(logits):
    return ffi.empty(tuple(logits.shape), logits.dtype, logits.device)


def token_stats_fwd(backend, a):
    results, state, target, arguments = _forward(a.rows, a.outputs, a.state_in, a.target_in)
    if a.rows.logits.numel():
        ffi.launch(backend, "token_stats_fwd", a.rows.logits, arguments)
    return (*results, state, target)


def _bwd(backend, a, grad):
    if grad.numel():
        ffi.launch(backend, "token_stats_bwd", grad, _backward(a.rows, a.state, a.upstream, grad))


def token_stats_bwd(backend, a):
    grad = _grad_of(a.rows.logits)
    _bwd(backend, a, grad)
    return grad


def token_stats_bwd_(backend, a):
    _bwd(backend, a, a.rows.logits)


def _fused(backend, a, grad):
    results, state, target, forward = _forward(a.rows, a.outputs, None, None)
    if grad.numel():
        ffi.launch(backend, "token_stats_fused", grad, (forward, _backward(a.rows, state, a.upstream, grad)))
    return tuple(results)


def token_stats_fused(backend, a):
    grad = _grad_of(a.rows.logits)
    return *_fused(backend, a, grad), grad


def token_stats_fused_(backend, a):
    return _fused(backend, a, a.rows.logits)


def scale_rows_(backend, a):
    if a.x.numel():
        ffi.launch(
            backend, "scale_rows", a.x, (ffi.rows_view(a.x), ffi.DTYPE_CODES[a.x.dtype], ffi.ptr(a.scale))
        )
