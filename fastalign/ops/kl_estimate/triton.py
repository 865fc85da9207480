"""The KL estimators in Triton, elementwise."""

import triton
import triton.language as tl

from fastalign.ops.math import scalar
from fastalign.runtime import ffi

BLOCK = 1024


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["logprobs", "ref_logprobs"])
def kl_estimate_kernel(
    logprobs, ref_logprobs, value, slope, n: tl.int64, KIND: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v, s = scalar.kl_estimate(
        KIND, tl.load(logprobs + i, mask=i < n, other=0.0), tl.load(ref_logprobs + i, mask=i < n, other=0.0)
    )
    tl.store(value + i, v, mask=i < n)
    if slope is not None:
        tl.store(slope + i, s, mask=i < n)


def kl_estimate_fwd(a):
    n, device, shape = a.logprobs.numel(), a.logprobs.device, tuple(a.logprobs.shape)
    value, slope = (
        ffi.empty(shape, a.logprobs.dtype, device),
        ffi.empty(shape if a.with_slope else (0,), a.logprobs.dtype, device),
    )
    if n:
        with ffi.triton_device(device):
            kl_estimate_kernel[(triton.cdiv(n, BLOCK),)](
                a.logprobs,
                a.ref_logprobs,
                value,
                slope if a.with_slope else None,
                n,
                KIND=a.kind,
                BLOCK=BLOCK,
                **ffi.launch_options(256, device),
            )
    return value, slope
