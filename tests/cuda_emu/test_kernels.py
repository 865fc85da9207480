"""What the contract tests do not reach: every cluster size and alignment, the edges of tensors, and that a
missing barrier is noticed."""

from __future__ import annotations

import math

import pytest
import torch
from checks.gae import check_equals_the_loop
from checks.lists import check_the_longest_list
from checks.pairs import PAIR_VARIANTS, compare_pairs
from checks.policy import compare_policy, make_policy_batch
from checks.rows import (
    ALL,
    check_accuracy_fp32,
    check_bad_rows_stay_alone,
    check_masked_rows_are_zeros,
    check_minus_inf_logits,
    check_rows,
    check_scale_softcap_temperature,
    check_several_labels,
    check_shards_merge,
    check_top1_is_argmax,
)
from cuda_emu import build, plugin

import fastalign as fa
from fastalign.runtime import backends, ffi
from fastalign.runtime.op import OPS
from fastalign.testing import assert_close, gradient, make_batch, make_labels, make_logits


@pytest.fixture(params=[1, 2, 8], ids="cluster{}".format)
def cluster(request, emulated):
    emulated._emu_set_seed(10 + request.param)
    emulated.set_cluster_size(request.param)
    return request.param


def outputs(logits, labels, inplace=False, **options):
    """Every output, and the gradient of a mix of them."""
    leaf = logits.detach().requires_grad_()
    stats = fa.token_stats(leaf, labels, outputs=ALL, **options)
    (stats.logprob.sum() - 0.7 * stats.entropy.sum() + 0.1 * stats.logsumexp.sum()).backward()
    return [getattr(stats, name).detach() for name in ALL] + [leaf.grad]


# --- clusters -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 3, 129, 1000, 5003])
def test_accuracy_at_every_cluster_size(cluster, vocab):
    check_accuracy_fp32("cpu", vocab, "normal")
    check_rows(make_logits(4, min(vocab, 1000), dtype=torch.bfloat16), make_labels(4, min(vocab, 1000)))


def test_edge_cases_at_every_cluster_size(cluster):
    check_minus_inf_logits("cpu", 600)
    check_bad_rows_stay_alone("cpu", 700, math.nan)
    check_bad_rows_stay_alone("cpu", 700, "all -inf")
    check_masked_rows_are_zeros("cpu", "labels")
    check_top1_is_argmax("cpu")
    check_shards_merge("cpu", (16, 64, 80))
    check_scale_softcap_temperature("cpu", 0.5, 5.0, 0.6)


def test_cluster_size_is_checked(emulated):
    for size in (-1, 3, 16):
        with pytest.raises(ValueError, match="0 .automatic., 1, 2, 4 or 8"):
            emulated.set_cluster_size(size)


def test_automatic_cluster_of_a_long_row(emulated):
    """Long enough that the choice by row length is a cluster, on one row."""
    check_rows(make_logits(1, 20_001, dtype=torch.bfloat16), make_labels(1, 20_001))


def test_fp64_is_refused_by_the_kernels_too(emulated):
    x = torch.zeros(1, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="fp32, bf16 and fp16"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "in_fp64", lambda name: True)
        fa.token_stats(x, outputs=("entropy",))


# --- alignment and edges ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size,vocab", [(0, 1037), (1, 2500), (8, 5003)])
def test_every_alignment_gives_the_same_bits(emulated, size, vocab, dtype):
    """Rows moved by one element at a time, in NaN surroundings that no load may let in."""
    emulated.set_cluster_size(size)
    row, labels = make_logits(2, vocab, dtype=dtype), make_labels(2, vocab)
    want = outputs(row, labels)
    for shift in range(16 // dtype.itemsize):
        stride = vocab + 3
        buffer = torch.full((shift + 2 * stride,), math.nan, dtype=dtype)
        moved = buffer[shift:].view(2, stride)[:, :vocab]
        moved.copy_(row)
        for got, expected in zip(outputs(moved, labels), want):
            assert torch.equal(got, expected), f"row moved by {shift} elements"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_inplace_gradient_stays_inside_its_rows(emulated, dtype):
    vocab, stride = 1037, 1041
    labels = make_labels(3, vocab, ignored=0.3)
    want = outputs(make_logits(3, vocab, dtype=dtype), labels)[-1]
    for shift in range(16 // dtype.itemsize):
        buffer = torch.full((shift + 3 * stride + 8,), 77.0, dtype=dtype)
        logits = buffer[shift : shift + 3 * stride].view(3, stride)[:, :vocab]
        logits.copy_(make_logits(3, vocab, dtype=dtype))
        leaf, size, address, seen = torch.zeros((), requires_grad=True), buffer.numel(), logits.data_ptr(), []
        overlaid = Overlaid.apply(leaf, logits)
        del buffer, logits
        overlaid.register_hook(seen.append)
        stats = fa.token_stats(overlaid, labels, outputs=ALL, inplace_backward=True)
        (stats.logprob.sum() - 0.7 * stats.entropy.sum() + 0.1 * stats.logsumexp.sum()).backward()
        assert torch.equal(seen[0], want) and seen[0].data_ptr() == address, f"row moved by {shift} elements"
        buffer = seen[0].as_strided((size,), (1,), 0)
        outside = torch.ones_like(buffer, dtype=torch.bool)
        outside[shift : shift + 3 * stride].view(3, stride)[:, :vocab] = False
        assert bool((buffer[outside] == 77.0).all())


class Overlaid(torch.autograd.Function):
    """Gives a strided buffer a place in the graph without copying it."""

    @staticmethod
    def forward(ctx, leaf, buffer):
        ctx.mark_dirty(buffer)
        return buffer

    @staticmethod
    def backward(ctx, grad):
        return grad.new_zeros((), dtype=torch.float32), None


def test_guard_bands_notice_a_stray_write():
    memory = plugin.GuardedMemory()
    tensor = memory.empty((2, 3), torch.float32, torch.device("cpu"))
    assert bool(torch.isnan(tensor).all())
    memory.check("nothing")
    torch.as_strided(tensor, (1,), (1,), tensor.storage_offset() + 6).fill_(0.0)
    with pytest.raises(AssertionError, match="an op wrote outside"):
        memory.check("an op")


# --- more than a warp or a block holds ----------------------------------------------------------------------


def test_many_labels_per_row(emulated):
    """More labels than threads of a warp and of a block, with duplicates, forward and backward."""
    for count in (33, 300):
        x = make_logits(2, 700).requires_grad_()
        index = torch.randint(700, (2, count), generator=torch.Generator().manual_seed(count))
        index[:, 1] = index[:, 0]
        weights = torch.randn(2, count)
        got = fa.selective_log_softmax(x, index)
        truth = torch.log_softmax(x.detach().double().requires_grad_(), -1).gather(-1, index)
        assert_close(got, truth, torch.log_softmax(x, -1).gather(-1, index))
        true = x.detach().double().requires_grad_()
        want = gradient((torch.log_softmax(true, -1).gather(-1, index) * weights).sum(), true)
        assert_close(gradient((got * weights).sum(), x), want, scale=float(weights.abs().sum()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_backward_of_a_row_in_several_chunks(emulated, dtype):
    """Rows longer than one block's share of the backward pass, labels near the edges of the shares."""
    vocab = 20_003 if dtype == torch.bfloat16 else 10_001
    labels = torch.tensor([0, vocab - 1, 8191, 8192, 16383, 16384][: 6 if dtype == torch.bfloat16 else 4])
    check_rows(make_logits(len(labels), vocab, dtype=dtype), labels, ("logprob",))
    index = torch.stack([labels, labels.flip(0), labels], -1)
    x = make_logits(len(labels), vocab).requires_grad_()
    got = gradient(fa.selective_log_softmax(x, index).sum(), x)
    true = x.detach().double().requires_grad_()
    assert_close(got, gradient(torch.log_softmax(true, -1).gather(-1, index).sum(), true), scale=4.0)


def test_malformed_packing_gives_nan_and_writes_everything(emulated, monkeypatch):
    """On a GPU cu_seqlens and pairs are not checked: what depends on a wrong value must be NaN, never garbage
    or a stray access."""
    monkeypatch.setattr(OPS["sequence_sum_fwd"], "check", None)
    monkeypatch.setattr(OPS["preference_fwd"], "check", None)
    x = torch.ones(10)
    for cu in ([0, 4, 30], [0, 7, 3, 10], [-2, 4, 10]):
        sums = fa.sequence_sum(x, torch.tensor(cu, dtype=torch.int32))
        assert bool(torch.isnan(sums).any())
    lp = torch.full((10,), -1.0, requires_grad=True)
    monkeypatch.setattr(OPS["policy_fwd"], "check", None)
    for cu in ([0, 4, 30], [0, 7, 3], [2, 4, 10]):
        options = {
            "cu_seqlens": torch.tensor(cu, dtype=torch.int32),
            "mask": torch.ones(10, dtype=torch.bool),
        }
        loss = fa.policy_loss(lp, lp.detach(), torch.ones(2), loss="gspo", **options).loss
        assert bool(torch.isnan(torch.autograd.grad(loss, lp)[0]).any()), cu
    for cu, pairs in (
        ([0, 4, 30], [[0, 1]]),
        ([0, 4, 10], [[0, 5]]),
        ([0, 4, 10], [[-1, 1]]),
        ([2, 4, 10], [[0, 1]]),
    ):
        loss = fa.preference_loss(
            lp, lp.detach(), torch.tensor(cu, dtype=torch.int32), pairs=torch.tensor(pairs)
        ).loss
        grad = torch.autograd.grad(loss, lp)[0]
        assert bool(torch.isnan(grad).any()), (cu, pairs)


# --- the suite notices --------------------------------------------------------------------------------------

MISSING = {
    "the barrier before the labels' gradients are read": (
        "token_stats_bwd.cu",
        "token_stats_bwd.cu",
        ("    extra[place] = sum * scale;\n  }\n  __syncthreads();", "    extra[place] = sum * scale;\n  }"),
        lambda: check_several_labels("cpu"),
        0,
    ),
    "the barrier before the warps' states are merged": (
        "reduce.cuh",
        "token_stats_fwd.cu",
        ("  if (lane == 0) partial[warp] = s;\n  __syncthreads();", "  if (lane == 0) partial[warp] = s;"),
        lambda: check_accuracy_fp32("cpu", 5003, "normal"),
        0,
    ),
    "the cluster barrier before other blocks' states are read": (
        "reduce.cuh",
        "token_stats_fwd.cu",
        ("  if (cluster > 1) {\n    cluster_sync();", "  if (cluster > 1) {"),
        lambda: check_accuracy_fp32("cpu", 5003, "normal"),
        2,
    ),
    "the cluster barrier before a block exits": (
        "reduce.cuh",
        "token_stats_fwd.cu",
        ("    cluster_sync();   // no block", "    // no block"),
        lambda: check_accuracy_fp32("cpu", 5003, "normal"),
        8,
    ),
    "the barrier before the last block is known": (
        "sequence.cuh",
        "preference.cu",
        (
            "    *flag = atomicAdd(counter, 1u) == gridDim.x - 1;\n  }\n  __syncthreads();",
            "    *flag = atomicAdd(counter, 1u) == gridDim.x - 1;\n  }",
        ),
        lambda: compare_pairs(make_batch(5, seed=10), **PAIR_VARIANTS["preset dpo"]),
        0,
    ),
    "the barrier before the warps' sums are added": (
        "sequence.cuh",
        "policy.cu",
        (
            "    for (int i = 0; i < N; ++i) partial[warp * N + i] = x[i];\n  __syncthreads();",
            "    for (int i = 0; i < N; ++i) partial[warp * N + i] = x[i];",
        ),
        lambda: compare_policy(make_policy_batch("cpu", lengths=(700, 300)), loss="gspo"),
        0,
    ),
    "the barrier before the room for the warps' sums is used again": (
        "sequence.cuh",
        "policy.cu",
        (
            "  __syncthreads();   // the caller may use `partial` again",
            "  // the caller may use `partial` again",
        ),
        lambda: compare_policy(make_policy_batch("cpu", lengths=(700, 300)), loss="gspo"),
        0,
    ),
    "the barrier before the warps' maps are composed": (
        "gae.cu",
        "gae.cu",
        ("    maps[warp] = own;\n  }\n  __syncthreads();", "    maps[warp] = own;\n  }"),
        lambda: check_equals_the_loop("cpu", [0, 1500]),
        0,
    ),
    "the barrier before the other responses' numbers are read": (
        "listwise.cu",
        "listwise.cu",
        (
            "  if (i < count) aux[i] = list_aux(p, x, head, i);\n  __syncthreads();",
            "  if (i < count) aux[i] = list_aux(p, x, head, i);",
        ),
        lambda: check_the_longest_list("cpu", "plackett_luce"),
        0,
    ),
}


@pytest.mark.parametrize("what", MISSING)
def test_a_missing_barrier_is_noticed(emulated, what):
    assert_noticed(what, *MISSING[what])


def assert_noticed(what, name, kernels, edit, probe, size):
    """A barrier is taken out of a copy of file `name`, which the source `kernels` is compiled with; the check
    that covers it fails, under some of three interleavings."""
    probe()
    broken = build.load(build.build(edits={name: edit}, seen_by=(kernels,)))
    ffi.use_emulator(broken)
    broken.set_cluster_size(size)
    failures = 0
    for seed in (1, 2, 3):
        broken._emu_set_seed(seed)
        try:
            probe()
        except (AssertionError, RuntimeError):
            failures += 1
    assert failures, f"without {what} every test still passes"
