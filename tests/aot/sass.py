"""Compiles the CUDA sources ahead of time and reads the machine code: registers, stack and shared memory per
kernel, instructions, loops.

Needs nvcc and, from Triton's package, cuobjdump and nvdisasm; no GPU. Objects are kept under build/cuda_aot
by the hash of their inputs."""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2].resolve()
CSRC = ROOT / "csrc"
OUT = ROOT / "build" / "cuda_aot"
ARCHS = ("80", "90", "100")
# Those whose machine code is read. sm_100 is assembled from the same PTX as sm_90 (setup.py): its registers and
# stack say what that came to.
READ = ("80", "90")


@dataclass
class Kernel:
    """One kernel of one object for one architecture. `code`: (address, instruction) in order."""

    arch: str
    name: str  # demangled, with template arguments, without parameters
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    code: list[tuple[int, str]] = field(default_factory=list)

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, opcode)) for opcode in self.opcodes(self.code))

    @staticmethod
    def opcodes(code) -> list[str]:
        return [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for _, text in code]

    def loops(self):
        """The bodies of all loops: from the target of a backward branch to the branch."""
        for address, text in self.code:
            target = re.match(r"(?:@!?U?P\w+\s+)?BRA.*?0x([0-9a-f]+)", text)
            if target and int(target[1], 16) < address:
                yield [line for line in self.code if int(target[1], 16) <= line[0] <= address]

    @staticmethod
    def interior(body):
        """One turn of a loop away from the ends of a row: branches ahead are taken, but those over an exp2,
        which every turn needs."""
        turn, resume = [], 0
        for address, text in body:
            if address < resume:
                continue
            turn.append((address, text))
            branch = re.match(r"(@!?U?P\w+\s+)?BRA.*?0x([0-9a-f]+)", text)
            if branch and address < int(branch[2], 16) <= body[-1][0]:
                over = [t for a, t in body if address < a < int(branch[2], 16)]
                if not branch[1] or not any("MUFU.EX2" in t for t in over):
                    resume = int(branch[2], 16)
        return turn


def nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    )
    assert found, (
        "nvcc (CUDA 12.8 or later) is neither on PATH nor in $CUDA_HOME/bin: the kernels cannot be compiled"
    )
    return found


def disassembler() -> str:
    try:
        import triton
    except ImportError as error:
        raise AssertionError("triton is not installed; its package carries cuobjdump and nvdisasm") from error
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    for tool in ("cuobjdump", "nvdisasm"):
        assert (path / tool).exists(), f"{tool} is not in {path}: the machine code cannot be read"
    return str(path / "cuobjdump")


def objects() -> list[Path]:
    """What holds the machine code: the installed extension where it is newer than the sources and built for
    ARCHS, as in a fresh checkout, so that what is tested is what is shipped and nothing is compiled twice;
    else objects compiled here."""
    try:
        from fastalign import _C
    except ImportError:
        return compile_all()
    extension = Path(_C.__file__)
    sources = [ROOT / "setup.py", *(p for p in CSRC.rglob("*") if p.is_file())]
    fresh = extension.is_relative_to(ROOT) and extension.stat().st_mtime > max(
        p.stat().st_mtime for p in sources
    )
    built_for = tuple(_C.build_info().get("cuda_archs", "").split(";"))
    return [extension] if fresh and built_for == ARCHS else compile_all()


def compile_all() -> list[Path]:
    """Objects of all .cu files for all of ARCHS, with the flags that setup.py ships."""
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="fastalign_setup")
    flags, targets = build["NVCC_FLAGS"].split(), build["cuda_targets"](ARCHS)
    headers = [p.read_text() for p in sorted(CSRC.rglob("*")) if p.suffix in (".h", ".cuh")]
    compiler = nvcc()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    OUT.mkdir(parents=True, exist_ok=True)

    def one(source: Path) -> Path:
        key = repr((flags, targets, version, headers, source.read_text()))
        output = OUT / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.o"
        if not output.exists():
            command = [
                compiler,
                *flags,
                *targets,
                f"-I{CSRC}",
                "-c",
                str(source),
                "-o",
                str(output.with_suffix(".part")),
            ]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
            output.with_suffix(".part").rename(output)
        return output

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sorted((CSRC / "cuda").glob("*.cu"), key=lambda p: -p.stat().st_size)))


def kernels(objects: list[Path], read: tuple[str, ...] = READ) -> list[Kernel]:
    """All kernels of the objects: registers, stack and shared memory, and of the architectures `read` the code,
    which takes a hundred times as long to read."""
    found: dict[tuple[str, str], Kernel] = {}
    for path in objects:
        _read_resources(path, found)
        for arch in read:
            _read_code(path, arch, found)
    names = [name for _, name in found]
    plain = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for (key, kernel), demangled in zip(found.items(), plain):
        kernel.name = re.sub(r"^void |fastalign::|cuda::|\(anonymous namespace\)::", "", demangled).split(
            "("
        )[0]
        assert kernel.code or not read or kernel.arch and kernel.arch not in read, (
            f"no machine code found for {key}"
        )
    return list(found.values())


def _dump(path: Path, *options: str) -> list[str]:
    return subprocess.run(
        [disassembler(), *options, str(path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()


def _read_resources(path: Path, found) -> None:
    arch = name = ""
    for line in _dump(path, "-res-usage"):
        if m := re.match(r"\s*arch = sm_(\d+)", line):
            arch = m[1]
        elif m := re.match(r"\s*Function (\S+):", line):
            name = m[1]
        elif m := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, m.groups())
            found[arch, name] = Kernel(arch, name, registers, stack, local, shared)


def _read_code(path: Path, arch: str, found) -> None:
    kernel, alone = None, path.suffix == ".cubin"  # that of one architecture, which it does not name
    for line in _dump(path, "-sass", *(() if alone else ("-arch", f"sm_{arch}"))):
        if m := re.match(r"\s*Function : (\S+)", line):
            kernel = found["" if alone else arch, m[1]]
        elif (m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;", line)) and kernel:
            kernel.code.append((int(m[1], 16), m[2]))


def table(all_kernels: list[Kernel]) -> str:
    """Registers, stack and static shared memory of every kernel, a line each, an architecture per column."""
    rows: dict[str, dict[str, Kernel]] = {}
    for k in all_kernels:
        rows.setdefault(k.name, {})[k.arch] = k
    lines = [f"{'kernel':<52}" + "".join(f"{'sm_' + a:>22}" for a in ARCHS)]
    for name, by_arch in sorted(rows.items()):
        cells = (f"{k.registers} reg {k.stack + k.local} B stack" for k in (by_arch[a] for a in ARCHS))
        lines.append(f"{name:<52}" + "".join(f"{c:>22}" for c in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(kernels(objects())))
