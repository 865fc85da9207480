"""The KL estimators through the compiled extension."""

from __future__ import annotations

from fastalign.runtime import ffi


def kl_estimate_fwd(backend, a):
    shape, dtype, device = tuple(a.logprobs.shape), a.logprobs.dtype, a.logprobs.device
    value, slope = ffi.empty(shape, dtype, device), ffi.empty(shape if a.with_slope else (0,), dtype, device)
    if a.logprobs.numel():
        ffi.launch(backend, "kl_estimate_fwd", a.logprobs, (
            ffi.ptr(a.logprobs), ffi.ptr(a.ref_logprobs), a.logprobs.numel(),
            ffi.DTYPE_CODES[a.logprobs.dtype], a.kind, ffi.ptr(value), ffi.ptr(slope),
        ))  # fmt: skip
    return value, slope
