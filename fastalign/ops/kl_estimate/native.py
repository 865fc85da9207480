"""The KL estimators through the compiled extension."""

from __future__ import annotations

from fastalign import ffi


def kl_estimate_fwd(backend, logprobs, ref_logprobs, kind):
    value, slope = (ffi.empty(tuple(logprobs.shape), logprobs.dtype, logprobs.device) for _ in range(2))
    if logprobs.numel():
        ffi.launch(
            backend, "kl_estimate_fwd", logprobs, ffi.ptr(logprobs), ffi.ptr(ref_logprobs), logprobs.numel(), ffi.DTYPE_CODES[logprobs.dtype],
            kind, ffi.ptr(value), ffi.ptr(slope),
        )  # fmt: skip
    return value, slope
