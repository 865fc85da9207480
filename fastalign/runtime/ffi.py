"""The one place where a tensor becomes a raw pointer, where a backend's presence is known, and where kernel
outputs are allocated.

The extension holds no torch symbols: it gets addresses, sizes, strides, a dtype code, a device number and a
stream."""

from __future__ import annotations

import importlib
import math
import os
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch

from fastalign.runtime.identity import NO_EXTENSION, PACKAGE

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

_extension: Any = None
_extension_error = NO_EXTENSION
try:
    if not NO_EXTENSION:
        _extension = importlib.import_module(f"{PACKAGE}._C")
        _extension_has_cuda = bool(_extension.build_info()["cuda"])
except ImportError as error:
    _extension_error = f"the compiled extension fastalign._C is not there ({error}); build it with `pip install .` from the sources"

MIN_TRITON = (3, 3)  # the oldest that the kernels are compiled with in the tests; pyproject.toml names it too
triton_version = (
    ""  # of the module that is imported, which on ROCm is no package called triton; "" without one
)
try:
    from triton import __version__ as triton_version

    _triton_error = ""
    if tuple(int(part) for part in triton_version.split(".")[:2]) < MIN_TRITON:
        _triton_error = f"triton {triton_version} is older than {'.'.join(map(str, MIN_TRITON))}, the oldest that fastalign supports"
except ImportError as error:
    _triton_error = f"triton is not importable ({error})"

# Triton decides at its import whether kernels are interpreted; only then can they run on CPU tensors.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

# Set by `use_emulator` (tests): the CUDA kernels compiled for the CPU, which then serve CPU tensors as
# backend "cuda".
_emulator: Any = None


def use_emulator(module: Any) -> None:
    """Serve backend "cuda" by `module` (the CUDA sources compiled with the emulation header) on CPU tensors;
    None ends it."""
    global _emulator
    _emulator = module


def emulator() -> Any:
    """The module that `use_emulator` put in place, or None."""
    return _emulator


def why_not_triton(device_type: str) -> str | None:
    """None if Triton is present and serves tensors on `device_type`; otherwise the reason."""
    if _triton_error:
        return _triton_error
    if device_type == "cpu":
        return None if TRITON_INTERPRETED else "Triton runs on CPU tensors only under TRITON_INTERPRET=1"
    return _no_device() if device_type == "cuda" else f"Triton is not used on {device_type} tensors"


def why_not_cpu(device_type: str) -> str | None:
    """Likewise for the extension's CPU kernels."""
    if _extension is None:
        return _extension_error
    return None if device_type == "cpu" else f"the CPU kernels do not serve {device_type} tensors"


def why_not_cuda(device_type: str) -> str | None:
    """Likewise for its CUDA kernels."""
    if _emulator is not None:
        return None if device_type == "cpu" else "the CUDA emulator serves CPU tensors only"
    if _extension is None:
        return _extension_error
    if not _extension_has_cuda:
        return "the extension was built without CUDA (nvcc was not found, or FASTALIGN_CUDA=0)"
    if device_type != "cuda":
        return f"the CUDA kernels do not serve {device_type} tensors"
    return "CUDA C++ kernels do not run on ROCm" if torch.version.hip else _no_device()


def _no_device() -> str | None:
    """Why torch has no GPU, if it has none. Asked anew each time: once per op, device type and dtype
    (dispatch keeps its choice), and only for CUDA tensors."""
    if torch.cuda.is_available():
        return None
    if torch.version.hip:
        return "no ROCm device is visible to torch"
    return "no CUDA device is visible to torch" + (
        "" if torch.version.cuda else ", which is a build without CUDA"
    )


def missing_backends(*, of_use: bool = False) -> list[str]:
    """One sentence per backend that this installation lacks altogether (not: that this machine has no device
    for). of_use: not those that this torch could not use either, as Triton where torch is built without a
    GPU."""
    for_gpu = torch.version.cuda or torch.version.hip or not (of_use or NO_EXTENSION)
    missing = ("" if NO_EXTENSION else _extension_error, _triton_error if for_gpu else "")
    return [error for error in missing if error]


def build_info() -> dict[str, Any]:
    """How the compiled extension was built, and the instruction sets that it can use on this CPU; empty
    without an extension."""
    return {} if _extension is None else {**_extension.build_info(), "cpu_isas": _extension.cpu_isas()}


def empty(shape: tuple[int, ...] | list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The only allocation of kernel outputs; tests replace it by one that poisons the memory and guards its
    edges."""
    return torch.empty(shape, dtype=dtype, device=device)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic and output type for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_PLAIN = {type(None), int, float, bool, list}


def holds_no_tensor(cls: type) -> None:
    """Makes it known that a class of arguments is numbers throughout."""
    _PLAIN.add(cls)


def are_plain(args: tuple[Any, ...]) -> bool:
    """Whether the tensors among them are of torch's own types and their memory holds their values: not so for
    lazily negated ones, zeros without memory and functional tensors, which the dispatcher resolves. Numbers,
    lists and None count as plain; a tuple is looked into."""
    for a in args:
        kind = type(a)
        if kind in _TENSORS:
            if a.is_neg() or (not a.data_ptr() and a.numel() and not a.is_meta):
                return False
        elif kind not in _PLAIN and (
            isinstance(a, torch.Tensor) or (isinstance(a, tuple) and not are_plain(a))
        ):
            return False
    return True


def first_tensor(args: tuple[Any, ...]) -> Any:
    """The first tensor among them; a tuple is looked into."""
    for a in args:
        if isinstance(a, torch.Tensor):
            return a
        if type(a) not in _PLAIN and isinstance(a, tuple) and (found := first_tensor(a)) is not None:
            return found
    return None


def ptr(tensor: torch.Tensor | None) -> int:
    """Address, 0 for None and for tensors without elements."""
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def pair_ptr(tensor: torch.Tensor | None) -> tuple[int, int]:
    """(address, stride) of a value per pair; stride 0 for one value that serves all."""
    if tensor is None:
        return 0, 0
    return (
        tensor.data_ptr() if tensor.numel() else 0,
        0 if tensor.dim() == 0 or tensor.numel() == 1 else tensor.stride(0),
    )


def numbers(params: Any, floats: int) -> tuple[list[float], list[int]]:
    """The parameters of a loss as the extension takes them: its floats, and the integers behind them."""
    return list(params[:floats]), list(params[floats:])


def row_layout(logits: torch.Tensor) -> tuple[int, int, int, int] | None:
    """(rows, inner, stride_outer, stride_inner) if the leading dims collapse to at most two strided ones and
    the last is contiguous."""
    if logits.numel() and logits.shape[-1] > 1 and logits.stride(-1) != 1:
        return None
    dims = [(size, stride) for size, stride in zip(logits.shape[:-1], logits.stride()[:-1]) if size != 1]
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        return None
    rows = math.prod(
        logits.shape[:-1]
    )  # torch.Size.numel() makes a constant of a size that torch.export traces
    if not merged:
        return rows, 1, 0, 0
    if len(merged) == 1:
        return rows, max(rows, 1), 0, merged[0][1]
    return rows, merged[1][0], merged[0][1], merged[1][1]


def offsets_are_valid(offsets: torch.Tensor, total: int) -> bool:
    """Whether `offsets` run from 0 to `total` and never decrease. False also where only torch can tell: other
    than contiguous int32 on the CPU, or without the extension."""
    plain = (
        offsets.device.type == "cpu"
        and offsets.dtype == torch.int32
        and offsets.is_contiguous()
        and not offsets.is_neg()
    )
    return (
        plain
        and _extension is not None
        and _extension.offsets_are_valid(offsets.data_ptr(), offsets.numel(), total)
    )


def rows_view(logits: torch.Tensor | None) -> tuple[int, int, int, int, int, int]:
    """The RowsView of csrc/ops.h; data is null for None. The public functions made the layout collapsible
    before."""
    if logits is None:
        return (0,) * 6
    layout = row_layout(logits)
    assert layout is not None
    return (ptr(logits), *layout, logits.shape[-1])


def counter(tensor: torch.Tensor) -> torch.Tensor:
    """A zero for one launch, by which the block that arrives last is known (see csrc/ops.h); keep it
    referenced until the launch.

    It is made, and filled, on the current stream in every call: what a graph captures includes the fill, no
    two graphs or streams share a word, and no tensor outlives the call in the pool of whoever records it."""
    return torch.zeros(1, dtype=torch.int32, device=tensor.device)


def aligned(tensor: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """For Triton: (a tensor that starts at a 16-byte boundary, the elements from there to `tensor`, elements
    per 16 bytes). Memory of others that does not start at such a boundary is (tensor, 0, 1): one element at a
    time."""
    itemsize = tensor.element_size()
    skip = tensor.data_ptr() % 16 // itemsize
    if skip == 0:
        return tensor, 0, 16 // itemsize
    if skip > tensor.storage_offset():
        return tensor, 0, 1
    return tensor.as_strided((1,), (1,), tensor.storage_offset() - skip), skip, 16 // itemsize


def triton_device(device: torch.device) -> Any:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def triton_options(threads: int, warp_size: int, max_registers: int | None) -> dict[str, Any]:
    """What a Triton kernel is compiled with: so many threads, and no fusion but the fma that it writes
    itself."""
    return {"num_warps": max(1, threads // warp_size), "enable_fp_fusion": False} | (
        {"maxnreg": max_registers} if max_registers else {}
    )


@lru_cache
def launch_options(threads: int, device: torch.device, max_registers: int | None = None) -> dict[str, Any]:
    """`triton_options` for a device. Warps have 32 threads on NVIDIA and RDNA, 64 on CDNA. max_registers: per
    thread, NVIDIA only; without it ptxas may spill a few to reach the next round number of blocks per
    multiprocessor."""
    warp_size = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
    return triton_options(threads, warp_size, None if torch.version.hip else max_registers)


def launch(backend: str, function: str, tensor: torch.Tensor, arguments: tuple[Any, ...]) -> None:
    """Run `_C.<function>` for "cpu", or for "cuda" on `tensor`'s device and current stream (the emulator when
    one is in use). `arguments` are the members of the op's struct in csrc/ops.h, in order;
    tests/ops/test_bindings.py holds them against the names in bindings.cpp."""
    if backend == "cpu":
        getattr(_extension, function)(-1, 0, arguments)
    elif _emulator is not None:
        getattr(_emulator, function)(0, 0, arguments)
    else:
        getattr(_extension, function)(
            tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream, arguments
        )
