"""Backend "cuda" on CPU tensors: the `emulator` fixture serves it by the emulated kernels, under several
interleavings, with every kernel output between guard bands. Loaded by tests/conftest.py; does nothing unless
`--backend cuda --device cpu` asks for it."""

from __future__ import annotations

import functools
import math
import zlib
from collections import deque

import pytest
import torch
from cuda_emu import build

from fastalign.runtime import ffi

GUARD = 64  # elements on either side of a tensor
GUARD_BYTE = 0xA5
SENTINEL = 1.234e30  # no result of any test


def pytest_addoption(parser):
    parser.addoption(
        "--emu-seeds",
        default=None,
        help="interleavings of the emulated threads, 1,2,3 for example, under each of which every contract test "
        "runs; default: one for each test, 1 or 2 by its name",
    )


def pytest_generate_tests(metafunc):
    seeds = metafunc.config.getoption("--emu-seeds")
    if seeds and "backend" in metafunc.fixturenames and emulated(metafunc.config):
        metafunc.fixturenames.append("emu_seed")
        metafunc.parametrize("emu_seed", [int(s) for s in seeds.split(",")], ids="seed{}".format)


def emulated(config) -> bool:
    return config.getoption("--device") == "cpu" and "cuda" in config.getoption("--backend").split(",")


class GuardedMemory:
    """Stands in for `ffi.empty`: poisoned tensors between guard bands. `check` looks at the bands of the
    latest ones."""

    def __init__(self):
        self.latest: deque[tuple[torch.Tensor, int]] = deque(maxlen=32)

    def empty(self, shape, dtype, device):
        count = math.prod(shape)
        size = torch.empty(0, dtype=dtype).element_size()
        raw = torch.full(((count + 2 * GUARD) * size,), GUARD_BYTE, dtype=torch.uint8)
        inner = raw[GUARD * size : (GUARD + count) * size].view(dtype)
        inner.fill_(math.nan if dtype.is_floating_point else -7)
        self.latest.append((raw, GUARD * size))
        return inner.view(shape)

    def check(self, what: str) -> None:
        for raw, guard in self.latest:
            for band in (raw[:guard], raw[-guard:]):
                assert bool((band == GUARD_BYTE).all()), f"{what} wrote outside a tensor"


@pytest.fixture
def memory(backend, monkeypatch):
    """On every backend: outputs between guard bands (on the CPU), filled with a number that none of their
    entries may keep."""
    guarded, plain = GuardedMemory(), ffi.empty

    def empty(shape, dtype, device):
        return (
            guarded.empty(shape, dtype, device) if device.type == "cpu" else plain(shape, dtype, device)
        ).fill_(SENTINEL)

    monkeypatch.setattr(ffi, "empty", empty)
    return guarded


@functools.cache
def module(variant="ubsan"):
    return build.load(build.build(variant))


@pytest.fixture
def emulator(request, monkeypatch):
    """The emulated extension, in use as backend "cuda" during the test, with guarded outputs. Threads run in an
    order that an odd seed draws evenly, and an even one warp by warp."""
    given = getattr(request.node, "callspec", None) and request.node.callspec.params.get("emu_seed")
    seed = given or zlib.crc32(request.node.nodeid.encode()) % 2 + 1
    emu = module()
    emu._emu_set_seed(seed)
    memory, launch = GuardedMemory(), ffi.launch

    def checked_launch(backend, function, *args):
        launch(backend, function, *args)
        memory.check(function)

    monkeypatch.setattr(ffi, "empty", memory.empty)
    monkeypatch.setattr(ffi, "launch", checked_launch)
    ffi.use_emulator(emu)
    yield emu
    emu.set_cluster_size(0)
    emu.set_gae_scheme(0)
    ffi.use_emulator(None)
