"""The stages of `make test`: none is forgotten, and what the ahead-of-time stage needs is installed or missed aloud."""

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


def test_a_missing_triton_ends_the_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all, "run", lambda *command, **env: pytest.fail("something ran before"))
    monkeypatch.setattr(run_all.shutil, "which", lambda name: "/usr/bin/nvcc")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    with pytest.raises(SystemExit, match=r"needs Triton 3\.6\.0: .*--target .*triton-3\.6\.0 triton==3\.6\.0"):
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
