"""Row ops through the compiled extension: C++ on the CPU, CUDA C++ on NVIDIA. One signature for both."""

from __future__ import annotations

from fastalign.ops.token_stats.contract import forward_shapes
from fastalign.runtime import ffi


def _forward(logits, labels, mask, temperature_tensor, factor, cap_scale, temperature, ignore_index, outputs, vocab_start, vocab_total,
             state_in=None, target_in=None, ref_logits=None):  # fmt: skip
    """(results, the TokenStatsArgs of csrc/ops.h as bindings.cpp takes them)"""
    acc = ffi.acc_dtype(logits.dtype)
    results = [ffi.empty(shape, acc, logits.device) for shape in forward_shapes(logits, labels, outputs, ref_logits)]
    return results, (
        ffi.rows_view(logits), ffi.rows_view(ref_logits), ffi.DTYPE_CODES[logits.dtype], ffi.ptr(labels),
        0 if labels is None else labels.shape[1], ffi.ptr(mask), ignore_index, factor, cap_scale, ffi.ptr(temperature_tensor), temperature,
        vocab_start, vocab_total, outputs, ffi.ptr(state_in), ffi.ptr(target_in), *(ffi.ptr(r) for r in results),
    )  # fmt: skip


def _backward(grad, logits, labels, mask, temperature_tensor, factor, cap_scale, temperature, ignore_index, vocab_start, vocab_total, state,
              g_logprob, g_entropy, g_logsumexp, ref_logits=None, g_kl_policy_ref=None, g_kl_ref_policy=None):  # fmt: skip
    """The TokenStatsBackwardArgs of csrc/ops.h as bindings.cpp takes them."""
    return (
        ffi.rows_view(logits), ffi.rows_view(grad), ffi.DTYPE_CODES[logits.dtype], ffi.ptr(labels), 0 if labels is None else labels.shape[1],
        ffi.ptr(mask), ignore_index, factor, cap_scale, ffi.ptr(temperature_tensor), temperature, vocab_start, vocab_total, ffi.ptr(state),
        ffi.ptr(g_logprob), ffi.ptr(g_entropy), ffi.ptr(g_logsumexp), ffi.rows_view(ref_logits), ffi.ptr(g_kl_policy_ref),
        ffi.ptr(g_kl_ref_policy),
    )  # fmt: skip


def token_stats_fwd(backend, logits, *rest):
    results, arguments = _forward(logits, *rest)
    if logits.numel():
        ffi.launch(backend, "token_stats_fwd", logits, arguments)
    return tuple(results)


def token_stats_bwd(backend, logits, *rest):
    grad = ffi.empty(tuple(logits.shape), logits.dtype, logits.device)
    if logits.numel():
        ffi.launch(backend, "token_stats_bwd", logits, _backward(grad, logits, *rest))
    return grad


def token_stats_bwd_(backend, logits, *rest):
    if logits.numel():
        ffi.launch(backend, "token_stats_bwd", logits, _backward(logits, logits, *rest))


def _fused(backend, grad, logits, labels, mask, temperature_tensor, factor, cap_scale, temperature, ignore_index, outputs, ref_logits,
           g_logprob, g_entropy, g_logsumexp, g_kl_policy_ref, g_kl_ref_policy):  # fmt: skip
    rows = (logits, labels, mask, temperature_tensor, factor, cap_scale, temperature, ignore_index)
    results, forward = _forward(*rows, outputs, 0, logits.shape[-1], None, None, ref_logits)
    state = results[-2]
    if logits.numel():
        backward = _backward(grad, *rows, 0, logits.shape[-1], state, g_logprob, g_entropy, g_logsumexp, ref_logits, g_kl_policy_ref,
                             g_kl_ref_policy)  # fmt: skip
        ffi.launch(backend, "token_stats_fused", logits, forward, backward)
    return tuple(results[:-2])


def token_stats_fused(backend, logits, *rest):
    grad = ffi.empty(tuple(logits.shape), logits.dtype, logits.device)
    return *_fused(backend, grad, logits, *rest), grad


def token_stats_fused_(backend, logits, *rest):
    return _fused(backend, logits, logits, *rest)


def scale_rows_(backend, x, scale):
    if x.numel():
        ffi.launch(backend, "scale_rows", x, ffi.rows_view(x), ffi.DTYPE_CODES[x.dtype], ffi.ptr(scale))
