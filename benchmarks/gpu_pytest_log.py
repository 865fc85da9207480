"""pytest plugin of the GPU gate: `-p gpu_pytest_log --log-lines FILE --log-step NAME` writes a JSON line per
test to FILE as soon as it is over, so that a run that is killed still tells what it found. The first line of
a step names all tests that it is going to run.

A CUDA error is for good in its process. Under xdist the worker in which one is seen leaves after that test,
and xdist starts another."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from gpu_lines import LOST

BACKENDS = ("reference", "cpu", "triton", "cuda")
_lost = False


def pytest_addoption(parser):
    parser.addoption("--log-lines", type=Path, default=None, help="append a JSON line per test to this file")
    parser.addoption("--log-step", default="", help="the step that the lines name")


def pytest_configure(config):
    path = config.getoption("--log-lines")
    if path is not None and not hasattr(config, "workerinput"):
        file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 open while the session lives
        config.pluginmanager.register(_Lines(file, config.getoption("--log-step")))


def backend_of(test: str) -> str | None:
    """The backend that a test's id names."""
    parameters = re.search(r"\[(.*)\]$", test)
    return next((p for p in (parameters[1].split("-") if parameters else ()) if p in BACKENDS), None)


class _Lines:
    """Writes the lines; lives in the process that sees every report."""

    def __init__(self, file, step: str):
        self.file, self.step, self.announced, self.written = file, step, False, set()

    def write(self, **line) -> None:
        self.file.write(json.dumps({"step": self.step, **line}) + "\n")

    def announce(self, tests) -> None:
        if not self.announced:
            self.announced = True
            self.write(collected=list(tests))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session):
        if session.items:  # without xdist; its controller collects nothing itself
            self.announce(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        self.announce(ids)

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        if report.when == "???" and report.nodeid in self.written:
            return  # xdist's word for the test under which its worker left on purpose; why is written already
        self.written.add(report.nodeid)
        # What is no assertion of the test itself is an error: a fixture's, a worker that died under the test,
        # its time limit.
        outcome = "error" if report.outcome == "failed" and report.when != "call" else report.outcome
        more = {"properties": dict(report.user_properties)} if report.user_properties else {}
        if report.outcome != "passed":
            more["text"] = str(report.longrepr)[-1500:]
        self.write(
            test=report.nodeid,
            backend=backend_of(report.nodeid),
            outcome=outcome,
            seconds=round(report.duration, 3),
            **more,
        )


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    global _lost
    yield
    if call.excinfo is not None and LOST.search(str(call.excinfo.value)):
        _lost = True


def pytest_runtest_logfinish(nodeid):
    if _lost and os.environ.get("PYTEST_XDIST_WORKER"):
        os._exit(3)
