"""Compiles the CUDA sources for the CPU: g++ over csrc/cuda/*.cu with the emulation header force-included, linked with the bindings into a
second extension, `_C_emu`. Objects are kept under build/ by the hash of everything that went into them.

`python tests/cuda_emu/build.py` builds and prints the module's path."""
from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
OUT = ROOT / "build" / "cuda_emu"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
# UBSan's runtime is linked into the module, so that a plain python can import it; a finding ends the process with a message.
VARIANTS = {"ubsan": ["-fsanitize=undefined", "-fno-sanitize-recover=all"], "plain": []}


def build(variant: str = "ubsan", edits: dict[str, tuple[str, str]] | None = None) -> Path:
    """Path of the module. `edits`: file name under csrc/cuda -> (text, replacement), to compile a changed copy of a kernel; the text must
    stand in the file exactly once."""
    cuda = {p: p.read_text() for p in sorted((CSRC / "cuda").iterdir()) if p.suffix in (".cu", ".cuh", ".h")}
    for name, (old, new) in (edits or {}).items():
        assert cuda[CSRC / "cuda" / name].count(old) == 1, f"{name} holds {old!r} {cuda[CSRC / 'cuda' / name].count(old)} times"
        cuda[CSRC / "cuda" / name] = cuda[CSRC / "cuda" / name].replace(old, new)
    headers = {p: t for p, t in cuda.items() if p.suffix != ".cu"}
    shared = {p: p.read_text() for p in [*sorted(CSRC.rglob("*.h")), *sorted(HERE.glob("*.h"))] if p not in headers}
    common = repr([(str(p), t) for p, t in [*headers.items(), *shared.items()]])
    # A changed copy is compiled from a directory of its own, which hides csrc/cuda.
    overlay = OUT / f"edit-{_hash(repr(edits))}" if edits else CSRC
    for path, text in cuda.items() if edits else ():
        (overlay / "cuda").mkdir(parents=True, exist_ok=True)
        (overlay / "cuda" / path.name).write_text(text)

    flags = [*FLAGS, *VARIANTS[variant], "-DFA_EMU", "-DFA_WITH_CUDA", f"-I{overlay}", f"-I{CSRC}", f"-I{HERE}", "-include", "cuda_emu.h"]
    python = [f"-isystem{sysconfig.get_path('include')}", f"-isystem{pybind11.get_include()}"]
    strings = [f'-D{k}="{v}"' for k, v in (("FA_VERSION", "emulated"), ("FA_CUDA_ARCHS", "emulated"), ("FA_CUDA_COMPILER", "g++"))]
    sources = [(overlay / "cuda" / p.name, t, []) for p, t in cuda.items() if p.suffix == ".cu"]
    sources.insert(0, (CSRC / "bindings.cpp", (CSRC / "bindings.cpp").read_text(), ["-DFA_MODULE=_C_emu", *strings, *python]))
    jobs = []
    for path, text, extra in sources:
        names = [f.replace(str(overlay), "") for f in (*flags, *extra)]
        jobs.append((path, OUT / f"{path.stem}-{_hash(repr((names, common, text)))}.o", [*flags, *extra]))
    module = OUT / f"{_hash(repr([str(o) for _, o, _ in jobs]))}" / f"_C_emu{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not module.exists():
        module.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda job: compile_object(*job), jobs))
        _run(["g++", "-shared", *VARIANTS[variant], "-static-libubsan", *[str(o) for _, o, _ in jobs], "-o", str(module)])
    return module


def compile_object(source: Path, output: Path, flags: list[str]) -> None:
    """`output`'s name holds the hash of its inputs: if it is there, it is up to date."""
    if not output.exists():
        partial = output.with_suffix(f".{source.stem}.part")
        _run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(partial)])
        partial.rename(output)


def load(path: Path) -> ModuleType:
    """Import a built module under its own path, beside others of the same name."""
    spec = importlib.util.spec_from_file_location("_C_emu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr[-8000:]}")


if __name__ == "__main__":
    print(build())
