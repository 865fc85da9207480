"""A change of the package, performed on a copy: small insertions of text, and how many files they touch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]


class Copy:
    """The package and csrc in a folder of their own, with the extension as it was built. `files`: what was
    changed."""

    def __init__(self, folder: Path):
        self.root, self.files, self.edits = folder, set(), 0
        for name in ("fastalign", "csrc"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))

    def replace(self, file: str, old: str, new: str) -> None:
        """`old`, which stands in the file once, becomes `new`."""
        path = self.root / file
        text = path.read_text()
        assert text.count(old) == 1, (
            f"{file} holds {old!r} {text.count(old)} times: mend the change in this test"
        )
        path.write_text(text.replace(old, new))
        self.files.add(file)
        self.edits += 1

    def create(self, file: str, text: str) -> None:
        """A new file."""
        assert not (self.root / file).exists(), f"{file} is there already"
        (self.root / file).write_text(text)
        self.files.add(file)
        self.edits += 1

    def before(self, file: str, place: str, new: str) -> None:
        self.replace(file, place, new + place)

    def after(self, file: str, place: str, new: str) -> None:
        self.replace(file, place, place + new)

    def run(self, code: str, **environment: str) -> str:
        """What a Python process on the copy prints."""
        env = {**os.environ, "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1", **environment}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=self.root, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def run_cpp(self, code: str) -> str:
        """What a C++ program over the copy's headers prints."""
        source, program = self.root / "probe.cpp", self.root / "probe"
        source.write_text(code)
        command = ["g++", "-std=c++17", "-O0", f"-I{self.root / 'csrc'}", str(source), "-o", str(program)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout

    def compiles(self, *sources: str) -> None:
        """The compiler takes the sources; nothing is built."""
        include = [
            f"-I{self.root / 'csrc'}",
            f"-isystem{sysconfig.get_path('include')}",
            f"-isystem{pybind11.get_include()}",
        ]
        for source in sources:
            defines = ['-DFA_VERSION="copy"', '-DFA_CUDA_ARCHS=""', '-DFA_CUDA_COMPILER=""']
            command = ["g++", "-std=c++17", "-fsyntax-only", *defines, *include, str(self.root / source)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
