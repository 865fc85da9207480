"""Every check that needs no GPU, each in a process of its own; what `make test` runs. The first failure ends
it.

Backends that must be exercised are named to pytest, and a named backend that cannot run fails: nothing here
is skipped because something is missing. Without names all stages run, two at a time, since each keeps about
one core busy; a stage's output comes when it is over. `python tests/run_all.py lint cpu` runs those two, one
after the other."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
PYTEST = [
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "--durations=5",
    "-p",
    "no:cacheprovider",
]  # stages that run at once share no cache
TRAINER = ("tests/train", "tests/arena")


def run(command, **env):
    print("+", " ".join(str(c) for c in command), flush=True)
    subprocess.run([str(c) for c in command], cwd=ROOT, env={**os.environ, **env}, check=True)


def lint():
    run([BIN / "ruff", "check", "."])
    run([BIN / "ruff", "format", "--check", "."])
    sources = [
        p
        for folder in ("csrc", "tests")
        for p in (ROOT / folder).rglob("*")
        if p.suffix in (".h", ".cuh", ".cpp", ".cu")
    ]
    run([BIN / "clang-format", "--dry-run", "--Werror", *sources])


def cpu():
    """Every test that no other stage names, those in a new folder included; pyproject.toml leaves out what
    needs a process set up for it."""
    run([*PYTEST, "tests", *(f"--ignore={folder}" for folder in TRAINER)])


def train():
    run([*PYTEST, *TRAINER])


def triton():
    run([*PYTEST, "tests/contract", "--backend", "triton"], TRITON_INTERPRET="1")


def cuda():
    run([*PYTEST, "tests/cuda_emu"])


# Tritons that the kernels must be right on besides the pinned one, and which of its tests they run. 3.6 comes
# with many a torch in use: every check of the machine code. 3.3 is the oldest supported: every option
# compiles (its ptxas spills in backward). The Makefile installs both.
OLDER_TRITONS = {"3.6.0": "sm_90", "3.3.1": "every_option"}


def older_triton(version):
    """PYTHONPATH for a process that is to import this Triton; ends the stage where it is not installed."""
    folder = Path(sys.prefix) / f"triton-{version}"
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    found = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    ).stdout.strip()
    if not folder.is_dir() or found != version:
        sys.exit(
            f"the ahead-of-time stage needs Triton {version}: python -m pip install --no-deps --target "
            f"{folder} triton=={version}"
        )
    return path


def aot():
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        sys.exit(
            "the ahead-of-time stage needs nvcc (CUDA 12.8 or later), neither on PATH nor in "
            "/usr/local/cuda/bin"
        )
    paths = {version: older_triton(version) for version in OLDER_TRITONS}
    run([*PYTEST, "tests/aot"], TRITON_INTERPRET="0")
    for version, path in paths.items():
        print(f"-- with Triton {version}", flush=True)
        run(
            [*PYTEST, "tests/aot/test_triton_aot.py", "-k", OLDER_TRITONS[version]],
            TRITON_INTERPRET="0",
            PYTHONPATH=path,
        )


# Trainers whose own functions the adapters are compared with; the oldest trl that LLaMA-Factory takes has its
# losses. The Makefile installs them into a folder of their own, without what they depend on.
TRAINERS = {"verl": "0.9.1", "openrlhf": "0.11.2", "llamafactory": "0.9.5", "trl": "0.18.0"}


def check_trainers():
    """Ends the process where one of them is not found, or another version of it is found first."""
    folder = Path(sys.prefix) / "trainers"
    for name, version in TRAINERS.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found != version:
            every = " ".join(f"{n}=={v}" for n, v in TRAINERS.items())
            sys.exit(
                f"the stage trainers needs {name} {version}, found {found}: python -m pip install --no-deps "
                f"--only-binary :all: --ignore-requires-python --python-version 3.11 --platform manylinux1_x86_64 "
                f"--target {folder} {every}; the stage puts that folder in front of the path"
            )


def trainers():
    folder = Path(sys.prefix) / "trainers"
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    run([*PYTEST, "tests/trainers"], PYTHONPATH=path)


def two_steps():
    """The command line on a file, two optimizer steps, and the model it saved loads."""
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "tests/train/two_step_run.py", folder])


STAGES = {f.__name__: f for f in (lint, cpu, train, triton, cuda, aot, trainers, two_steps)}


# What runs when nothing is named, two at a time and the longest first; lint comes before them.
ORDER = ("cpu", "aot", "triton", "train", "cuda", "trainers", "two_steps")


def in_order(names):
    """Runs the stages in this process; the first that fails ends it."""
    for name in names:
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        try:
            STAGES[name]()
        except subprocess.CalledProcessError as error:
            sys.exit(f"stage {name} failed: {error}")
        print(f"== {name} passed, {time.perf_counter() - start:.0f} s", flush=True)


def at_once():
    """Runs the stages of ORDER, two at a time, each as a process group of its own. The first failure stops
    the other one too."""
    waiting, running, passed, failed, lock = list(ORDER), {}, [], [], threading.Lock()
    environment = {
        **os.environ,
        "GOMP_SPINCOUNT": "20000",
    }  # threads that spin for long would take the other stage's core

    def stop(reason):
        failed.append(reason)
        for process in running.values():
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.killpg(process.pid, signal.SIGTERM)

    def work():
        while True:
            with lock:
                if failed or not waiting:
                    return
                name = waiting.pop(0)
                print(f"-- {name} begins", flush=True)
                command = [sys.executable, __file__, name]
                running[name] = subprocess.Popen(
                    command,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                    env=environment,
                )
            output, _ = running[name].communicate()
            with lock:
                if failed:
                    return
                print(output, end="", flush=True)
                if running.pop(name).returncode:
                    stop(f"stage {name} failed; its output is above")
                else:
                    passed.append(name)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        stop("the run was interrupted")
    if failed:
        sys.exit(failed[0])
    if missing := [name for name in ORDER if name not in passed]:  # a worker that broke off
        sys.exit(f"stages {', '.join(missing)} did not run to their end")


def main(names):
    unknown = [n for n in names if n not in STAGES]
    if unknown:
        sys.exit(f"unknown stages {', '.join(unknown)}; legal: {', '.join(STAGES)}")
    assert sorted(("lint", *ORDER)) == sorted(STAGES)
    start = time.perf_counter()
    if names:
        in_order(names)
    else:
        in_order(["lint"])
        at_once()
    print(f"all stages passed: {', '.join(names or STAGES)}, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
