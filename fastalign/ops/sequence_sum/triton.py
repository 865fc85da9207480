"""Sums over packed sequences in Triton: one program per sequence, either way."""

import triton
import triton.language as tl

from fastalign.ops.math.scalar import times_slope
from fastalign.ops.math.segment import scored_tokens, sequence_bounds, sequence_share
from fastalign.runtime import ffi

BLOCK = 2048  # tokens at a time
TENSORS = ["x", "grad", "cu_seqlens", "mask", "weights"]  # their alignment compiles nothing anew


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=TENSORS)
def sequence_sum_fwd_kernel(
    x, cu_seqlens, mask, weights, sums, counts, tokens: tl.int32, BLOCK: tl.constexpr
):
    i = tl.program_id(0)
    begin, end = sequence_bounds(cu_seqlens, i, tokens)
    total, count = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    for start in range(
        begin, end, BLOCK
    ):  # lane by lane, so the order of summation depends on the sequence alone
        t = start + tl.arange(0, BLOCK)
        counted = scored_tokens(mask, t, t < end)
        term = tl.load(x + t, mask=counted, other=0.0)
        if weights is not None:
            term *= tl.load(weights + t, mask=counted, other=0.0)
        total += term
        count += counted.to(tl.int32)
    tl.store(sums + i, tl.sum(total, 0))
    tl.store(counts + i, tl.sum(count, 0).to(tl.float32))


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=TENSORS)
def sequence_sum_bwd_kernel(grad, cu_seqlens, mask, weights, grad_x, tokens: tl.int32, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    begin, end = sequence_bounds(cu_seqlens, i, tokens)
    first, stop = sequence_share(cu_seqlens, i, tl.num_programs(0), tokens)
    g = tl.load(grad + i)
    for start in range(first, stop, BLOCK):
        t = start + tl.arange(0, BLOCK)
        own = (t >= begin) & (t < end)
        counted = scored_tokens(mask, t, own)
        term = tl.zeros([BLOCK], tl.float32) + g
        if weights is not None:
            term = times_slope(term, tl.load(weights + t, mask=counted, other=0.0))
        tl.store(grad_x + t, tl.where(own, tl.where(counted, term, 0.0), float("nan")), mask=t < stop)


def sequence_sum_fwd(a):
    sequences, device = a.cu_seqlens.shape[0] - 1, a.x.device
    sums, counts = (ffi.empty((sequences,), a.x.dtype, device) for _ in range(2))
    if sequences:
        with ffi.triton_device(device):
            sequence_sum_fwd_kernel[(sequences,)](
                a.x,
                a.cu_seqlens,
                a.mask,
                a.weights,
                sums,
                counts,
                a.x.shape[0],
                BLOCK=BLOCK,
                **ffi.launch_options(256, device),
            )
    return sums, counts


def sequence_sum_bwd(a):
    device = a.grad.device
    grad_x = ffi.empty((a.tokens,), a.grad.dtype, device)
    if a.tokens:
        with ffi.triton_device(device):
            sequence_sum_bwd_kernel[(a.grad.shape[0],)](
                a.grad,
                a.cu_seqlens,
                a.mask,
                a.weights,
                grad_x,
                a.tokens,
                BLOCK=BLOCK,
                **ffi.launch_options(256, device),
            )
    return grad_x
