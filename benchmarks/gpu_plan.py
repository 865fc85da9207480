"""The plan of the GPU gate: two stages of steps, what each runs, how long it may take, and what its exit code
and output mean."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PREPARED = ROOT / "build" / "gpu-carry"  # what gpu_prepare.py leaves
CONTRACT = tuple(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests" / "contract").glob("test_*.py")))
FOUND = 86  # the exit code by which compute-sanitizer says that it found an error
SECONDS = {1: 540, 2: 180}
FILES = {
    1: ("stage1.json", "stage1.log", "table.jsonl", "tests.jsonl"),
    2: ("stage2.json", "stage2.log", "sweep.jsonl", "ncu.csv"),
}
ABOUT = {
    "stage1.json": "machine, versions, revision, and every step's outcome, after every step",
    "stage1.log": "what every step printed, line by line",
    "table.jsonl": "bandwidth of op x shape x backend and errors against fp64, a line per case",
    "tests.jsonl": "outcome of every contract and device test on every backend, a line per test",
    "stage2.json": "the same as stage1.json for this stage",
    "stage2.log": "what every step printed, line by line",
    "sweep.jsonl": "cluster sizes, Triton threads and registers, variants of the extension, a line per case",
    "ncu.csv": "hardware counters of one launch per row op",
}


def plainly(code: int | None, output: str) -> str:
    """Exit code 0 is success; a step that was stopped has not passed."""
    return "passed" if code == 0 else "failed"


@dataclass(frozen=True)
class Command:
    """One process of a step. `judge(exit code or None when the time was up, output)` -> "passed", "failed" or
    "n/a"."""

    name: str
    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    judge: Callable[[int | None, str], str] = plainly


@dataclass(frozen=True)
class Step:
    """Commands that run at the same time. `absent`: why the step cannot run here, instead of commands."""

    name: str
    seconds: float
    commands: tuple[Command, ...] = ()
    absent: str = ""


@dataclass(frozen=True)
class Place:
    """Where the gate runs: the folder of the results, the device, the backends that can be tested there,
    whether it is a dry run on the CPU."""

    folder: Path
    backends: tuple[str, ...]
    dry: bool = False

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"


def steps(stage: int, place: Place) -> list[Step]:
    """What follows the description of the machine and the build."""
    return _first(place) if stage == 1 else _second(place)


def budget(stage: int) -> list[tuple[str, float]]:
    """(step, seconds) in order, the description and the build included; the build is skipped where a fitting
    extension was carried along."""
    own = [(step.name, step.seconds) for step in steps(stage, Place(Path("."), ("cuda", "triton")))]
    return [
        ("describe the machine", 15),
        *([("build the extension, unless carried", 150)] if stage == 1 else []),
        *own,
    ]


def _python(*arguments: object) -> tuple[str, ...]:
    return (sys.executable, *map(str, arguments))


def tool(name: str) -> str | None:
    """A tool of the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=f"{home}/bin")


def _table(
    place: Place, file: str, mode: str, *more: object, backends: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    options = [
        "--device",
        place.device,
        "--backends",
        ",".join(backends or place.backends),
        *(["--tiny"] if place.dry else []),
    ]
    return _python("benchmarks/gpu_table.py", place.folder / file, mode, *options, *more)


def _pytest(place: Place, step: str, workers: int, seconds: int, *arguments: str) -> tuple[str, ...]:
    """Every test a line on disk at once; a hang costs one test, a lost CUDA context one worker; no stop at a
    failure."""
    log = ("-p", "gpu_pytest_log", "--log-lines", place.folder / "tests.jsonl", "--log-step", step)
    guards = (
        "--timeout",
        seconds,
        "--timeout-method",
        "thread",
        "-n",
        workers,
        "--dist",
        "worksteal",
        "--max-worker-restart",
        40,
    )
    chosen = ("--device", place.device, "--backend", ",".join(place.backends), "-p", "no:cacheprovider")
    return _python("-m", "pytest", "-q", *log, *guards, *chosen, *arguments)


def _first(place: Place) -> list[Step]:
    smoke = [Command(f"smoke {b}", _python("tests/gpu/sanitize.py", b, place.device)) for b in place.backends]
    # A dry run shows that the commands work; the contract itself is tested on the CPU elsewhere.
    chosen = (
        (
            "tests/contract/test_contract.py",
            "tests/contract/test_contract_packed.py",
            "-k",
            "top1 or cu_seqlens",
        )
        if place.dry
        else CONTRACT
    )
    workers = 2 if place.dry else min(14, max(2, (os.cpu_count() or 4) - 2))
    contract = Command(
        "contract",
        _pytest(place, "contract", workers, 60, *chosen),
        {"CUDA_LAUNCH_BLOCKING": "1", "OMP_NUM_THREADS": "2"},
    )
    if place.dry:
        device = Command(
            "device",
            _python(
                "-m",
                "pytest",
                "-q",
                "tests/gpu",
                "--collect-only",
                "--device",
                "cuda",
                "--backend",
                "cuda,triton",
            ),
        )
    else:
        device = Command("device", _pytest(place, "device", 3, 90, "tests/gpu"))
    return [
        Step("smoke: every op on small shapes", 60, tuple(smoke)),
        Step(
            "bandwidth table, checked against fp64",
            100,
            (Command("table", _table(place, "table.jsonl", "table")),),
        ),
        Step("contract tests", 170, (contract,)),
        Step("device tests", 110, (device,)),
        _sanitizers(place, 85),
    ]


def _sanitizers(place: Place, seconds: float) -> Step:
    """memcheck and racecheck side by side, over the CUDA C++ kernels. Triton's read whole 16-byte groups, up
    to 14 bytes beyond a tensor: memory that exists, but that memcheck rightly calls out of bounds where every
    tensor is an allocation of its own."""
    name, backend = "compute-sanitizer: memcheck, racecheck", "cpu" if place.dry else "cuda"
    sanitizer, program = tool("compute-sanitizer"), _python("tests/gpu/sanitize.py", backend, place.device)
    if not place.dry and sanitizer is None:
        return Step(name, seconds, absent="compute-sanitizer is not installed")
    if backend not in place.backends:
        return Step(name, seconds, absent=f"backend {backend} cannot be tested here")
    # Without torch's cache every tensor is an allocation of its own, whose ends memcheck knows.
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    commands = []
    for check in ("memcheck", "racecheck"):
        prefix = () if place.dry else (sanitizer, "--tool", check, "--error-exitcode", str(FOUND))
        judge = plainly if place.dry else (lambda code, output: sanitizer_outcome(code, output, backend))
        commands.append(Command(check, (*prefix, *program), env, judge))
    return Step(name, seconds, tuple(commands))


def sanitizer_outcome(code: int | None, output: str, backend: str) -> str:
    """Passed only if the tool printed a clean summary and the program came to its end; "n/a" if it found
    nothing but did not do its work (it refused this device, or the time was up)."""
    clean = re.search(r"(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)", output)
    found = re.search(r"(ERROR SUMMARY: [1-9]|RACECHECK SUMMARY: [1-9])", output)
    ran = f"ran on backend {backend}" in output
    if code == 0 and clean and ran:
        return "passed"
    return "failed" if found or (ran and code == FOUND) else "n/a"


def _second(place: Place) -> list[Step]:
    return [
        Step(
            "sweep: cluster sizes, Triton threads and registers",
            65,
            (Command("sweep", _table(place, "sweep.jsonl", "sweep")),),
        ),
        _variants(place, 50),
        _counters(place, 50),
    ]


def _variants(place: Place, seconds: float) -> Step:
    """One after the other, in one shell: two at a time would share the memory's bandwidth. The first is the
    extension as it is."""
    name = "variants of the CUDA kernels"
    built = (
        [ROOT / "fastalign" / f"_C{EXTENSION_SUFFIXES[0]}"]
        if place.dry
        else sorted(PREPARED.glob("*/_C*.so"))
    )
    if not built:
        return Step(
            name, seconds, absent="no variants were carried along (benchmarks/gpu_prepare.sh builds them)"
        )
    runs = [("as it is", ())] + [
        ("dry run" if place.dry else path.parent.name, ("--extension", path)) for path in built
    ]
    backend = ("cpu",) if place.dry else ("cuda",)
    lines = [
        _table(place, "sweep.jsonl", "variant", "--label", label, *more, backends=backend)
        for label, more in runs
    ]
    loop = "import subprocess, sys; sys.exit(max(abs(subprocess.run(line).returncode) for line in {!r}))"
    return Step(name, seconds, (Command("variants", _python("-c", loop.format(lines))),))


def _counters(place: Place, seconds: float) -> Step:
    name, ncu = "ncu: hardware counters", tool("ncu")
    program = _table(place, "sweep.jsonl", "profile")
    if place.dry:
        return Step(name, seconds, (Command("ncu", program),))
    if ncu is None:
        return Step(name, seconds, absent="ncu is not installed")
    sections = (
        "SpeedOfLight",
        "MemoryWorkloadAnalysis",
        "SchedulerStats",
        "WarpStateStats",
        "LaunchStats",
        "Occupancy",
    )
    options = ("--clock-control", "none", "--profile-from-start", "off", "--csv", "--log-file", str(place.folder / "ncu.csv"),
               "-k", "regex:token_stats", *(word for s in sections for word in ("--section", s)))  # fmt: skip
    return Step(name, seconds, (Command("ncu", (ncu, *options, *program)),))
