"""`fastalign info`: what it says is what the ops and the extension say."""

from __future__ import annotations

import pytest
import torch

import fastalign as fa
from fastalign.cli import console, info
from fastalign.runtime import ffi
from fastalign.runtime.backends import BACKENDS
from fastalign.runtime.op import OPS


def test_output_names_versions_build_and_every_op(capsys):
    assert info.main([]) == 0
    out = capsys.readouterr().out
    assert fa.__version__ in out and torch.__version__ in out and "python" in out and "transformers" in out
    for name in OPS:
        assert f"| {name}" in out
    built = ffi.build_info()
    assert (built["cpu_isa"] if built else "fastalign._C") in out


def test_extension_says_why_it_is_missing(monkeypatch):
    monkeypatch.setattr(ffi, "_extension", None)
    monkeypatch.setattr(ffi, "_extension_error", "not built here")
    assert info.extension() == {"fastalign._C": "not built here"}
    assert "[1] " in info.availability() and "not built here" in info.availability()


def test_availability_says_what_the_machine_lacks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ffi, "_triton_error", "")
    monkeypatch.setattr(ffi, "TRITON_INTERPRETED", False)
    notes = [line for line in info.availability().splitlines() if line.startswith("[")]
    assert any("no CUDA device is visible to torch" in note for note in notes) and not any(
        "TRITON_INTERPRET" in note for note in notes
    )


def test_versions_are_those_of_the_modules(monkeypatch):
    """On ROCm the package that brings Triton has another name."""
    monkeypatch.setattr(ffi, "triton_version", "3.5.1+rocm")
    assert info.versions()["triton"] == "3.5.1+rocm"
    monkeypatch.setattr(ffi, "triton_version", "")
    assert info.versions()["triton"] == "not installed"


def test_availability_agrees_with_the_registry():
    lines = info.availability().splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["op", *BACKENDS]
    notes = dict(line.split(" ", 1) for line in lines if line.startswith("["))
    for line in lines[2 : 2 + len(OPS)]:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for backend, cell in zip(BACKENDS, cells):
            why = OPS[name].why_not(backend, torch.empty(0))
            if why is None:
                assert cell.startswith("cpu")
            elif cell.startswith("no"):
                assert cell.removeprefix("no ") in notes
        assert sum("cpu*" in cell for cell in cells) == 1


def test_markdown_table_lists_the_storage_types(capsys):
    assert info.main(["--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(OPS)
    (row,) = [line for line in lines if "`token_stats_fwd`" in line]
    reference, cpu, triton, cuda = (cell.strip() for cell in row.strip("|").split("|")[1:])
    assert reference == cpu == "fp32 bf16 fp16 fp64" and triton == cuda == "fp32 bf16 fp16"


def test_wrong_option_is_one_line_and_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        info.main(["--colour"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--colour" in error and len(error.strip().splitlines()) == 1


def test_table_aligns_numbers_right():
    assert console.table(["name", "ms"], [["a", "1.5"], ["bcdef", "n/a"]]) == (
        "| name  |  ms |\n|-------|----:|\n| a     | 1.5 |\n| bcdef | n/a |"
    )
