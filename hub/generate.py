"""Makes of this source a kernel for the Hugging Face Hub, in the layout that the `kernels` package loads: the
reference and the Triton kernels, with no dependency but torch.

    python hub/generate.py DIR [--repo-id OWNER/NAME]

DIR must not exist. What stands there afterwards: build.toml, CARD.md, tests and benchmarks as in hub/;
torch-ext/fastalign, the source that kernel-builder reads; build/torch-<backend>, what `kernels.get_kernel`
downloads and `kernels.get_local_kernel(Path(DIR))` loads as it is.

What differs from fastalign/ itself: imports are relative, since many kernels are loaded side by side under
names of their own; ops are registered under a namespace that no other build has; there is no compiled
extension (runtime/identity.py says so), and no trainer, bench or command line."""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HUB = Path(__file__).resolve().parent
ROOT = HUB.parent
PACKAGE = "fastalign"
# What is copied: the public names and all that they stand on.
ROOMS = ("__init__.py", "packing.py", "runtime", "ops", "losses", "rows", "preference", "policy")
LEFT_OUT = ("native.py",)  # kernels of the compiled extension

IDENTITY = '''"""What this copy of the package is: where its modules and its ops stand. Written by hub/generate.py of
fastalign."""

from .._ops import add_op_namespace_prefix

PACKAGE = __name__.removesuffix(".runtime.identity")
NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
NO_EXTENSION = "the kernel of the Hub has no compiled extension; the package fastalign has one"
'''
# kernel-builder writes a file of this name and with these two names into what it builds.
OPS = """import torch

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{id}::{{op_name}}"
"""
# Older versions of `kernels` look for the kernel one folder further down.
COMPATIBLE = """import importlib.util
import sys
from pathlib import Path

_file = Path(__file__).parents[1] / "__init__.py"
_spec = importlib.util.spec_from_file_location("{id}", _file)
_module = sys.modules.get("{id}")
if _module is None:
    _module = sys.modules["{id}"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
globals().update({{name: getattr(_module, name) for name in _module.__all__}})
__all__ = _module.__all__
"""


def relative(text: str, path: str) -> str:
    """`text`, of the file `path` inside the package, with relative imports."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(a.name.split(".")[0] == PACKAGE for a in node.names):
            raise SystemExit(f"{path}:{node.lineno}: `import {PACKAGE}` cannot be made relative")
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != PACKAGE:
            continue
        dots, rest = "." * len(Path(path).parts), node.module.removeprefix(PACKAGE).removeprefix(".")
        old, new = f"from {node.module} import", f"from {dots}{rest} import"
        line = lines[node.lineno - 1]
        if not line.startswith(old, node.col_offset):
            raise SystemExit(f"{path}:{node.lineno}: expected `{old}`, found {line.strip()!r}")
        lines[node.lineno - 1] = line[: node.col_offset] + line[node.col_offset :].replace(old, new, 1)
    return "".join(lines)


def sources() -> dict[str, str]:
    """Path inside the package -> text, of the copy."""
    found = {}
    for room in ROOMS:
        place = ROOT / PACKAGE / room
        for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
            path = file.relative_to(ROOT / PACKAGE).as_posix()
            if file.name not in LEFT_OUT:
                found[path] = relative(file.read_text(encoding="utf-8"), path)
    return found | {"runtime/identity.py": IDENTITY}


def write(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


def digest(folder: Path) -> dict[str, object]:
    """The hashes that a kernel's metadata holds of its files."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    hashes = (base64.b64encode(hashlib.sha256(p.read_bytes()).digest()).decode() for p in files)
    return {
        "algorithm": "sha256",
        "files": dict(zip((p.relative_to(folder).as_posix() for p in files), hashes)),
    }


def write_variant(folder: Path, backend: str, general: dict, package: dict[str, str]) -> None:
    """build/torch-<backend>: the package, the namespace of its ops, what `kernels` asks of it."""
    content = hashlib.sha256(json.dumps(package, sort_keys=True).encode()).hexdigest()
    name = general["name"].replace("-", "_")
    identifier = f"_{name}_{backend}_{content[:10]}"
    write(folder, package)
    glue = {"_ops.py": OPS, f"{name}/__init__.py": COMPATIBLE}
    write(folder, {path: text.format(id=identifier) for path, text in glue.items()})
    metadata = {
        "name": general["name"],
        "id": identifier,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": digest(folder),
    }
    write(folder, {"metadata.json": json.dumps(metadata, indent=2) + "\n"})


def generate(target: Path, repo_id: str | None = None) -> None:
    """All of it at once: what fails leaves no directory behind."""
    settings = (HUB / "build.toml").read_text(encoding="utf-8")
    general, package = tomllib.loads(settings)["general"], sources()
    public = ast.literal_eval(
        re.search(r"^__all__ = (\[.*?\])", package["__init__.py"], re.M | re.S).group(1)
    )
    card = (HUB / "CARD.md").read_text(encoding="utf-8")
    filled = {
        "REPO_ID": repo_id or f"OWNER/{general['name']}",
        "VERSION": str(general["version"]),
        "NAMES": ", ".join(f"`{n}`" for n in sorted(public) if not n.startswith("_")),
    }
    for word, value in filled.items():
        card = card.replace(f"@{word}@", value)
    draft = Path(tempfile.mkdtemp(prefix=".hub-", dir=target.absolute().parent))
    try:
        hub = f'\n[general.hub]\nrepo-id = "{repo_id}"\n' if repo_id else ""
        write(
            draft,
            {"build.toml": settings.replace("\n[torch-noarch]", f"{hub}\n[torch-noarch]"), "CARD.md": card},
        )
        shutil.copy(ROOT / "LICENSE", draft)
        for folder in ("tests", "benchmarks"):
            shutil.copytree(HUB / folder, draft / folder, ignore=shutil.ignore_patterns("__pycache__"))
        write(draft / "torch-ext" / general["name"].replace("-", "_"), package)
        for backend in general["backends"]:
            write_variant(draft / "build" / f"torch-{backend}", backend, general, package)
        draft.chmod(0o755)
        os.rename(draft, target)
    except BaseException:
        shutil.rmtree(draft)
        raise


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("directory", type=Path, metavar="DIR", help="made here; it must not exist")
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="of the Hub, for CARD.md and build.toml")
    arguments = parser.parse_args(argv)
    if arguments.directory.exists():
        parser.error(f"{arguments.directory} exists; name a directory that does not")
    if not arguments.directory.absolute().parent.is_dir():
        parser.error(f"the directory of {arguments.directory} does not exist")
    if arguments.repo_id is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", arguments.repo_id):
        parser.error(f"--repo-id {arguments.repo_id!r}: legal: OWNER/NAME")
    generate(arguments.directory, arguments.repo_id)
    print(f"the kernel is in {arguments.directory}; `kernels.get_local_kernel` loads it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
