"""The KL estimators through the compiled extension."""

from __future__ import annotations

from fastalign.runtime import ffi


def kl_estimate_fwd(backend, logprobs, ref_logprobs, kind, with_slope):
    shape, dtype, device = tuple(logprobs.shape), logprobs.dtype, logprobs.device
    value, slope = ffi.empty(shape, dtype, device), ffi.empty(shape if with_slope else (0,), dtype, device)
    if logprobs.numel():
        ffi.launch(
            backend, "kl_estimate_fwd", logprobs, ffi.ptr(logprobs), ffi.ptr(ref_logprobs), logprobs.numel(), ffi.DTYPE_CODES[logprobs.dtype],
            kind, ffi.ptr(value), ffi.ptr(slope),
        )  # fmt: skip
    return value, slope
