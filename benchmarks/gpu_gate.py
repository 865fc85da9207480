"""The GPU gate; start it by benchmarks/gpu_gate.sh. Runs the plan of gpu_plan.py step by step; the outcome of
each is one of

    passed   it ran and found nothing
    failed   a test failed, a result was wrong, a tool found an error, or the step ran out of time
    n/a      the step could not run here, with the tool's own message: a missing compiler or sanitizer, say

The gate fails if any step failed, or if neither GPU backend could be tested. A run that is killed leaves all
files up to there. `--dry-run` shows the order, the time of each step and the files, and walks through
everything on the CPU. benchmarks/gpu_report.py prints what the files say."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import hashlib
import importlib.util
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_plan
from gpu_plan import ABOUT, FILES, PREPARED, ROOT, SECONDS, Command, Place, Step

DRY_SECONDS = 1800  # a busy machine without a GPU has no hurry: each step may take this long
TAIL = 4000  # characters of output kept in the JSON
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_libc = ctypes.CDLL(None)


def _own_group() -> None:
    """In the child: a process group of its own, which can be ended as a whole, and no life beyond the
    gate's."""
    os.setpgrp()
    _libc.prctl(DIE_WITH_PARENT, signal.SIGKILL)


class Running:
    """A process of a step, its output so far, and its end."""

    def __init__(self, command: Command):
        self.command, self.output, self.code = command, "", None
        paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **command.env}
        self.process = subprocess.Popen(command.argv, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, preexec_fn=_own_group)  # fmt: skip

    def stop(self) -> None:
        """The whole group: a tool's or pytest's children would disturb what follows."""
        for number, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(patience)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue


class Gate:
    """Runs the steps of one stage against its deadline, and keeps what they said in the stage's JSON and
    log."""

    def __init__(
        self, stage: int, folder: Path, facts: dict[str, Any], seconds: float, started: float | None = None
    ):
        self.stage, self.folder, self.started = (
            stage,
            folder,
            time.monotonic() if started is None else started,
        )
        self.deadline = self.started + seconds
        self.report: dict[str, Any] = {"stage": stage, "finished": False, **facts, "failed": [], "steps": []}
        self.running: list[Running] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.log = open(folder / f"stage{stage}.log", "a", buffering=1, encoding="utf-8")  # noqa: SIM115 open while the gate lives
        self.save()

    def save(self) -> None:
        """All of the JSON or nothing of it, whenever the gate is killed."""
        self.report["seconds"] = round(time.monotonic() - self.started, 1)
        path = self.folder / f"stage{self.stage}.json"
        draft = path.with_suffix(".part")
        draft.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, path)

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")

    def run(self, step: Step) -> str:
        """The step's outcome; the worst of its commands'."""
        left = self.deadline - time.monotonic()
        limit = min(step.seconds, left)
        self.say(f"== {step.name} (at most {max(limit, 0):.0f} s)")
        if step.absent:
            return self.record(step.name, "n/a", 0.0, step.absent)
        if limit < 2:
            return self.record(step.name, "failed", 0.0, "no time was left for this step")
        began = time.monotonic()
        for command in step.commands:
            self.log.write(f"+ {' '.join(command.argv)}\n")
        self.running = [Running(command) for command in step.commands]
        try:
            self.follow(began + limit)
        finally:
            for running in self.running:
                running.stop()
        seconds, outcomes, outputs = round(time.monotonic() - began, 1), [], []
        for running in self.running:
            text = running.output + (f"\nstopped after {limit:.0f} s" if running.code is None else "")
            outcomes.append(running.command.judge(running.code, text))
            if outcomes[-1] != "passed":
                outputs.append(f"[{running.command.name}]\n{text[-TAIL:]}")
        self.running = []
        worst = next(o for o in ("failed", "n/a", "passed") if o in outcomes)
        each = {c.name: o for c, o in zip(step.commands, outcomes)} if len(outcomes) > 1 else None
        return self.record(step.name, worst, seconds, "\n".join(outputs), each)

    def follow(self, until: float) -> None:
        """Read what the processes print, into the log at once, until they have ended or the time is up."""
        with selectors.DefaultSelector() as ready:
            for running in self.running:
                ready.register(running.process.stdout, selectors.EVENT_READ, running)
            while ready.get_map() and (left := until - time.monotonic()) > 0:
                for key, _ in ready.select(min(left, 1.0)):
                    self.read(ready, key.fileobj, key.data)
                for running in self.running:  # one may have ended while a child of it still holds the pipe
                    ended = running.process.poll() is not None and running.process.stdout in ready.get_map()
                    if ended and not ready.select(0.2):
                        ready.unregister(running.process.stdout)
        for running in self.running:
            running.code = (
                running.process.poll()
                if time.monotonic() >= until
                else running.process.wait(max(0.1, until - time.monotonic()))
            )

    def read(self, ready: selectors.BaseSelector, pipe: Any, running: Running) -> None:
        data = os.read(pipe.fileno(), 1 << 16)
        if not data:
            ready.unregister(pipe)
            return
        text = data.decode(errors="replace")
        running.output += text
        name = f"[{running.command.name}] " if len(self.running) > 1 else ""
        self.log.write("".join(name + line + "\n" for line in text.splitlines()))

    def record(
        self, name: str, outcome: str, seconds: float, output: str = "", each: dict[str, str] | None = None
    ) -> str:
        self.report["steps"].append(
            {"step": name, "outcome": outcome, "seconds": seconds}
            | ({"commands": each} if each else {})
            | ({"output": output} if output else {})
        )
        if outcome == "failed":
            self.report["failed"].append(name)
        print(f"   {outcome} ({seconds} s)" + (f"\n{output}" if output else ""), flush=True)
        self.save()
        return outcome

    def finish(self) -> int:
        self.report["finished"] = True
        self.save()
        failed = self.report["failed"]
        self.say(f"stage {self.stage}: " + (f"failed: {'; '.join(failed)}" if failed else "every step passed or n/a")
                 + f", {self.report['seconds']:.0f} s; {self.folder}")  # fmt: skip
        return int(bool(failed))

    def interrupted(self, number: int, frame: Any) -> None:
        for running in self.running:
            running.stop()
        self.report["interrupted"] = signal.Signals(number).name
        self.save()
        sys.exit(128 + number)


# --- the machine and the extension --------------------------------------------------------------------------

DESCRIBE = """
import json, sys, torch
from fastalign.bench.command import describe
device = torch.device(sys.argv[1])
facts = describe(device)
if device.type == "cuda":
    facts["capability"] = "".join(map(str, torch.cuda.get_device_capability()))
print(json.dumps(facts))
"""


def describe(device: str) -> dict[str, Any]:
    """Device and versions, from a process of its own: the gate itself holds no memory on the device."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DESCRIBE, device],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=DRY_SECONDS if device == "cpu" else 60,
    )
    if done.returncode:
        sys.exit(f"gpu_gate: cannot describe device {device}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def card() -> str:
    """The card's clocks and temperature as they are; nothing is set."""
    try:
        question = ["nvidia-smi", "-q", "-d", "CLOCK,TEMPERATURE,PERFORMANCE"]
        return subprocess.run(question, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"


def revision(given: str | None) -> str:
    """A copied tree may have no .git: then it is what was said, or unknown."""
    if given:
        return given
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def sources() -> str:
    """What csrc holds, as one number: gpu_prepare.py leaves it beside what it built."""
    digest = hashlib.sha256()
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def build_step(facts: dict[str, Any], seconds: float) -> Step:
    """Build the extension for this GPU alone, unless one is there that was built for it from these sources;
    without nvcc, use what is there."""
    name, capability = "build the extension, unless carried", facts["capability"]
    built = str(facts["extension"].get("CUDA kernels", "no"))
    mark = PREPARED / "csrc.sha256"
    if re.search(rf"\b{capability}\b", built):
        if not mark.exists() or mark.read_text().strip() == sources():
            origin = (
                "built from these sources"
                if mark.exists()
                else f"no {mark.name} says from which sources it was built"
            )
            return Step(name, seconds, absent=f"not needed: carried along, {origin} ({built})")
        why = "built from other sources"
    else:
        why = f"the extension that is there has CUDA kernels: {built}"
    if gpu_plan.tool("nvcc") is None:
        return Step(name, seconds, absent=f"nvcc is not here; the extension is used as it is ({why})")
    env = {"FASTALIGN_CUDA": "1", "FASTALIGN_ARCHS": capability}
    return Step(
        name, seconds, (Command("build", (sys.executable, "setup.py", "build_ext", "--inplace"), env),)
    )


def show_plan(stage: int) -> None:
    plan = gpu_plan.budget(stage)
    print(f"stage {stage}: {SECONDS[stage]} s in all; a step may take")
    print("\n".join(f"  {seconds:4.0f} s  {name}" for name, seconds in plan))
    if sum(seconds for _, seconds in plan) > SECONDS[stage]:
        print("  (where something must be built, the last steps have what is left)")
    print(
        "and leaves in its folder\n" + "\n".join(f"  {name:<12} {ABOUT[name]}" for name in FILES[stage]),
        flush=True,
    )


def run_stage(stage: int, arguments: argparse.Namespace) -> int:
    dry, clock = arguments.dry_run, time.monotonic()
    started = datetime.datetime.now(datetime.timezone.utc)
    machine = describe("cpu" if dry else "cuda")
    device = re.sub(r"[^a-z0-9]+", "-", "dry-run" if dry else machine["device"].lower()).strip("-")
    folder = (arguments.results / f"{started:%Y-%m-%d-%H%M%S}-{device}-stage{stage}").resolve()
    facts = {"dry_run": dry, "started": started.isoformat(timespec="seconds"), "revision": revision(arguments.revision), "machine": machine,
             "card": "" if dry else card(), "plan": gpu_plan.budget(stage), "files": FILES[stage]}  # fmt: skip
    gate = Gate(stage, folder, facts, DRY_SECONDS if dry else SECONDS[stage], clock)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, gate.interrupted)
    if stage == 1:
        build = (
            Step("build the extension, unless carried", 150, absent="dry run: nothing is built")
            if dry
            else build_step(machine, 150)
        )
        gate.run(build)
        if not build.absent:
            machine = gate.report["machine"] = describe("cuda")
    wanted = ("reference", "cpu") if dry else ("cuda", "triton")
    backends = tuple(name for name in wanted if machine["backends"][name] == "available")
    for name in set(wanted) - set(backends):
        gate.record(f"backend {name}", "n/a", 0.0, machine["backends"][name])
    if backends:
        for step in gpu_plan.steps(stage, Place(folder, backends, dry)):
            gate.run(replace(step, seconds=DRY_SECONDS) if dry else step)
    else:
        gate.record("backends", "failed", 0.0, "no GPU backend could be tested")
    return gate.finish()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the plan and walk through it on the CPU; proves nothing about a GPU",
    )
    parser.add_argument(
        "--stage", type=int, choices=(1, 2), action="append", help="only this stage; default: both"
    )
    home = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--results",
        type=Path,
        default=home,
        help="folder of the results' folder (default: $OUT, else benchmarks/results)",
    )
    parser.add_argument(
        "--revision",
        default=os.environ.get("FASTALIGN_REVISION"),
        help="where there is no .git (or FASTALIGN_REVISION)",
    )
    arguments = parser.parse_args()
    missing = [
        name for name in ("pytest", "xdist", "pytest_timeout") if importlib.util.find_spec(name) is None
    ]
    if missing:
        sys.exit(
            f"gpu_gate: {', '.join(missing)} cannot be imported; pip install pytest pytest-xdist "
            "pytest-timeout"
        )
    if not arguments.dry_run:
        import torch

        if not torch.cuda.is_available():
            sys.exit("gpu_gate: torch sees no CUDA device (--dry-run walks through the steps without one)")
    stages = arguments.stage or [1, 2]
    for stage in stages:
        show_plan(stage)
    return max([run_stage(stage, arguments) for stage in stages])


if __name__ == "__main__":
    sys.exit(main())
