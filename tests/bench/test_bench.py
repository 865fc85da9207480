"""The benchmark itself: it refuses wrong results, restores what it overwrites, sees memory, and writes what
it prints. No timed claims here."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastalign as fa
from fastalign.bench import SHAPES, command, eager, measure
from fastalign.bench.cases import make_case, own_backends
from fastalign.bench.cases import packed as packed_cases
from fastalign.bench.cases.case import Contestant
from fastalign.bench.shapes import OPS, Rows, Sequences

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def tiny(op, **options):
    return make_case(op, SHAPES["tiny"][op][0], CPU, compile=False, **options)


def test_every_suite_has_every_op():
    for suite, shapes in SHAPES.items():
        assert set(shapes) == set(OPS) and all(shapes.values()), suite
        assert suite in command.EFFORT
    assert SHAPES["cpu"]["token_logprobs"][0] == Rows(
        2048, 128256, "bfloat16"
    )  # the shape that quoted numbers are for


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("own", ["reference", "cpu"])
def test_every_contestant_is_right(op, own):
    """What is measured computes the same thing: every line passes the gate, and our own error is within the
    house rule."""
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
    (result,) = [
        r
        for r in measure.measure(case, CPU, seconds=0, least=2, most=2, memory=False)
        if r.kind == "compiled"
    ]
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
    monkeypatch.setattr(command, "ceiling_bytes", lambda device: 1 << 20)
    files = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = [
        "--quick",
        "--no-compile",
        "--device",
        "cpu",
        "--op",
        "sequence_sum",
        "--json",
        str(files[0]),
        "--plot",
        str(files[1]),
    ]
    assert command.main(arguments) == 0
    report = json.loads(files[0].read_text())
    (case,) = report["cases"]
    assert (
        case["op"] == "sequence_sum"
        and report["machine"]["torch"] == torch.__version__
        and report["failures"] == []
    )
    assert not [r for r in case["results"] if r["kind"] == "compiled"]
    (ours,) = [r for r in case["results"] if r["kind"] == "ours"]
    assert ours["gbs"] == pytest.approx(case["traffic_bytes"] / ours["ms"] / 1e6) and ours[
        "share"
    ] == pytest.approx(ours["gbs"] / case["read_gbs"])
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
    ours, reader = (
        measure.Result("fastalign cpu", "ours", ms=2.0),
        measure.Result("read only", "read", ms=1.0),
    )
    gbs = measure.add_bandwidth(case, [ours, reader], machine_gbs=1e9)
    assert gbs == reader.gbs == pytest.approx(inputs * case.inputs[0][0].nbytes / 1e6)
    assert ours.share == pytest.approx(case.traffic / 2e6 / gbs)


def test_pytest_benchmarks_cover_every_op():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q", "--suite", "tiny"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for op in OPS:
        assert f"[{op}-{SHAPES['tiny'][op][0]}-fastalign_cpu]".replace(" ", "_") in done.stdout, op


def test_json_is_there_after_every_case(tmp_path, monkeypatch):
    """A run that ends in the middle has left the cases before."""
    path, makers = tmp_path / "bench.json", command.make_case

    def make(op, *arguments, **options):
        if op == "policy_loss":
            raise KeyboardInterrupt
        return makers(op, *arguments, **options)

    monkeypatch.setattr(command, "make_case", make)
    with pytest.raises(KeyboardInterrupt):
        command.run("tiny", CPU, ["kl_estimate", "policy_loss"], compile=False, save=path)
    report = json.loads(path.read_text())
    assert [case["op"] for case in report["cases"]] == ["kl_estimate"] and "seconds" not in report
    assert [p.name for p in tmp_path.iterdir()] == ["bench.json"]


def test_gae_by_doubling_is_the_loop():
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(3, 77, generator=generator, dtype=torch.float64) for _ in range(2))
    for a, b in zip(
        eager.gae_doubling(rewards, values, 0.9, 0.97), eager.gae_loop(rewards, values, 0.9, 0.97)
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_long_sequences_have_no_loop_over_time(monkeypatch):
    monkeypatch.setattr(eager, "gae_loop", lambda *arguments: pytest.fail("a loop over time"))
    case = make_case(
        "gae", Sequences(2, packed_cases.MOST_STEPS + 1), CPU, compile=False, backends=("reference",)
    )
    assert {"loop over time steps", "loop over time steps, masked"} <= set(
        case.missing
    ) and "scan by doubling" in [c.name for c in case.contestants]
    # The reference is the loop itself: here only the truth counts, against the rival that scans.
    case.contestants = [c for c in case.contestants if c.name == "scan by doubling"]
    results = measure.measure(case, CPU, seconds=0, least=2, most=2, memory=False)
    assert {r.name: r.status for r in results} == {
        "scan by doubling": "ok",
        **dict.fromkeys(case.missing, "n/a"),
    }
