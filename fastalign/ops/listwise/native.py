"""The list kernel through the compiled extension."""

from __future__ import annotations

from fastalign.ops.columns import LIST_TABLE_WIDTH
from fastalign.ops.listwise.params import LIST_SCALAR_COUNT
from fastalign.runtime import ffi


def listwise_fwd(backend, a):
    sequences, lists = a.sums.shape[0], a.list_offsets.shape[0] - 1
    shapes = ((), (lists,), (sequences,), (sequences,), (lists, LIST_TABLE_WIDTH))
    loss, list_loss, slopes, rewards, table = (ffi.empty(s, a.sums.dtype, a.sums.device) for s in shapes)
    if lists == 0:
        return loss.zero_(), list_loss, slopes.fill_(float("nan")), rewards.fill_(float("nan")), table
    counter = None if backend == "cpu" else ffi.counter(a.sums)
    ffi.launch(backend, "listwise_fwd", a.sums, (
        ffi.ptr(a.sums), sequences, ffi.ptr(a.list_offsets), lists, ffi.ptr(a.scores),
        ffi.DTYPE_CODES[a.sums.dtype], ffi.pair_ptr(a.given.beta), ffi.ptr(a.given.num_items),
        ffi.ptr(a.given.num_sft_tokens), *ffi.numbers(a.params, LIST_SCALAR_COUNT), ffi.ptr(loss),
        ffi.ptr(list_loss), ffi.ptr(slopes), ffi.ptr(rewards), ffi.ptr(table), ffi.ptr(counter),
    ))  # fmt: skip
    return loss, list_loss, slopes, rewards, table
