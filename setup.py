"""Builds fastalign/_C from csrc/ with ninja: g++ always, nvcc when it is found. No torch headers, no torch
libraries.

FASTALIGN_EXTENSION=1|0      compile fastalign/_C (default), or install the Python part alone: its backends are the reference and Triton
FASTALIGN_CUDA=auto|0|1      compile the .cu files: where nvcc is found and torch or a GPU can use them (default), never, or fail without nvcc
FASTALIGN_ARCHS="80;90;100"  compute capabilities to compile for; PTX for later GPUs goes along
"""

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import ninja
import pybind11
import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
MIN_SETUPTOOLS = 64  # the first with editable installs by pyproject.toml; before 61 it passes over that file and installs a nameless package
if int(setuptools.__version__.split(".")[0]) < MIN_SETUPTOOLS:
    raise SystemExit(
        f"setuptools {setuptools.__version__} is too old: {MIN_SETUPTOOLS} or later builds fastalign (pip "
        "install -U setuptools)"
    )
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "fastalign" / "__init__.py").read_text(), re.MULTILINE
).group(1)

# -ffp-contract=off: a fused multiply-add is where the source says so and nowhere else, so variants of one
# kernel agree bit by bit. -Wno-psabi: vectors wider than the machine's are only passed to functions that are
# inlined.
CXX_FLAGS = "-O3 -std=c++17 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=off -fno-math-errno -Wall -Wextra -Wno-psabi"
# Host code of the .cu files. The runtime is linked statically and kept out of the symbol table: the module
# loads without a driver, and next to any torch with a CUDA runtime of its own.
NVCC_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"
NVCC_LINK_FLAGS = "-cudart static -Xcompiler -fopenmp -Xlinker --exclude-libs,ALL"
# The kernels of one instruction set each; isa.cpp picks at load what the CPU can run.
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
AVX2 = "-mavx2 -mfma -mf16c"
ISA_FLAGS = {"rows_avx2.cpp": AVX2, "rows_avx512.cpp": AVX512, "rows_avx512bf16.cpp": AVX512 + " -mavx512bf16",
             "tokens_avx2.cpp": AVX2, "tokens_avx512.cpp": AVX512}  # fmt: skip
# Those for any CPU serve, on x86-64, machines older than AVX2: there they are compiled in half the time.
# Elsewhere they are the kernels.
X86_FLAGS = {**ISA_FLAGS, "rows_generic.cpp": "-O2", "tokens_generic.cpp": "-O2"}

# They take minutes: begun last, one of them would leave the other cores idle.
SLOWEST = ("token_stats_fwd.cu", "token_stats_bwd.cu", "token_stats_fused.cu")


def find_nvcc(cuda_sources):
    """The nvcc to use, or None to build without CUDA."""
    wanted = os.environ.get("FASTALIGN_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FASTALIGN_CUDA={wanted!r}: legal values are auto, 0 and 1")
    if wanted == "0" or (wanted == "auto" and not cuda_sources):
        return None
    chosen = "FASTALIGN_ARCHS" in os.environ  # whoever names architectures wants them
    if wanted == "auto" and not chosen and (why := cuda_is_of_no_use()):
        print(
            f"fastalign: the CUDA kernels are left out, since {why}; FASTALIGN_CUDA=1 compiles them all the "
            "same",
            flush=True,
        )
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if wanted == "1" and not (nvcc and cuda_sources):
        raise SystemExit(
            "FASTALIGN_CUDA=1, but "
            f"{'csrc/cuda holds no .cu file' if nvcc else f'nvcc is neither on PATH nor in {home}/bin'}"
        )
    return nvcc


def cuda_is_of_no_use():
    """Why no program here could call a CUDA kernel: there is no NVIDIA device, and torch, where it is
    installed, was built without CUDA. None where one could. A torch that is not visible (an isolated build)
    decides nothing: then the device does."""
    if (
        any(Path("/dev").glob("nvidia[0-9]*"))
        or Path("/dev/dxg").exists()
        or Path("/proc/driver/nvidia/version").exists()
    ):
        return None
    try:
        from torch.version import cuda
    except ImportError:
        return "this machine has no NVIDIA device"
    return None if cuda else "this machine has no NVIDIA device and torch is built without CUDA"


def cuda_archs():
    text = os.environ.get("FASTALIGN_ARCHS", "80;90;100")
    archs = text.split(";")
    if not all(re.fullmatch(r"\d{2,3}[af]?", a) for a in archs):
        raise SystemExit(
            f"FASTALIGN_ARCHS={text!r}: write compute capabilities without the dot, separated by semicolons, "
            'as in "80;90;100"'
        )
    return archs


def cuda_targets(archs):
    """What nvcc is told: machine code for each, and PTX for later GPUs. The kernels ask for nothing newer than
    compute capability 9.0, so from there on all share one run of the compiler's first half."""
    virtual = [a if not a.isdigit() or int(a) < 90 else "90" for a in archs]
    targets = [f"-gencode=arch=compute_{v},code=sm_{a}" for v, a in zip(virtual, archs)]
    return [*targets, f"-gencode=arch=compute_{virtual[-1]},code=compute_{virtual[-1]}"]


def cuda_compiler_version(nvcc):
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    return "nvcc " + re.search(r"release [\d.]+, V([\d.]+)", text).group(1)


def literal(name, value):
    """A macro that expands to a C string literal, quoted for the shell that ninja runs."""
    return f"'-D{name}=\"{value}\"'"


def compile_rule(name, command):
    lines = [
        f"rule {name}",
        f"  command = {command} -c $in -o $out",
        "  description = compiling $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    return lines


def ninja_file(output, nvcc, cuda_sources, *, headers=None, cpu=True, cuda_flags=""):
    """The text of build.ninja. benchmarks/gpu_prepare.py builds for another Python's `headers`, without the
    CPU kernels, with more flags."""
    include = f"-I{CSRC}"
    python = f"-isystem {headers or sysconfig.get_path('include')} -isystem {pybind11.get_include()}"
    defines = f"-DFA_MODULE=_C {'-DFA_WITH_CPU ' if cpu else ''}{literal('FA_VERSION', VERSION)}"
    link = "g++ -fopenmp"
    rules = compile_rule("cxx", f"g++ {CXX_FLAGS} $flags {include} -MMD -MF $out.d")
    if nvcc:
        archs = cuda_archs()
        targets = " ".join(cuda_targets(archs))
        defines += f" -DFA_WITH_CUDA {literal('FA_CUDA_ARCHS', ';'.join(archs))} {literal('FA_CUDA_COMPILER', cuda_compiler_version(nvcc))}"
        link = f"{nvcc} {NVCC_LINK_FLAGS}"
        rules += compile_rule("cuda", f"{nvcc} {NVCC_FLAGS} {targets} {cuda_flags} {include} -MD -MF $out.d")
    rules += ["rule link", f"  command = {link} -shared $in -o $out", "  description = linking $out"]

    sources = [
        CSRC / "bindings.cpp",
        *(sorted((CSRC / "cpu").glob("*.cpp")) if cpu else []),
        *(cuda_sources if nvcc else []),
    ]
    sources.sort(key=lambda source: source.name not in SLOWEST)
    objects = []
    for source in sources:
        objects.append(str(source.relative_to(CSRC)).replace("/", ".") + ".o")
        rules.append(f"build {objects[-1]}: {'cuda' if source.suffix == '.cu' else 'cxx'} {escape(source)}")
        if source.name == "bindings.cpp":
            rules.append(f"  flags = -O2 {defines} {python}")
        elif source.name in X86_FLAGS and platform.machine() in ("x86_64", "AMD64"):
            rules.append(f"  flags = {X86_FLAGS[source.name]}")
    return "\n".join(
        [*rules, f"build {escape(output)}: link {' '.join(objects)}", f"default {escape(output)}", ""]
    )


def escape(path):
    """A path as ninja reads it in a build line."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def run_ninja(directory, text, verbose=False):
    """Build what `text` describes in `directory`, where the objects stay for the next, incremental build;
    whether it succeeded."""
    directory.mkdir(parents=True, exist_ok=True)
    build_file = directory / "build.ninja"
    if not build_file.exists() or build_file.read_text() != text:
        build_file.write_text(text)
    return (
        subprocess.run(
            [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(directory), *(["-v"] if verbose else [])]
        ).returncode
        == 0
    )


class NinjaBuild(build_ext):
    def build_extension(self, ext):
        cuda_sources = sorted((CSRC / "cuda").glob("*.cu"))
        nvcc = find_nvcc(cuda_sources)
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        # Not build_temp, which is a fresh directory on every editable install.
        directory = (
            ROOT
            / "build"
            / f"{sysconfig.get_platform()}-{sysconfig.get_python_version()}-{'cuda' if nvcc else 'cpu'}"
        )
        if not run_ninja(directory, ninja_file(output, nvcc, cuda_sources), self.verbose > 1):
            hint = (
                " FASTALIGN_CUDA=0 builds without the CUDA kernels; FASTALIGN_ARCHS chooses what they are "
                "compiled for."
                if nvcc
                else ""
            )
            raise SystemExit(f"building fastalign/_C failed; the compiler's message is above.{hint}")


def extensions():
    wanted = os.environ.get("FASTALIGN_EXTENSION", "1")
    if wanted not in ("0", "1"):
        raise SystemExit(f"FASTALIGN_EXTENSION={wanted!r}: legal values are 0 and 1")
    return [Extension("fastalign._C", sources=[])] if wanted == "1" else []


if __name__ == "__main__":
    setup(version=VERSION, license="Apache-2.0", ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
