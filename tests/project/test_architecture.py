"""The layers of docs/architecture.md, held by AST: adapters, train, feedback, bench, arena -> public names ->
preference, policy -> rows, packing, losses -> ops
-> runtime. An import goes down or stays in its room, never up."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fastalign"
FILES = sorted(PACKAGE.rglob("*.py"))
OPS = sorted(
    p.name for p in (PACKAGE / "ops").iterdir() if p.is_dir() and p.name not in ("math", "__pycache__")
)


def imports(path):
    """Absolute names of everything a file imports, functions' inner imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return {name for name in found if name.split(".")[0] == "fastalign"}


def layer(path):
    return path.relative_to(PACKAGE).as_posix()


# Rooms of each floor. On one floor they do not know each other, but for those of the top: the trainer is
# tried in the arena, all share a console.
FLOORS = (
    {"runtime"},
    {"ops"},
    {"losses", "rows", "packing"},
    {"preference", "policy"},
    {"__init__", "testing"},
    {"train", "feedback", "pipeline", "bench", "arena", "cli", "adapters", "__main__"},
)
TOP = FLOORS[-1]


def room(name):
    """Of a module's dotted name or of a file's path inside the package: its first part. The package itself is
    `__init__`."""
    return name.removesuffix(".py").replace("/", ".").split(".")[0]


def floor(name):
    return next(i for i, rooms in enumerate(FLOORS) if room(name) in rooms)


def modules(names):
    """Of imported names those of modules, without the package's own name: `ops.gae.op` of
    `fastalign.ops.gae.op.gae_fwd`."""
    found = set()
    for name in names:
        parts = name.split(".")[1:]
        while parts and not (
            (PACKAGE / "/".join(parts)).is_dir() or (PACKAGE / "/".join(parts)).with_suffix(".py").exists()
        ):
            parts.pop()
        found.add(".".join(parts) or "__init__")
    return found


@pytest.mark.parametrize("path", FILES, ids=layer)
def test_imports_follow_the_layers(path):
    where = layer(path)
    for name in modules(imports(path)):
        if (
            room(where) in TOP
        ):  # what stands on the public names reaches below them for data, checks and metrics, never for kernels
            below = ("ops", "runtime.ffi", "runtime.layout", "runtime.overwrite", "runtime.function")
            allowed = {
                "bench": ("runtime.ffi",),
                "cli": ("runtime.ffi",),
                "adapters": ("runtime.function",),
            }.get(room(where), ())
            assert not name.startswith(below) or name.startswith(allowed), (
                f"{where} reaches below the public names: {name}"
            )
        elif (
            name == "__init__"
        ):  # `from fastalign import x`: x was resolved to its module above, so this is a public name
            assert floor(where) > floor("preference"), f"{where} imports the package itself"
        else:
            assert room(name) == room(where) or floor(name) < floor(where), (
                f"{where} imports from above or beside it: {name}"
            )


@pytest.mark.parametrize("path", [p for p in FILES if layer(p).startswith("ops/")], ids=layer)
def test_ops_know_each_other_by_definition_only(path):
    """An op may call another op or its reference, never its kernels."""
    own = layer(path).split("/")[1]
    for name in modules(imports(path)):
        if name.startswith("ops.") and name.count(".") == 2 and name.split(".")[1] not in (own, "math"):
            assert name.split(".")[2] in ("op", "params", "reference"), (
                f"{layer(path)} imports another op's kernels: {name}"
            )


def test_no_import_circle():
    """Imports at the top of files, followed file by file."""
    edges = {}
    for path in FILES:
        top = ast.Module(
            [n for n in ast.parse(path.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))], []
        )
        names = {
            f"{n.module}.{a.name}"
            for n in top.body
            if isinstance(n, ast.ImportFrom) and n.module
            for a in n.names
        }
        own = layer(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        edges[own] = modules({n for n in names if n.startswith("fastalign.")}) - {own, "__init__"}

    def visit(name, way):
        assert name not in way, " -> ".join([*way, name])
        for other in edges.get(name, ()):
            if other not in done:
                visit(other, (*way, name))
        done.add(name)

    done: set[str] = set()
    for name in edges:
        visit(name, ())


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_the_same_files(op):
    assert {"op.py", "reference.py", "native.py", "triton.py"} <= {
        p.name for p in (PACKAGE / "ops" / op).glob("*.py")
    }


def test_pointers_and_the_extension_are_in_one_place():
    for path in FILES:
        text = path.read_text()
        if layer(path) != "runtime/ffi.py":
            assert ".data_ptr(" not in text and "fastalign._C" not in imports(path), layer(path)
            assert "{PACKAGE}._C" not in text and 'import_module("fastalign._C' not in text, layer(path)


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
        if path.name == "native.py" or path.name.startswith("triton"):
            for name in ("torch.empty(", "torch.empty_like(", "new_empty("):
                assert name not in path.read_text(), f"{layer(path)}: {name}"


def test_environment_variables_are_the_documented_ones():
    import re

    for path in [*FILES, ROOT / "setup.py"]:
        for name in re.findall(r"FASTALIGN_[A-Z_]+", path.read_text()):
            assert name in (
                "FASTALIGN_BACKEND",
                "FASTALIGN_EXTENSION",
                "FASTALIGN_CUDA",
                "FASTALIGN_ARCHS",
            ), (path, name)


def long_argument_lists(tree):
    """Functions with more than a dozen arguments by position, those of Triton by position and by keyword.
    A kernel may have 30 names: what Triton would specialise on, tensors and sizes, is given one by one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            of_triton = any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
            count = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs) * of_triton
            legal = 30 if of_triton and node.name.endswith("_kernel") else 12
            if count > legal or (of_triton and (node.args.vararg or node.args.kwarg)):
                yield f"{node.name} takes {count} arguments; legal: {legal}"


@pytest.mark.parametrize("path", FILES, ids=layer)
def test_argument_lists_are_short(path):
    """Beyond a dozen, positions say nothing: an object with names does."""
    assert not [*long_argument_lists(ast.parse(path.read_text()))], layer(path)


@pytest.mark.parametrize(
    "decorator, name, count, fine",
    [
        ("", "f", 12, True), ("", "f", 13, False), ("@triton.jit\n", "f", 12, True), ("@triton.jit\n", "f", 13, False),
        ("@triton.jit(do_not_specialize=['x'])\n", "f_kernel", 30, True), ("@triton.jit\n", "f_kernel", 31, False),
        ("", "f_kernel", 13, False),
    ],
)  # fmt: skip
def test_long_argument_lists_are_found(decorator, name, count, fine):
    source = f"{decorator}def {name}({', '.join(f'x{i}' for i in range(count))}):\n    pass"
    assert (not [*long_argument_lists(ast.parse(source))]) == fine


def test_no_argument_is_counted_off():
    """Lists of None, as many as there are arguments, stand where only the order says what is what."""
    for path in FILES:
        assert "*(None,) * " not in path.read_text() or layer(path) == "bench/floors.py", layer(path)


@pytest.mark.parametrize(
    ("folder", "most"), [("fastalign", 400), ("csrc", 400), ("benchmarks", 400), ("tests", 500)]
)
def test_files_are_read_in_one_sitting(folder, most):
    suffixes = (".py", ".h", ".cuh", ".cpp", ".cu")
    sizes = {p: len(p.read_text().splitlines()) for p in (ROOT / folder).rglob("*") if p.suffix in suffixes}
    assert sizes and not [f"{p}: {n} lines" for p, n in sizes.items() if n > most]
