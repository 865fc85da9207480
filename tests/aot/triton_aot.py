"""Compile Triton kernels for GPUs that are not there, exactly as the launchers in ops/*/triton.py would: the
launcher is called on CPU tensors, and in place of a launch each kernel is compiled for the chosen target with
the signature, specialisation and options that this call gives it."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastalign.runtime import ffi

OUT = Path(__file__).parents[2].resolve() / "build" / "triton_aot"
DRIVER = (
    "_active" if hasattr(driver, "_active") else "active"
)  # where Triton keeps the driver in use; "active" before 3.5
TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}


class _NoDevice:
    """What JITFunction.run asks of a driver before it compiles."""

    def __init__(self, target):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: str(target)
        self.get_current_stream = lambda device: 0


@contextmanager
def compiling_for(target_name):
    """Yields a list that fills with the compiled kernels of the launches inside, in order."""
    assert not ffi.TRITON_INTERPRETED, "TRITON_INTERPRET is set: kernels would be interpreted, not compiled"
    target, kernels, run, active, options = (
        TARGETS[target_name],
        [],
        JITFunction.run,
        getattr(driver, DRIVER),
        ffi.launch_options,
    )

    def compile_instead(self, *args, grid, warmup, **options):
        kernels.append(run(self, *args, grid=grid, warmup=True, **options))

    os.environ["TRITON_CACHE_DIR"] = str(OUT)

    def launch_options(threads, device, max_registers=None):
        return ffi.triton_options(
            threads, target.warp_size, max_registers if target.backend == "cuda" else None
        )

    try:
        driver.set_active(_NoDevice(target))
        JITFunction.run, ffi.launch_options = compile_instead, launch_options
        yield kernels
    finally:
        JITFunction.run, ffi.launch_options = run, options
        setattr(driver, DRIVER, active)
