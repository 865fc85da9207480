"""The CUDA kernels compile for every architecture we ship, and the machine code is what we meant: no spills, 16-byte loads, few
instructions. A missing compiler or disassembler fails; nothing is skipped."""

from __future__ import annotations

import re

import pytest
import sass


@pytest.fixture(scope="module")
def kernels():
    return sass.kernels(sass.compile_all())


@pytest.fixture(params=sass.ARCHS, ids="sm_{}".format)
def arch(request, kernels):
    return [k for k in kernels if k.arch == request.param]


def test_every_kernel_is_there(arch):
    names = {re.sub("<.*", "", k.name) for k in arch}
    assert names == {
        "token_stats_fwd_kernel", "token_stats_bwd_kernel", "sequence_sum_fwd_kernel", "sequence_sum_bwd_kernel", "kl_estimate_fwd_kernel",
        "preference_fwd_kernel", "preference_bwd_kernel", "gae_maps_kernel", "gae_fwd_kernel", "listwise_fwd_kernel",
        "policy_fwd_kernel", "value_fwd_kernel", "policy_bwd_kernel",
    }  # fmt: skip
    assert sum("token_stats_fwd" in k.name for k in arch) == 3 * 3 * 2  # storage types x sets of sums x softcap
    assert sum("token_stats_bwd" in k.name for k in arch) == 3 * 2 * 2  # storage types x softcap x several labels


def test_nothing_spills(arch):
    bad = [f"{k.name}: {k.stack} B stack, {k.local} B local" for k in arch if k.stack or k.local or k.count(r"LDL|STL")]
    assert not bad, bad


def test_registers_and_shared_memory(arch):
    for k in arch:
        # From sm_90 on the hardware keeps 1 KiB per block for itself. Anything else would be shared memory that the emulator cannot poison.
        assert k.shared <= (0 if k.arch == "80" else 1024), f"{k.name} has static shared memory"
        # Four blocks of 256 threads per SM; three for the kernel that keeps every sum, and where the work is not per element.
        streaming = "token_stats" in k.name and ", 15, " not in k.name
        assert k.registers <= (64 if streaming else 80), f"{k.name} takes {k.registers} registers"


def test_streaming_kernels_move_16_bytes_at_a_time(arch):
    for k in arch:
        if "token_stats" in k.name:
            assert k.count(r"LDG\.E\.128") >= 4, f"{k.name}: {k.count(r'LDG.E.128')} 16-byte loads"
            assert "bwd" not in k.name or k.count(r"STG\.E\.128") >= 2, f"{k.name}: {k.count(r'STG.E.128')} 16-byte stores"


def test_streaming_loop_is_short(arch):
    """At H200 bandwidth an SM has about 15 instructions per bf16 element; one of them may be an exp2."""
    for k in arch:
        if k.name not in ("token_stats_fwd_kernel<bf16, 0, false>", "token_stats_fwd_kernel<bf16, 1, false>"):
            continue
        bodies = [b for b in k.loops() if sum(o.startswith("LDG.E.128") for o in k.opcodes(b)) >= 4]
        body = k.opcodes(min(bodies, key=len))
        elements = 4 * 8
        assert len(body) <= 15 * elements, f"{k.name}: {len(body) / elements:.1f} instructions per element, the ends of rows included"
        assert sum(o.startswith("MUFU.EX2") for o in body) <= elements + 1, f"{k.name}: more than one exp2 per element"


def test_clusters_only_where_they_exist(arch):
    """sm_80 has no cluster barrier; from sm_90 on the row kernels hold one."""
    for k in arch:
        if "token_stats_fwd" in k.name:
            assert (k.count(r"UCGABAR") > 0) == (k.arch != "80"), k.name
