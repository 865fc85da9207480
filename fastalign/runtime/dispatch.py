"""The one place where a backend is chosen.

An `Op` is a `torch.library` operator (schema, one Python implementation that selects the backend, a fake for tracing) with one kernel
per backend. Backends are tried in a fixed order per device type; each may decline a call with a reason, and `explain` prints them.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch

from fastalign.runtime import as_command, ffi, layout
from fastalign.runtime.arguments import Declaration

BACKENDS = ("reference", "cpu", "triton", "cuda")
# CUDA C++ before Triton on NVIDIA; Triton alone on ROCm, where the extension has no kernels.
_PRIORITY = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "triton", "reference")}

# True: also check the values of CUDA tensors (labels, cu_seqlens, pairs) before every op, at the price of a device synchronisation.
_debug_checks = False

_library = torch.library.Library("fastalign", "DEF")
OPS: dict[str, Op] = {}


def _check_name(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is unknown; legal: {', '.join(BACKENDS)}")
    return name


_from_environment: str | None = None
if os.environ.get("FASTALIGN_BACKEND"):
    try:
        _from_environment = _check_name(os.environ["FASTALIGN_BACKEND"])
    except ValueError as error:
        if as_command.is_command():
            as_command.end(f"FASTALIGN_BACKEND: {error}")
        raise ValueError(f"FASTALIGN_BACKEND: {error}") from None

# A thread's (or asyncio task's) own choice, and those of the main thread, the last one first in force, for threads that made none.
_own: ContextVar[tuple[str | None] | None] = ContextVar("fastalign_backend", default=None)
_of_main_thread: list[use_backend] = []


class use_backend:
    """Force one backend (`reference`, `cpu`, `triton` or `cuda`; None: automatic): `with use_backend("triton"): ...`, or for good as
    a plain call `use_backend("triton")`. A call that the forced backend cannot serve raises `BackendError`; nothing falls back.

    The choice is that of the thread (or asyncio task) that makes it; threads without one follow the main thread. Backward runs on the backend
    that was in force in forward, on whichever thread (a graph compiled by torch.compile: on what is in force where it runs)."""

    def __init__(self, name: str | None):
        self.name = None if name is None else _check_name(name)
        self._before = _own.get()
        _own.set((self.name,))
        if threading.current_thread() is threading.main_thread():
            _of_main_thread.append(self)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exc: object) -> None:
        _own.set(self._before)
        if self in _of_main_thread:
            del _of_main_thread[_of_main_thread.index(self) :]


def forced() -> str | None:
    """The backend that is forced where this is called, or None."""
    own = _own.get()
    if own is not None:
        return own[0]
    return _of_main_thread[-1].name if _of_main_thread else _from_environment


@contextmanager
def on_backend(name: str | None) -> Iterator[None]:
    """`name` as the choice of this thread alone, whatever was chosen before: for backward, which may run on another thread than forward."""
    before = _own.get()
    _own.set((name,))
    try:
        yield
    finally:
        _own.set(before)


@contextmanager
def debug_checks() -> Iterator[None]:
    """Within this context CUDA inputs are checked by value as CPU inputs always are (costs a synchronisation per op)."""
    global _debug_checks
    previous, _debug_checks = _debug_checks, True
    try:
        yield
    finally:
        _debug_checks = previous


# Names of torch that are not promised; where one is missing, every call goes through the dispatcher.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_transforms = getattr(torch._C._functorch, "peek_interpreter_stack", None)
_tracing = getattr(torch._C, "_get_tracing_state", None)
_can_tell = None not in (_dispatch_modes, _transforms, _tracing) and hasattr(torch.autograd.profiler, "_is_profiler_enabled")


def _nobody_listens() -> bool:
    """Whether no one but the kernel would see an op pass the dispatcher: no compiler or tracer, dispatch mode, functorch transform or profiler."""
    return _can_tell and not (
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or torch.autograd.profiler._is_profiler_enabled
        or _transforms() is not None
        or _tracing() is not None
    )


class BackendError(RuntimeError):
    """No backend (or not the forced one) can serve this call; the message gives each backend's reason."""


@dataclass
class Op:
    """One registered operator.

    `arguments` is the NamedTuple class that declares them (arguments.py), `results` what the schema returns; `fake`, `rules`, `check` and the kernels
    take one such object. `kernels` maps a backend to "module:function" or "module:function:first argument"; `dtypes` maps a backend to the storage
    types it accepts for the first tensor; `rules` say what else than the layout must hold where a call comes through the dispatcher; `check` validates
    tensor values (CPU always, CUDA under `debug_checks`) and raises."""

    name: str
    arguments: Any
    results: str
    fake: Callable[[Any], Any]
    kernels: dict[str, str]
    dtypes: dict[str, tuple[torch.dtype, ...]]
    rules: Callable[[Any], None] | None = None
    check: Callable[[Any], None] | None = None
    writes: str = ""  # the tensor that is written in place
    _loaded: dict[str, Callable[..., Any]] = field(default_factory=dict)
    _chosen: dict[tuple, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.declaration = Declaration(self.arguments, self.writes)
        _library.define(f"{self.name}({self.declaration.schema}) -> {self.results}")
        _library.impl(self.name, self._run_raw, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastalign::{self.name}", self._fake_raw, lib=_library)
        self.overload = getattr(torch.ops.fastalign, self.name).default
        self._names = [leaf.name for leaf in self.declaration.leaves]
        self._entries = layout.parse(self.declaration.layout, self._names, (self.writes,))
        if not self.writes:
            torch.library.register_autograd(f"fastalign::{self.name}", self._no_derivative, lib=_library)
        OPS[self.name] = self

    def __call__(self, a: Any) -> Any:
        """Through torch's dispatcher where anything may listen to it (tracing, dispatch modes, tensor subclasses, transforms, the profiler); else
        straight to the kernel, which saves the dispatcher's conversion of every argument, twice (20 to 60 us)."""
        return self._run(a) if _nobody_listens() and ffi.are_plain(a) else self.overload(*self.declaration.flatten(a))

    def _no_derivative(self, ctx: Any, *grads: Any) -> NoReturn:
        """The derivatives are those of the public functions; a graph that holds the bare op would lose them without a word."""
        raise RuntimeError(
            f"torch.ops.fastalign.{self.name} has no derivative by itself: differentiate fastalign's functions, not their ops. A program of "
            "torch.export holds the ops and is for inference; torch.compile is for training"
        )

    def _run_raw(self, *args: Any) -> Any:
        """What the dispatcher calls, whoever called that: nothing about the tensors is known."""
        a = self.declaration.build(layout.conform(self._entries, self._names, args))
        if self.rules is not None:
            self.rules(a)
        return self._run(a)

    def _fake_raw(self, *args: Any) -> Any:
        return self.fake(self.declaration.build(args))

    def _run(self, a: Any) -> Any:
        tensor = ffi.first_tensor(a)
        if self.check is not None and (tensor.device.type == "cpu" or _debug_checks):
            self.check(a)
        return self.select(tensor)(a)

    def select(self, tensor: torch.Tensor) -> Callable[..., Any]:
        """The kernel that serves `tensor`'s device and dtype, or BackendError with the reasons."""
        chosen = forced()
        key = (chosen, tensor.device.type, tensor.dtype, ffi.emulator())
        if key in self._chosen:
            return self._chosen[key]
        if tensor.device.type == "meta":  # shapes are all that such tensors have
            return self._chosen.setdefault(key, self.fake)
        reasons = []
        for backend in (chosen,) if chosen else _PRIORITY.get(tensor.device.type, ("reference",)):
            why = self.why_not(backend, tensor)
            if why is None:
                return self._chosen.setdefault(key, self._kernel(backend))
            reasons.append(f"  {backend}: {why}")
        raise BackendError(f"fastalign::{self.name} has no backend for {tensor.dtype} on {tensor.device}:\n" + "\n".join(reasons))

    def why_not(self, backend: str, tensor: torch.Tensor) -> str | None:
        """None if `backend` can serve the call, else the reason."""
        why = ffi.why_not(backend, tensor.device.type)
        if why is None and tensor.dtype not in self.dtypes[backend]:
            legal = ", ".join(str(d).removeprefix("torch.") for d in self.dtypes[backend])
            why = f"{str(tensor.dtype).removeprefix('torch.')} is not supported here (legal: {legal})"
        return why

    def _kernel(self, backend: str) -> Callable[..., Any]:
        if backend not in self._loaded:
            module, function, *bound = self.kernels[backend].split(":")
            kernel = getattr(importlib.import_module(module), function)
            self._loaded[backend] = partial(kernel, *bound) if bound else kernel
        return self._loaded[backend]


def standard_kernels(folder: str, function: str) -> dict[str, str]:
    """The four kernels of an op by the house layout: ops/<folder>/{reference,native,triton}.py, one function name."""
    base = f"fastalign.ops.{folder}"
    return {
        "reference": f"{base}.reference:{function}",
        "cpu": f"{base}.native:{function}:cpu",
        "cuda": f"{base}.native:{function}:cuda",
        "triton": f"{base}.triton:{function}",
    }


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def row_dtypes() -> dict[str, tuple[torch.dtype, ...]]:
    """Storage types of ops over vocabulary rows: fp64 only where it can be checked for (reference and CPU)."""
    return {b: FLOATS + ((torch.float64,) if b in ("reference", "cpu") else ()) for b in BACKENDS}


def scalar_dtypes() -> dict[str, tuple[torch.dtype, ...]]:
    """Types of ops over per-token scalars, which the public functions have already widened to fp32 or fp64."""
    return {b: (torch.float32,) + ((torch.float64,) if b in ("reference", "cpu") else ()) for b in BACKENDS}


def backends() -> dict[str, str]:
    """What each backend can do on this machine: name -> "available" or the reason why it is not."""
    status = {}
    for name in BACKENDS:
        devices = ("cpu",) if name == "cpu" else ("cuda", "cpu")
        whys = [ffi.why_not(name, d) for d in devices]
        status[name] = "available" if None in whys else whys[0]
    return status


def explain(op: str, *args: Any) -> str:
    """Which backend would serve `op` (a name of `dispatch.OPS`, or a public function's name: its forward op) for these arguments,
    and why the others would not. Only the first tensor among `args` matters (its device and dtype)."""
    name = op if op in OPS else _PUBLIC.get(op)
    if name is None:
        raise ValueError(f"op={op!r} is unknown; legal: {', '.join([*OPS, *_PUBLIC])}")
    tensor = next((a for a in args if isinstance(a, torch.Tensor)), None)
    if tensor is None:
        raise ValueError("explain needs at least one tensor argument")
    entry = OPS[name]
    order = _PRIORITY.get(tensor.device.type, ("reference",))
    lines, chosen, required = [], None, forced()
    for backend in (*order, *(b for b in BACKENDS if b not in order)):
        why = entry.why_not(backend, tensor)
        if required and backend != required:
            why = f"backend forced to {required}" + (f"; {why}" if why else "")
        if why is None and chosen is None:
            chosen, why = backend, "chosen"
        lines.append(f"  {backend:<10}{why or 'able, but a faster one comes first'}")
    return f"fastalign::{name} on {tensor.device}, {tensor.dtype}: {chosen or 'no backend'}\n" + "\n".join(lines)


# Public functions whose forward op goes by another name.
_PUBLIC = {
    "token_stats": "token_stats_fwd",
    "token_logprobs": "token_stats_fwd",
    "selective_log_softmax": "token_stats_fwd",
    "entropy_from_logits": "token_stats_fwd",
    "token_kl": "token_stats_fwd",
    "token_kl_loss": "token_stats_fused",
    "kl_estimate": "kl_estimate_fwd",
    "sequence_sum": "sequence_sum_fwd",
    "preference_loss": "preference_fwd",
    "preference_loss_from_sums": "preference_fwd",
    "policy_loss": "policy_fwd",
    "value_loss": "value_fwd",
    "listwise_loss": "listwise_fwd",
    "listwise_loss_from_sums": "listwise_fwd",
    "reward_loss": "preference_fwd",
    "kwise_reward_loss": "listwise_fwd",
    "gae": "gae_fwd",
}
