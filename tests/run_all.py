"""Every check that needs no GPU, each in a process of its own; what `make test` runs. The first failure ends it.

Backends that must be exercised are named to pytest, and a named backend that cannot run fails: nothing here is skipped because something
is missing. Stages by name: `python tests/run_all.py lint cpu` runs those two."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "--durations=5"]
CONTRACT = sorted((ROOT / "tests").glob("test_contract*.py"))


def run(command, **env):
    print("+", " ".join(str(c) for c in command), flush=True)
    subprocess.run([str(c) for c in command], cwd=ROOT, env={**os.environ, **env}, check=True)


def lint():
    run([BIN / "ruff", "check", "."])
    run([BIN / "ruff", "format", "--check", "."])
    sources = [p for folder in ("csrc", "tests") for p in (ROOT / folder).rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")]
    run([BIN / "clang-format", "--dry-run", "--Werror", *sources])


def cpu():
    run([*PYTEST, "tests", "--ignore=tests/train"])


def train():
    run([*PYTEST, "tests/train"])


def triton():
    run([*PYTEST, *CONTRACT, "--backend", "triton"], TRITON_INTERPRET="1")


def cuda():
    run([*PYTEST, "tests/cuda_emu"])


def aot():
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        sys.exit("the ahead-of-time stage needs nvcc (CUDA 12.8 or later), neither on PATH nor in /usr/local/cuda/bin")
    run([*PYTEST, "tests/test_cuda_aot.py", "tests/test_triton_aot.py"], TRITON_INTERPRET="0")


def two_steps():
    """The command line on a file, two optimizer steps, and the model it saved loads."""
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "tests/two_step_run.py", folder])


STAGES = {f.__name__: f for f in (lint, cpu, train, triton, cuda, aot, two_steps)}


def main(names):
    unknown = [n for n in names if n not in STAGES]
    if unknown:
        sys.exit(f"unknown stages {', '.join(unknown)}; legal: {', '.join(STAGES)}")
    times = {}
    for name in names or STAGES:
        start = time.perf_counter()
        print(f"== {name}", flush=True)
        try:
            STAGES[name]()
        except subprocess.CalledProcessError as error:
            sys.exit(f"stage {name} failed: {error}")
        times[name] = time.perf_counter() - start
    print("all stages passed:", ", ".join(f"{n} {t:.0f} s" for n, t in times.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
