"""Generalised advantage estimation through the compiled extension."""

from __future__ import annotations

import torch

from fastalign.runtime import ffi

TILE = 1024  # kGaeTile of csrc/ops.h


def gae_fwd(backend, rewards, values, cu_seqlens, mask, bootstrap, gamma_tensor, lam_tensor, gamma, lam):
    tokens, sequences, dtype, device = rewards.shape[0], cu_seqlens.shape[0] - 1, rewards.dtype, rewards.device
    advantages, returns = (ffi.empty((tokens,), dtype, device) for _ in range(2))
    moments = ffi.empty((3,), dtype, device)
    if sequences == 0:
        return advantages, returns, moments.zero_()
    workspace = ffi.empty((4 * (tokens // TILE + sequences),), torch.float64, device)
    counter = None if backend == "cpu" else ffi.counter(rewards)
    ffi.launch(
        backend, "gae_fwd", rewards, ffi.ptr(rewards), ffi.ptr(values), ffi.ptr(cu_seqlens), tokens, sequences, ffi.DTYPE_CODES[dtype],
        ffi.ptr(mask), ffi.ptr(bootstrap), ffi.ptr(gamma_tensor), ffi.ptr(lam_tensor), gamma, lam, ffi.ptr(advantages), ffi.ptr(returns),
        ffi.ptr(moments), ffi.ptr(workspace), ffi.ptr(counter),
    )  # fmt: skip
    return advantages, returns, moments
