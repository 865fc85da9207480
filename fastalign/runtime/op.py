"""The one place where a call finds its kernel.

An `Op` is a `torch.library` operator (schema, one Python implementation that selects the backend, a fake for
tracing) with a kernel per backend. Backends are tried in an order per device type, which an op may have of
its own; each may decline a call with a reason, and `explain` prints them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import torch

from fastalign.runtime import backends, ffi, layout
from fastalign.runtime.arguments import Declaration
from fastalign.runtime.backends import BACKENDS, BackendError, forced, standard_kernels
from fastalign.runtime.identity import NAMESPACE, add_op_namespace_prefix

# True: also check the values of CUDA tensors (labels, cu_seqlens, pairs) before every op, at the price of a
# device synchronisation.
_debug_checks = False

_library = torch.library.Library(NAMESPACE, "DEF")
OPS: dict[str, Op] = {}
PUBLIC: dict[str, str] = {}  # public functions and the op that they call first
PLANS: dict[
    str, Callable[..., str]
] = {}  # public functions that choose a plan, and what tells it from their arguments


@contextmanager
def debug_checks() -> Iterator[None]:
    """Within this context CUDA inputs are checked by value as CPU inputs always are (costs a synchronisation
    per op)."""
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
_can_tell = None not in (_dispatch_modes, _transforms, _tracing) and hasattr(
    torch.autograd.profiler, "_is_profiler_enabled"
)


def dispatcher_can_be_skipped() -> bool:
    """Whether no one but the kernel would see an op pass the dispatcher: no compiler or tracer, dispatch
    mode, functorch transform or profiler."""
    return _can_tell and not (
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or torch.autograd.profiler._is_profiler_enabled
        or _transforms() is not None
        or _tracing() is not None
    )


@dataclass
class Op:
    """One registered operator.

    `arguments` is the NamedTuple class that declares them (arguments.py), `results` what the schema returns;
    `fake`, `rules`, `check`, `declines` and the kernels take one such object. `folder` is that of its
    kernels, which bear its name; `dtypes` are the storage types that it takes for its first tensor, fp64 only
    from backends that compute in it; `rules` say what else than the layout must hold where a call comes
    through the dispatcher; `check` validates tensor values (CPU always, CUDA under `debug_checks`) and
    raises. `public` names the public functions that call it first, `writes` the tensor that it writes in
    place. `order`: its own order of backends on a device type, a measured choice; `declines`: a backend's
    reason not to serve some arguments, or None."""

    name: str
    arguments: Any
    results: str
    fake: Callable[[Any], Any]
    folder: str
    dtypes: tuple[torch.dtype, ...]
    rules: Callable[[Any], None] | None = None
    check: Callable[[Any], None] | None = None
    public: tuple[str, ...] = ()
    writes: str = ""
    order: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    declines: Mapping[str, Callable[[Any], str | None]] = field(default_factory=dict)
    _loaded: dict[str, Callable[..., Any]] = field(default_factory=dict)
    _able: dict[tuple, list[tuple[str, Callable[..., Any]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.declaration = Declaration(self.arguments, self.writes)
        _library.define(f"{self.name}({self.declaration.schema}) -> {self.results}")
        _library.impl(self.name, self._run_raw, "CompositeExplicitAutograd")
        full_name = add_op_namespace_prefix(self.name)
        torch.library.register_fake(full_name, self._fake_raw, lib=_library)
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        self._names = [leaf.name for leaf in self.declaration.leaves]
        self._entries = layout.parse(self.declaration.layout, self._names, (self.writes,))
        if not self.writes:
            torch.library.register_autograd(full_name, self._no_derivative, lib=_library)
        self.kernels = standard_kernels(self.folder, self.name)
        OPS[self.name] = self
        PUBLIC.update(dict.fromkeys(self.public, self.name))

    def __call__(self, a: Any) -> Any:
        """Through torch's dispatcher where anything may listen to it (tracing, dispatch modes, tensor
        subclasses, transforms, the profiler); else straight to the kernel, which saves the dispatcher's
        conversion of every argument, twice (20 to 60 us)."""
        return (
            self._run(a)
            if dispatcher_can_be_skipped() and ffi.are_plain(a)
            else self.overload(*self.declaration.flatten(a))
        )

    def _no_derivative(self, ctx: Any, *grads: Any) -> NoReturn:
        """The derivatives are those of the public functions; a graph that holds the bare op would lose them
        without a word."""
        raise RuntimeError(
            f"torch.ops.{NAMESPACE}.{self.name} has no derivative by itself: differentiate fastalign's "
            "functions, not their ops. A program of "
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
        return self.select(tensor, a)(a)

    def select(self, tensor: torch.Tensor, a: Any = None) -> Callable[..., Any]:
        """The kernel that serves `tensor`'s device and dtype and the arguments `a`, or BackendError with the
        reasons."""
        key = (forced(), tensor.device.type, tensor.dtype, ffi.emulator())
        able = self._able.get(key)
        if not able:  # nobody: asked anew, since a backend may come
            able = self._able[key] = self._find(tensor)
        for backend, kernel in able:
            if self.declined(backend, a) is None:
                return kernel
        reasons = [
            f"  {backend}: {self.why_not(backend, tensor, a)}" for backend in self.tried(tensor.device.type)
        ]
        raise BackendError(
            f"{add_op_namespace_prefix(self.name)} has no backend for {tensor.dtype} on {tensor.device}:\n"
            + "\n".join(reasons)
        )

    def tried(self, device_type: str) -> tuple[str, ...]:
        """The backends that are asked for tensors of this device type, in order: the forced one alone, if one
        is."""
        name = forced()
        return (name,) if name else self.in_order(device_type)

    def in_order(self, device_type: str) -> tuple[str, ...]:
        """All that would be asked if none were forced."""
        return self.order.get(device_type) or backends.usual_order(device_type)

    def _find(self, tensor: torch.Tensor) -> list[tuple[str, Callable[..., Any]]]:
        """Those of them that can serve such tensors, with their kernels."""
        if tensor.device.type == "meta":  # shapes are all that such tensors have
            return [("meta", self.fake)]
        return [
            (b, self._kernel(b)) for b in self.tried(tensor.device.type) if self.why_not(b, tensor) is None
        ]

    def takes(self, backend: str) -> tuple[torch.dtype, ...]:
        """The storage types that a backend takes for the first tensor."""
        return tuple(d for d in self.dtypes if d != torch.float64 or backends.in_fp64(backend))

    def declined(self, backend: str, a: Any) -> str | None:
        """The backend's reason not to serve these arguments, if it has one."""
        decline = self.declines.get(backend)
        return None if decline is None or a is None else decline(a)

    def why_not(self, backend: str, tensor: torch.Tensor, a: Any = None) -> str | None:
        """None if `backend` can serve the call, else the reason."""
        why = backends.why_not(backend, tensor.device.type)
        if why is None and tensor.dtype not in self.takes(backend):
            legal = ", ".join(str(d).removeprefix("torch.") for d in self.takes(backend))
            why = f"{str(tensor.dtype).removeprefix('torch.')} is not supported here (legal: {legal})"
        return self.declined(backend, a) if why is None else why

    def _kernel(self, backend: str) -> Callable[..., Any]:
        if backend not in self._loaded:
            module, function, *bound = self.kernels[backend].split(":")
            kernel = getattr(importlib.import_module(module), function)
            self._loaded[backend] = partial(kernel, *bound) if bound else kernel
        return self._loaded[backend]


# Storage types of ops over vocabulary rows, and of ops over per-token scalars, which the public functions
# have already widened.
ROW_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCALAR_DTYPES = (torch.float32, torch.float64)


def explain(op: str, *args: Any, **options: Any) -> str:
    """Which backend would serve `op` (a name of `OPS`, or a public function's name: the op that it calls
    first) for these arguments, and why the others would not. Only the first tensor among `args` matters (its
    device and dtype); for the op's own arguments object, all of them do, and for a function that plans its
    work (linear_token_stats) its arguments and options as they are: the plan stands first."""
    name = op if op in OPS else PUBLIC.get(op)
    if name is None:
        raise ValueError(f"op={op!r} is unknown; legal: {', '.join([*OPS, *PUBLIC])}")
    if options and op not in PLANS:
        raise TypeError(f"explain takes options ({', '.join(options)}) for {', '.join(PLANS)} only")
    plan = PLANS[op](*args, **options) + "\n" if op in PLANS else ""
    entry = OPS[name]
    a = args[0] if args and isinstance(args[0], entry.arguments) else None
    tensor = ffi.first_tensor(args)
    if tensor is None:
        raise ValueError("explain needs at least one tensor argument")
    required = forced()
    order = entry.in_order(tensor.device.type)
    lines, chosen = [], None
    for backend in (*order, *(b for b in BACKENDS if b not in order)):
        why = entry.why_not(backend, tensor, a)
        if required and backend != required:
            why = f"backend forced to {required}" + (f"; {why}" if why else "")
        if why is None and chosen is None:
            chosen, why = backend, "chosen"
        lines.append(f"  {backend:<10}{why or 'able, but a faster one comes first'}")
    return (
        plan
        + f"{add_op_namespace_prefix(name)} on {tensor.device}, {tensor.dtype}: {chosen or 'no backend'}\n"
        + "\n".join(lines)
    )
