"""Sums over packed sequences through the compiled extension."""

from __future__ import annotations

from fastalign.runtime import ffi


def sequence_sum_fwd(backend, a):
    sequences = a.cu_seqlens.shape[0] - 1
    sums, counts = (ffi.empty((sequences,), a.x.dtype, a.x.device) for _ in range(2))
    if sequences:
        ffi.launch(backend, "sequence_sum_fwd", a.x, (
            ffi.ptr(a.x), ffi.ptr(a.cu_seqlens), a.x.shape[0], sequences, ffi.DTYPE_CODES[a.x.dtype],
            ffi.ptr(a.mask), ffi.ptr(a.weights), ffi.ptr(sums), ffi.ptr(counts),
        ))  # fmt: skip
    return sums, counts


def sequence_sum_bwd(backend, a):
    grad_x = ffi.empty((a.tokens,), a.grad.dtype, a.grad.device)
    if a.tokens:
        ffi.launch(backend, "sequence_sum_bwd", a.grad, (
            ffi.ptr(a.grad), ffi.ptr(a.cu_seqlens), a.tokens, a.grad.shape[0], ffi.DTYPE_CODES[a.grad.dtype],
            ffi.ptr(a.mask), ffi.ptr(a.weights), ffi.ptr(grad_x),
        ))  # fmt: skip
    return grad_x
