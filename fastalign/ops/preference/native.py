"""The pair kernel through the compiled extension."""

from __future__ import annotations

from fastalign.ops.columns import SUM_WIDTH, TABLE_WIDTH
from fastalign.ops.preference.params import SCALAR_COUNT
from fastalign.runtime import ffi


def preference_fwd(backend, a):
    t, given = a.tokens, a.given
    like = t.logprobs if a.sums is None else a.sums
    stages = (a.sums is None) + 2 * bool(a.table)
    sums = ffi.empty((a.count, 2, SUM_WIDTH), like.dtype, like.device) if a.sums is None else a.sums.clone()
    loss = ffi.empty(() if a.table else (0,), like.dtype, like.device)
    pair_loss = ffi.empty((a.count,) if a.table else (0,), like.dtype, like.device)
    table = ffi.empty((a.count, TABLE_WIDTH) if a.table else (0,), like.dtype, like.device)
    if a.count == 0:
        return loss.zero_(), pair_loss, table, sums
    tokens, sequences = (t.logprobs.shape[0], t.cu_seqlens.shape[0] - 1) if a.sums is None else (0, 0)
    counter = ffi.counter(like) if stages == 3 and backend != "cpu" else None
    ffi.launch(backend, "preference_fwd", like, (
        ffi.ptr(t.logprobs), ffi.ptr(t.ref_logprobs), ffi.ptr(t.kl), ffi.ptr(t.cu_seqlens), tokens, sequences,
        a.count, ffi.ptr(t.pairs), ffi.ptr(t.mask), ffi.ptr(t.weights), ffi.DTYPE_CODES[like.dtype],
        *(ffi.pair_ptr(x) for x in given[:6]), ffi.ptr(given.valid), ffi.ptr(given.num_items),
        ffi.ptr(given.num_sft_tokens), *ffi.numbers(a.params, SCALAR_COUNT), stages, ffi.ptr(sums),
        ffi.ptr(loss), ffi.ptr(pair_loss), ffi.ptr(table), ffi.ptr(counter),
    ))  # fmt: skip
    return loss, pair_loss, table, sums


def preference_bwd(backend, a):
    t = a.tokens
    tokens = t.logprobs.shape[0]
    d_logprobs = ffi.empty((tokens,), t.logprobs.dtype, t.logprobs.device)
    d_kl = ffi.empty((tokens if a.with_kl else 0,), t.logprobs.dtype, t.logprobs.device)
    if tokens:
        ffi.launch(backend, "preference_bwd", t.logprobs, (
            ffi.ptr(a.grad), a.grad.dim(), ffi.ptr(t.logprobs), ffi.ptr(t.ref_logprobs),
            ffi.ptr(t.cu_seqlens), tokens, t.cu_seqlens.shape[0] - 1, a.table.shape[0], ffi.ptr(t.pairs),
            ffi.ptr(t.mask), ffi.ptr(t.weights), ffi.DTYPE_CODES[t.logprobs.dtype],
            *ffi.numbers(a.params, SCALAR_COUNT), ffi.ptr(a.sums), ffi.ptr(a.table), ffi.ptr(d_logprobs),
            ffi.ptr(d_kl),
        ))  # fmt: skip
    return d_logprobs, d_kl
