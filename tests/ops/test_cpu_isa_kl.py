"""The CPU kernels over two rows on every instruction set of this machine: the contract's checks at the edges
of blocks and chunks, and the same bits under other thread counts and when the gradient is made in the forward
pass."""

from __future__ import annotations

import math

import pytest
import torch
from checks.row_pairs import KLS, NAMES, check_row_pairs, kl_truth, make_row_pair

import fastalign as fa
from fastalign import _C
from fastalign.testing import assert_close, gradient, make_labels

BLOCK, CHUNK = 2048, 16384  # csrc/cpu/rows.h


@pytest.fixture(params=_C.cpu_isas())
def isa(request):
    _C.set_cpu_isa(request.param)
    with fa.use_backend("cpu"):
        yield request.param
    _C.set_cpu_isa("auto")


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [31, BLOCK - 1, CHUNK + 1])
def test_accuracy(isa, vocab, dtype, softcap):
    x, ref = make_row_pair(2, vocab, dtype=dtype)
    for names in (KLS[:1], KLS[1:], ("logprob", "entropy", "log_sum_sq_probs", *NAMES)):
        check_row_pairs(x, ref, make_labels(2, vocab), names, softcap=softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [BLOCK + 33, CHUNK + BLOCK + 1])
def test_whole_blocks_without_mass(isa, vocab, dtype):
    """-inf over the first block or chunk in both models, in one of them, in neither: 0 * inf nowhere, +inf
    where it belongs."""
    hidden = vocab - 30
    for policy, reference in ((True, True), (True, False), (False, True)):
        x, ref = make_row_pair(2, vocab, dtype=dtype)
        if policy:
            x[0, :hidden] = -math.inf
        if reference:
            ref[0, :hidden] = -math.inf
        stats = fa.token_stats(x, ref_logits=ref, outputs=KLS)
        truth = kl_truth(x, ref, None)
        for name in KLS:
            assert_close(getattr(stats, name), truth[name], what=name, scale=16.0)
        assert math.isinf(float(truth["kl_policy_ref"][0])) == (reference and not policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_fusion_change_no_bit(isa, dtype):
    vocab, before = 3 * CHUNK + 65, torch.get_num_threads()
    x, ref = make_row_pair(3, vocab, dtype=dtype)
    results = []
    try:
        for threads, rows in (
            (1, 3),
            (2, 3),
            (4, 3),
            (2, 1),
        ):  # fewer rows than threads: a row's chunks are shared out
            torch.set_num_threads(threads)
            leaf = x[:rows].clone().requires_grad_()
            stats = fa.token_stats(leaf, ref_logits=ref[:rows], outputs=KLS)
            out = fa.token_kl_loss(leaf, ref[:rows], torch.full((rows,), 0.3), direction="ref_policy")
            separate = torch.autograd.grad(stats.kl_ref_policy.sum() * 0.3, leaf, retain_graph=True)[0]
            assert torch.equal(gradient(out.loss, leaf), separate) and torch.equal(
                out.kl, stats.kl_ref_policy
            )
            results.append(
                [
                    stats.kl_policy_ref[:1],
                    stats.kl_ref_policy[:1],
                    gradient(stats.kl_policy_ref.sum(), leaf)[:1],
                    separate[:1],
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0]))


def test_instruction_sets_agree():
    x, ref = make_row_pair(3, 20257, dtype=torch.bfloat16)
    results = {}
    for name in _C.cpu_isas():
        _C.set_cpu_isa(name)
        with fa.use_backend("cpu"):
            results[name] = fa.token_stats(x, ref_logits=ref, outputs=KLS)
    _C.set_cpu_isa("auto")
    for stats in results.values():
        for name in KLS:
            assert float((getattr(stats, name) - getattr(results["generic"], name)).abs().max()) <= 5e-7
