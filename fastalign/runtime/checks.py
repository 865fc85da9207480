"""Argument checks that every public function shares: each message names the argument, what was given and what
is legal."""

from __future__ import annotations

import math
import operator
import sys
from typing import Any

import torch
from torch import Tensor

from fastalign.runtime import ffi

_LARGEST = sys.float_info.max


def shown(value: Any) -> str:
    """repr, shortened: a message is one line also about an integer of thousands of digits, which Python
    refuses to print."""
    if isinstance(value, int) and value.bit_length() > 10_000:
        return f"an integer of about {int(value.bit_length() * 0.30103)} digits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else text[:97] + "..."


def check_shape(name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; legal here: {tuple(shape)}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device} but {other_name} is on {other.device}; they must share a device"
        )


def check_device(name: str, tensor: Tensor) -> None:
    if tensor.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name} is on {tensor.device}; legal: cpu and cuda (NVIDIA or ROCm)")


def check_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    low: float = -math.inf,
    high: float = math.inf,
) -> None:
    """A finite number in (above, below) and [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    # Comparisons only: torch.compile traces through here, and math.isfinite would break the graph. NaN fails
    # every one of them, and an integer that no float holds the first.
    if not (-_LARGEST <= value <= _LARGEST and above < value < below and low <= value <= high):
        bounds = [
            f"> {above:g}" * (above > -math.inf), f"< {below:g}" * (below < math.inf),
            f">= {low:g}" * (low > -math.inf), f"<= {high:g}" * (high < math.inf),
        ]  # fmt: skip
        raise ValueError(
            f"{name}={shown(value)} is out of range; legal: finite {' and '.join(b for b in bounds if b)}".rstrip()
        )


def check_integer(name: str, value: Any) -> None:
    """A Python integer that int64 holds."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"{name}={shown(value)} is out of range; legal: integers of 64 bits")


def check_integers(name: str, tensor: Any) -> None:
    """A tensor of integers: token ids, labels."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of integers, got {type(tensor).__name__}")
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {tensor.dtype}")


def check_floating(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")


def check_choice(name: str, value: Any, legal: Any) -> None:
    if value not in legal:
        raise ValueError(f"{name}={shown(value)} is unknown; legal: {', '.join(str(v) for v in legal)}")


def check_cu_seqlens(
    cu_seqlens: Any, tokens: Tensor, *, name: str = "cu_seqlens", total: str = "tokens"
) -> Tensor:
    """Shape, dtype and device; returns it as contiguous int32. Values are checked by
    `check_cu_seqlens_values`, inside the ops. Offsets of other things than sequences of tokens have another
    `name` and `total`."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"{name} must be a 1-D integer tensor that starts at 0 and ends at the number of {total}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 (or int64), got {cu_seqlens.dtype}")
    check_same_device(name, cu_seqlens, "the per-token tensor", tokens)
    return as_int32(cu_seqlens)


def as_int32(numbers: Tensor) -> Tensor:
    """Contiguous int32. What int32 cannot hold becomes its least or largest number, which is no legal offset
    or sequence number: were it cut off, 2^32 + 8 would pass for 8."""
    if numbers.dtype == torch.int32 and numbers.is_contiguous():
        return numbers
    limits = torch.iinfo(torch.int32)
    return numbers.to(torch.int64).clamp(limits.min, limits.max).to(torch.int32).contiguous()


def check_cu_seqlens_values(
    cu_seqlens: Tensor, tokens: int, *, name: str = "cu_seqlens", total: str = "tokens"
) -> None:
    """Starts at 0, never decreases, ends at the number of tokens."""
    if ffi.offsets_are_valid(cu_seqlens, tokens):
        return
    # Something is wrong, or must be looked at by torch: find out what, and say it.
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != tokens:
        beyond = " or more" if int(cu_seqlens[-1]) == torch.iinfo(torch.int32).max else ""
        raise ValueError(
            f"{name} must start at 0 and end at the number of {total} ({tokens}); it runs from "
            f"{int(cu_seqlens[0])} to {int(cu_seqlens[-1])}{beyond}"
        )
    if bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        where = int((cu_seqlens[1:] < cu_seqlens[:-1]).nonzero()[0])
        raise ValueError(f"{name} decreases at position {where + 1}; it must be non-decreasing")


def check_cu_seqlens_outside_ops(cu_seqlens: Tensor, tokens: int) -> None:
    """`check_cu_seqlens_values` in functions that are no ops."""
    if values_are_here(cu_seqlens):
        check_cu_seqlens_values(cu_seqlens, tokens)


def values_are_here(tensor: Tensor) -> bool:
    """Whether a tensor's values can be looked at without a synchronisation: on the CPU, not traced, and no
    fake, which has none."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )


def check_pairs_values(pairs: Tensor, sequences: int) -> None:
    """Sequence numbers inside [0, sequences)."""
    if pairs.numel():
        low, high = (int(x) for x in pairs.aminmax())
        if low < 0 or high >= sequences:
            raise IndexError(
                f"pairs holds sequence numbers from {low} to {high}; legal: 0 to {sequences - 1}"
            )


def global_count(name: str, value: Any, like: Tensor) -> Tensor | None:
    """num_items and its kin, a number or a tensor of one element, as a 0-dim tensor of `like`'s dtype and
    device; a constant. None stays None."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return one_element(name, value, like)
    if not isinstance(value, (int, float)) and hasattr(value, "__index__"):
        value = operator.index(value)  # counts are often NumPy's integers
    check_number(name, value, low=0)
    return torch.full((), float(value), dtype=like.dtype, device=like.device)


def one_element(name: str, value: Tensor, like: Tensor) -> Tensor:
    """A tensor of one element that stands for a number, as a 0-dim constant of `like`'s dtype and device."""
    if value.numel() != 1:
        raise ValueError(
            f"{name} must be a number or a tensor of one element, got shape {tuple(value.shape)}"
        )
    check_same_device(name, value, "the per-token tensor", like)
    return value.detach().reshape(()).to(like.dtype)


def per_token(name: str, tensor: Any, like: Tensor | None = None) -> Tensor:
    """A floating [T] tensor widened to fp32 (fp64 stays), contiguous; with `like`: of its shape, dtype and
    device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if (
        like is not None
        and tensor.dtype == like.dtype
        and tensor.shape == like.shape
        and tensor.device == like.device
        and tensor.is_contiguous()
    ):
        return tensor  # the usual case, without a dispatch
    check_floating(name, tensor)
    if like is None:
        if tensor.dim() != 1:
            raise ValueError(f"{name} must be 1-D [T] (packed tokens), got shape {tuple(tensor.shape)}")
        check_device(name, tensor)
        if tensor.dtype in (torch.float32, torch.float64) and tensor.is_contiguous():
            return tensor
        return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32).contiguous()
    check_shape(name, tensor, tuple(like.shape))
    check_same_device(name, tensor, "the log-probs", like)
    return tensor.to(like.dtype).contiguous()


def row_mask(mask: Any, like: Tensor) -> Tensor | None:
    """A row-aligned mask as contiguous bool, or None."""
    if mask is None:
        return None
    check_shape("mask", mask, tuple(like.shape))
    check_same_device("mask", mask, "the per-token tensor", like)
    usual = mask.dtype == torch.bool and mask.is_contiguous()
    return mask if usual else mask.to(torch.bool).contiguous()
