"""The stages of `make test`: none is forgotten, and what the ahead-of-time stage needs is installed or missed
aloud."""

from __future__ import annotations

import re
import sys

import pytest
import run_all


def test_every_stage_is_run():
    assert sorted(("lint", *run_all.ORDER)) == sorted(run_all.STAGES)


def test_the_makefile_installs_the_older_tritons():
    (versions,) = re.findall(r"TRITONS = (.+)", (run_all.ROOT / "Makefile").read_text())
    assert versions.split() == list(run_all.OLDER_TRITONS)


def test_the_makefile_installs_the_trainers():
    (packages,) = re.findall(r"TRAINERS = (.+)", (run_all.ROOT / "Makefile").read_text())
    assert packages.split() == [f"{name}=={version}" for name, version in run_all.TRAINERS.items()]


def test_a_missing_trainer_ends_the_stage(monkeypatch):
    monkeypatch.setattr(run_all, "TRAINERS", {"pytest": "0.1", "fastalign-no-such-trainer": "1.0"})
    with pytest.raises(SystemExit, match=r"needs pytest 0\.1, found \d.*--target .*trainers pytest==0\.1 "):
        run_all.check_trainers()
    monkeypatch.setattr(run_all, "TRAINERS", {"fastalign-no-such-trainer": "1.0"})
    with pytest.raises(SystemExit, match="needs fastalign-no-such-trainer 1.0, found none"):
        run_all.check_trainers()


def test_a_missing_triton_ends_the_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "run", lambda *command, **env: pytest.fail("something ran before"))
    monkeypatch.setattr(run_all.shutil, "which", lambda name: "/usr/bin/nvcc")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(
        SystemExit, match=r"needs Triton 3\.6\.0: .*--target .*triton-3\.6\.0 triton==3\.6\.0"
    ):
        run_all.aot()
    (tmp_path / "triton-3.6.0" / "triton").mkdir(parents=True)
    (tmp_path / "triton-3.6.0" / "triton" / "__init__.py").write_text("__version__ = '3.9.0'")
    with pytest.raises(SystemExit, match=r"needs Triton 3\.6\.0"):
        run_all.older_triton("3.6.0")


def test_an_older_triton_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    (tmp_path / "triton-3.3.1").mkdir()
    (tmp_path / "triton-3.3.1" / "triton.py").write_text("__version__ = '3.3.1'")
    assert run_all.older_triton("3.3.1").split(":") == [str(tmp_path / "triton-3.3.1"), "/elsewhere"]


# --- every test file is in exactly one stage, and the contract in one per backend ---------------------------


def commands_of(stage, monkeypatch):
    """What a stage would give to pytest."""
    found = []
    monkeypatch.setattr(run_all, "run", lambda command, **env: found.append([str(c) for c in command]))
    monkeypatch.setattr(run_all, "older_triton", lambda version: "")
    monkeypatch.setattr(run_all.shutil, "which", lambda name: "/usr/bin/nvcc")
    run_all.STAGES[stage]()
    return [command for command in found if "pytest" in command]


def files_of(command, root, always):
    """The test files that a pytest command collects; `always`: the options of pyproject.toml."""
    paths = [root / word for word in command if word.startswith("tests")]
    ignored = [root / word.split("=")[1] for word in (*always, *command) if word.startswith("--ignore=")]
    ignored = [folder for folder in ignored if folder not in paths]  # a path that is named is collected
    found = {f for path in paths for f in ([path] if path.suffix else path.rglob("test_*.py"))}
    return {str(f.relative_to(root)) for f in found if not {f, *f.parents} & {*ignored}}


def test_every_test_file_is_in_one_stage(monkeypatch):
    root = run_all.ROOT
    always = (
        re.search(r'^addopts = "(.*)"', (root / "pyproject.toml").read_text(), re.MULTILINE).group(1).split()
    )
    by_stage = {}
    for stage in ("cpu", "train", "cuda", "aot", "trainers", "triton"):
        by_stage[stage] = files_of(commands_of(stage, monkeypatch)[0], root, always)
    every = {str(f.relative_to(root)) for f in (root / "tests").rglob("test_*.py")}
    contract = {f for f in every if f.startswith("tests/contract/")}
    assert by_stage.pop("triton") == contract <= by_stage["cpu"]
    on_device = {f for f in every if f.startswith("tests/gpu/")}  # benchmarks/gpu_gate.sh
    for f in every - on_device:
        assert sum(f in files for files in by_stage.values()) == 1, f
    assert not on_device & set.union(*by_stage.values())


def test_a_new_folder_is_in_the_stage_cpu(tmp_path, monkeypatch):
    for name in ("tests/new/test_x.py", "tests/train/test_y.py", "tests/cuda_emu/test_z.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    (command,) = commands_of("cpu", monkeypatch)
    assert files_of(command, tmp_path, ["--ignore=tests/cuda_emu"]) == {"tests/new/test_x.py"}


def test_tests_are_in_files_that_pytest_collects():
    for path in (run_all.ROOT / "tests").rglob("*.py"):
        if not path.name.startswith("test_"):
            assert not re.search(r"^(def|    def) test_", path.read_text(), re.MULTILINE), path


def test_a_room_of_the_package_has_its_tests_in_a_room_of_that_name():
    """What a thing is tested by lies where the thing lies; what belongs to no room of the package is named
    here."""
    rooms = {p.name for p in (run_all.ROOT / "fastalign").iterdir() if (p / "__init__.py").is_file()}
    folders = {p.parent.name for p in (run_all.ROOT / "tests").rglob("test_*.py")}
    assert folders - rooms == {"contract", "cuda_emu", "gpu", "aot", "project", "packing", "trainers"}
    assert rooms <= folders
