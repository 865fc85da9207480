"""`--backend a,b`: the backends that the contract tests run on. A backend that cannot run here fails its
tests; nothing is skipped."""

from __future__ import annotations

import pytest
import torch

import fastalign as fa
from fastalign.rows import planner
from fastalign.runtime import backends, ffi
from fastalign.runtime.op import OPS

if ffi.TRITON_INTERPRETED:
    import fast_interpreter

    fast_interpreter.install()

pytest.register_assert_rewrite("checks")  # so that a failed check says what it compared
pytest_plugins = ("cuda_emu.plugin",)  # the `emulator` fixture: backend "cuda" on CPU tensors


def pytest_addoption(parser):
    parser.addoption(
        "--backend", default="reference,cpu", help="comma-separated: reference, cpu, triton, cuda"
    )
    parser.addoption("--device", default="cpu", help="cpu (triton interpreted, cuda emulated) or cuda")


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", metafunc.config.getoption("--backend").split(","), indirect=True)


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture
def backend(request, device, monkeypatch):
    """Forces the backend for the test and poisons every kernel output with NaN before the kernel runs."""
    if request.param == "cuda" and device == "cpu":
        request.getfixturevalue("emulator")
    why = backends.why_not(request.param, device)
    assert why is None, f"backend {request.param} cannot run: {why}"
    if ffi._emulator is None:  # the emulator brings its own, guarded, allocator
        plain = ffi.empty

        def poisoned(shape, dtype, device):
            return plain(shape, dtype, device).fill_(float("nan"))

        monkeypatch.setattr(ffi, "empty", poisoned)
    with fa.use_backend(request.param):
        yield request.param


@pytest.fixture
def slow_backend(backend, device):
    """True where every element costs Python or fiber time: keep shapes small."""
    return device == "cpu" and backend in ("triton", "cuda")


@pytest.fixture
def row_dtypes(backend):
    return OPS["token_stats_fwd"].takes(backend)


@pytest.fixture
def one_thread():
    """Bitwise comparisons between runs need the same number of threads throughout; for models this small one
    is the fastest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of the fused head that products would not be efficient with, so that few rows show what many
    would."""
    monkeypatch.setattr(planner, "MIN_ROWS", 4)
    monkeypatch.setattr(planner, "MIN_VOCAB", 64)
