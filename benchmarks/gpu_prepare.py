"""What to carry to a GPU machine: fastalign/_C for its Python and its GPU, and variants of the CUDA kernels;
start it by benchmarks/gpu_prepare.sh."""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from gpu_gate import sources as csrc_digest
from gpu_plan import PREPARED, ROOT

MARK = PREPARED / "csrc.sha256"  # from which sources: the gate builds again where they are others
LIMIT = 64 << 20  # bytes that commonly travel with one command

# Other values for what csrc/cuda/row.cuh leaves open. A block's share of a row is no variant: stage 2 sweeps
# set_cluster_size instead.
VARIANTS = {"unroll8": "-DFA_UNROLL=8", "threads512": "-DFA_ROW_THREADS=512"}


def headers(version: str) -> Path:
    """The folder with Python.h of Python `version`, from PYTHON_INCLUDE or from the interpreter itself."""
    given = os.environ.get("PYTHON_INCLUDE")
    if given is None:
        name = f"python{version}"
        for python in (name, *sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/{name}"))):
            question = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('include'))"]
            try:
                given = subprocess.run(question, check=True, capture_output=True, text=True).stdout.strip()
                break
            except (OSError, subprocess.CalledProcessError):
                continue
        else:
            sys.exit(
                f"gpu_prepare: no {name} runs here; set PYTHON_INCLUDE to a folder with the Python.h of "
                f"Python {version}"
            )
    patchlevel = Path(given) / "patchlevel.h"
    if not (Path(given) / "Python.h").is_file() or not patchlevel.is_file():
        sys.exit(
            f"gpu_prepare: {given} holds no Python.h; set PYTHON_INCLUDE to a folder with the headers of "
            f"Python {version}"
        )
    found = ".".join(
        re.search(rf"#define PY_{part}_VERSION\s+(\d+)", patchlevel.read_text())[1]
        for part in ("MAJOR", "MINOR")
    )
    if found != version:
        sys.exit(f"gpu_prepare: {given} holds the headers of Python {found}, not {version}")
    return Path(given)


def needs(library: Path) -> str:
    """The newest GLIBC and GLIBCXX that the library asks for."""
    data = library.read_bytes()
    newest = []
    for name in ("GLIBC", "GLIBCXX"):
        versions = {
            tuple(map(int, v.split(b"."))) for v in re.findall(rb"\0%s_([\d.]+)(?=\0)" % name.encode(), data)
        }
        newest.append(f"{name} {'.'.join(map(str, max(versions, default=(0,))))}")
    return ", ".join(newest)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default="3.12", help="the GPU machine's Python (default: 3.12)")
    parser.add_argument(
        "--archs", default="90", help="its compute capability, as FASTALIGN_ARCHS has it (default: 90)"
    )
    parser.add_argument("--no-variants", action="store_true", help="the extension alone")
    arguments = parser.parse_args()
    if not re.fullmatch(r"3\.\d+", arguments.python):
        parser.error(f"--python {arguments.python}: write a version like 3.12")
    try:
        build = runpy.run_path(str(ROOT / "setup.py"), run_name="fastalign_setup")
    except ImportError as error:
        sys.exit(f"gpu_prepare: {error}; {sys.executable} needs setuptools, pybind11 and ninja to build")
    include = headers(arguments.python)
    os.environ.update(FASTALIGN_CUDA="1", FASTALIGN_ARCHS=arguments.archs)
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    nvcc = build["find_nvcc"](sources)

    name = f"_C.cpython-{arguments.python.replace('.', '')}-x86_64-linux-gnu.so"
    shutil.rmtree(PREPARED, ignore_errors=True)
    built = {ROOT / "fastalign" / name: {"cpu": True}}
    if not arguments.no_variants:
        built |= {
            PREPARED / variant / name: {"cpu": False, "cuda_flags": flags}
            for variant, flags in VARIANTS.items()
        }
    for output, options in built.items():
        label = "extension" if options["cpu"] else output.parent.name
        print(f"== {label}", flush=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        text = build["ninja_file"](output, nvcc, sources, headers=include, **options)
        if not build["run_ninja"](ROOT / "build" / "gpu-objects" / f"{arguments.python}-{label}", text):
            sys.exit(f"gpu_prepare: building {label} failed; the compiler's message is above")

    PREPARED.mkdir(parents=True, exist_ok=True)
    MARK.write_text(csrc_digest() + "\n")
    print(
        f"\nfor Python {arguments.python} and sm_{arguments.archs.replace(';', ', sm_')}; carry (they are not "
        "in git):"
    )
    for output in built:
        print(
            f"  {output.stat().st_size / 2**20:6.1f} MiB  {output.relative_to(ROOT)}  ({needs(output)} or "
            "later)"
        )
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True).stdout.split(b"\0")
    tree = sum(
        (ROOT / os.fsdecode(path)).stat().st_size
        for path in tracked
        if path and (ROOT / os.fsdecode(path)).is_file()
    )
    total = tree + sum(output.stat().st_size for output in built)
    print(
        f"  {'':>10}  {MARK.relative_to(ROOT)}: from which sources; the gate builds again where they are "
        "others"
    )
    print(
        f"  {tree / 2**20:6.1f} MiB  the sources\n  {total / 2**20:6.1f} MiB  in all; the limit is "
        f"{LIMIT >> 20} MiB"
    )
    return int(total > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
