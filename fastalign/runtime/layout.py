"""The tensors that an op takes: shapes, dtypes, one device. The public functions bring their inputs into this
form; `torch.ops.fastalign.*` is public too, and what is called there is held against it before a kernel sees
an address."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastalign.runtime import ffi

_DTYPES = {"int32": torch.int32, "int64": torch.int64, "bool": torch.bool}


@dataclass(frozen=True)
class Entry:
    """One tensor: its place and name in the schema, its dims, its type: "same" as the first tensor's, "acc"
    (what that accumulates in), or a name."""

    place: int
    name: str
    dims: tuple[str, ...]
    kind: str
    scalar: bool  # one element without dims will do as well
    rows: bool  # the leading dims are free, their strides too
    written: bool  # in place


def parse(layout: str, names: Sequence[str], written: Sequence[str] = ()) -> tuple[Entry, ...]:
    """`layout` is a list of tensors like "x[T] cu_seqlens[S+1]:int32 beta[P?] logits[*rows,V]": dims are
    letters that must agree throughout, numbers, or names of the op's integer arguments; `+1` adds one, a
    final `?` allows a tensor without dims, `*rows` stands for any leading dims. Floating tensors without a
    type have the type of the first one."""
    entries = []
    for text in layout.split():
        name, dims, kind = re.fullmatch(r"(\w+)\[([^]]*)\](?::(\w+))?", text).groups()
        scalar, rows = dims.endswith("?"), dims.startswith("*")
        sizes = tuple(d for d in dims.strip("*?").split(",") if d)
        entries.append(Entry(names.index(name), name, sizes, kind or "same", scalar, rows, name in written))
    return tuple(sorted(entries, key=lambda e: e.place))


def conform(entries: Sequence[Entry], names: Sequence[str], args: Sequence[Any]) -> list[Any]:
    """`args` with every tensor as the kernels read it (contiguous), or ValueError, TypeError."""
    out = list(args)
    sizes = {name: a for name, a in zip(names, args) if isinstance(a, int)}
    first = None
    for e in entries:
        tensor = args[e.place] if e.place < len(args) else None
        if tensor is None:
            continue
        first = first or (e.name, tensor)
        if tensor.device != first[1].device:
            raise ValueError(
                f"{e.name} is on {tensor.device} but {first[0]} is on {first[1].device}; they must share a "
                "device"
            )
        dtype = {"same": first[1].dtype, "acc": ffi.acc_dtype(first[1].dtype)}.get(e.kind) or _DTYPES[e.kind]
        if tensor.dtype != dtype:
            raise TypeError(f"{e.name} is {tensor.dtype}; legal here: {dtype}")
        _agree(e, tensor, sizes)
        out[e.place] = tensor if e.rows and ffi.row_layout(tensor) is not None else tensor.contiguous()
        if e.written and out[e.place] is not tensor:
            raise ValueError(
                f"{e.name} has strides {tensor.stride()}; legal: a contiguous last dim, and leading dims that "
                "collapse to two"
            )
    return out


def _agree(e: Entry, tensor: Tensor, sizes: dict[str, int]) -> None:
    shape = tuple(tensor.shape)
    if e.scalar and not shape:
        return
    if e.rows:
        shape = (math.prod(shape[:-1]), *shape[-1:])
    fits = len(shape) == len(e.dims)
    for dim, size in zip(e.dims, shape):
        base, plus, _ = dim.partition("+1")
        want = int(base) if base.isdigit() else sizes.setdefault(base, size - bool(plus))
        fits = fits and size == want + bool(plus) and want >= 0
    if not fits:
        legal = ", ".join(
            str(sizes[d]) if d in sizes else f"{sizes[d[:-2]] + 1}" if d[:-2] in sizes else d for d in e.dims
        )
        raise ValueError(
            f"{e.name} has shape {tuple(tensor.shape)}; legal here: ({'..., ' if e.rows else ''}{legal})"
            + " or ()" * e.scalar
        )


def refuse(wrong: bool, message: str) -> None:
    """What an op's own rules add to the layout of its tensors."""
    if wrong:
        raise ValueError(message)
