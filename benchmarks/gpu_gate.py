"""The GPU gate; start it by benchmarks/gpu_gate.sh. Each step is a process of its own with a time limit, and its outcome is one of

    passed   it ran and found nothing
    failed   a test failed, a result was wrong, a tool found an error, or the step ran out of time
    n/a      the step could not run here, with the tool's own message: a missing compiler or sanitizer, say

The gate fails if any step failed, or if neither GPU backend could be tested. `--dry-run` walks through all steps on the CPU."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONTRACT = tuple(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests").glob("test_contract*.py")))
FOUND = 86  # the exit code by which compute-sanitizer says that it found an error
TAIL = 4000  # characters of output kept in the JSON


class Gate:
    """Runs the steps against one deadline and keeps what they said."""

    def __init__(self, minutes: float, dry: bool):
        self.deadline, self.dry = time.monotonic() + 60 * minutes, dry
        self.device = "cpu" if dry else "cuda"
        self.steps: list[dict[str, Any]] = []

    def run(self, name: str, command: list[str], limit: float, **env: str) -> tuple[int | None, str]:
        """(exit code, output); the code is None when the time was up."""
        limit = min(limit, self.deadline - time.monotonic())
        print(f"== {name}: {' '.join(command)}", flush=True)
        started = time.monotonic()
        try:
            if limit <= 5:
                raise subprocess.TimeoutExpired(command, limit, output=b"no time was left for this step")
            done = subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, timeout=limit, text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT)  # fmt: skip
            code, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            code, output = None, (error.output or b"").decode(errors="replace") + f"\nstopped after {max(limit, 0):.0f} s"
        self.seconds = round(time.monotonic() - started, 1)
        return code, output

    def record(self, name: str, outcome: str, output: str = "", **facts: Any) -> None:
        output = "" if outcome == "passed" else output[-TAIL:]
        print(f"   {outcome} ({self.seconds} s)" + (f"\n{output}" if output else ""), flush=True)
        self.steps.append({"step": name, "outcome": outcome, "seconds": self.seconds, **facts} | ({"output": output} if output else {}))

    def absent(self, name: str, message: str) -> None:
        self.seconds = 0.0
        print(f"== {name}", flush=True)
        self.record(name, "n/a", message)

    # --- the steps --------------------------------------------------------------------------------------------------------------------

    def build(self, capability: str) -> None:
        """Build the extension in place for this GPU alone; without nvcc, use what is there."""
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        if self.dry:
            return self.absent("build", "dry run: nothing is built")
        if not (shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")):
            return self.absent("build", f"nvcc is neither on PATH nor in {home}/bin; the extension is used as it is")
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        code, output = self.run("build", command, 240, FASTALIGN_CUDA="1", FASTALIGN_ARCHS=capability)
        self.record("build", "passed" if code == 0 else "failed", output)

    def pytest(self, name: str, backend: str, paths: tuple[str, ...], limit: float, *options: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [sys.executable, "-m", "pytest", "-q", "-x" if self.dry else "--maxfail=50", *paths, "--device", self.device]
            if paths == CONTRACT and importlib.util.find_spec("xdist"):  # most of the time goes into compiling Triton kernels
                command += ["-n", str(min(8, os.cpu_count() or 1))]
            code, output = self.run(name, [*command, "--backend", backend, f"--junitxml={report}", *options], limit)
            facts = _read_junit(report)
        self.record(name, "passed" if code == 0 else "failed", output, **facts)

    def sanitize(self, backend: str) -> None:
        """The program by itself (it must run), then under each tool of compute-sanitizer."""
        program = [sys.executable, "tests/gpu/sanitize.py", backend, self.device]
        name = f"every op on small shapes, {backend}"
        code, output = self.run(name, program, 60)
        self.record(name, "passed" if code == 0 else "failed", output)
        sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        for tool in ("memcheck", "racecheck"):
            name = f"compute-sanitizer {tool}, {backend}"
            if self.dry or sanitizer is None:
                self.absent(name, "dry run" if self.dry else "compute-sanitizer is not installed")
                continue
            # Without torch's cache every tensor is an allocation of its own, whose ends memcheck knows.
            command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *program]
            code, output = self.run(name, command, 75, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
            self.record(name, _sanitizer_outcome(code, output, backend), output)

    def bench(self, op: str) -> dict[str, Any] | None:
        name = f"bench {op}"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bench.json"
            command = [sys.executable, "-m", "fastalign", "bench", "--op", op, "--device", self.device, "--json", str(path)]
            code, output = self.run(name, command + ["--quick"] * self.dry, 150)
            report = json.loads(path.read_text()) if path.exists() else None
        # Out of time is no wrong result, and no result either.
        self.record(name, {0: "passed", None: "n/a"}.get(code, "failed"), output)
        print(output, flush=True)
        return report


def _sanitizer_outcome(code: int | None, output: str, backend: str) -> str:
    """Passed only if the tool printed a clean summary and the program came to its end; "n/a" if it found nothing but did not do its work
    (it refused this device, or the time was up)."""
    clean = re.search(r"(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)", output)
    found = re.search(r"(ERROR SUMMARY: [1-9]|RACECHECK SUMMARY: [1-9])", output)
    ran = f"ran on backend {backend}" in output
    if code == 0 and clean and ran:
        return "passed"
    return "failed" if found or (ran and code == FOUND) else "n/a"


def _read_junit(path: Path) -> dict[str, Any]:
    """Counts, failed tests, reasons of skipped ones, and what tests recorded."""
    if not path.exists():
        return {"tests": 0}
    facts: dict[str, Any] = {"tests": 0, "failures": [], "skipped": [], "recorded": {}}
    for case in ElementTree.parse(path).iter("testcase"):
        facts["tests"] += 1
        name = f"{case.get('classname')}::{case.get('name')}"
        for kind in ("failure", "error"):
            facts["failures"] += [f"{name}: {node.get('message', '')[:300]}" for node in case.findall(kind)]
        facts["skipped"] += [f"{name}: {node.get('message', '')}" for node in case.findall("skipped")]
        facts["recorded"] |= {node.get("name"): node.get("value") for node in case.iter("property")}
    return facts


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def describe(device: str) -> dict[str, Any]:
    """Revision, device and versions, from a process of its own: the gate itself holds no memory on the device."""
    code = "import json, torch; from fastalign.bench.command import describe; d = torch.device('{0}'); print(json.dumps(describe(d) | " \
           "{{'capability': ''.join(map(str, torch.cuda.get_device_capability())) if d.type == 'cuda' else ''}}))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code.format(device)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"gpu_gate: cannot describe device {device}:\n{done.stderr[-2000:]}")
    status = _git("status", "--porcelain")
    return {"revision": _git("rev-parse", "HEAD"), "changed_files": status if status == "unknown" else status.splitlines(),
            **json.loads(done.stdout.splitlines()[-1])}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dry-run", action="store_true", help="walk through the steps on the CPU, to check the gate itself; proves nothing"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="time for everything (default: 9.5)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON file")
    arguments = parser.parse_args()
    gate = Gate(arguments.minutes, arguments.dry_run)
    started = datetime.datetime.now(datetime.timezone.utc)
    if not gate.dry:
        import torch

        if not torch.cuda.is_available():
            sys.exit("gpu_gate: torch sees no CUDA device (--dry-run walks through the steps without one)")
        gate.build("".join(map(str, torch.cuda.get_device_capability())))
    else:
        gate.build("")
    facts = describe(gate.device)
    wanted = ("cpu",) if gate.dry else ("cuda", "triton")
    backends = [name for name in wanted if facts["backends"][name] == "available"]
    for name in set(wanted) - set(backends):
        gate.absent(f"backend {name}", facts["backends"][name])

    for name in backends:
        # A dry run shows that the commands work; the contract itself is tested on the CPU elsewhere.
        gate.pytest(f"contract, {name}", name, CONTRACT, 200, *(["-k", "top1 or cu_seqlens"] if gate.dry else []))
    for name in backends:
        gate.sanitize(name)
    if not gate.dry:
        for name in backends:
            gate.pytest(f"device, {name}", name, ("tests/gpu",), 150)
    sys.path.insert(0, str(ROOT))
    from fastalign.bench.shapes import OPS

    benches = [gate.bench(op) for op in (("kl_estimate",) if gate.dry else OPS)]

    failed = [step["step"] for step in gate.steps if step["outcome"] == "failed"] + ([] if backends else ["no GPU backend could be tested"])
    report = {"started": started.isoformat(timespec="seconds"), "dry_run": gate.dry, "machine": facts, "failed": failed, "steps": gate.steps,
              "bench": [b for b in benches if b is not None]}  # fmt: skip
    arguments.results.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", ("dry-run " if gate.dry else "") + facts["device"].lower()).strip("-")
    path = arguments.results / f"{started:%Y-%m-%d-%H%M%S}-{device}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"\n{path}\n" + ("failed: " + "; ".join(failed) if failed else "all steps passed or n/a:"))
    print("\n".join(f"  {step['outcome']:<7} {step['seconds']:6.1f} s  {step['step']}" for step in gate.steps))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
