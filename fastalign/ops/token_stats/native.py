"""Row ops through the compiled extension: C++ on the CPU, CUDA C++ on NVIDIA. One signature for both."""

from __future__ import annotations

import math

from fastalign import ffi
from fastalign.ops.token_stats.api import OUTPUT_BITS, STATE_WIDTH


def token_stats_fwd(backend, logits, labels, mask, temperature_tensor, factor, cap_scale, temperature, ignore_index, outputs, vocab_start,
                    vocab_total, state_in, target_in):  # fmt: skip
    rows, acc, device = math.prod(logits.shape[:-1]), ffi.acc_dtype(logits.dtype), logits.device
    targets = 0 if labels is None else labels.shape[1]
    results = []
    for name, bit in OUTPUT_BITS.items():
        shape = (rows, targets) if name == "logprob" else (rows,)
        results.append(ffi.empty(shape if outputs & bit else (0,), acc, device))
    state = ffi.empty((rows, STATE_WIDTH), acc, device)
    target = ffi.empty((0,) if labels is None else (rows, targets), acc, device)
    if rows:
        ffi.launch(
            backend, "token_stats_fwd", logits, ffi.rows_view(logits), ffi.DTYPE_CODES[logits.dtype], ffi.ptr(labels), targets, ffi.ptr(mask),
            ignore_index, factor, cap_scale, ffi.ptr(temperature_tensor), temperature, vocab_start, vocab_total, outputs, ffi.ptr(state_in),
            ffi.ptr(target_in), *(ffi.ptr(r) for r in results), ffi.ptr(state), ffi.ptr(target),
        )  # fmt: skip
    return (*results, state, target)


def _backward(backend, grad, logits, labels, mask, temperature_tensor, factor, cap_scale, temperature, ignore_index, vocab_start, vocab_total,
              state, g_logprob, g_entropy, g_logsumexp):  # fmt: skip
    if logits.numel() == 0:
        return
    ffi.launch(
        backend, "token_stats_bwd", logits, ffi.rows_view(logits), ffi.rows_view(grad), ffi.DTYPE_CODES[logits.dtype], ffi.ptr(labels),
        0 if labels is None else labels.shape[1], ffi.ptr(mask), ignore_index, factor, cap_scale, ffi.ptr(temperature_tensor), temperature,
        vocab_start, vocab_total, ffi.ptr(state), ffi.ptr(g_logprob), ffi.ptr(g_entropy), ffi.ptr(g_logsumexp),
    )  # fmt: skip


def token_stats_bwd(backend, logits, *rest):
    grad = ffi.empty(tuple(logits.shape), logits.dtype, logits.device)
    _backward(backend, grad, logits, *rest)
    return grad


def token_stats_bwd_(backend, logits, *rest):
    _backward(backend, logits, logits, *rest)
