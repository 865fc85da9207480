"""The list kernel through the compiled extension."""

from __future__ import annotations

from fastalign.ops.listwise.reference import TABLE_WIDTH
from fastalign.runtime import ffi


def listwise_fwd(backend, sums, list_offsets, scores, beta, num_items, num_sft_tokens, scalars, switches):
    sequences, lists = sums.shape[0], list_offsets.shape[0] - 1
    shapes = ((), (lists,), (sequences,), (sequences,), (lists, TABLE_WIDTH))
    loss, list_loss, slopes, rewards, table = (ffi.empty(s, sums.dtype, sums.device) for s in shapes)
    if lists == 0:
        return loss.zero_(), list_loss, slopes.fill_(float("nan")), rewards.fill_(float("nan")), table
    counter = None if backend == "cpu" else ffi.counter(sums)
    ffi.launch(
        backend, "listwise_fwd", sums, ffi.ptr(sums), sequences, ffi.ptr(list_offsets), lists, ffi.ptr(scores), ffi.DTYPE_CODES[sums.dtype],
        ffi.pair_ptr(beta), ffi.ptr(num_items), ffi.ptr(num_sft_tokens), scalars, switches, ffi.ptr(loss), ffi.ptr(list_loss), ffi.ptr(slopes),
        ffi.ptr(rewards), ffi.ptr(table), ffi.ptr(counter),
    )  # fmt: skip
    return loss, list_loss, slopes, rewards, table
