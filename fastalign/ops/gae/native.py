"""Generalised advantage estimation through the compiled extension."""

from __future__ import annotations

import torch

from fastalign.ops.columns import GAE_TILE, MOMENT_WIDTH
from fastalign.runtime import ffi


def gae_fwd(backend, a):
    tokens, sequences, dtype, device = (
        a.rewards.shape[0],
        a.cu_seqlens.shape[0] - 1,
        a.rewards.dtype,
        a.rewards.device,
    )
    advantages, returns = (ffi.empty((tokens,), dtype, device) for _ in range(2))
    moments = ffi.empty((MOMENT_WIDTH,), dtype, device)
    if sequences == 0:
        return advantages, returns, moments.zero_()
    workspace = ffi.empty((4 * (tokens // GAE_TILE + sequences),), torch.float64, device)
    counter = None if backend == "cpu" else ffi.counter(a.rewards)
    ffi.launch(backend, "gae_fwd", a.rewards, (
        ffi.ptr(a.rewards), ffi.ptr(a.values), ffi.ptr(a.cu_seqlens), tokens, sequences,
        ffi.DTYPE_CODES[dtype], ffi.ptr(a.mask), ffi.ptr(a.bootstrap), ffi.ptr(a.gamma_tensor),
        ffi.ptr(a.lam_tensor), a.gamma, a.lam, ffi.ptr(advantages), ffi.ptr(returns), ffi.ptr(moments),
        ffi.ptr(workspace), ffi.ptr(counter),
    ))  # fmt: skip
    return advantages, returns, moments
