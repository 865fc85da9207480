"""The LM head as matrix products: logits of some rows and a part of the vocabulary, and the way back of their
gradient. Everything here is one library product per step; what precision means stands in `Head`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

PRECISIONS = ("fp32", "bf16", "tf32")
# Of a part of the weight in another type than its own, which exists only while it is multiplied.
CAST_BYTES = 16 << 20
_HALF = (torch.bfloat16, torch.float16)
_WITH_PRODUCTS = ("cpu", "cuda")  # devices that multiply; meta tensors have shapes only


class Precision(NamedTuple):
    """operands: the type that hidden and weight are rounded to before they are multiplied. logits: the type
    that the products' sums are rounded to: fp32 (fp64 for fp64), bf16 with precision "bf16". tf32: operands
    lose all but 10 bits of their fraction. Gradients of the logits have the logits' type; the products of the
    way back accumulate in `acc` and come out in it."""

    operands: torch.dtype
    logits: torch.dtype
    tf32: bool

    @property
    def acc(self) -> torch.dtype:
        return torch.float64 if self.logits == torch.float64 else torch.float32


class Head(NamedTuple):
    """logits = hidden weight^T + bias; weight [V, H], bias [V]."""

    weight: Tensor
    bias: Tensor | None
    operands: torch.dtype
    logits: torch.dtype
    tf32: bool

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def precision(self) -> Precision:
        return Precision(*self[2:])


def precision_of(hidden: Tensor, weight: Tensor, name: str) -> Precision:
    """`name` is one of PRECISIONS. Operands are of the wider of both types, under autocast of its type, as in
    torch.nn.functional.linear."""
    operands = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if device in _WITH_PRODUCTS and torch.is_autocast_enabled(device) and operands != torch.float64:
        operands = torch.get_autocast_dtype(device)
    if name == "bf16":
        return Precision(torch.bfloat16, torch.bfloat16, False)
    logits = torch.float64 if operands == torch.float64 else torch.float32
    return Precision(operands, logits, name == "tf32" and operands == torch.float32)


def parts(head: Head, first: int, end: int, kind: torch.dtype) -> Iterator[tuple[int, int, Tensor]]:
    """The weight of [first, end) as operands in the type `kind`: in one part, or, where it must be cast, in
    parts of CAST_BYTES."""
    if head.weight.dtype == head.operands == kind and not _rounds_itself(head):
        yield first, end, head.weight[first:end]
        return
    step = max(64, CAST_BYTES // (head.weight.shape[1] * kind.itemsize))
    for begin in range(first, end, step):
        stop = min(begin + step, end)
        yield begin, stop, operand(head, head.weight[begin:stop]).to(kind)


def multiply_type(head: Head) -> torch.dtype:
    """The type in which the operands meet: their own where the library's product gives the logits' type from
    it, else the logits'."""
    same = head.operands == head.logits
    return head.operands if same or _widens(head.weight.device, head.operands) else head.logits


def way_back_type(precision: Precision, device: torch.device) -> torch.dtype:
    """The type in which the gradient of the logits meets hidden and weight, whose products come out in `acc`:
    the operands' where the library widens them, else that."""
    return precision.operands if _widens(device, precision.operands) else precision.acc


def bytes_per_logit(precision: Precision, device: torch.device) -> int:
    """Of a tile, with its gradient in the type of the way back, where that is another one. Counted without a
    way back, too: both kinds of call then have the same tiles, and the same bits."""
    back = way_back_type(precision, device)
    return precision.logits.itemsize + (back.itemsize if back != precision.logits else 0)


def operand(head: Head, x: Tensor) -> Tensor:
    """x rounded to the operands' type, in the type in which they meet."""
    x = x.to(head.operands).to(multiply_type(head))
    return _tf32(x) if _rounds_itself(head) else x


def rounded(precision: Precision, x: Tensor) -> Tensor:
    """x rounded to the operands' type and precision, in the accumulation type."""
    x = x.to(precision.operands).to(precision.acc)
    return _tf32(x) if precision.tf32 else x


def _widens(device: torch.device, operands: torch.dtype) -> bool:
    """Whether the library multiplies 16-bit numbers into fp32 sums that it does not round."""
    return device.type == "cuda" and operands in _HALF and hasattr(torch.ops.aten.mm, "dtype_out")


def _rounds_itself(head: Head) -> bool:
    return head.tf32 and head.weight.device.type != "cuda"


def _tf32(x: Tensor) -> Tensor:
    """fp32 to the nearest number with 10 bits of fraction, ties to even."""
    bits = x.view(torch.int32)
    odd = (bits >> 13) & 1
    rounded = ((bits + (0xFFF + odd)) & ~0x1FFF).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x)


def product(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b; out may be wider than the operands where the library widens."""
    wider = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    torch.addmm(out, a, b, out=out, **wider) if add else torch.mm(a, b, out=out, **wider)


def logits_of(head: Head, x: Tensor, first: int, end: int, out: Tensor) -> Tensor:
    """The logits [rows, end - first] of operands x [rows, H], written to `out`."""
    with exact_products(head):
        for begin, stop, weight in parts(head, first, end, multiply_type(head)):
            tile = out[:, begin - first : stop - first]
            product(tile, x, weight.t())
            if head.bias is not None:
                tile += head.bias[begin:stop]
    return out


def bring_back(head: Head, grad: Tensor, first: int, x: Tensor, into: Tile) -> None:
    """What the gradient of a tile of logits, [rows, some part of V from `first` on], does to those of hidden,
    weight and bias. `x`: the rows' operands."""
    end, kind = first + grad.shape[1], way_back_type(head.precision, grad.device)
    with exact_products(head):
        own = grad.to(kind)
        if into.hidden is not None:
            for begin, stop, weight in parts(head, first, end, kind):
                tile = own[:, begin - first : stop - first]
                product(into.hidden, tile, weight, add=into.add_hidden or begin > first)
        if into.weight is not None:
            product(into.weight, own.t(), x.to(kind), add=into.add_weight)
        if into.bias is not None:
            sums = grad.sum(0, dtype=into.bias.dtype)
            into.bias.add_(sums) if into.add_weight else into.bias.copy_(sums)


class Tile(NamedTuple):
    """Where the gradient of a tile of logits goes, in the accumulation type; None: not asked for. hidden
    [rows, H] of its rows, weight [v, H] and bias [v] of its part of the vocabulary; added to what is there,
    or written over it."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    add_hidden: bool
    add_weight: bool


@contextlib.contextmanager
def exact_products(head: Head) -> Iterator[None]:
    """Products of the operands as they are: autocast does not round them again, and fp32 ones are fp32
    products, or TF32 ones where that was asked for, whatever the process has set."""
    device = head.weight.device.type
    if device not in _WITH_PRODUCTS or torch.compiler.is_compiling():  # a graph's products are the compiler's
        yield
        return
    with contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
        back = way_back_type(head.precision, head.weight.device)
        if torch.float32 in (multiply_type(head), back):
            _set_precision(stack, device, "tf32" if head.tf32 and device == "cuda" else "ieee")
        yield


def _set_precision(stack: contextlib.ExitStack, device: str, wanted: str) -> None:
    """Of fp32 products, until the stack unwinds; torch before 2.9 has a setting for CUDA only."""
    setting = torch.backends.cuda.matmul if device == "cuda" else torch.backends.mkldnn.matmul
    if hasattr(setting, "fp32_precision"):
        name, value = "fp32_precision", wanted
    elif device == "cuda":
        name, value = "allow_tf32", wanted == "tf32"
    else:
        return
    before = getattr(setting, name)
    if before != value and not (device == "cpu" and before == "none"):
        setattr(setting, name, value)
        stack.callback(setattr, setting, name, before)
