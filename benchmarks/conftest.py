"""`pytest benchmarks --benchmark-only`: the cases of fastalign.bench one by one under pytest-benchmark, with
its statistics and comparisons.

`--suite cpu` (or cpu-quick, cuda, cuda-quick, tiny) chooses the shapes in fastalign/bench/shapes.py; default:
the quick ones of the device there is. Contestants run one after another here; `fastalign bench` runs them in
turns, which is what quoted ratios come from."""

from __future__ import annotations

import functools

import pytest
import torch

from fastalign.bench import SHAPES
from fastalign.bench.cases import make_case
from fastalign.bench.measure import Runner, cache_bytes, ceiling_bytes, peak_extra_bytes, read_bandwidth
from fastalign.bench.timing import Timer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_addoption(parser):
    parser.addoption(
        "--suite",
        choices=sorted(SHAPES),
        default=f"{DEVICE.type}-quick",
        help="which shapes of fastalign/bench/shapes.py",
    )


def pytest_collect_file(file_path, parent):
    """Benchmarks are files named bench_*.py."""
    return pytest.Module.from_parent(parent, path=file_path) if file_path.match("bench_*.py") else None


@functools.lru_cache(maxsize=1)  # contestants of one case follow each other and share its inputs
def case_of(op, shape):
    return make_case(op, shape, DEVICE, cache_bytes=cache_bytes(DEVICE))


@functools.cache
def contestants_of(op):
    """Names of all contestants, those that cannot take part included; from a case of the smallest shape."""
    case = make_case(op, SHAPES["tiny"][op][0], DEVICE)
    return [c.name for c in case.contestants] + list(case.missing)


def pytest_generate_tests(metafunc):
    """One benchmark per op of the module's OPS, shape of the suite, and contestant."""
    suite = metafunc.config.getoption("--suite")
    cases = [
        (op, shape, name)
        for op in metafunc.module.OPS
        for shape in SHAPES[suite][op]
        for name in contestants_of(op)
    ]
    metafunc.parametrize(
        "op,shape,contestant",
        cases,
        ids=[f"{op}-{shape}-{name}".replace(" ", "_") for op, shape, name in cases],
    )


@functools.cache
def read_gbs():
    """The bandwidth at which this machine merely reads, GB/s."""
    return max(read_bandwidth(DEVICE, ceiling_bytes(DEVICE)).values())


@pytest.fixture
def run_case(benchmark, op, shape, contestant):
    """Checks the contestant against fp64, then times it; GB/s, share of the read bandwidth, error and memory
    stand in extra_info."""

    def run():
        read_gbs()  # before the case: it also finds the fastest reader
        case = case_of(op, shape)
        if contestant in case.missing:
            pytest.skip(case.missing[contestant])
        (found,) = [c for c in case.contestants if c.name == contestant]
        runner, timer = Runner(case, found), Timer(DEVICE)
        if found.computes:
            output = runner.call(0)()
            assert (wrong := case.check(found, output)) is None, wrong
            benchmark.extra_info["max_error"] = case.error(output)
            del output
            benchmark.extra_info["extra_mb"] = (peak_extra_bytes(runner.call(0), DEVICE) or 0) / 1e6

        def once(call):
            call()
            timer.synchronize()

        benchmark.group = f"{op}, {shape}"
        benchmark.pedantic(once, setup=lambda: ((runner.call(),), {}), rounds=20, warmup_rounds=2)
        if benchmark.stats is not None:  # None under --benchmark-disable
            traffic = case.inputs[0][0].nbytes if found.kind == "read" else case.traffic
            gbs = traffic / benchmark.stats.stats.median / 1e9
            benchmark.extra_info.update(gbs=gbs, read_gbs=read_gbs(), share_of_read=gbs / read_gbs())

    return run
