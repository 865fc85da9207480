"""The Triton kernels compile for every architecture we ship, with what the launchers really pass, and the
machine code is what we meant: no spills, 16-byte loads, no specialisation on sizes. A missing compiler or
disassembler fails; nothing is skipped."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import sass
import torch
from row_calls import rows_of
from triton_aot import OUT, TARGETS, compiling_for

import fastalign
from fastalign import losses
from fastalign.losses import policy as policy_losses
from fastalign.losses.list import ListPreset
from fastalign.losses.pair import Preset
from fastalign.losses.policy import PolicyPreset
from fastalign.ops.columns import LINKS, STATE_WIDTH, STATS, TRANSFORMS
from fastalign.ops.gae.op import GaeFwd
from fastalign.ops.kl_estimate.op import KlEstimateFwd
from fastalign.ops.listwise.op import ListTensors, ListwiseFwd
from fastalign.ops.policy import params as policy_params
from fastalign.ops.policy.op import PolicyBwd, PolicyFwd, ValueFwd
from fastalign.ops.policy.params import PolicyParams
from fastalign.ops.preference.op import PairTensors, PairTokens, PreferenceBwd, PreferenceFwd
from fastalign.ops.sequence_sum.op import SequenceSumBwd, SequenceSumFwd
from fastalign.ops.token_stats.contract import (
    RowGradients,
    RowOptions,
    RowStatesFinish,
    RowStatesMerge,
    ScaleRows,
    TokenStatsBwd,
    TokenStatsFwd,
)

FOLDER = Path(fastalign.__file__).parent / "ops"
MODULES = {
    p.parent.name: importlib.import_module(f"fastalign.ops.{p.parent.name}.triton")
    for p in sorted(FOLDER.glob("*/triton.py"))
}
rows, sums, estimate, pair = (
    MODULES[op] for op in ("token_stats", "sequence_sum", "kl_estimate", "preference")
)
gae, ranked, policy = (MODULES[op] for op in ("gae", "listwise", "policy"))
ALL_BITS = 63  # all that need no reference
# Where every op is compiled; elsewhere the row kernels are, whose code is the architecture's own.
WHOLE = ("sm_90", "gfx942")
VOCAB = 1001  # odd: no row but the first is aligned, and nothing about sizes is known to the compiler


def row_args(logits, capped=False, skip=0, ref=None):
    labels = torch.zeros(logits.shape[0] + skip, 1, dtype=torch.long)[skip:]
    return rows_of(logits, labels, ref=ref, options=RowOptions(1.44, 0.1 if capped else 0.0, 1.0, -100))


def forward(dtype, outputs, capped=False, logits=None, skip=0):
    logits = torch.zeros(3, VOCAB, dtype=dtype) if logits is None else logits
    return rows.token_stats_fwd(TokenStatsFwd(row_args(logits, capped, skip), outputs, None, None))


def backward(dtype, entropy=False, capped=False, in_place=False, logits=None):
    logits = torch.zeros(3, VOCAB, dtype=dtype) if logits is None else logits
    n = logits.shape[0]
    run = rows.token_stats_bwd_ if in_place else rows.token_stats_bwd
    upstream = RowGradients(torch.zeros(n, 1), torch.zeros(n) if entropy else None)
    run(TokenStatsBwd(row_args(logits, capped), torch.zeros(n, STATE_WIDTH), upstream))


def pair_rows(dtype, capped, together):
    logits = torch.zeros(3, VOCAB, dtype=dtype)
    ref = torch.zeros_like(logits) if together else torch.zeros(3, VOCAB + 2, dtype=dtype)[:, 1:-1]
    return row_args(logits, capped, ref=ref)


def pair_forward(dtype, outputs, capped=False, together=True):
    return rows.token_stats_fwd(TokenStatsFwd(pair_rows(dtype, capped, together), outputs, None, None))


def pair_backward(
    dtype, entropy=False, capped=False, in_place=False, together=True, reverse=True, forward=True
):
    n = torch.zeros(3)
    run = rows.token_stats_bwd_ if in_place else rows.token_stats_bwd
    upstream = RowGradients(
        torch.zeros(3, 1), n if entropy else None, None, n if reverse else None, n if forward else None
    )
    run(TokenStatsBwd(pair_rows(dtype, capped, together), torch.zeros(3, STATE_WIDTH), upstream))


def row_states(outputs=1, ref=False, labels=1, temperature=None, mask=None, parts=2, merged=True):
    """States merged and finished; labels: of each row, 0 for none. The kernel that merges knows labels or
    none only."""
    n = 6 if ref else 3
    y, state = (
        torch.zeros(3, labels, dtype=torch.long) if labels else None,
        torch.zeros(parts, 3, STATE_WIDTH),
    )
    if merged:
        rows.row_states_merge(RowStatesMerge(state, torch.zeros(parts, n, labels) if labels else None))
    target = torch.zeros(n, labels) if labels else None
    rows.row_states_finish(
        RowStatesFinish(state[0], target, y, mask, temperature, 1.44, 1.0, -100, VOCAB, outputs)
    )


def preference(
    loss, stages="both", kl=None, weights=None, pairs=None, given=None, reduction="mean", **options
):
    preset = losses.get(loss) if isinstance(loss, str) else loss
    p, cu, x = (
        preset.replace(**options).params(reduction),
        torch.tensor([0, 5, 9], dtype=torch.int32),
        torch.zeros(9),
    )
    tokens = PairTokens(x, x, kl, cu, pairs, x > 0, weights)
    sums = torch.zeros(1, 2, 6)
    if stages == "table":
        pair.preference_fwd(PreferenceFwd(PairTokens(), sums, given or PairTensors(), p, 1, True))
    else:
        pair.preference_fwd(PreferenceFwd(tokens, None, given or PairTensors(), p, 1, stages == "both"))
    if stages == "both":
        pair.preference_bwd(
            PreferenceBwd(
                torch.zeros(()), tokens._replace(kl=None), sums, torch.zeros(1, 11), p, kl is not None
            )
        )


def listwise(loss, beta=None, counts=None, reduction="mean", **options):
    p = (losses.get_listwise(loss) if isinstance(loss, str) else loss).replace(**options).params(reduction)
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    ranked.listwise_fwd(
        ListwiseFwd(torch.zeros(3, 6), offsets, torch.zeros(3), ListTensors(beta, counts, counts), p)
    )


def policy_step(loss="ppo", sequences=False, full=False, backward=True, **options):
    """Forward and backward of a policy loss; full: with every optional tensor."""
    x, cu, one = torch.zeros(9), torch.tensor([0, 5, 9], dtype=torch.int32), torch.zeros(())
    preset = policy_losses.get(loss) if isinstance(loss, str) else loss
    preset = preset.replace(**options)
    per_sequence = preset.needs_sequence_values
    optional = (x, x, x, one, one, one) if full else (None,) * 6
    p = preset.params(per_sequence, per_sequence)
    policy.policy_fwd(PolicyFwd(x, x, x, cu if sequences else None, x > 0, *optional, p, full))
    if backward:
        policy.policy_bwd(PolicyBwd(one, x, x if full else x[:0], torch.zeros(len(STATS))))


def launch_rows():
    """The row kernels of the usual calls: (storage types x sets of sums x softcap) thinned out."""
    for dtype, outputs, capped in (
        (torch.bfloat16, 1, False), (torch.bfloat16, 3, False), (torch.bfloat16, ALL_BITS, False),
        (torch.bfloat16, 3, True), (torch.float16, 1, False), (torch.float32, 1, False),
        (torch.float32, ALL_BITS, False), (torch.float32, 3, True),
    ):  # fmt: skip
        forward(dtype, outputs, capped)
    for dtype, options in (
        (torch.bfloat16, {}), (torch.bfloat16, {"entropy": True, "in_place": True}),
        (torch.bfloat16, {"entropy": True, "capped": True}), (torch.float16, {"entropy": True}),
        (torch.float32, {"in_place": True}),
    ):  # fmt: skip
        backward(dtype, **options)
    for dtype, outputs, capped in (
        (torch.bfloat16, 128, False), (torch.bfloat16, 1 + 64 + 256, False), (torch.bfloat16, 511, True),
        (torch.float16, 1 + 2 + 128, False), (torch.float32, 511, False),
    ):  # fmt: skip
        pair_forward(dtype, outputs, capped)
    for dtype, options in (
        (torch.bfloat16, {"in_place": True, "forward": False}),
        (torch.bfloat16, {"entropy": True, "capped": True}), (torch.float16, {"reverse": False}),
        (torch.float32, {"in_place": True}),
    ):  # fmt: skip
        pair_backward(dtype, **options)
    rows.scale_rows_(ScaleRows(torch.zeros(3, VOCAB, dtype=torch.bfloat16), torch.ones(())))
    row_states(ALL_BITS)
    row_states(511, ref=True)


def launch_others():
    """Every other op, in which nothing depends on the architecture."""
    x, cu = torch.zeros(9), torch.tensor([0, 5, 9], dtype=torch.int32)
    sums.sequence_sum_fwd(SequenceSumFwd(x, cu, x > 0, x))
    sums.sequence_sum_bwd(SequenceSumBwd(torch.zeros(2), cu, x > 0, x, 9))
    estimate.kl_estimate_fwd(KlEstimateFwd(x, x, 2, True))
    preference("dpo")
    preference("simpo")
    preference("exo_pair", "table")
    preference("slic_hf", "sums")
    listwise("lipo")
    listwise("pro")
    gae.gae_fwd(GaeFwd(x, x, cu, x > 0, None, None, None, 1.0, 0.95))
    policy_step()
    policy_step("gspo", sequences=True, full=True, is_mode="truncate", is_max=2.0)
    policy_step("vespo", sequences=True)
    policy.value_fwd(ValueFwd(x, x, x, None, x > 0, None, 0.2, 0, 1.0))


@pytest.fixture(scope="module", params=TARGETS)
def compiled(request):
    with compiling_for(request.param) as kernels:
        launch_rows()
        if request.param in WHOLE:
            launch_others()
    return request.param, kernels


@pytest.fixture(scope="module")
def resources(compiled):
    """(kernel, registers, bytes of spills, 16-byte loads, 16-byte stores) of every compiled kernel."""
    target, kernels = compiled
    if target.startswith("sm_"):
        return [(k, *read_sass(k)) for k in kernels]
    return [(k, *read_amdgcn(k)) for k in kernels]


_machine_code = {}  # by the kernel's hash, which covers the target


def machine_code(kernel):
    """To disassemble a kernel takes as long as to compile it: those over rows alone, the others' loads are of
    no interest."""
    if kernel.hash not in _machine_code:
        OUT.mkdir(parents=True, exist_ok=True)
        path = OUT / f"{kernel.metadata.name}-{kernel.hash[:16]}.cubin"
        path.write_bytes(kernel.asm["cubin"])
        arch = str(kernel.metadata.target.arch)
        (_machine_code[kernel.hash],) = sass.kernels(
            [path], (arch,) if re.match("token_stats|scale_rows", kernel.metadata.name) else ()
        )
    return _machine_code[kernel.hash]


def read_sass(kernel):
    code = machine_code(kernel)
    spilled = code.stack + code.local + code.count(r"LDL|STL")  # what is spilled has a place on the stack
    return code.registers, spilled, code.count(WIDE_LOAD), code.count(r"STG\.E(\.\w+)*\.128")


WIDE_LOAD = r"LDG\.E(\.\w+)*\.128"


def streaming_loop(kernel):
    """Instructions of the innermost loop that loads 16 bytes; empty where none does."""
    code = machine_code(kernel)
    bodies = (code.opcodes(b) for b in code.loops())
    return min((b for b in bodies if any(re.match(WIDE_LOAD, o) for o in b)), key=len, default=[])


def narrow_loads(kernel):
    """What the streaming loop loads of the logits in less than 16 bytes. Backward reads labels and their
    gradients in it as well, 4 and 8 bytes each; its logits would come in 2 bytes."""
    narrow = r"LDG\.E(\.\w+)*\.U16" if "_bwd_" in kernel.metadata.name else r"LDG(?!\.E(\.\w+)*\.128)"
    return [o for o in streaming_loop(kernel) if re.match(narrow, o)]


def read_amdgcn(kernel):
    text = kernel.asm["amdgcn"]
    number = {name: int(n) for name, n in re.findall(r"^\s*\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
    # SGPRs that do not fit are kept in lanes of a VGPR; only scratch memory is a spill that costs bandwidth.
    spilled = (
        number["vgpr_spill_count"]
        + number["private_segment_fixed_size"]
        + len(re.findall(r"\bscratch_(load|store)", text))
    )
    loads, stores = (
        len(re.findall(rf"\b(?:global|buffer)_{what}_dwordx4\b", text)) for what in ("load", "store")
    )
    return number["vgpr_count"], spilled, loads, stores


def test_every_kernel_is_there(compiled):
    modules = [
        importlib.import_module(f"fastalign.ops.{p.parent.name}.{p.stem}")
        for p in FOLDER.glob("*/triton*.py" if compiled[0] in WHOLE else "token_stats/triton*.py")
    ]
    assert {k.metadata.name for k in compiled[1]} == {
        n for module in modules for n in vars(module) if n.endswith("_kernel")
    }


def test_nothing_spills(resources):
    bad = [f"{k.metadata.name}: {spilled}" for k, _, spilled, *_ in resources if spilled]
    assert not bad, bad


def test_registers_threads_and_shared_memory(resources, compiled):
    print(f"\n{compiled[0]}")
    for k, registers, _, loads, stores in resources:
        print(
            f"  {k.metadata.name:<26}{registers:>4} registers {k.metadata.shared:>6} B shared, 16-byte loads "
            f"{loads}, stores {stores}"
        )
        assert k.metadata.shared <= 48 << 10
        assert k.metadata.num_warps * TARGETS[compiled[0]].warp_size <= 256
        assert registers <= 255


def test_streaming_kernels_move_16_bytes_at_a_time(resources, compiled):
    streaming = [r for r in resources if r[0].metadata.name.startswith("token_stats")]
    assert len(streaming) == 22
    for k, _, _, loads, stores in streaming:
        forward = k.metadata.name.endswith("_fwd_kernel")
        assert loads >= (4 if forward else 2) and stores >= (0 if forward else 2), (
            f"{k.metadata.name}: {loads} loads, {stores} stores"
        )
        if compiled[0].startswith("sm_"):
            assert streaming_loop(k), f"{k.metadata.name}: no loop loads 16 bytes"
            assert not narrow_loads(k), f"{k.metadata.name}: {narrow_loads(k)} in the loop"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_streaming_loop_is_short(target):
    """At H200 bandwidth an SM has about 15 instructions per bf16 element. Counted with what rows that end or
    are misaligned do besides."""
    with compiling_for(target) as kernels:
        forward(torch.bfloat16, 1)
        forward(torch.bfloat16, 3)
        pair_forward(torch.bfloat16, 128)
    for k, bound in zip(kernels, (22, 22, 44)):
        loop = streaming_loop(k)
        print(f"{k.metadata.name} {target}: {len(loop) / 16:.1f} instructions per element")
        assert 0 < len(loop) <= bound * 16, f"{k.metadata.name}: {len(loop)} instructions for 16 elements"


def test_sizes_alignments_and_numbers_compile_nothing_anew():
    """H2: one kernel for any number of rows, vocabulary, stride and address, and for any temperature or
    margin."""
    with compiling_for("sm_90") as kernels:
        for n, vocab, skip in ((1, 1, 0), (2, 16, 0), (16, 128256, 0), (5, 50257, 3), (3, 1000, 8)):
            logits = torch.zeros(n * vocab + skip, dtype=torch.bfloat16)[skip:].view(n, vocab)
            forward(None, 1, logits=logits, skip=skip)
            backward(None, logits=logits)
            backward(None, logits=logits, in_place=True)
        wide = torch.zeros(6, 2048, dtype=torch.bfloat16)
        forward(None, 1, logits=wide[::2, 8:1008])
        forward(None, 1, logits=torch.zeros(8, dtype=torch.bfloat16).expand(4, 8))
        for beta in (0.0, 0.1, 1.0):
            preference("dpo", "table", beta=beta)
            preference("dpo", "table", label_smoothing=0.0)
            listwise("rrhf", list_weight=1.0 + beta, sft_weight=beta)
        for skip in (0, 1):
            x = torch.zeros(9 + skip)[skip:]
            for one_or_all in (x[0], x[:2]):
                preference("dpo", "table", given=PairTensors(beta=one_or_all, num_items=x[0]))
            preference("dpo", "sums", kl=x, weights=x)
        for n, discount in ((16, 0.5), (17, 0.0), (1024, 1.0)):
            token = torch.zeros(n + 1)[1:]
            offsets = torch.tensor([0, n], dtype=torch.int32)
            gae.gae_fwd(GaeFwd(token, token, offsets, None, None, None, None, discount, discount))
            policy_step(kl_coef=discount, clip_low=discount, dual_clip=1.5 + discount)
    assert {name: len({k.hash for k in group}) for name, group in by_name(kernels).items()} == {
        "token_stats_fwd_kernel": 1,
        "token_stats_bwd_kernel": 3,  # in place; out of place; out of place with an alignment of its own
        "preference_fwd_kernel": 4,  # dpo with and without label smoothing, with its own beta, and its sums
        "listwise_fwd_kernel": 1,
        "gae_fwd_kernel": 1,
        "policy_fwd_kernel": 1,
        "policy_bwd_kernel": 1,
    }


def test_every_option_compiles():
    """The interpreter accepts what the compiler refuses (types that change in a branch, say): optional
    tensors, links, transforms, labels."""
    x, y, state = torch.zeros(3, VOCAB), torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, STATE_WIDTH)
    options, row, token, one = (
        RowOptions(1.44, 0.0, 1.0, -100),
        torch.zeros(3),
        torch.zeros(9),
        torch.zeros(1),
    )
    with compiling_for("sm_90") as kernels:
        bare, full = (
            rows_of(x, options=options),
            rows_of(x, y, mask=row > 0, temperature=one[0], options=options),
        )
        rows.token_stats_fwd(TokenStatsFwd(bare, 2, None, None))
        rows.token_stats_fwd(TokenStatsFwd(full, 31, state, torch.zeros(3, 2)))
        rows.token_stats_bwd(TokenStatsBwd(bare, state, RowGradients(g_entropy=row)))
        rows.token_stats_bwd(TokenStatsBwd(full, state, RowGradients(torch.zeros(3, 2), row, row)))
        row_states(2, labels=0, parts=1)
        row_states(384, ref=True, labels=0, temperature=one[0], mask=row > 0, merged=False)
        row_states(65, ref=True, labels=2)
        for kind in range(4):
            estimate.kl_estimate_fwd(KlEstimateFwd(token, token, kind, True))
        offsets = torch.tensor([0, 9], dtype=torch.int32)
        sums.sequence_sum_fwd(SequenceSumFwd(token, offsets, None, None))
        gae.gae_fwd(GaeFwd(token, token, offsets, None, None, None, None, 1.0, 0.95))
        gae.gae_fwd(GaeFwd(token, token, offsets, token > 0, one, one[0], one[0], 0.0, 0.0))
        for kind in policy_losses.SURROGATES:
            ratio = {"gmpo": "seq_mean", "vespo": "seq_sum"}.get(kind, "token")
            policy_step(PolicyPreset(surrogate=kind, ratio=ratio), sequences=ratio != "token", backward=False)
        for kind in policy_losses.KL_KINDS:
            options = {"kl_kind": kind, "kl_bias_correction": kind == "k3", "is_mode": "mask", "is_max": 2.0}
            policy_step(sequences=True, full=True, backward=False, **options)
        policy_step(
            "rloo", sequences=True, aggregation="seq_mean_token_sum_norm", norm_length=3.0, backward=False
        )
        zeros = PolicyParams(*[0.0] * policy_params.SCALAR_COUNT, *[0] * 8)
        policy.policy_fwd(PolicyFwd(token, None, token, None, None, *(None,) * 6, zeros, False))
        policy.value_fwd(ValueFwd(token, None, token, offsets, token > 0, one[0], 0.0, 1, 1.0))
        pairs = torch.zeros(1, 2, dtype=torch.int32)
        preference(
            "dpo",
            kl=token,
            weights=token,
            pairs=pairs,
            given=PairTensors(*(one,) * 6, one > 0, one[0], one[0]),
            kl_chosen=0.5,
        )
        preference(
            "dpo",
            reduction="none",
            sft_weight=0.5,
            sft_norm="seq_mean",
            sft_include_prompt=True,
            nonfinite="drop",
        )
        for kind in LINKS:
            smoothing = 0.01 if kind == "exo" else 0.0
            points = {} if kind == "exo" else {"point_link": kind, "point_chosen": (1.0, 0.5)}
            preference(Preset(link=kind, label_smoothing=smoothing, **points), "table")
        for kind in TRANSFORMS:
            preference(
                Preset(
                    transform=kind, **({"reference": False, "length_norm": 1.0} if kind == "logodds" else {})
                ),
                "table",
            )
        for kind in ("smooth", "robust", "soft"):
            preference(
                Preset(
                    labels=kind,
                    label_smoothing=0.0 if kind == "soft" else 0.1,
                    label_entropy=kind == "smooth",
                ),
                "table",
            )
        one_list = torch.zeros(1)
        listwise(
            ListPreset(link="hinge", pair_mean=True, nonfinite="drop"), beta=one_list, counts=one_list[0]
        )
        listwise("rrhf", reduction="none", sft_norm="token_mean_global")
        for kind in ("plackett_luce", "infonca", "nca", "exo_list"):
            listwise(kind)
    assert len({k.hash for k in kernels}) == len(kernels)  # every option is code of its own


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
    assert [bool(read_sass(k)[2]) for k in kernels] == [False, True, True]


def test_blocks_have_the_same_number_of_threads_everywhere():
    for target in TARGETS:
        with compiling_for(target) as kernels:
            forward(torch.bfloat16, 1)
        assert kernels[0].metadata.num_warps * TARGETS[target].warp_size == rows.THREADS
