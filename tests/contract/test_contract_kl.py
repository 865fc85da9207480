"""The contract of the row ops with reference logits, on every backend: both log-probs, the exact KLs and
their gradients (row numbers in comments refer to the table of numeric edge cases that every kernel must
survive). Losses made of them: test_contract_kl_loss.py."""

from __future__ import annotations

import math

import pytest
import torch
from checks.row_pairs import (
    KLS,
    NAMES,
    check_bad_rows_of_either_model_stay_alone,
    check_identical_rows_are_zero,
    check_kl_accuracy_fp32,
    check_large_finite_mask_values,
    check_masked_row_pairs_are_zeros,
    check_mass_on_a_token_without_mass,
    check_minus_inf_in_both,
    check_row_pairs,
    check_shards_of_both_rows_merge,
    kl_magnitude,
    kl_truth,
    log_softmaxes,
    make_row_pair,
    total_of,
)

import fastalign as fa
from fastalign.testing import assert_close, gradient, make_labels, make_logits

# --- the definition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [("kl_policy_ref",), ("kl_ref_policy",), ("logprob", "entropy", "logsumexp", *NAMES)]
)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7, "logit_scale": 1.3}])
def test_gradcheck_of_the_definition(names, options):
    x, ref = make_row_pair(4, 37, dtype=torch.float64)
    x.requires_grad_()
    labels = make_labels(4, 37, ignored=0.3)

    def f(x):
        stats = fa.token_stats(x, labels, ref_logits=ref, outputs=names, **options)
        return tuple(getattr(stats, n) for n in names)

    with fa.use_backend("reference"):
        assert torch.autograd.gradcheck(f, (x,))
        truth = kl_truth(x, ref, labels, **options)
        scale = kl_magnitude(x.detach(), ref, **options)
        for name, got in zip(names, f(x)):
            if name in truth:
                assert_close(got, truth[name], what=name, scale=scale)
                if name != "ref_logprob":
                    g, want = (
                        torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (got, truth[name])
                    )
                    assert_close(g, want, what=name, scale=scale.unsqueeze(-1))


# --- accuracy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "peaked", "offset"])
@pytest.mark.parametrize("vocab", (1, 2, 3, 127, 129, 1000, 5003))
def test_kl_accuracy_fp32(backend, device, slow_backend, vocab, kind):
    check_kl_accuracy_fp32(device, min(vocab, 1500) if slow_backend else vocab, kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab", (3, 129, 1000))
def test_kl_accuracy_other_dtypes(backend, device, row_dtypes, vocab, dtype):  # row 17
    if dtype in row_dtypes:
        check_row_pairs(
            *make_row_pair(3, vocab, dtype=dtype, device=device), make_labels(3, vocab, device=device)
        )


@pytest.mark.parametrize(
    "names",
    [
        ("kl_policy_ref",),
        ("kl_ref_policy",),
        ("ref_logprob",),
        ("logprob", "ref_logprob", "kl_ref_policy"),
        NAMES,
    ],
)
def test_each_output_alone_and_together(backend, device, names):
    check_row_pairs(*make_row_pair(3, 700, device=device), make_labels(3, 700, device=device), names)


@pytest.mark.parametrize("vocab", (32000, 50257, 129920, 262145))
def test_kl_accuracy_large_vocabularies(backend, device, slow_backend, vocab):
    vocab = vocab // 64 + vocab % 2 if slow_backend else vocab
    check_row_pairs(
        *make_row_pair(2, vocab, dtype=torch.bfloat16, device=device), make_labels(2, vocab, device=device)
    )


@pytest.mark.parametrize(
    "scale,cap,temperature", [(1.0, 30.0, 1.0), (0.5, 5.0, 0.6), (3.0, None, 2.0), (1.0, None, 1e-2)]
)
def test_scale_softcap_temperature_of_both_rows(
    backend, device, scale, cap, temperature
):  # rows 15, 16: both rows alike
    x, ref = make_row_pair(3, 300, device=device)
    check_row_pairs(
        x * 3,
        ref * 3,
        make_labels(3, 300, device=device),
        logit_scale=scale,
        softcap=cap,
        temperature=temperature,
    )


@pytest.mark.parametrize("offset,ref_offset", [(1e2, 0.0), (0.0, -1e4), (1e6, 1e6), (-1e6, 1e4)])
def test_common_offsets_cancel(backend, device, offset, ref_offset):  # row 9, for each row its own
    x, ref = make_row_pair(3, 501, device=device)
    x, ref = (x + offset).requires_grad_(), ref + ref_offset
    truth = kl_truth(x.double(), ref.double(), None)
    for name in KLS:
        value = getattr(fa.token_stats(x, ref_logits=ref, outputs=(name,)), name)
        assert float((value.double() - truth[name]).detach().abs().max()) <= 2e-6, name
        got, want = gradient(value.sum(), x), torch.autograd.grad(truth[name].sum(), x, retain_graph=True)[0]
        assert float((got - want).abs().max()) <= 2e-6, name


# --- nearly equal rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [7, 1031, 2500])
def test_identical_rows_are_exactly_zero(backend, device, vocab, dtype):  # row 26
    check_identical_rows_are_zero(device, vocab, dtype)


@pytest.mark.parametrize("distance", [1e-4, 2e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearly_equal_rows(backend, device, dtype, distance):  # row 26; E8
    """Values never below -1e-7; at a total variation of 0.02 the gradient is right to 0.3 %."""
    x = make_logits(4, 900, device=device)
    noise = torch.randn(4, 900, generator=torch.Generator().manual_seed(5)).to(device)
    if dtype == torch.bfloat16:  # differences that bf16 can hold: some logits one step away
        x = x.to(dtype)
        ref = torch.where(noise.abs() < 2.5 - 50 * distance, x, x * (1 + 2**-7))
    else:
        ref = x + 2.5 * distance * noise
    log_p, log_q = log_softmaxes(x, ref, torch.float64)
    if dtype == torch.float32:
        assert 0.4 * distance < float((log_p.exp() - log_q.exp()).abs().sum(-1).mean() / 2) < 2.5 * distance
    leaf, true = x.clone().requires_grad_(), x.double().requires_grad_()
    truth = kl_truth(true, ref.double(), None)
    for name in KLS:
        value = getattr(fa.token_stats(leaf, ref_logits=ref, outputs=(name,)), name)
        assert float(value.detach().min()) >= -1e-7
        assert float((value.double() - truth[name]).detach().abs().max()) <= 3e-7
        if distance == 2e-2:
            got, want = (
                gradient(value.sum(), leaf).double(),
                torch.autograd.grad(truth[name].sum(), true, retain_graph=True)[0],
            )
            assert float((got - want).norm() / want.norm()) <= 3e-3, name


# --- masked, infinite and bad rows --------------------------------------------------------------------------


def test_masked_pairs_of_rows_are_exact_zeros(backend, device):  # rows 2, 4
    check_masked_row_pairs_are_zeros(device)


@pytest.mark.parametrize("vocab", [9, 600, 2100])
def test_minus_inf_in_both(backend, device, vocab):  # row 10, E16
    check_minus_inf_in_both(device, vocab)


def test_mass_on_a_token_without_mass(backend, device):  # row 27
    check_mass_on_a_token_without_mass(device)


@pytest.mark.parametrize("bad", [math.nan, math.inf, "all -inf"])
@pytest.mark.parametrize("where", ["policy", "reference"])
def test_bad_rows_of_either_model_stay_alone(backend, device, bad, where):  # rows 12, 13
    check_bad_rows_of_either_model_stay_alone(device, bad, where)


def test_extreme_peaks(backend, device):  # row 7
    x, ref = torch.zeros(3, 400, device=device), torch.zeros(3, 400, device=device)
    x[0, 3] = x[1, 3] = ref[0, 3] = ref[1, 7] = x[2, 3] = 1e4
    leaf = x.requires_grad_()
    stats = fa.token_stats(leaf, ref_logits=ref, outputs=KLS)
    assert stats.kl_policy_ref.tolist() == pytest.approx([0.0, 1e4, math.log(400)], rel=3e-7, abs=2e-7)
    assert stats.kl_ref_policy.tolist()[:2] == pytest.approx([0.0, 1e4], rel=3e-7, abs=2e-7)
    for name in KLS:
        g = torch.autograd.grad(getattr(stats, name).sum(), leaf, retain_graph=True)[0]
        assert bool(torch.isfinite(g).all()) and float(g[0].abs().max()) <= 2e-7
        want = [1.0, -1.0] if name == "kl_ref_policy" else [0.0, 0.0]
        assert g[1, [3, 7]].tolist() == pytest.approx(want, abs=2e-3 if name == "kl_policy_ref" else 2e-7)


def test_large_finite_mask_values(backend, device):
    check_large_finite_mask_values(device)


# --- layouts, repeatability ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_of_both_rows(backend, device, dtype):  # row 23
    base, other = (z.view(2, 4, 45) for z in make_row_pair(2 * 4, 45, dtype=dtype, device=device))
    padded = torch.full((4, 2, 51), math.nan, dtype=dtype, device=device)
    padded[..., 2:47] = other.transpose(0, 1)
    pairs = [
        (base, padded[..., 2:47].transpose(0, 1)),
        (padded[..., 2:47].transpose(0, 1), base),
        (base[:, ::2], other[:, ::2].contiguous()),
        (base[..., ::2], other[..., ::2]),
        (base, other[:1].expand(2, 4, 45)),
    ]
    for x, ref in pairs:
        leaves = [x.detach().requires_grad_(), x.detach().contiguous().clone().requires_grad_()]
        results = []
        for leaf, reference in zip(leaves, (ref, ref.contiguous())):
            stats = fa.token_stats(leaf, ref_logits=reference, outputs=KLS)
            results.append(
                [
                    *(getattr(stats, n) for n in KLS),
                    gradient(stats.kl_policy_ref.sum() - stats.kl_ref_policy.sum(), leaf),
                ]
            )
        assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1037, 2600])
def test_kl_batch_invariance_and_alignment(backend, device, vocab, dtype):  # rows 20, 42; E10
    """A row's result is the same bits alone, in any batch, at any address of either row, and in every run."""
    if backend == "reference" and vocab > 1037:
        return  # PyTorch's own sums of longer rows depend on the address
    row, ref_row = make_row_pair(1, vocab, dtype=dtype, device=device)

    def run(logits, ref_logits):
        leaf = logits.detach().requires_grad_()
        stats = fa.token_stats(leaf, ref_logits=ref_logits, outputs=KLS)
        return *(getattr(stats, n)[-1] for n in KLS), gradient(
            stats.kl_policy_ref.sum() + stats.kl_ref_policy.sum(), leaf
        )[-1]

    want = run(row, ref_row)
    for skip, ref_skip, rows in ((0, 0, 3), (1, 0, 1), (0, 3, 1), (5, 2, 3), (8, 7, 2)):
        placed = []
        for content, before in ((row, skip), (ref_row, ref_skip)):
            buffer = torch.randn(before + rows * vocab, device=device).to(dtype)
            placed.append(buffer[before:].view(rows, vocab))
            placed[-1][-1] = content[0]
        assert all(torch.equal(a, b) for a, b in zip(run(*placed), want)), (skip, ref_skip, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [7, 130, 1031])
def test_kl_inplace_backward_equals_out_of_place(backend, device, vocab, dtype):  # E21
    labels = make_labels(4, vocab, ignored=0.3, device=device)
    grads = []
    for inplace in (False, True):
        x, ref = make_row_pair(4, vocab, dtype=dtype, device=device)
        leaf = x.requires_grad_()
        logits = leaf * 1.0
        stats = fa.token_stats(
            logits, labels, ref_logits=ref, outputs=("logprob", *KLS), inplace_backward=inplace
        )
        total_of(stats._asdict(), {"logprob": 1.0, "kl_policy_ref": 0.3, "kl_ref_policy": -0.2}).backward()
        assert logits.shape == ((4, 0) if inplace else (4, vocab))
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("cuts", [(30,), (1, 2, 3), (16, 64, 80)])
@pytest.mark.parametrize("masked", [(), ("policy",), ("policy", "reference")])
def test_vocabulary_shards_of_both_rows_merge(
    backend, device, cuts, masked
):  # row 43 for one rank, both rows
    check_shards_of_both_rows_merge(device, cuts, masked)


def test_ref_logprobs_of_several_labels(backend, device):  # A9
    x, ref = make_row_pair(4, 60, device=device)
    index = torch.randint(60, (4, 3), generator=torch.Generator().manual_seed(1)).to(device)
    index[1, 2] = -100
    stats = fa.token_stats(x.requires_grad_(), index, ref_logits=ref, outputs=("logprob", *NAMES))
    want = torch.log_softmax(ref.double(), -1).gather(-1, index.clamp(min=0)).masked_fill(index == -100, 0.0)
    assert_close(
        stats.ref_logprob, want, torch.log_softmax(ref, -1).gather(-1, index.clamp(min=0)), scale=8.0
    )
    true = x.detach().double().requires_grad_()
    log_p = torch.log_softmax(true, -1).gather(-1, index.clamp(min=0)).masked_fill(index == -100, 0.0)
    truth = (log_p.sum() + kl_truth(true, ref.double(), None)["kl_policy_ref"].sum(), true)
    assert_close(gradient(stats.logprob.sum() + stats.kl_policy_ref.sum(), x), gradient(*truth), scale=8.0)


def test_reference_is_a_constant(backend, device):
    x, ref = (z.requires_grad_() for z in make_row_pair(2, 20, device=device))
    loss = fa.token_kl(x, ref).sum() + fa.token_kl_loss(x, ref, torch.ones(2, device=device)).loss
    assert torch.autograd.grad(loss, (x, ref), allow_unused=True)[1] is None
    assert not fa.token_kl(x.detach(), ref).requires_grad


def test_no_rows_and_one_word(backend, device):  # rows 1, 6
    x = torch.empty(0, 30, device=device, requires_grad=True)
    assert gradient(fa.token_kl(x, torch.empty(0, 30, device=device)).sum(), x).shape == (0, 30)
    assert float(fa.token_kl_loss(x, x.detach(), torch.ones((), device=device)).loss) == 0
    x = make_logits(3, 1, device=device).requires_grad_()
    for direction in ("policy_ref", "ref_policy"):
        kl = fa.token_kl(x, torch.zeros(3, 1, device=device), direction=direction)
        assert kl.tolist() == pytest.approx([0.0] * 3, abs=2e-7)
        assert gradient(kl.sum(), x).flatten().tolist() == pytest.approx([0.0] * 3, abs=2e-7)


def test_kl_makes_no_vocabulary_sized_temporary(backend, device):  # A1
    if backend == "reference":
        return
    from fastalign.runtime import ffi

    taken, empty = [], ffi.empty
    try:
        ffi.empty = lambda shape, dtype, device: taken.append(math.prod(shape)) or empty(shape, dtype, device)
        fa.token_stats(
            *make_row_pair(4, 3000, device=device)[:1],
            ref_logits=make_logits(4, 3000, device=device),
            outputs=KLS,
        )
    finally:
        ffi.empty = empty
    assert taken and sum(taken) < 4 * 40


# --- bad arguments ------------------------------------------------------------------------------------------


def test_kl_errors_name_the_argument(backend, device):
    x, ref = make_row_pair(3, 10, device=device)
    one = torch.ones((), device=device)
    for error, words, call in (
        (
            ValueError,
            "ref_logits is required for outputs kl_policy_ref",
            lambda: fa.token_stats(x, outputs=("kl_policy_ref",)),
        ),
        (
            ValueError,
            "labels is required for outputs ref_logprob",
            lambda: fa.token_stats(x, ref_logits=ref, outputs=("ref_logprob",)),
        ),
        (ValueError, "ref_logits has shape", lambda: fa.token_kl(x, ref[:2])),
        (
            TypeError,
            "ref_logits is torch.bfloat16 but logits is torch.float32",
            lambda: fa.token_kl(x, ref.bfloat16()),
        ),
        (TypeError, "ref_logits must be a tensor", lambda: fa.token_kl_loss(x, None, one)),
        (
            ValueError,
            "direction='forward' is unknown; legal: policy_ref, ref_policy",
            lambda: fa.token_kl(x, ref, direction="forward"),
        ),
        (ValueError, "coef has shape", lambda: fa.token_kl_loss(x, ref, one.expand(2))),
        (TypeError, "coef must be a tensor", lambda: fa.token_kl_loss(x, ref, 0.1)),
        (ValueError, "temperature", lambda: fa.token_kl(x, ref, temperature=0.0)),
    ):
        with pytest.raises(error, match=words):
            call()
