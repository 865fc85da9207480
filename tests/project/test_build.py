"""The compiled extension as a build product: what it links, what it exports, how its build refuses, and the
package without it."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch

import fastalign as fa
from fastalign import _C

ROOT = Path(__file__).resolve().parents[2]
with mock.patch("setuptools.setup"):
    SETUP = runpy.run_path(str(ROOT / "setup.py"))


def output_of(*command, **env):
    return subprocess.run(
        [str(c) for c in command],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, **env},
    ).stdout


def failure_of(*command, **env):
    result = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **env}
    )
    assert result.returncode != 0
    return result.stderr


def test_build_info():
    info = _C.build_info()
    assert info["version"] == fa.__version__ and info["cpu"] is True and info["cpu_isa"] in _C.cpu_isas()
    assert re.match(r"\d+\.\d+", info["compiler"]) and isinstance(info["cuda"], bool)
    if info["cuda"]:
        assert re.fullmatch(r"\d+[af]?(;\d+[af]?)*", info["cuda_archs"]) and info["cuda_compiler"].startswith(
            "nvcc "
        )


def test_links_neither_torch_nor_cuda_libraries():
    """One build serves every torch, and loads on a machine without a driver."""
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", output_of("readelf", "-d", _C.__file__))
    allowed = r"(libstdc\+\+|libm|libgcc_s|libgomp|libc|libdl|librt|libpthread|ld-linux-.*)\.so.*"
    assert needed and all(re.fullmatch(allowed, name) for name in needed), needed
    undefined = output_of("nm", "-D", "-C", "--undefined-only", _C.__file__)
    assert not re.search(r"\bU (at|c10|torch|caffe2)::|\bU (cuda|cu)[A-Z]", undefined)
    # Nor may it offer the CUDA runtime it holds to another module.
    assert not re.search(r"\b[TW] cuda[A-Z]", output_of("nm", "-D", "--defined-only", _C.__file__))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_one_openmp_runtime():
    """torch.set_num_threads acts on the kernels because both use the same libgomp."""
    fa.token_logprobs(torch.randn(64, 5000), torch.zeros(64, dtype=torch.long))
    runtimes = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "libgomp" in line or "libiomp" in line
    }
    assert len(runtimes) == 1, runtimes


@pytest.mark.parametrize("source", SETUP["ISA_FLAGS"])
def test_no_shared_code_in_files_for_one_instruction_set(source, tmp_path):
    """An inline function emitted there could be the copy that the linker keeps for all files, and crash CPUs
    without those instructions."""
    if platform.machine() != "x86_64":
        assert _C.cpu_isas() == ["generic"]
        return
    flags = (
        f"{SETUP['CXX_FLAGS']} {SETUP['ISA_FLAGS'][source]} -O1".split()
    )  # which inlines less than what ships, in half the time
    output = tmp_path / "rows.o"
    output_of("g++", *flags, "-Werror", f"-I{ROOT}/csrc", "-c", f"{ROOT}/csrc/cpu/{source}", "-o", output)
    symbols = [
        line.split(None, 2)[-2:] for line in output_of("nm", "-C", "--defined-only", output).splitlines()
    ]
    kind, isa = source.removesuffix(".cpp").split("_")
    assert [name for binding, name in symbols if not binding.islower()] == [f"fastalign::cpu::{isa}_{kind}"]


def test_the_extension_can_be_left_out(monkeypatch):
    for value, count in ((None, 1), ("1", 1), ("0", 0)):
        monkeypatch.delenv("FASTALIGN_EXTENSION", raising=False)
        if value is not None:
            monkeypatch.setenv("FASTALIGN_EXTENSION", value)
        assert len(SETUP["extensions"]()) == count
    monkeypatch.setenv("FASTALIGN_EXTENSION", "no")
    with pytest.raises(SystemExit, match="FASTALIGN_EXTENSION='no': legal values are 0 and 1"):
        SETUP["extensions"]()


def test_package_works_without_the_extension():
    code = """
import sys, warnings
sys.modules["fastalign._C"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastalign, torch
assert any("_C" in str(w.message) for w in caught), [str(w.message) for w in caught]
x, y = torch.randn(3, 50), torch.tensor([1, 2, 3])
torch.testing.assert_close(fastalign.token_logprobs(x, y), torch.log_softmax(x, -1).gather(1, y[:, None])[:, 0])
"""
    output_of(sys.executable, "-c", code, FASTALIGN_BACKEND="")


@pytest.mark.parametrize(
    "wanted,archs,no_use,compiled",
    [
        ("auto", None, "nothing here runs CUDA", False),
        ("auto", None, None, True),
        ("auto", "90", "nothing here runs CUDA", True),
        ("1", None, "nothing here runs CUDA", True),
        ("0", "90", None, False),
    ],
)
def test_cuda_is_compiled_where_it_is_of_use(wanted, archs, no_use, compiled, monkeypatch, capsys):
    """auto leaves the CUDA kernels out, and says so, where neither torch nor a device could call them; a wish
    goes before it."""
    find_nvcc = SETUP["find_nvcc"]
    monkeypatch.setitem(find_nvcc.__globals__, "cuda_is_of_no_use", lambda: no_use)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: "/there/nvcc")
    monkeypatch.setenv("FASTALIGN_CUDA", wanted)
    monkeypatch.delenv("FASTALIGN_ARCHS", raising=False)
    if archs:
        monkeypatch.setenv("FASTALIGN_ARCHS", archs)
    assert (find_nvcc(["a.cu"]) is not None) == compiled
    assert ("left out, since nothing here runs CUDA" in capsys.readouterr().out) == (
        wanted == "auto" and not compiled
    )


@pytest.mark.parametrize(
    "cuda,said", [("None", "torch is built without CUDA"), ("'12.8'", "None"), ("", "no NVIDIA device")]
)
def test_what_makes_cuda_useless(cuda, said, tmp_path):
    """Judged by torch's own word, by the device alone where torch is not visible (as in an isolated
    build)."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        cuda, said = "None", "None"  # a device settles it
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("" if cuda else "raise ImportError")
    (tmp_path / "torch" / "version.py").write_text(f"cuda = {cuda or None}")
    code = "import runpy; from unittest import mock; mock.patch('setuptools.setup').start(); "
    code += f"print(runpy.run_path({str(ROOT / 'setup.py')!r})['cuda_is_of_no_use']())"
    assert said in output_of(sys.executable, "-c", code, PYTHONPATH=str(tmp_path))


@pytest.mark.parametrize(
    "env,message",
    [
        ({"FASTALIGN_CUDA": "yes"}, "FASTALIGN_CUDA='yes': legal values are auto, 0 and 1"),
        (
            {"FASTALIGN_CUDA": "1", "PATH": "/usr/bin:/bin", "CUDA_HOME": "/nowhere"},
            "FASTALIGN_CUDA=1, but nvcc is neither on PATH nor in",
        ),
    ],
)
def test_refused_settings(env, message, tmp_path):
    if "PATH" in env and shutil.which("nvcc", path=env["PATH"]):
        env = {**env, "PATH": str(Path(sys.executable).parent)}
    assert message in failure_of(
        sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, **env
    )


def test_setuptools_of_any_age():
    """Those before 77 refuse a licence in [project]; those that are too old are named before anything is
    built."""
    project = (ROOT / "pyproject.toml").read_text()
    assert not re.search(r"^license(-files)?\b", project, re.MULTILINE)
    assert set(re.findall(r"\bsetuptools>=(\d+)", project)) == {str(SETUP["MIN_SETUPTOOLS"])}
    too_old = mock.patch("setuptools.__version__", f"{SETUP['MIN_SETUPTOOLS'] - 1}.9.1")
    with (
        mock.patch("setuptools.setup"),
        too_old,
        pytest.raises(SystemExit, match=r"setuptools 63\.9\.1 is too old: 64 or later"),
    ):
        runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize("archs", ["", "8.0", "80,90", "sm_90", "80;"])
def test_refused_archs(archs, tmp_path):
    """With an nvcc that only knows its version: the value is refused before anything is compiled."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    stderr = failure_of(
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        tmp_path,
        FASTALIGN_ARCHS=archs,
        PATH=path,
    )
    assert f"FASTALIGN_ARCHS={archs!r}" in stderr


def test_failing_nvcc_is_not_silent(tmp_path):
    """Under FASTALIGN_CUDA=auto a CUDA compiler that fails stops the build and says how to do without."""
    source = copy_of_sources(tmp_path)
    for file in [*(source / "csrc" / "cpu").glob("*.cpp"), source / "csrc" / "bindings.cpp"]:
        file.write_text("")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in --version) echo 'release 13.0, V13.0.88';; *) echo 'nvcc is out of order' >&2; "
        "exit 1;; esac\n"
    )
    nvcc.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "FASTALIGN_CUDA": "auto",
        "FASTALIGN_ARCHS": "90",
    }
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext"], cwd=source, env=env, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert (
        "nvcc is out of order" in result.stdout + result.stderr
        and "FASTALIGN_CUDA=0 builds without" in result.stderr
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(sdist, wheel) of `python -m build`, which makes the wheel of the sdist; in the compiler's place a program
    that hands out the extension as it is built already. benchmarks/check_wheel.sh compiles."""
    folder = tmp_path_factory.mktemp("built")
    compiler = folder / "bin" / "g++"
    compiler.parent.mkdir()
    give = f'case "$*" in *-shared*) cp {_C.__file__} "$last";; *) : > "$last";; esac'
    compiler.write_text(f"#!/bin/sh\nfor last; do :; done\n{give}\n")
    compiler.chmod(0o755)
    env = {**os.environ, "PATH": f"{compiler.parent}:{os.environ['PATH']}", "FASTALIGN_CUDA": "0"}
    env.pop("FASTALIGN_EXTENSION", None)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist")]
    done = subprocess.run(
        [*command, str(copy_of_sources(folder))], env=env, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (sdist,), (wheel,) = ((folder / "dist").glob(kind) for kind in ("*.tar.gz", "*.whl"))
    return sdist, wheel


def test_sdist_holds_the_sources(built):
    with tarfile.open(built[0]) as tar:
        inside = {name.split("/", 1)[-1] for name in tar.getnames()}
    missing = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()} - inside
    assert not missing and {"setup.py", "pyproject.toml", "LICENSE", "fastalign/__init__.py"} <= inside


def test_wheel_holds_the_extension_and_needs_torch_alone(built):
    wheel = built[1]
    assert re.fullmatch(rf"fastalign-{re.escape(fa.__version__)}-cp3\d+-cp3\d+-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {n.split("/")[0] for n in names if ".dist-info/" in n}
        assert {n.split("/")[0] for n in names} == {"fastalign", info}
        assert archive.read(f"fastalign/{Path(_C.__file__).name}") == Path(_C.__file__).read_bytes()
        metadata, points = (archive.read(f"{info}/{n}").decode() for n in ("METADATA", "entry_points.txt"))
    kept = {
        f"fastalign/{p.relative_to(ROOT / 'fastalign').as_posix()}" for p in (ROOT / "fastalign").rglob("*.*")
    }
    assert {n for n in kept if "__pycache__" not in n and not n.endswith(".so")} <= names
    needed = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert needed == ["Requires-Dist: torch>=2.6"] and "fastalign = fastalign.cli.main:main" in points


def test_wheel_is_installed_without_a_compiler(built, tmp_path):
    """What benchmarks/check_wheel.py finds, in a folder of its own beside this torch."""
    target = tmp_path / "site"
    output_of(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-compile",
        "--no-deps",
        "--no-index",
        "--target",
        target,
        built[1],
    )
    code = f"import runpy, sysconfig; sysconfig.get_path = lambda name: {str(target)!r}\n"
    code += f"runpy.run_path({str(ROOT / 'benchmarks' / 'check_wheel.py')!r})"
    env = {"PYTHONPATH": str(target), "PATH": str(tmp_path), "FASTALIGN_BACKEND": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and f"fastalign {fa.__version__} beside torch" in done.stdout, done.stderr


def test_what_is_installed_holds_every_file(tmp_path):
    """Recipes, templates and whatever else is no Python."""
    source = copy_of_sources(tmp_path)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    there = {p.relative_to(tmp_path / "lib") for p in (tmp_path / "lib").rglob("*") if p.is_file()}
    wanted = {p.relative_to(source) for p in (source / "fastalign").rglob("*") if p.is_file()}
    assert wanted <= there and any(p.suffix == ".yaml" for p in wanted), sorted(wanted - there)[:5]


def copy_of_sources(folder):
    target = folder / "source"
    target.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    for name in ("csrc", "fastalign"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return target


def test_what_is_newer_than_9_0_shares_the_ptx_of_9_0():
    """Architectures of their own kind (90a, 100f) and older ones have their own."""
    targets = SETUP["cuda_targets"]
    assert targets(["80", "90", "100"]) == [
        "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=sm_100", "-gencode=arch=compute_90,code=compute_90",
    ]  # fmt: skip
    assert targets(["89", "90a", "120"])[:2] == [
        "-gencode=arch=compute_89,code=sm_89", "-gencode=arch=compute_90a,code=sm_90a",
    ]  # fmt: skip
    assert targets(["100f"])[-1] == "-gencode=arch=compute_100f,code=compute_100f"
    assert targets(["89"])[-1] == "-gencode=arch=compute_89,code=compute_89"
