"""The policy and value losses through the compiled extension."""

from __future__ import annotations

from fastalign.ops.policy.reference import MOMENTS, STATS, TILE, VALUE_MOMENTS, VALUE_STATS
from fastalign.runtime import ffi


def _scratch(backend, like, cu_seqlens, width):
    """Segments, and for CUDA a row of statistics for each, with two doubles for each of its moments, and the counter of the last block."""
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    segments = -(-like.shape[0] // TILE) if cu_seqlens is None else sequences
    if backend == "cpu":
        return sequences, None, None
    return sequences, ffi.empty((segments, width), like.dtype, like.device), ffi.counter(like)


def nothing(stats):
    """Statistics of no tokens: the number of items, first, is 1."""
    stats.zero_()[:1].fill_(1.0)
    return stats


def policy_fwd(backend, logprobs, old_logprobs, advantages, cu_seqlens, mask, ref_logprobs, entropy, is_weight, kl_coef, entropy_coef,
               num_items, scalars, switches, with_entropy_grad):  # fmt: skip
    tokens, dtype, device = logprobs.shape[0], logprobs.dtype, logprobs.device
    loss, stats = ffi.empty((), dtype, device), ffi.empty((len(STATS),), dtype, device)
    slopes, entropy_slopes = ffi.empty((tokens,), dtype, device), ffi.empty((tokens if with_entropy_grad else 0,), dtype, device)
    sequences, rows, counter = _scratch(backend, logprobs, cu_seqlens, len(STATS) + 4 * len(MOMENTS))
    if tokens == 0:
        return loss.zero_(), slopes, entropy_slopes, nothing(stats)
    ffi.launch(
        backend, "policy_fwd", logprobs, ffi.ptr(logprobs), ffi.ptr(old_logprobs), ffi.ptr(advantages), ffi.ptr(cu_seqlens), tokens, sequences,
        ffi.ptr(mask), ffi.ptr(ref_logprobs), ffi.ptr(entropy), ffi.ptr(is_weight), ffi.DTYPE_CODES[dtype], ffi.ptr(kl_coef),
        ffi.ptr(entropy_coef), ffi.ptr(num_items), scalars, switches, ffi.ptr(loss), ffi.ptr(slopes), ffi.ptr(entropy_slopes), ffi.ptr(stats),
        ffi.ptr(rows), ffi.ptr(counter),
    )  # fmt: skip
    return loss, slopes, entropy_slopes, stats


def value_fwd(backend, values, old_values, returns, cu_seqlens, mask, num_items, clip, aggregation, norm_length):
    tokens, dtype, device = values.shape[0], values.dtype, values.device
    loss, slopes, stats = (ffi.empty(shape, dtype, device) for shape in ((), (tokens,), (len(VALUE_STATS),)))
    sequences, rows, counter = _scratch(backend, values, cu_seqlens, len(VALUE_STATS) + 4 * len(VALUE_MOMENTS))
    if tokens == 0:
        return loss.zero_(), slopes, nothing(stats)
    ffi.launch(
        backend, "value_fwd", values, ffi.ptr(values), ffi.ptr(old_values), ffi.ptr(returns), ffi.ptr(cu_seqlens), tokens, sequences,
        ffi.ptr(mask), ffi.DTYPE_CODES[dtype], ffi.ptr(num_items), clip, aggregation, norm_length, ffi.ptr(loss), ffi.ptr(slopes),
        ffi.ptr(stats), ffi.ptr(rows), ffi.ptr(counter),
    )  # fmt: skip
    return loss, slopes, stats


def policy_bwd(backend, grad, slopes, entropy_slopes, stats):
    tokens = slopes.shape[0]
    d_logprobs, d_entropy = (ffi.empty(tuple(x.shape), x.dtype, x.device) for x in (slopes, entropy_slopes))
    if tokens:
        ffi.launch(
            backend, "policy_bwd", slopes, ffi.ptr(grad), ffi.ptr(slopes), ffi.ptr(entropy_slopes), ffi.ptr(stats), tokens,
            ffi.DTYPE_CODES[slopes.dtype], ffi.ptr(d_logprobs), ffi.ptr(d_entropy),
        )  # fmt: skip
    return d_logprobs, d_entropy
