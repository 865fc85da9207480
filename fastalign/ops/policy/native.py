"""The policy and value losses through the compiled extension."""

from __future__ import annotations

from fastalign.ops.columns import MOMENTS, POLICY_TILE, STATS, VALUE_MOMENTS, VALUE_STATS
from fastalign.ops.policy.params import SCALAR_COUNT, nothing
from fastalign.runtime import ffi


def _scratch(backend, like, cu_seqlens, width):
    """Segments, and for CUDA a row of statistics for each, with two doubles for each of its moments, and the
    counter of the last block."""
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    segments = -(-like.shape[0] // POLICY_TILE) if cu_seqlens is None else sequences
    if backend == "cpu":
        return sequences, None, None
    return sequences, ffi.empty((segments, width), like.dtype, like.device), ffi.counter(like)


def policy_fwd(backend, a):
    tokens, dtype, device = a.logprobs.shape[0], a.logprobs.dtype, a.logprobs.device
    loss, stats = ffi.empty((), dtype, device), ffi.empty((len(STATS),), dtype, device)
    slopes, entropy_slopes = (
        ffi.empty((tokens,), dtype, device),
        ffi.empty((tokens if a.with_entropy_grad else 0,), dtype, device),
    )
    sequences, rows, counter = _scratch(backend, a.logprobs, a.cu_seqlens, len(STATS) + 4 * len(MOMENTS))
    if tokens == 0:
        return loss.zero_(), slopes, entropy_slopes, nothing(stats)
    ffi.launch(backend, "policy_fwd", a.logprobs, (
        ffi.ptr(a.logprobs), ffi.ptr(a.old_logprobs), ffi.ptr(a.advantages), ffi.ptr(a.cu_seqlens), tokens,
        sequences, ffi.ptr(a.mask), ffi.ptr(a.ref_logprobs), ffi.ptr(a.entropy), ffi.ptr(a.is_weight),
        ffi.DTYPE_CODES[dtype], ffi.ptr(a.kl_coef), ffi.ptr(a.entropy_coef), ffi.ptr(a.num_items),
        *ffi.numbers(a.params, SCALAR_COUNT), ffi.ptr(loss), ffi.ptr(slopes), ffi.ptr(entropy_slopes),
        ffi.ptr(stats), ffi.ptr(rows), ffi.ptr(counter),
    ))  # fmt: skip
    return loss, slopes, entropy_slopes, stats


def value_fwd(backend, a):
    tokens, dtype, device = a.values.shape[0], a.values.dtype, a.values.device
    loss, slopes, stats = (ffi.empty(shape, dtype, device) for shape in ((), (tokens,), (len(VALUE_STATS),)))
    sequences, rows, counter = _scratch(
        backend, a.values, a.cu_seqlens, len(VALUE_STATS) + 4 * len(VALUE_MOMENTS)
    )
    if tokens == 0:
        return loss.zero_(), slopes, nothing(stats)
    ffi.launch(backend, "value_fwd", a.values, (
        ffi.ptr(a.values), ffi.ptr(a.old_values), ffi.ptr(a.returns), ffi.ptr(a.cu_seqlens), tokens,
        sequences, ffi.ptr(a.mask), ffi.DTYPE_CODES[dtype], ffi.ptr(a.num_items), a.clip, a.aggregation,
        a.norm_length, ffi.ptr(loss), ffi.ptr(slopes), ffi.ptr(stats), ffi.ptr(rows), ffi.ptr(counter),
    ))  # fmt: skip
    return loss, slopes, stats


def policy_bwd(backend, a):
    tokens = a.slopes.shape[0]
    d_logprobs, d_entropy = (
        ffi.empty(tuple(x.shape), x.dtype, x.device) for x in (a.slopes, a.entropy_slopes)
    )
    if tokens:
        ffi.launch(backend, "policy_bwd", a.slopes, (
            ffi.ptr(a.grad), ffi.ptr(a.slopes), ffi.ptr(a.entropy_slopes), ffi.ptr(a.stats), tokens,
            ffi.DTYPE_CODES[a.slopes.dtype], ffi.ptr(d_logprobs), ffi.ptr(d_entropy),
        ))  # fmt: skip
    return d_logprobs, d_entropy
