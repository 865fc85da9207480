"""The KL estimators in Triton, elementwise."""

import triton
import triton.language as tl

from fastalign.ops.math import scalar as triton_math
from fastalign.runtime import ffi

BLOCK = 1024


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["logprobs", "ref_logprobs"])
def kl_estimate_kernel(logprobs, ref_logprobs, value, slope, n: tl.int64, KIND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v, s = triton_math.kl_estimate(KIND, tl.load(logprobs + i, mask=i < n, other=0.0), tl.load(ref_logprobs + i, mask=i < n, other=0.0))
    tl.store(value + i, v, mask=i < n)
    if slope is not None:
        tl.store(slope + i, s, mask=i < n)


def kl_estimate_fwd(logprobs, ref_logprobs, kind, with_slope):
    n, device, shape = logprobs.numel(), logprobs.device, tuple(logprobs.shape)
    value, slope = ffi.empty(shape, logprobs.dtype, device), ffi.empty(shape if with_slope else (0,), logprobs.dtype, device)
    if n:
        with ffi.triton_device(device):
            kl_estimate_kernel[(triton.cdiv(n, BLOCK),)](
                logprobs, ref_logprobs, value, slope if with_slope else None, n, KIND=kind, BLOCK=BLOCK, **ffi.launch_options(256, device)
            )
    return value, slope
