"""The benchmark itself: it refuses wrong results, restores what it overwrites, sees memory, and writes what it prints. No timed claims here."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastalign as fa
from fastalign import registry
from fastalign.bench import SHAPES, command, measure
from fastalign.bench.cases import Contestant, make_case, own_backends
from fastalign.bench.shapes import OPS, Rows

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def tiny(op, **options):
    return make_case(op, SHAPES["tiny"][op][0], CPU, compile=False, **options)


def test_every_suite_has_every_op():
    for suite, shapes in SHAPES.items():
        assert set(shapes) == set(OPS) and all(shapes.values()), suite
        assert suite in command.EFFORT
    assert SHAPES["cpu"]["token_logprobs"][0] == Rows(2048, 128256, "bfloat16")  # the shape that quoted numbers are for


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("own", ["reference", "cpu"])
def test_every_contestant_is_right(op, own):
    """What is measured computes the same thing: every line passes the gate, and our own error is within the house rule."""
    case = tiny(op, backends=(own,))
    assert case.contestants[0].name == f"fastalign {own}"
    for result in measure.measure(case, CPU, seconds=0, least=2, most=2, memory=False):
        if result.name in case.missing:
            assert result.status == "n/a" and result.message
        else:
            assert result.status == "ok" and result.ms > 0, result
            assert result.kind in ("read", "floor") or result.error < 0.1


@pytest.mark.parametrize("op", ["token_logprobs", "preference_loss"])
def test_compiled_contestants(op):
    case = make_case(op, SHAPES["tiny"][op][0], CPU)
    compiled = [c for c in case.contestants if c.kind == "compiled"]
    assert compiled
    case.contestants = compiled[:1]
    (result,) = [r for r in measure.measure(case, CPU, seconds=0, least=2, most=2, memory=False) if r.kind == "compiled"]
    assert result.status == "ok", result.message


@pytest.mark.parametrize("wrong", [1e-3, float("nan")])
def test_a_wrong_result_gets_no_number(wrong):
    case = tiny("token_logprobs")
    right = case.contestants[0]
    case.contestants = [
        dataclasses.replace(right, name="off", run=lambda *inputs: right.run(*inputs) + wrong),
        Contestant("broken", lambda *inputs: 1 // 0, "peer"),
    ]
    off, broken = measure.measure(case, CPU, seconds=0, least=1, most=1)[:2]
    assert off.status == "wrong" and off.ms is None and "off" in off.message
    assert broken.status == "n/a" and broken.ms is None and "ZeroDivisionError" in broken.message
    assert "wrong" in command.render([off, broken])


def test_a_wrong_result_fails_the_command(monkeypatch, capsys):
    right = fa.kl_estimate
    monkeypatch.setattr(fa, "kl_estimate", lambda *a, **k: right(*a, **k) * 1.01)
    report = command.run("tiny", CPU, ["kl_estimate"], compile=False)
    assert report["failures"] and "kl_estimate" in capsys.readouterr().err


def test_inputs_that_are_overwritten_are_restored():
    case = tiny("token_logprobs_backward")
    assert case.contestants[0].overwrites
    before = [inputs[0].detach().clone() for inputs in case.inputs]
    runner = measure.Runner(case, case.contestants[0])
    first, second = (runner.call(0)().clone() for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(runner.buffer, before[0])  # it did write in place
    for inputs, copy in zip(case.inputs, before):
        assert torch.equal(inputs[0], copy)


def test_inputs_take_turns():
    case = tiny("kl_estimate", cache_bytes=1000)
    assert len(case.inputs) == 12  # 3 * 1000 bytes in sets of 2 x 128 bytes
    seen = []
    runner = measure.Runner(case, Contestant("spy", lambda x, ref: seen.append(id(x)), "eager"))
    for _ in range(len(case.inputs)):
        runner.call()()
    assert len(set(seen)) == len(case.inputs)


def test_peak_memory_sees_temporaries_and_ours_makes_none():
    """A1: log_softmax makes a [N, V] temporary, the fused forward makes none."""
    case = make_case("token_logprobs", Rows(512, 32768, "float32"), CPU, compile=False, backends=("cpu",))
    size = case.inputs[0][0].nbytes
    extra = {c.name: measure.peak_extra_bytes(measure.Runner(case, c).call(0), CPU) for c in case.contestants}
    assert extra["log_softmax.gather"] > 0.9 * size
    assert extra["fastalign cpu"] < 0.1 * size


def test_readers_read_every_byte():
    speeds = measure.read_bandwidth(CPU, 1 << 16, rounds=1)
    assert set(speeds) == set(measure.READERS) and measure._fastest_reader == max(speeds, key=speeds.get)
    x = torch.zeros(1000, dtype=torch.bfloat16)
    x[-1] = 1.0
    assert all(int(reader(x)) != 0 for reader in measure.READERS.values())


def test_own_backends_are_those_that_explain_names():
    x = torch.empty(2, 3)
    assert own_backends("token_stats", x) == ("cpu",)
    with fa.use_backend("reference"):
        assert own_backends("token_stats", x) == ("reference",)


def test_command_writes_json_and_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "cpu-quick", SHAPES["tiny"])
    monkeypatch.setitem(command.EFFORT, "cpu-quick", command.EFFORT["tiny"])
    files = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ["--quick", "--device", "cpu", "--op", "sequence_sum", "--json", str(files[0]), "--plot", str(files[1])]
    assert command.main(arguments) == 0
    report = json.loads(files[0].read_text())
    (case,) = report["cases"]
    assert case["op"] == "sequence_sum" and report["machine"]["torch"] == torch.__version__ and report["failures"] == []
    (ours,) = [r for r in case["results"] if r["kind"] == "ours"]
    assert ours["gbs"] == pytest.approx(case["traffic_bytes"] / ours["ms"] / 1e6) and ours["share"] == pytest.approx(
        ours["gbs"] / case["read_gbs"]
    )
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert "fastalign cpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--op", "softmax"], "token_logprobs"),
        (["--backend", "cuda", "--device", "cpu"], "--backend cuda"),
        (["--json", "/nowhere/x.json"], "/nowhere/x.json"),
        (["--plot", "times.txt"], ".png"),
        (["--rounds", "3"], "--rounds"),
    ],
)
def test_wrong_options_are_one_line_and_code_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("op,inputs", [("token_logprobs", 1), ("token_kl", 2), ("token_kl_loss", 2)])
def test_the_plain_read_counts_all_that_it_reads(op, inputs):
    case = make_case(op, SHAPES["tiny"][op][0], torch.device("cpu"), compile=False)
    ours, reader = measure.Result("fastalign cpu", "ours", ms=2.0), measure.Result("read only", "read", ms=1.0)
    gbs = measure.add_bandwidth(case, [ours, reader], machine_gbs=1e9)
    assert gbs == reader.gbs == pytest.approx(inputs * case.inputs[0][0].nbytes / 1e6)
    assert ours.share == pytest.approx(case.traffic / 2e6 / gbs)


def test_pytest_benchmarks_cover_every_op():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q", "--suite", "tiny"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for op in OPS:
        assert f"[{op}-{SHAPES['tiny'][op][0]}-fastalign_cpu]".replace(" ", "_") in done.stdout, op


# --- the GPU gate, as far as it runs without a GPU ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gate_module():
    spec = importlib.util.spec_from_file_location("gpu_gate", ROOT / "benchmarks" / "gpu_gate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_gate_shell_script_parses_and_refuses_without_a_gpu():
    script = str(ROOT / "benchmarks" / "gpu_gate.sh")
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if not torch.cuda.is_available():
        done = subprocess.run([script], env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}, capture_output=True, text=True)
        assert done.returncode != 0 and "no CUDA device" in done.stderr


def test_gate_steps_fail_and_run_out_of_time(gate_module):
    gate = gate_module.Gate(minutes=1, dry=True)
    assert gate.run("fails", [sys.executable, "-c", "print('words'); raise SystemExit(3)"], 60) == (3, "words\n")
    late = gate_module.Gate(minutes=0, dry=True)
    code, output = late.run("late", [sys.executable, "-c", ""], 60)
    assert code is None and "no time was left" in output


@pytest.mark.parametrize(
    "code,output,outcome",
    [
        (0, "ran on backend cuda\n========= ERROR SUMMARY: 0 errors", "passed"),
        (0, "ran on backend cuda\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed"),
        (86, "Invalid __global__ write\n========= ERROR SUMMARY: 2 errors", "failed"),
        (86, "ran on backend cuda\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", "failed"),
        (1, "========= Error: process didn't terminate successfully\nDevice not supported", "n/a"),
        (0, "ran on backend cuda", "n/a"),  # it printed no summary: it did not look
        (None, "stopped after 75 s", "n/a"),
    ],
)
def test_gate_reads_the_sanitizer(gate_module, code, output, outcome):
    assert gate_module._sanitizer_outcome(code, output, "cuda") == outcome


def test_gate_keeps_the_output_of_what_did_not_pass(gate_module, capsys):
    gate = gate_module.Gate(minutes=1, dry=True)
    gate.absent("tool", "it is not installed")
    gate.record("tests", "passed", "words", tests=3)
    assert gate.steps[0] == {"step": "tool", "outcome": "n/a", "seconds": 0.0, "output": "it is not installed"}
    assert gate.steps[1] == {"step": "tests", "outcome": "passed", "seconds": 0.0, "tests": 3}
    assert "it is not installed" in capsys.readouterr().out


def test_gate_reads_test_reports(gate_module, tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="b"><properties><property name="k" value="1 of 3"/></properties></testcase>'
        '<testcase classname="a" name="c"><failure message="boom"/></testcase><testcase classname="a" name="d"><skipped message="why"/></testcase>'
        "</testsuite></testsuites>"
    )
    facts = gate_module._read_junit(report)
    assert facts == {"tests": 3, "failures": ["a::c: boom"], "skipped": ["a::d: why"], "recorded": {"k": "1 of 3"}}
    assert gate_module._read_junit(tmp_path / "none.xml") == {"tests": 0}


def test_gpu_tests_refuse_to_run_without_a_device():
    if torch.cuda.is_available():
        return
    for options, words in ((["--device", "cuda"], "torch sees none"), ([], "--device cuda")):
        command_line = [sys.executable, "-m", "pytest", "-q", "tests/gpu", *options]
        done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode != 0 and words in done.stdout + done.stderr


def test_calls_of_the_gpu_checks_reach_every_op(monkeypatch):
    """Tests on a device and the sanitizer run what tests/gpu/calls.py lists: a new op must be among it."""
    spec = importlib.util.spec_from_file_location("calls", ROOT / "tests" / "gpu" / "calls.py")
    calls = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(calls)
    reached, select = set(), registry.Op.select
    monkeypatch.setattr(registry.Op, "select", lambda op, tensor: (reached.add(op.name), select(op, tensor))[1])
    listed = calls.public_calls("cpu", rows=3, vocab=37, dtype=torch.float32, pairs=2)
    for _, call in listed.values():
        assert all(bool(torch.isfinite(x).all()) for x in call())
    assert tuple(listed) == calls.NAMES and reached == set(registry.OPS)
