"""Compiles the CUDA sources for the CPU: g++ over csrc/cuda/*.cu with the emulation header force-included,
linked with the bindings into a second extension, `_C_emu`. Objects are kept under build/ by the hash of
everything that went into them.

`python tests/cuda_emu/build.py` builds and prints the module's path."""

from __future__ import annotations

import hashlib
import importlib.util
import re
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
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Werror",
]
# UBSan's runtime is linked into the module, so that a plain python can import it; a finding ends the process
# with a message.
VARIANTS = {"ubsan": ["-fsanitize=undefined", "-fno-sanitize-recover=all"], "plain": []}


def build(
    variant: str = "ubsan", edits: dict[str, tuple[str, str]] | None = None, seen_by: tuple[str, ...] = ()
) -> Path:
    """Path of the module. `edits`: file name under csrc/cuda -> (text, replacement), to compile a changed
    copy of a kernel; the text must stand in the file exactly once. What does not include a changed file is
    not compiled again, nor, with `seen_by`, what is not named there."""
    edited = {}
    for name, (old, new) in (edits or {}).items():
        text = (CSRC / "cuda" / name).read_text()
        assert text.count(old) == 1, f"{name} holds {old!r} {text.count(old)} times"
        edited[name] = text.replace(old, new)
    # Changed copies lie in a directory of their own, which is searched first.
    overlay = OUT / f"edit-{_hash(repr(edited))}" if edited else OUT
    for name, text in edited.items():
        (overlay / "cuda").mkdir(parents=True, exist_ok=True)
        (overlay / "cuda" / name).write_text(text)
    flags = [*FLAGS, "-DFA_EMU", "-DFA_WITH_CUDA", "-include", "cuda_emu.h"]
    python = [f"-isystem{sysconfig.get_path('include')}", f"-isystem{pybind11.get_include()}"]
    strings = [
        f'-D{k}="{v}"'
        for k, v in (("FA_VERSION", "emulated"), ("FA_CUDA_ARCHS", "emulated"), ("FA_CUDA_COMPILER", "g++"))
    ]
    bindings = ["-DFA_MODULE=_C_emu", *strings, *python]
    search = [overlay, CSRC, HERE]
    jobs = []
    for source in [CSRC / "bindings.cpp", *sorted((CSRC / "cuda").glob("*.cu"))]:
        path = overlay / "cuda" / source.name if source.name in edited else source
        where = search if not seen_by or source.name in seen_by else [CSRC, HERE]
        texts = _texts([path, HERE / "cuda_emu.h"], where)
        changed = any(
            text in edited.values() for text in texts
        )  # a wrong kernel, which other checks than UBSan's are to notice
        options = [
            *flags,
            *(bindings if source.name == "bindings.cpp" else [] if changed else VARIANTS[variant]),
        ]
        output = OUT / f"{source.stem}-{_hash(repr((options, texts)))}.o"
        jobs.append((path, output, [*options, *[f"-I{d}" for d in where]]))
    module = (
        OUT
        / f"{_hash(repr([str(o) for _, o, _ in jobs]))}"
        / f"_C_emu{sysconfig.get_config_var('EXT_SUFFIX')}"
    )
    if not module.exists():
        module.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(2) as pool:
            list(
                pool.map(
                    lambda job: compile_object(*job), sorted(jobs, key=lambda job: -job[0].stat().st_size)
                )
            )
        _run(
            [
                "g++",
                "-shared",
                *VARIANTS[variant],
                "-static-libubsan",
                *[str(o) for _, o, _ in jobs],
                "-o",
                str(module),
            ]
        )
    return module


def _texts(paths: list[Path], search: list[Path]) -> list[str]:
    """The texts of `paths` and of everything they include from `search`."""
    seen: dict[Path, str] = {}
    while paths:
        path = paths.pop()
        if path not in seen:
            seen[path] = path.read_text()
            found = (
                next((d / name for d in search if (d / name).exists()), None)
                for name in re.findall(r'#include "(.+)"', seen[path])
            )
            paths += [p for p in found if p]
    return [seen[p] for p in sorted(seen, key=lambda p: p.name)]


def compile_object(source: Path, output: Path, flags: list[str]) -> None:
    """`output`'s name holds the hash of its inputs: if it is there, it is up to date."""
    if not output.exists():
        partial = output.with_suffix(f".{source.stem}.part")
        _run(["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(partial)])
        partial.rename(output)


def load(path: Path) -> ModuleType:
    """Import a built module beside others: pybind11 hands out one module per full name, so the name holds the
    build's hash."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}._C_emu", path)
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
