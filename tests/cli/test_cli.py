"""The command line as a whole: what goes wrong around a command is one line and an exit code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastalign as fa
from fastalign.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]


def fastalign(*words, **env):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "FASTALIGN_BACKEND")
    } | env
    command = [sys.executable, "-W", "ignore", "-m", "fastalign", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize(
    "words,forced,said",
    [
        (["info"], "bogus", "backend='bogus' is unknown; legal: reference, cpu, triton, cuda"),
        (["train", "dpo", "--model", "nowhere"], "triton", "FASTALIGN_BACKEND=triton: "),
    ],
)
def test_a_backend_that_cannot_serve(words, forced, said):
    if fa.backends().get(forced) == "available":
        pytest.fail(f"this test is about a machine without a GPU, and {forced} is available")
    done = fastalign(*words, FASTALIGN_BACKEND=forced, TRITON_INTERPRET="0")
    assert (
        done.returncode == 2
        and said in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
        and not done.stdout
    )


def test_a_backend_error_on_the_way_is_one_line(monkeypatch, capsys):
    def refuse(argv):
        raise fa.BackendError("fastalign::gae_fwd has no backend:\n  cpu: why")

    monkeypatch.setattr("fastalign.cli.info.main", refuse)
    assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "fastalign info: error: fastalign::gae_fwd has no backend: cpu: why\n"


def test_interruption_is_one_line(monkeypatch, capsys):
    def interrupt(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastalign.arena.demo.main", interrupt)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "fastalign demo: interrupted\n"


def test_a_closed_pipe_is_silent():
    """As in `fastalign losses | head -1`."""
    command = f"{sys.executable} -W ignore -m fastalign losses"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -c 1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stderr == "" and done.stdout == "l" and done.returncode in (0, 141)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"fastalign {fa.__version__}\n"


def how_threads_wait(argv, **env):
    """OMP_WAIT_POLICY and GOMP_SPINCOUNT once fastalign is imported by this command line."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    first = ["-m", *argv[2:]] if argv[0] == "-m" else ["-c"]
    code = f"import os, sys; sys.orig_argv, sys.argv = ['python', *{argv}], {first}; import fastalign; print(*map(os.environ.get, {names}))"
    environment = {k: v for k, v in os.environ.items() if k not in names} | env
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    ).stdout.split()


@pytest.mark.parametrize(
    "argv,spin",
    [
        (["-m", "fastalign", "info"], "20000"),
        (["-m", "fastalign", "bench", "--help"], "None"),
    ],
)
def test_only_commands_choose_how_threads_wait(argv, spin):
    assert how_threads_wait(argv) == ["None", spin]


def test_a_wish_of_the_users_stays():
    assert how_threads_wait(["-m", "fastalign"], GOMP_SPINCOUNT="7") == ["None", "7"]


def test_every_command_has_help(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0 and f"fastalign {command}" in capsys.readouterr().out


WITHOUT_EXTRA = """
import contextlib, io, sys
from fastalign.cli import main as cli
for name in cli.TRAIN_EXTRA:
    sys.modules[name] = None
commands = {"train": ["dpo", "--model", "m", "--data", "d", "--output", "o"], "run": ["dpo", "--output", "o"]}
for command in sorted({*cli.COMMANDS} - {"info", "losses", "bench", "adapters"}):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main([command, *commands.get(command, ())])
    print(command, code, said.getvalue().strip().replace("\\n", " | "))
"""


def test_what_is_not_installed_is_one_line():
    """Beside torch alone, without the extra `train`."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_EXTRA], capture_output=True, text=True, cwd=ROOT
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(cli.COMMANDS) - 4, done.stderr
    for line in lines:
        assert " 2 fastalign " in line and "pip install 'fastalign[train]'" in line and "|" not in line, line


def test_another_import_that_fails_is_no_matter_of_the_extra(monkeypatch):
    def broken(argv):
        raise ModuleNotFoundError("No module named 'fastalign.nowhere'", name="fastalign.nowhere")

    monkeypatch.setattr("fastalign.cli.info.main", broken)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["info"])


def test_the_extra_is_that_of_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    declared = re.search(r"^train = \[(.*)\]$", text, re.MULTILINE)[1]
    names = {re.split("[>=]", name)[0] for name in re.findall(r'"([^"]+)"', declared)}
    assert names == {name if name != "yaml" else "pyyaml" for name in cli.TRAIN_EXTRA}
