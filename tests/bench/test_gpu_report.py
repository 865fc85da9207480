"""Scripts beside the GPU gate: the table goes on after a lost context, the report reads what tools write,
what is carried is built for that machine."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checks import calls

from fastalign.runtime import op
from fastalign.runtime.op import OPS

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _modules():
    """The scripts of benchmarks/ import one another by name."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


KEY = {"op": "kl", "shape": "1 x 2", "backend": "cuda", "setting": ""}


@pytest.fixture
def table_lines(tmp_path, monkeypatch):
    """(Lines on an empty file, what was started instead of the process)"""
    import gpu_lines

    started = []
    monkeypatch.setattr(gpu_lines.os, "execv", lambda *arguments: started.append(arguments))
    return gpu_lines.Lines(tmp_path / "table.jsonl", "table", ""), started


def test_an_error_concerns_its_case_alone(table_lines):
    import gpu_lines

    lines, started = table_lines
    with lines.case(**KEY) as line:
        raise ValueError("no such kernel")
    assert gpu_lines.read_lines(lines.path)[0]["error"] == "ValueError: no such kernel" and not started
    with lines.case(**KEY) as line:
        assert line is None  # it has its line


def test_a_lost_context_starts_the_process_again_behind_its_case(table_lines):
    import gpu_lines

    lines, started = table_lines
    with lines.case(**KEY):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    assert started and "illegal memory access" in gpu_lines.read_lines(lines.path)[0]["error"]
    again = gpu_lines.Lines(lines.path, "table", "")
    with again.case(**KEY) as line:
        assert line is None
    with again.case(**{**KEY, "backend": "triton"}) as line:
        line["ms"] = 1.0
    assert gpu_lines.read_lines(lines.path)[-1]["ms"] == 1.0


def test_a_hang_starts_the_process_again_behind_its_case(table_lines, monkeypatch):
    import gpu_lines

    monkeypatch.setattr(gpu_lines, "CASE_SECONDS", 0.05)
    lines, started = table_lines
    with lines.case(**KEY):
        for _ in range(200):
            time.sleep(0.05)
            if started:
                break
    assert started and "no answer" in gpu_lines.read_lines(lines.path)[0]["error"]


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    import gpu_lines

    path = tmp_path / "table.jsonl"
    path.write_text('{"op": "a"}\n{"op": "b", "ms": 1')
    assert gpu_lines.read_lines(path) == [{"op": "a"}] and gpu_lines.read_lines(tmp_path / "none") == []


def test_report_names_failures_and_what_did_not_run():
    import gpu_report

    names = [f"t.py::test_{name}[cuda]" for name in "abcd"]
    lines = [{"step": "contract", "collected": names},
             {"step": "contract", "test": names[0], "backend": "cuda", "outcome": "passed", "properties": {"kernels": "1 of 3"}},
             {"step": "contract", "test": names[1], "backend": "cuda", "outcome": "passed"},
             {"step": "contract", "test": names[1], "backend": "cuda", "outcome": "error", "text": "in teardown"},
             {"step": "contract", "test": names[2], "backend": "cuda", "outcome": "failed", "text": "def test():\nE  assert 1 == 2\nt.py:3"}]  # fmt: skip
    text = gpu_report.tests(lines)
    assert "| contract, cuda | 1 | 1 | 1 | 0 | 1 |" in text
    assert (
        "test_c[cuda]: E  assert 1 == 2" in text
        and "not run:\n\n- contract: t.py::test_d[cuda]" in text
        and "kernels 1 of 3" in text
    )


NCU = """==PROF== Connected to process 1
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name","Rule Type","Rule Description"
"0","token_stats_fwd","GPU Speed Of Light Throughput","Duration","us","1,412.5","","",""
"0","token_stats_fwd","GPU Speed Of Light Throughput","DRAM Throughput","%","91.20","","",""
"0","token_stats_fwd","Launch Statistics","Registers Per Thread","register/thread","64","","",""
"0","token_stats_fwd","Warp State Statistics","","","","CPIStall","WRN","12.3 cycles being stalled waiting for a scoreboard dependency on an L1TEX operation."
"1","token_stats_bwd","GPU Speed Of Light Throughput","Duration","ms","2.5","","",""
"""


def test_report_reads_the_counters(tmp_path):
    import gpu_report

    (tmp_path / "ncu.csv").write_text(NCU)
    text = gpu_report.counters(tmp_path / "ncu.csv")
    assert (
        "| token_stats_fwd | 1412 | 91.20 |" in text
        and "64 | a scoreboard dependency on an L1TEX operation (12.3 cycles) |" in text
    )
    assert "| token_stats_bwd | 2500 |" in text


def test_report_puts_variants_beside_their_baseline():
    import gpu_report

    lines = [{"op": "ceilings", "label": "as it is"}, {"op": "kl", "shape": "1 x 2", "backend": "cuda", "label": "as it is", "gbs": 2900.0},
             {"op": "kl", "shape": "1 x 2", "backend": "cuda", "label": "unroll8", "error": "RuntimeError: too many resources"}]  # fmt: skip
    text = gpu_report.settings("Variants", lines, "label")
    assert (
        "| cuda, as it is | 2900 |" in text
        and "| cuda, unroll8 | error |" in text
        and "too many resources" in text
    )


def test_report_refuses_other_folders(tmp_path):
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_report.py", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 2 and "holds no stage1.json" in done.stderr


@pytest.mark.parametrize(
    "environment,arguments,words",
    [
        ({}, ["--python", "3.99"], "no python3.99 runs here; set PYTHON_INCLUDE"),
        ({"PYTHON_INCLUDE": "/nowhere"}, [], "/nowhere holds no Python.h"),
        ({"PYTHON_INCLUDE": "HERE"}, [], "holds the headers of Python 3.9, not 3.12"),
        ({}, ["--python", "four"], "--python four"),
    ],
)
def test_prepare_says_what_it_needs(tmp_path, environment, arguments, words):
    (tmp_path / "Python.h").touch()
    (tmp_path / "patchlevel.h").write_text("#define PY_MAJOR_VERSION\t3\n#define PY_MINOR_VERSION  9\n")
    environment = {name: str(tmp_path) if value == "HERE" else value for name, value in environment.items()}
    done = subprocess.run([BENCHMARKS / "gpu_prepare.sh", *arguments], env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, **environment},
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr


def test_variants_change_what_the_sources_leave_open():
    import gpu_prepare

    text = (ROOT / "csrc" / "cuda" / "row.cuh").read_text()
    for flags in gpu_prepare.VARIANTS.values():
        name = flags.removeprefix("-D").split("=")[0]
        assert f"#ifndef {name}\n" in text
    done = subprocess.run(
        [BENCHMARKS / "gpu_prepare.sh", "--help"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--archs" in done.stdout


def test_gpu_tests_refuse_to_run_without_a_device():
    if torch.cuda.is_available():
        return
    command_line = [sys.executable, "-m", "pytest", "-q", "tests/gpu", "--device", "cuda"]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "torch sees none" in done.stdout + done.stderr


def test_calls_of_the_gpu_checks_reach_every_op(monkeypatch):
    """Tests on a device and the sanitizer run what tests/checks/calls.py lists: a new op must be among it."""
    reached, select = set(), op.Op.select
    monkeypatch.setattr(op.Op, "select", lambda op, *call: (reached.add(op.name), select(op, *call))[1])
    listed = calls.public_calls("cpu", rows=3, vocab=37, dtype=torch.float32, pairs=2)
    for _, call in listed.values():
        assert all(bool(torch.isfinite(x).all()) for x in call())
    assert tuple(listed) == calls.NAMES and reached == set(OPS)
