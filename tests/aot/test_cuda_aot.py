"""The CUDA kernels compile for every architecture we ship, and the machine code is what we meant: no spills,
16-byte loads, few instructions. A missing compiler or disassembler fails; nothing is skipped."""

from __future__ import annotations

import re

import pytest
import sass


@pytest.fixture(scope="module")
def kernels():
    return sass.kernels(sass.objects())


@pytest.fixture(params=sass.ARCHS, ids="sm_{}".format)
def arch(request, kernels):
    return [k for k in kernels if k.arch == request.param]


@pytest.fixture(params=sass.READ, ids="sm_{}".format)
def read(request, kernels):
    """Kernels with their code."""
    return [k for k in kernels if k.arch == request.param]


def test_every_kernel_is_there(arch):
    names = {re.sub("<.*", "", k.name) for k in arch}
    assert names == {
        "token_stats_fwd_kernel", "token_stats_bwd_kernel", "sequence_sum_fwd_kernel", "sequence_sum_bwd_kernel", "kl_estimate_fwd_kernel",
        "preference_fwd_kernel", "preference_bwd_kernel", "gae_maps_kernel", "gae_fwd_kernel", "listwise_fwd_kernel",
        "policy_fwd_kernel", "value_fwd_kernel", "policy_bwd_kernel",
        "token_stats_fused_kernel", "scale_rows_kernel", "row_states_merge_kernel", "row_states_finish_kernel",
    }  # fmt: skip
    assert (
        sum("token_stats_fwd" in k.name for k in arch) == 3 * 5 * 2
    )  # storage types x sets of sums x softcap
    assert (
        sum("token_stats_bwd" in k.name for k in arch) == 3 * 2 * 2 * 2
    )  # storage types x softcap x several labels x reference rows
    assert sum("token_stats_fused" in k.name for k in arch) == 3 * 4  # storage types x sets of sums


def test_nothing_spills(arch):
    bad = [
        f"{k.name}: {k.stack} B stack, {k.local} B local"
        for k in arch
        if k.stack or k.local or k.count(r"LDL|STL")
    ]
    assert not bad, bad


def test_registers_and_shared_memory(arch):
    for k in arch:
        # From sm_90 on the hardware keeps 1 KiB per block for itself. Anything else would be shared memory
        # that the emulator cannot poison.
        assert k.shared <= (0 if k.arch == "80" else 1024), f"{k.name} has static shared memory"
        # Four blocks of 256 threads per SM; three where the work is not per element, for every sum of a row,
        # and for two rows; two for every sum of two rows, for two capped ones and for several labels there.
        one_row = re.match(
            r"token_stats_fwd_kernel<\w+, [01],|token_stats_bwd_kernel<.*false>|scale_rows", k.name
        )
        rare = re.match(
            r"token_stats_(fwd_kernel<\w+, (127,|113, true>)|fused_kernel<\w+, 113>|bwd_kernel<.*true, true>)",
            k.name,
        )
        bound = 64 if one_row else 128 if rare else 80
        assert k.registers <= bound, f"{k.name} takes {k.registers} registers"


def test_streaming_kernels_move_16_bytes_at_a_time(read):
    for k in read:
        fused = "token_stats_fused" in k.name
        if not fused and re.match("token_stats|scale_rows", k.name):
            wide = k.count(r"LDG\.E\.128")
            assert wide >= 4, f"{k.name}: {wide} 16-byte loads"
        if fused and k.arch != "80":  # both rows come by bulk copies, and are read from shared memory twice
            counts = [k.count(op) for op in ("UBLKCP", r"LDG\.E\.128", r"LDS\.128")]
            assert counts[0] >= 1 and counts[1] == 0 and counts[2] >= 8, (
                f"{k.name}: {counts} bulk copies, 16-byte loads, of shared memory"
            )
        if re.match("token_stats_bwd|token_stats_fused|scale_rows", k.name) and not (
            fused and k.arch == "80"
        ):
            assert k.count(r"STG\.E\.128") >= 2, f"{k.name}: {k.count(r'STG.E.128')} 16-byte stores"


def test_one_read_is_nothing_without_clusters(read):
    for k in read:
        if "token_stats_fused" in k.name and k.arch == "80":
            assert len(k.code) < 100, k.name


def test_streaming_loop_is_short(read):
    """At H200 bandwidth an SM has about 15 instructions per bf16 element of a row that is read once, and
    about 23 for both sweeps over a pair of rows that is read once and written over once. One of them per
    sweep may be an exp2."""
    bounds = {
        "token_stats_fwd_kernel<bf16, 0, false>": (8,), "token_stats_fwd_kernel<bf16, 1, false>": (10,),
        "token_stats_fwd_kernel<bf16, 113, false>": (15,), "token_stats_bwd_kernel<bf16, false, false, true>": (15, 15),
        "token_stats_fused_kernel<bf16, 48>": (11, 11), "token_stats_fused_kernel<bf16, 80>": (11, 11),
    }  # fmt: skip
    for k in read:
        if k.name not in bounds or "fused" in k.name and k.arch == "80":
            continue
        wide = ("LDG.E.128", "LDS.128")
        bodies = sorted((b for b in k.loops() if sum(o.startswith(wide) for o in k.opcodes(b)) >= 4), key=len)
        for bound, body in zip(bounds[k.name], bodies):
            turn = k.opcodes(k.interior(body))
            elements = 4 * 8
            assert len(turn) <= bound * elements, (
                f"{k.name}: {len(turn) / elements:.1f} instructions per element"
            )
            assert sum(o.startswith("MUFU.EX2") for o in turn) <= elements + 2, (
                f"{k.name}: more than one exp2 per element"
            )


def test_clusters_only_where_they_exist(read):
    """sm_80 has no cluster barrier; from sm_90 on the row kernels hold one."""
    for k in read:
        if re.match("token_stats_(fwd|fused)", k.name):
            assert (k.count(r"UCGABAR") > 0) == (k.arch != "80"), k.name
