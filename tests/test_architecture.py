"""The directions of design: train and adapters -> public names -> ops/*/api -> registry -> backends; native -> ffi -> _C. Held by AST."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fastalign"
FILES = sorted(PACKAGE.rglob("*.py"))
OPS = sorted(p.name for p in (PACKAGE / "ops").iterdir() if p.is_dir() and p.name != "__pycache__")


def imports(path):
    """Absolute names of everything a file imports, functions' inner imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return {name for name in found if name.split(".")[0] == "fastalign"}


def layer(path):
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=layer)
def test_imports_follow_the_layers(path):
    where, names = layer(path), imports(path)
    if where.startswith("ops/") and where.count("/") == 2:
        op = where.split("/")[1]
        for name in names:
            assert not name.startswith(("fastalign.train", "fastalign.adapters", "fastalign.cli")), name
            if name.startswith("fastalign.ops.") and name.split(".")[2] != op:
                assert name.split(".")[3] in ("api", "reference"), f"{where} imports another op's kernels: {name}"
        if not where.endswith("native.py"):
            assert not any(n.startswith("fastalign._C") for n in names)
    if where.startswith(("train/", "adapters/", "bench/")):
        private = ("fastalign._C", "fastalign.ops.", "fastalign.triton_math")
        allowed = ("fastalign.ffi", "fastalign.registry") if where.startswith("bench/") else ()
        for name in names:
            assert not name.startswith(private), f"{where} reaches below the public API: {name}"
            assert allowed or not name.startswith("fastalign.ffi"), name
    if where in ("registry.py", "ffi.py", "checks.py", "packing.py", "losses.py"):
        assert not any(n.startswith(("fastalign.train", "fastalign.adapters")) for n in names)


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_the_same_files(op):
    assert {"api.py", "reference.py", "native.py", "triton.py"} <= {p.name for p in (PACKAGE / "ops" / op).glob("*.py")}


def test_pointers_and_the_extension_are_in_one_place():
    for path in FILES:
        text = path.read_text()
        if layer(path) != "ffi.py":
            assert ".data_ptr(" not in text and "fastalign._C" not in imports(path), layer(path)
            assert 'import_module("fastalign._C' not in text


def test_kernels_hold_no_torch_and_pybind_is_in_one_file():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu")]
    assert sources
    for path in sources:
        includes = [line for line in path.read_text().splitlines() if line.lstrip().startswith("#include")]
        for line in includes:
            assert "torch" not in line and "ATen" not in line, path
            assert "pybind11" not in line or path.name == "bindings.cpp", path
            assert "cub/" not in line, path


def test_outputs_are_allocated_in_one_place():
    """Kernel outputs come from ffi.empty, so that tests can poison and guard every one of them."""
    for path in (PACKAGE / "ops").rglob("*.py"):
        if path.name in ("native.py", "triton.py"):
            for name in ("torch.empty(", "torch.empty_like(", "new_empty("):
                assert name not in path.read_text(), f"{layer(path)}: {name}"


def test_environment_variables_are_the_documented_ones():
    import re

    for path in [*FILES, ROOT / "setup.py"]:
        for name in re.findall(r"FASTALIGN_[A-Z_]+", path.read_text()):
            assert name in ("FASTALIGN_BACKEND", "FASTALIGN_EXTENSION", "FASTALIGN_CUDA", "FASTALIGN_ARCHS"), (path, name)
