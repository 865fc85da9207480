"""The kernels over a policy row and a reference row, beyond what the contract tests reach: every cluster size
and pair of alignments, the kernel that reads the rows once against the two that read them twice, and that a
missing barrier is noticed."""

from __future__ import annotations

import math

import pytest
import torch
from checks.row_pairs import (
    KLS,
    check_bad_rows_of_either_model_stay_alone,
    check_identical_rows_are_zero,
    check_kl_accuracy_fp32,
    check_kl_loss,
    check_large_finite_mask_values,
    check_masked_row_pairs_are_zeros,
    check_mass_on_a_token_without_mass,
    check_minus_inf_in_both,
    check_row_pairs,
    check_shards_of_both_rows_merge,
    make_row_pair,
)
from row_calls import PLAIN, rows_of
from test_kernels import assert_noticed, cluster  # noqa: F401

import fastalign as fa
from fastalign.ops.token_stats import fused as ops
from fastalign.ops.token_stats.contract import OUTPUT_BITS, RowGradients, ScaleRows, TokenStatsFused
from fastalign.runtime.op import OPS
from fastalign.testing import assert_close, make_labels, make_logits

OPTIONS = PLAIN
BITS = sum(OUTPUT_BITS[n] for n in ("logprob", "entropy", "logsumexp", "ref_logprob", *KLS))
TOP1 = OUTPUT_BITS[
    "is_top1"
]  # an output that the one-read kernel does not have: with it the call takes the two kernels


def upstream(labels, dtype, with_ref=True):
    """Gradients of logprob, entropy, logsumexp and both KLs, with zeros among them."""
    rows = labels.shape[0]
    g = [(torch.linspace(-1, 1, rows) * k).to(dtype) for k in (1.0, 0.5, -0.7, 0.9, -0.4)]
    g[0] = g[0].unsqueeze(-1).expand(labels.shape).contiguous()
    g[3][0] = g[4][-1] = 0.0
    return g if with_ref else [*g[:3], None, None]


def fused(logits, ref, labels, bits=BITS, options=OPTIONS, inplace=False, mask=None):
    """[every output, the gradient] of the op, in one list."""
    g = upstream(labels, torch.float64 if logits.dtype == torch.float64 else torch.float32, ref is not None)
    a = TokenStatsFused(rows_of(logits, labels, ref=ref, mask=mask, options=options), bits, RowGradients(*g))
    if inplace:
        return [*ops.token_stats_fused_(a), logits]
    return list(ops.token_stats_fused(a))


def same(got, want):
    """Bit for bit, but for outputs that only one of the two was asked for."""
    return all(torch.equal(a, b) for a, b in zip(got, want) if a.numel() == b.numel())


# --- clusters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 3, 129, 1000, 2603])
def test_accuracy_at_every_cluster_size(cluster, vocab):  # noqa: F811
    check_kl_accuracy_fp32("cpu", min(vocab, 1500), "normal")
    for dtype in (torch.bfloat16, torch.float16):
        check_row_pairs(*make_row_pair(3, min(vocab, 1000), dtype=dtype), make_labels(3, min(vocab, 1000)))


def test_edge_cases_at_every_cluster_size(cluster):  # noqa: F811
    check_identical_rows_are_zero("cpu", 1031, torch.bfloat16)
    check_minus_inf_in_both("cpu", 600)
    check_mass_on_a_token_without_mass("cpu")
    check_bad_rows_of_either_model_stay_alone("cpu", math.nan, "reference")
    check_masked_row_pairs_are_zeros("cpu")
    check_large_finite_mask_values("cpu")
    x, ref = make_row_pair(3, 300)
    check_row_pairs(x * 3, ref * 3, make_labels(3, 300), logit_scale=0.5, softcap=5.0, temperature=0.6)
    check_shards_of_both_rows_merge("cpu", (16, 64, 80), ("policy",))


def test_automatic_cluster_of_a_long_row(emulated):
    """Long enough that the choice by row length is a cluster, for a single row; the loss reads it once."""
    x, ref = make_row_pair(1, 40_003, dtype=torch.bfloat16)
    check_row_pairs(x, ref, make_labels(1, 40_003), KLS)
    check_kl_loss("cpu", 40_003, torch.bfloat16, "policy_ref")


@pytest.mark.parametrize(
    "vocab,dtype,size", [(32000, torch.bfloat16, 2), (128256, torch.bfloat16, 8), (151936, torch.bfloat16, 8)]
)
def test_one_read_leaves_room_for_three_blocks_per_multiprocessor(emulated, vocab, dtype, size):
    """What sm_90 and sm_100 have: 228 KiB per multiprocessor, of which each block costs 1 KiB, and 227 KiB
    per block."""
    x, ref = (torch.zeros(1, vocab, dtype=dtype) for _ in range(2))
    fa.token_kl_loss(x.requires_grad_(), ref, torch.ones(()))
    cluster, threads, shared = emulated._emu_last_launch()  # noqa: F811
    assert (cluster, threads) == (size, 256)
    assert 3 * (shared + 1024) <= 228 << 10


# --- one read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_ref", [True, False], ids=["pair", "row"])
def test_one_read_gives_the_bits_of_two_kernels(cluster, with_ref, dtype):  # noqa: F811
    for vocab in (1, 9, 300, 2603):
        x, ref = make_row_pair(5, vocab, dtype=dtype)
        ref = ref if with_ref else None
        bits = BITS if with_ref else BITS & 7
        labels = make_labels(5, vocab, ignored=0.2).unsqueeze(-1)
        mask = torch.tensor([True, False, True, True, True])
        x[1] = math.nan
        got = fused(x, ref, labels, bits, mask=mask)
        assert same(got, fused(x, ref, labels, bits | TOP1, mask=mask))
        assert same(got, fused(x.clone(), ref, labels, bits, inplace=True, mask=mask))


def test_what_one_read_does_not_serve(emulated):
    """Several labels, a softcap, rows beyond the shared memory of their blocks: the two kernels, with the
    same numbers as the reference."""
    cases = [
        (*make_row_pair(3, 300), make_labels(9, 300).view(3, 3), OPTIONS, 0),
        (
            *make_row_pair(3, 300),
            make_labels(3, 300).unsqueeze(-1),
            OPTIONS._replace(factor=4.0, cap_scale=0.4),
            0,
        ),
        (*make_row_pair(1, 30_001), make_labels(1, 30_001).unsqueeze(-1), OPTIONS, 1),
    ]
    for x, ref, labels, options, size in cases:
        emulated.set_cluster_size(size)
        got = fused(x, ref, labels, options=options)
        with fa.use_backend("reference"):
            plain, truth = (
                fused(a, b, labels, options=options) for a, b in ((x, ref), (x.double(), ref.double()))
            )
        for mine, true, base in zip(got, truth, plain):
            if true.numel():
                assert_close(mine, true, base, scale=16.0)


def test_bad_label_and_bad_rows_in_one_read(emulated, monkeypatch):
    """On a GPU labels are not checked: the row is NaN, its neighbours are not touched."""
    monkeypatch.setattr(OPS["token_stats_fused"], "check", None)
    x, ref = make_row_pair(4, 300)
    labels = torch.tensor([[3], [300], [5], [7]])
    clean = fused(x, ref, torch.tensor([[3], [4], [5], [7]]))
    ref[2, 11] = math.nan
    got = fused(x, ref, labels)
    for mine, want in zip(got, clean):
        if mine.numel():
            assert torch.equal(mine[[0, 3]], want[[0, 3]]) and bool(torch.isnan(mine[1]).all())
    assert (
        bool(torch.isnan(got[-1][2]).all())
        and math.isfinite(float(got[0][2]))
        and math.isnan(float(got[6][2]))
    )


# --- alignment and edges ------------------------------------------------------------------------------------


def placed(content, shift, pad, fill):
    """`content` as rows of a wider buffer that starts `shift` elements off a 16-byte boundary, and the
    buffer."""
    rows, vocab = content.shape
    buffer = torch.full((shift + rows * (vocab + pad) + 8,), fill, dtype=content.dtype)
    view = buffer[shift : shift + rows * (vocab + pad)].view(rows, vocab + pad)[:, :vocab]
    return view.copy_(content), buffer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size,vocab", [(0, 1037), (2, 1300)])
def test_every_pair_of_alignments_gives_the_same_bits(emulated, size, vocab, dtype):
    """Both rows moved, each by its own number of elements, in NaN surroundings that no load may let in: every
    kernel alike."""
    emulated.set_cluster_size(size)
    x, ref = make_row_pair(2, vocab, dtype=dtype)
    labels = make_labels(2, vocab).unsqueeze(-1)
    want = fused(x, ref, labels, BITS | TOP1)
    lanes = 16 // dtype.itemsize
    for shift in range(lanes):
        moved, _ = placed(x, shift, 3, math.nan)
        other, _ = placed(ref, (3 * shift + 1) % lanes, 5, math.nan)
        assert same(fused(moved, other, labels), want), f"policy moved by {shift} elements"
        assert same(fused(moved, other, labels, BITS | TOP1), want), (
            f"policy moved by {shift} elements, two kernels"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [BITS, BITS | TOP1], ids=["one read", "two kernels"])
def test_inplace_gradient_stays_inside_its_rows(cluster, bits, dtype):  # noqa: F811
    x, ref = make_row_pair(3, 1037, dtype=dtype)
    labels = make_labels(3, 1037, ignored=0.3).unsqueeze(-1)
    want = fused(x, ref, labels, bits)
    for shift in (0, 1, 3):
        logits, buffer = placed(x, shift, 4, 77.0)
        assert same(fused(logits, ref, labels, bits, inplace=True), want), f"row moved by {shift} elements"
        logits.fill_(77.0)
        assert bool((buffer == 77.0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [5, 1037, 9001])
def test_scale_rows(emulated, vocab, dtype):
    for shift in (0, 1, 3):
        x, buffer = placed(make_logits(3, vocab, dtype=dtype), shift, 4, 77.0)
        want = (x.float() * 0.3).to(dtype)
        before = buffer.clone()
        ops.scale_rows_(ScaleRows(x, torch.tensor(1.0)))
        assert torch.equal(buffer, before)
        ops.scale_rows_(ScaleRows(x, torch.tensor(0.3)))
        assert torch.equal(x, want)
        x.fill_(77.0)
        assert bool((buffer == 77.0).all())


# --- the suite notices --------------------------------------------------------------------------------------

MISSING = {
    "the wait for the copies": ("wait_for_copies(flags + i / round);", ""),
    "the barrier after the copies are started": (
        "    }\n    __syncthreads();\n\n    State",
        "    }\n\n    State",
    ),
    "the barrier before all threads take the row's state": (
        "    __syncthreads();\n    s = *states;",
        "    s = *states;",
    ),
}


@pytest.mark.parametrize("what", MISSING)
def test_a_missing_barrier_is_noticed(emulated, what):
    assert_noticed(
        what,
        "token_stats_fused.cu",
        "token_stats_fused.cu",
        MISSING[what],
        lambda: check_kl_loss("cpu", 1037, torch.float32, "policy_ref"),
        2,
    )
