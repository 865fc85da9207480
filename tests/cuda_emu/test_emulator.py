"""The emulator itself: right kernels run, wrong ones are refused with a message that says where."""

from __future__ import annotations

import ctypes
import math
import subprocess

import pytest
from cuda_emu import build


@pytest.fixture(scope="session")
def library():
    source = build.HERE / "selftest.cu"
    flags = [*build.FLAGS, "-DFA_EMU", f"-I{build.CSRC}", f"-I{build.HERE}", "-include", "cuda_emu.h"]
    texts = [source.read_text(), *(p.read_text() for p in sorted(build.HERE.glob("*.h")))]
    output = build.OUT / f"selftest-{build._hash(repr((flags, texts)))}.so"
    if not output.exists():
        build.OUT.mkdir(parents=True, exist_ok=True)
        subprocess.run(["g++", *flags, "-shared", "-x", "c++", str(source), "-o", str(output)], check=True)
    return ctypes.CDLL(str(output))


@pytest.fixture
def run(library):
    def call(name, seed=1):
        out, message = (ctypes.c_float * 64)(*[math.nan] * 64), ctypes.create_string_buffer(500)
        failed = library.run(name.encode(), seed, out, message, ctypes.c_size_t(500))
        if failed:
            raise RuntimeError(message.value.decode())
        return list(out)

    return call


@pytest.mark.parametrize("seed", range(1, 6))
def test_right_kernels_run(run, seed):
    assert run("reverse", seed) == [63.0 - i for i in range(64)]
    assert run("early_exit", seed)[:40] == [32.0] * 32 + [8.0] * 8
    assert run("warp_sum", seed)[:32] == [496.0] * 32
    assert run("cluster_read", seed)[:4] == [1.0, 2.0, 3.0, 0.0]
    assert run("copy", seed)[:32] == [float(i) for i in range(32)]


@pytest.mark.parametrize("seed", range(1, 6))
def test_missing_barrier_shows_as_nan(run, seed):
    assert any(math.isnan(x) for x in run("no_barrier", seed))


@pytest.mark.parametrize(
    "name,words",
    [
        ("divergent_barrier", "__syncthreads at selftest.cu:.*divergent"),
        ("divergent_shuffle", "divergent"),
        ("wrong_mask", "different masks"),
        ("missing_lane", "reads a lane that is not there"),
        ("deadlock", "deadlock: .*threads wait in __.* at selftest.cu"),
        ("cluster_deadlock", "deadlock: .*96 threads wait in cluster_sync"),
        ("cluster_read_early", "before the first cluster_sync|exited"),
        ("cluster_exit_early", "exits without a cluster_sync|has exited"),
        ("copy_without_wait", "exits while copies to its shared memory are under way"),
        ("copy_miscounted", "never add up to what was announced"),
        ("copy_misaligned", "not multiples of 16"),
        ("overrun", "wrote outside its shared memory"),
        ("too_many_threads", "invalid configuration"),
        ("too_much_shared", "invalid configuration"),
        ("odd_cluster", "invalid configuration"),
    ],
)
@pytest.mark.parametrize("seed", range(1, 4))
def test_wrong_kernels_are_refused(run, name, words, seed):
    with pytest.raises(RuntimeError, match=words):
        run(name, seed)
    assert run("reverse") == [63.0 - i for i in range(64)]  # and the emulator goes on working


def test_seed_changes_the_interleaving_and_repeats_it(run):
    orders = [tuple(run("arrivals", seed)[:16]) for seed in range(1, 6)]
    assert all(sorted(o) == list(range(16)) for o in orders) and len(set(orders)) > 1
    assert orders[0] == tuple(run("arrivals", 1)[:16])
