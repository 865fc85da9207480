"""The GPU gate, as far as it runs without a GPU: its plan is walked on the CPU, a killed run has left its
files, a hang or a lost CUDA context costs one test, and the report says what the files say."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SCRIPT = str(BENCHMARKS / "gpu_gate.sh")


@pytest.fixture(scope="module", autouse=True)
def _modules():
    """The scripts of benchmarks/ import one another by name."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def environment():
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """(what `--dry-run` printed, its two folders)"""
    results = tmp_path_factory.mktemp("results")
    done = subprocess.run(
        [SCRIPT, "--dry-run", "--results", results, "--revision", "abc"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, sorted(results.iterdir())


def test_dry_run_shows_the_plan(walk):
    import gpu_plan

    printed, _ = walk
    for stage in (1, 2):
        assert f"stage {stage}: {gpu_plan.SECONDS[stage]} s in all" in printed
        positions = [printed.index(f"{seconds:4.0f} s  {name}") for name, seconds in gpu_plan.budget(stage)]
        assert positions == sorted(positions) and all(
            f"  {name}" in printed for name in gpu_plan.FILES[stage]
        )
        own = sum(seconds for name, seconds in gpu_plan.budget(stage) if not name.startswith("build"))
        assert own <= gpu_plan.SECONDS[stage]  # what is carried along leaves time for every step
    assert gpu_plan.SECONDS == {1: 540, 2: 180}


def test_dry_run_walks_every_step_and_leaves_the_files(walk):
    import gpu_plan

    _, folders = walk
    assert len(folders) == 2 and len([p for folder in folders for p in folder.iterdir()]) <= 8
    for stage, folder in enumerate(folders, 1):
        assert {p.name for p in folder.iterdir()} == set(gpu_plan.FILES[stage]) - {
            "ncu.csv"
        }  # which only ncu writes
        report = json.loads((folder / f"stage{stage}.json").read_text())
        assert (
            report["finished"]
            and report["failed"] == []
            and report["revision"] == "abc"
            and report["machine"]["torch"] == torch.__version__
        )
        assert [step["step"] for step in report["steps"]] == [name for name, _ in gpu_plan.budget(stage)[1:]]
        assert [step["outcome"] for step in report["steps"] if not step["step"].startswith("build")] == [
            "passed"
        ] * (5 if stage == 1 else 3)


def test_dry_run_lists_every_test_and_every_case(walk):
    import gpu_lines
    import gpu_report
    from gpu_plan import Place

    _, (first, second) = walk
    found = gpu_report.outcomes(gpu_lines.read_lines(first / "tests.jsonl"))
    assert {line["outcome"] for line in found.values()} == {"passed"} and {
        line["backend"] for line in found.values()
    } == {
        "reference",
        "cpu",
    }
    assert {step for step, _ in found} == {"contract"} and any("top1" in test for _, test in found)
    table = gpu_lines.read_lines(first / "table.jsonl")
    measured = {(line["op"], line.get("backend")) for line in table if "gbs" in line}
    for backend in Place(first, ("reference", "cpu")).backends:
        assert {
            ("logprob", backend),
            ("fused kl", backend),
            ("backward kl", backend),
            ("gae", backend),
            ("policy_loss", backend),
        } <= measured
        assert [
            line
            for line in table
            if line["op"] == "check" and line["backend"] == backend and "wrong" not in line
        ]
    swept = gpu_lines.read_lines(second / "sweep.jsonl")
    assert {line["mode"] for line in swept} == {"sweep", "variant", "profile"}
    assert {line["label"] for line in swept if line["mode"] == "variant"} == {"as it is", "dry run"}


def test_report_of_a_dry_run(walk):
    _, folders = walk
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_report.py", *folders], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "## Stage 1",
        "## Stage 2",
        "| contract, cpu |",
        "| fused kl | 16 x 1000 bfloat16 | cpu |",
        "## Sweep",
        "## Variants",
        "revision abc",
    ):
        assert words in done.stdout, words


def processes(words):
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if (
                entry.name.isdigit()
                and words in (entry / "cmdline").read_text(errors="replace")
                and " Z " not in (entry / "stat").read_text()
            ):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < until, "in vain"
        time.sleep(0.05)
    return value


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_has_left_everything_up_to_there(tmp_path, number):
    """And no process of its own."""
    import gpu_lines

    gate = subprocess.Popen(
        [SCRIPT, "--dry-run", "--stage", "2", "--results", tmp_path],
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    lines = wait_for(lambda: [p for p in tmp_path.glob("*/sweep.jsonl") if len(gpu_lines.read_lines(p)) > 3])[
        0
    ]
    gate.send_signal(number)
    assert gate.wait(60) != 0
    wait_for(lambda: not processes(str(tmp_path)), 30)
    report = json.loads((lines.parent / "stage2.json").read_text())
    assert not report["finished"] and report["machine"]["torch"] == torch.__version__
    assert report.get("interrupted") == ("SIGTERM" if number == signal.SIGTERM else None)
    assert len([line for line in gpu_lines.read_lines(lines) if "gbs" in line]) >= 2
    assert "logprob" in (lines.parent / "stage2.log").read_text()
    assert {p.name for p in lines.parent.iterdir()} == {"stage2.json", "stage2.log", "sweep.jsonl"}
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_report.py", lines.parent], capture_output=True, text=True
    )
    assert done.returncode == 0 and "NOT finished" in done.stdout and "not reached" in done.stdout


PLANTED = """
import time, pytest

@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("number", range(12))
def test_right(backend, number):
    pass

def test_ordinary_failure():
    assert 1 == 2, "one is not two"

def test_hangs():
    time.sleep(600)

def test_loses_the_context():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.mark.parametrize("backend", ["cuda"])
def test_process_dies(backend):
    import os
    os._exit(1)
"""


def test_one_bad_test_costs_one_test(tmp_path):
    """A hang, a lost context and a dead process each: all other tests have their lines, by name, with their
    backends."""
    import gpu_lines
    import gpu_report
    from gpu_plan import Place, _pytest

    (tmp_path / "test_planted.py").write_text(PLANTED)
    (tmp_path / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--device')\n    parser.addoption('--backend')\n"
    )
    command = _pytest(
        Place(tmp_path, ("cuda", "triton")), "planted", 2, 4, "test_planted.py", "--rootdir", str(tmp_path)
    )
    path = os.pathsep.join([str(ROOT), str(BENCHMARKS)])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = {
        test.split("::")[1]: line
        for (_, test), line in gpu_report.outcomes(gpu_lines.read_lines(tmp_path / "tests.jsonl")).items()
    }
    assert len(found) == 24 + 4 and sum(line["outcome"] == "passed" for line in found.values()) == 24
    bad = {name: line for name, line in found.items() if line["outcome"] != "passed"}
    assert {line["outcome"] for line in bad.values()} <= {"failed", "error"}
    assert set(bad) == {
        "test_ordinary_failure",
        "test_hangs",
        "test_loses_the_context",
        "test_process_dies[cuda]",
    }
    assert (
        "one is not two" in bad["test_ordinary_failure"]["text"]
        and "CUDA error" in bad["test_loses_the_context"]["text"]
    )
    assert (
        bad["test_process_dies[cuda]"]["backend"] == "cuda"
        and found["test_right[3-triton]"]["backend"] == "triton"
    )
    text = gpu_report.tests(gpu_lines.read_lines(tmp_path / "tests.jsonl"))
    assert "| planted, triton | 12 | 0 | 0 | 0 | 0 |" in text and "test_hangs" in text


# --- steps --------------------------------------------------------------------------------------------------


def gate_in(folder, seconds=60.0):
    import gpu_gate

    return gpu_gate.Gate(1, folder, {"plan": []}, seconds)


def step(code, seconds=60.0, **options):
    from gpu_plan import Command, Step

    return Step("step", seconds, (Command("words", (sys.executable, "-c", code), **options),))


def test_steps_pass_fail_and_run_out_of_time(tmp_path):
    gate = gate_in(tmp_path)
    assert gate.run(step("print('words')")) == "passed"
    assert gate.run(step("print('more words'); raise SystemExit(3)")) == "failed"
    assert (
        "more words" in gate.report["steps"][1]["output"] and "words" in (tmp_path / "stage1.log").read_text()
    )
    assert gate_in(tmp_path / "late", seconds=0).run(step("")) == "failed"
    assert gate.finish() == 1 and json.loads((tmp_path / "stage1.json").read_text())["failed"] == ["step"]


def test_a_step_is_cut_with_its_children(tmp_path):
    """What it printed is kept, what it started is gone."""
    mark = f"import time; time.sleep(600)  # {tmp_path}"
    code = f"import subprocess, sys, time; print('begun', flush=True); subprocess.Popen([sys.executable, '-c', {mark!r}]); time.sleep(600)"
    gate = gate_in(tmp_path)
    assert gate.run(step(code, seconds=5.0)) == "failed"
    assert (
        "begun" in gate.report["steps"][0]["output"]
        and "stopped after 5 s" in gate.report["steps"][0]["output"]
    )
    wait_for(lambda: not processes(str(tmp_path)), 20)


def test_a_killed_gate_takes_a_silent_step_along(tmp_path):
    code = f"import gpu_gate, gpu_plan, pathlib, sys\ngate = gpu_gate.Gate(1, pathlib.Path({str(tmp_path)!r}), {{}}, 60)\n"
    code += f"command = gpu_plan.Command('silent', (sys.executable, '-c', 'import time; time.sleep(600)  # {tmp_path}/silent'))\n"
    code += "gate.run(gpu_plan.Step('silent', 60.0, (command,)))"
    gate = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS)},
        stdout=subprocess.DEVNULL,
    )
    wait_for(lambda: set(processes(f"{tmp_path}/silent")) - {gate.pid})
    gate.kill()
    gate.wait()
    wait_for(lambda: not processes(f"{tmp_path}/silent"), 20)
    assert not json.loads((tmp_path / "stage1.json").read_text())["finished"]


def test_commands_of_a_step_run_at_once_and_the_worst_counts(tmp_path):
    from gpu_plan import Command, Step

    wait = "import pathlib, time; p = pathlib.Path({!r}); (p / {!r}).touch()\nwhile not (p / {!r}).exists(): time.sleep(0.01)"
    codes = {
        "a": wait.format(str(tmp_path), "a", "b"),
        "b": wait.format(str(tmp_path), "b", "a") + "\nraise SystemExit(1)",
    }
    gate = gate_in(tmp_path / "gate")
    assert (
        gate.run(
            Step(
                "both",
                60.0,
                tuple(Command(name, (sys.executable, "-c", code)) for name, code in codes.items()),
            )
        )
        == "failed"
    )
    assert gate.report["steps"][0]["commands"] == {"a": "passed", "b": "failed"}


@pytest.mark.parametrize(
    "code,output,outcome",
    [
        (0, "ran on backend cuda\n========= ERROR SUMMARY: 0 errors", "passed"),
        (
            0,
            "ran on backend cuda\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            "passed",
        ),
        (86, "Invalid __global__ write\n========= ERROR SUMMARY: 2 errors", "failed"),
        (
            86,
            "ran on backend cuda\n========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)",
            "failed",
        ),
        (1, "========= Error: process didn't terminate successfully\nDevice not supported", "n/a"),
        (0, "ran on backend cuda", "n/a"),  # it printed no summary: it did not look
        (None, "stopped after 75 s", "n/a"),
    ],
)
def test_gate_reads_the_sanitizer(code, output, outcome):
    from gpu_plan import sanitizer_outcome

    assert sanitizer_outcome(code, output, "cuda") == outcome


def test_the_sanitizer_sees_cuda_alone_with_allocations_of_their_own(monkeypatch):
    import gpu_plan

    monkeypatch.setattr(gpu_plan, "tool", lambda name: f"/cuda/bin/{name}")
    for plan in gpu_plan.steps(1, gpu_plan.Place(Path("x"), ("cuda", "triton")))[-1:]:
        assert [c.argv[2] for c in plan.commands] == ["memcheck", "racecheck"]
        assert all(
            c.argv[-2:] == ("cuda", "cuda") and c.env["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
            for c in plan.commands
        )
    contract = gpu_plan.steps(1, gpu_plan.Place(Path("x"), ("cuda", "triton")))[2].commands[0]
    assert (
        contract.env["CUDA_LAUNCH_BLOCKING"] == "1"
        and "cuda,triton" in contract.argv
        and not {"-x", "--maxfail"} & set(contract.argv)
    )
    assert set(gpu_plan.CONTRACT) <= set(contract.argv) and len(gpu_plan.CONTRACT) >= 7


def test_the_build_is_skipped_where_a_fitting_extension_was_carried(tmp_path, monkeypatch):
    import gpu_gate

    monkeypatch.setattr(gpu_gate, "PREPARED", tmp_path)
    monkeypatch.setattr(gpu_gate.gpu_plan, "tool", lambda name: "/cuda/bin/nvcc")
    facts = {"capability": "90", "extension": {"CUDA kernels": "yes, for 80;90, by nvcc 13.0"}}
    (tmp_path / "csrc.sha256").write_text(gpu_gate.sources() + "\n")
    assert "not needed: carried along, built from these sources" in gpu_gate.build_step(facts, 1).absent
    (built,) = gpu_gate.build_step({**facts, "capability": "100"}, 1).commands
    assert built.env["FASTALIGN_ARCHS"] == "100"
    (tmp_path / "csrc.sha256").write_text("of other sources\n")
    assert gpu_gate.build_step(facts, 1).commands
    monkeypatch.setattr(gpu_gate.gpu_plan, "tool", lambda name: None)
    assert "nvcc is not here" in gpu_gate.build_step(facts, 1).absent
    (tmp_path / "csrc.sha256").unlink()
    assert "no csrc.sha256 says from which sources" in gpu_gate.build_step(facts, 1).absent


def test_gate_refuses_without_a_gpu_and_names_its_folder(monkeypatch):
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    if not torch.cuda.is_available():
        done = subprocess.run(
            [SCRIPT], env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}, capture_output=True, text=True
        )
        assert done.returncode != 0 and "no CUDA device" in done.stderr
        done = subprocess.run([SCRIPT, "--stage", "3"], env=environment(), capture_output=True, text=True)
        assert done.returncode == 2 and "--stage" in done.stderr
