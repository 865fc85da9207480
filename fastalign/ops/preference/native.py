"""The pair kernel through the compiled extension."""

from __future__ import annotations

from fastalign.ops.preference.reference import SUM_WIDTH, TABLE_WIDTH
from fastalign.runtime import ffi


def preference_fwd(backend, logprobs, ref_logprobs, kl, cu_seqlens, pairs, mask, weights, sums, beta, omega, soft_labels, gamma_ext, target,
                   anchor, valid, num_items, num_sft_tokens, scalars, switches, count, table):  # fmt: skip
    like = logprobs if sums is None else sums
    stages = (sums is None) + 2 * bool(table)
    out_sums = ffi.empty((count, 2, SUM_WIDTH), like.dtype, like.device) if sums is None else sums.clone()
    loss = ffi.empty(() if table else (0,), like.dtype, like.device)
    pair_loss = ffi.empty((count,) if table else (0,), like.dtype, like.device)
    rows = ffi.empty((count, TABLE_WIDTH) if table else (0,), like.dtype, like.device)
    if count == 0:
        return loss.zero_(), pair_loss, rows, out_sums
    tokens, sequences = (logprobs.shape[0], cu_seqlens.shape[0] - 1) if sums is None else (0, 0)
    counter = ffi.counter(like) if stages == 3 and backend != "cpu" else None
    ffi.launch(
        backend, "preference_fwd", like, ffi.ptr(logprobs), ffi.ptr(ref_logprobs), ffi.ptr(kl), ffi.ptr(cu_seqlens), tokens, sequences, count,
        ffi.ptr(pairs), ffi.ptr(mask), ffi.ptr(weights), ffi.DTYPE_CODES[like.dtype],
        *(ffi.pair_ptr(t) for t in (beta, omega, soft_labels, gamma_ext, target, anchor)), ffi.ptr(valid), ffi.ptr(num_items),
        ffi.ptr(num_sft_tokens), scalars, switches, stages, ffi.ptr(out_sums), ffi.ptr(loss), ffi.ptr(pair_loss), ffi.ptr(rows),
        ffi.ptr(counter),
    )  # fmt: skip
    return loss, pair_loss, rows, out_sums


def preference_bwd(backend, grad, logprobs, ref_logprobs, cu_seqlens, pairs, mask, weights, sums, table, scalars, switches, with_kl):
    tokens = logprobs.shape[0]
    d_logprobs = ffi.empty((tokens,), logprobs.dtype, logprobs.device)
    d_kl = ffi.empty((tokens if with_kl else 0,), logprobs.dtype, logprobs.device)
    if tokens:
        ffi.launch(
            backend, "preference_bwd", logprobs, ffi.ptr(grad), grad.dim(), ffi.ptr(logprobs), ffi.ptr(ref_logprobs), ffi.ptr(cu_seqlens),
            tokens, cu_seqlens.shape[0] - 1, table.shape[0], ffi.ptr(pairs), ffi.ptr(mask), ffi.ptr(weights), ffi.DTYPE_CODES[logprobs.dtype],
            scalars, switches, ffi.ptr(sums), ffi.ptr(table), ffi.ptr(d_logprobs), ffi.ptr(d_kl),
        )  # fmt: skip
    return d_logprobs, d_kl
