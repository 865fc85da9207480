"""Sums over packed sequences through the compiled extension."""

from __future__ import annotations

from fastalign.runtime import ffi


def sequence_sum_fwd(backend, x, cu_seqlens, mask, weights):
    sequences = cu_seqlens.shape[0] - 1
    sums, counts = (ffi.empty((sequences,), x.dtype, x.device) for _ in range(2))
    if sequences:
        ffi.launch(
            backend, "sequence_sum_fwd", x, ffi.ptr(x), ffi.ptr(cu_seqlens), x.shape[0], sequences, ffi.DTYPE_CODES[x.dtype], ffi.ptr(mask),
            ffi.ptr(weights), ffi.ptr(sums), ffi.ptr(counts),
        )  # fmt: skip
    return sums, counts


def sequence_sum_bwd(backend, grad, cu_seqlens, mask, weights, tokens):
    grad_x = ffi.empty((tokens,), grad.dtype, grad.device)
    if tokens:
        ffi.launch(
            backend, "sequence_sum_bwd", grad, ffi.ptr(grad), ffi.ptr(cu_seqlens), tokens, grad.shape[0], ffi.DTYPE_CODES[grad.dtype],
            ffi.ptr(mask), ffi.ptr(weights), ffi.ptr(grad_x),
        )  # fmt: skip
    return grad_x
