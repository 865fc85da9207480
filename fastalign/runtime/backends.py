"""The backends, a row each, and which one is to serve: by default, or because someone forced one.

A new backend is a row here and a kernel for each op that it serves."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from fastalign.runtime import as_command, ffi
from fastalign.runtime.identity import PACKAGE


@dataclass(frozen=True)
class Backend:
    """Where its kernel of an op stands ("module:function" or "module:function:first argument"), why it cannot
    serve a device type's tensors (None: it can), the device types that it is tried on unasked, its place
    among the others there (the highest first), and whether it computes in fp64."""

    kernel: str
    absent: Callable[[str], str | None]
    unasked_on: tuple[str, ...]
    rank: int
    fp64: bool


# CUDA C++ before Triton on NVIDIA; Triton alone on ROCm, where the extension has no kernels. What nothing
# else serves, the reference does.
_ROWS = {
    "reference": Backend("{op}.reference:{function}", lambda device: None, (), 0, True),
    "cpu": Backend("{op}.native:{function}:cpu", ffi.why_not_cpu, ("cpu",), 2, True),
    "triton": Backend("{op}.triton:{function}", ffi.why_not_triton, ("cuda", "cpu"), 1, False),
    "cuda": Backend("{op}.native:{function}:cuda", ffi.why_not_cuda, ("cuda",), 2, False),
}
BACKENDS = tuple(_ROWS)


class BackendError(RuntimeError):
    """No backend (or not the forced one) can serve this call; the message gives each backend's reason."""


def why_not(backend: str, device_type: str) -> str | None:
    """None if `backend` is present and serves tensors on `device_type`; otherwise the reason."""
    return _ROWS[backend].absent(device_type)


def usual_order(device_type: str) -> tuple[str, ...]:
    """The backends that are tried for tensors of this device type, the fastest first."""
    tried = [name for name, row in _ROWS.items() if device_type in row.unasked_on]
    return (*sorted(tried, key=lambda name: -_ROWS[name].rank), "reference")


def standard_kernels(op: str, function: str) -> dict[str, str]:
    """The kernels of an op by the house layout: ops/<op>/{reference,native,triton}.py, one function name."""
    return {
        name: row.kernel.format(op=f"{PACKAGE}.ops.{op}", function=function) for name, row in _ROWS.items()
    }


def in_fp64(backend: str) -> bool:
    """Whether it takes fp64, which is there to check the others by."""
    return _ROWS[backend].fp64


def backends() -> dict[str, str]:
    """What each backend can do on this machine: name -> "available" or the reason why it is not."""
    status = {}
    for name, row in _ROWS.items():
        whys = [
            row.absent(device) for device in (("cpu",) if row.unasked_on == ("cpu",) else ("cuda", "cpu"))
        ]
        status[name] = "available" if None in whys else whys[0]
    return status


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

# A thread's (or asyncio task's) own choice, and those of the main thread, the last one first in force, for
# threads that made none.
_own: ContextVar[tuple[str | None] | None] = ContextVar("fastalign_backend", default=None)
_of_main_thread: list[use_backend] = []


class use_backend:
    """Force one backend (`reference`, `cpu`, `triton` or `cuda`; None: automatic): `with
    use_backend("triton"): ...`, or for good as a plain call `use_backend("triton")`. A call that the forced
    backend cannot serve raises `BackendError`; nothing falls back.

    The choice is that of the thread (or asyncio task) that makes it; threads without one follow the main
    thread. Backward runs on the backend that was in force in forward, on whichever thread (a graph compiled
    by torch.compile: on what is in force where it runs)."""

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
    """`name` as the choice of this thread alone, whatever was chosen before: for backward, which may run on
    another thread than forward."""
    before = _own.get()
    _own.set((name,))
    try:
        yield
    finally:
        _own.set(before)
