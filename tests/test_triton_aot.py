"""The Triton kernels compile for every architecture we ship, with what the launchers really pass, and the machine code is what we meant: no spills,
16-byte loads, no specialisation on sizes. A missing compiler or disassembler fails; nothing is skipped."""

from __future__ import annotations

import importlib
import re

import pytest
import sass
import torch
from triton_aot import OUT, TARGETS, compiling_for

from fastalign import losses
from fastalign.ops.token_stats.api import OUTPUT_BITS
from fastalign.preset import SCALAR_COUNT

rows, sums, estimate, pair = (
    importlib.import_module(f"fastalign.ops.{op}.triton") for op in ("token_stats", "sequence_sum", "kl_estimate", "preference")
)
ALL_BITS = sum(OUTPUT_BITS.values())
VOCAB = 1001  # odd: no row but the first is aligned, and nothing about sizes is known to the compiler


def row_args(logits, capped=False, total=VOCAB):
    cap_scale = 0.1 if capped else 0.0
    return logits, torch.zeros(logits.shape[0], 1, dtype=torch.long), None, None, 1.44, cap_scale, 1.0, -100, total


def forward(dtype, outputs, capped=False, logits=None):
    logits = torch.zeros(3, VOCAB, dtype=dtype) if logits is None else logits
    *args, total = row_args(logits, capped, logits.shape[1])
    return rows.token_stats_fwd(*args, outputs, 0, total, None, None)


def backward(dtype, entropy=False, capped=False, in_place=False, logits=None):
    logits = torch.zeros(3, VOCAB, dtype=dtype) if logits is None else logits
    *args, total = row_args(logits, capped, logits.shape[1])
    n = logits.shape[0]
    run = rows.token_stats_bwd_ if in_place else rows.token_stats_bwd
    run(*args, 0, total, torch.zeros(n, 12), torch.zeros(n, 1), torch.zeros(n) if entropy else None, None)


def preference(loss, stages="both", **options):
    p, cu, x = losses.get(loss).replace(**options).params(), torch.tensor([0, 5, 9], dtype=torch.int32), torch.zeros(9)
    scalars, switches = list(p[:SCALAR_COUNT]), list(p[SCALAR_COUNT:])
    given = torch.zeros(1, 2, 6) if stages == "table" else None
    tokens = (None,) * 7 if stages == "table" else (x, x, None, cu, None, x > 0, None)
    pair.preference_fwd(*tokens, given, *(None,) * 9, scalars, switches, 1, stages != "sums")
    if stages == "both":
        table = torch.zeros(1, 11)
        pair.preference_bwd(torch.zeros(()), x, x, cu, torch.zeros(1, 2, dtype=torch.int32), x > 0, None, torch.zeros(1, 2, 6), table,
                            scalars, switches, False)  # fmt: skip


def launch_all():
    """The kernels of the usual calls: (storage types x sets of sums x softcap) thinned out, and every other op."""
    for dtype, outputs, capped in (
        (torch.bfloat16, 1, False), (torch.bfloat16, 3, False), (torch.bfloat16, ALL_BITS, False), (torch.bfloat16, 3, True),
        (torch.float16, 1, False), (torch.float32, 1, False), (torch.float32, ALL_BITS, False), (torch.float32, 3, True),
    ):  # fmt: skip
        forward(dtype, outputs, capped)
    for dtype, options in (
        (torch.bfloat16, {}), (torch.bfloat16, {"entropy": True, "in_place": True}), (torch.bfloat16, {"entropy": True, "capped": True}),
        (torch.float16, {"entropy": True}), (torch.float32, {"in_place": True}),
    ):  # fmt: skip
        backward(dtype, **options)
    x, cu = torch.zeros(9), torch.tensor([0, 5, 9], dtype=torch.int32)
    sums.sequence_sum_fwd(x, cu, x > 0, x)
    sums.sequence_sum_bwd(torch.zeros(2), cu, x > 0, x, 9)
    estimate.kl_estimate_fwd(x, x, 2)
    preference("dpo")
    preference("simpo")
    preference("exo_pair", "table")
    preference("slic_hf", "sums")


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request):
    with compiling_for(request.param) as kernels:
        launch_all()
    return request.param, kernels


@pytest.fixture(scope="module")
def resources(compiled):
    """(kernel, registers, bytes of spills, 16-byte loads, 16-byte stores) of every compiled kernel."""
    target, kernels = compiled
    if target.startswith("sm_"):
        return [(k, *read_sass(k, target)) for k in kernels]
    return [(k, *read_amdgcn(k)) for k in kernels]


def read_sass(kernel, target):
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{kernel.metadata.name}-{target}.cubin"
    path.write_bytes(kernel.asm["cubin"])
    (code,) = sass.kernels([path])
    spilled = code.stack + code.local + code.count(r"LDL|STL")
    return code.registers, spilled, code.count(r"LDG\.E(\.\w+)*\.128"), code.count(r"STG\.E(\.\w+)*\.128")


def read_amdgcn(kernel):
    text = kernel.asm["amdgcn"]
    number = {name: int(n) for name, n in re.findall(r"^\s*\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    # SGPRs that do not fit are kept in lanes of a VGPR; only scratch memory is a spill that costs bandwidth.
    spilled = number["vgpr_spill_count"] + number["private_segment_fixed_size"] + len(re.findall(r"\bscratch_(load|store)", text))
    loads, stores = (len(re.findall(rf"\b(?:global|buffer)_{what}_dwordx4\b", text)) for what in ("load", "store"))
    return number["vgpr_count"], spilled, loads, stores


def test_every_kernel_is_there(compiled):
    written = {name for module in (rows, sums, estimate, pair) for name in vars(module) if name.endswith("_kernel")}
    assert {k.metadata.name for k in compiled[1]} == written and len(written) == 7


def test_nothing_spills(resources):
    bad = [f"{k.metadata.name}: {spilled}" for k, _, spilled, *_ in resources if spilled]
    assert not bad, bad


def test_registers_threads_and_shared_memory(resources, compiled):
    print(f"\n{compiled[0]}")
    for k, registers, _, loads, stores in resources:
        print(f"  {k.metadata.name:<26}{registers:>4} registers {k.metadata.shared:>6} B shared, 16-byte loads {loads}, stores {stores}")
        assert k.metadata.shared <= 48 << 10
        assert k.metadata.num_warps * TARGETS[compiled[0]].warp_size <= 256
        assert registers <= 255


def test_streaming_kernels_move_16_bytes_at_a_time(resources):
    streaming = [r for r in resources if r[0].metadata.name.startswith("token_stats")]
    assert len(streaming) == 13
    for k, _, _, loads, stores in streaming:
        forward = k.metadata.name == "token_stats_fwd_kernel"
        assert loads >= (4 if forward else 2) and stores >= (0 if forward else 2), f"{k.metadata.name}: {loads} loads, {stores} stores"


def test_sizes_alignments_and_numbers_compile_nothing_anew():
    """H2: one kernel for any number of rows, vocabulary, stride and address, and for any temperature or margin."""
    with compiling_for("sm_90") as kernels:
        for n, vocab, skip in ((1, 1, 0), (2, 16, 0), (16, 128256, 0), (5, 50257, 3), (3, 1000, 8)):
            logits = torch.zeros(n * vocab + skip, dtype=torch.bfloat16)[skip:].view(n, vocab)
            forward(None, 1, logits=logits)
            backward(None, logits=logits)
            backward(None, logits=logits, in_place=True)
        wide = torch.zeros(6, 2048, dtype=torch.bfloat16)
        forward(None, 1, logits=wide[::2, 8:1008])
        forward(None, 1, logits=torch.zeros(8, dtype=torch.bfloat16).expand(4, 8))
        for beta in (0.0, 0.1, 1.0):
            preference("dpo", "table", beta=beta)
            preference("dpo", "table", label_smoothing=0.0)
    assert {name: len({k.hash for k in group}) for name, group in by_name(kernels).items()} == {
        "token_stats_fwd_kernel": 1,
        "token_stats_bwd_kernel": 3,  # in place; out of place; out of place with an alignment of its own
        "preference_fwd_kernel": 2,  # dpo with and without label smoothing
    }


def by_name(kernels):
    groups: dict[str, list] = {}
    for k in kernels:
        groups.setdefault(k.metadata.name, []).append(k)
    return groups


def test_rows_that_do_not_share_an_alignment_with_their_gradient_take_the_narrow_path():
    with compiling_for("sm_90") as kernels:
        backward(None, logits=torch.zeros(4, 9, dtype=torch.bfloat16)[:, :8])
        backward(None, logits=torch.zeros(4, 16, dtype=torch.bfloat16)[:, :8])
        backward(None, logits=torch.zeros(4, 9, dtype=torch.bfloat16)[:, :8], in_place=True)
    assert [bool(read_sass(k, "sm_90")[2]) for k in kernels] == [False, True, True]


def test_blocks_have_the_same_number_of_threads_everywhere():
    for target in TARGETS:
        with compiling_for(target) as kernels:
            forward(torch.bfloat16, 1)
        assert kernels[0].metadata.num_warps * TARGETS[target].warp_size == rows.THREADS
