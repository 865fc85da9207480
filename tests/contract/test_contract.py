"""The contract of the row ops, on every backend: accuracy against fp64 within the plain computation's own
error, and the edge cases (row numbers in comments refer to the table of numeric edge cases that every kernel
must survive)."""

from __future__ import annotations

import math

import pytest
import torch
from checks.rows import (
    ALL,
    DIFFERENTIABLE,
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

import fastalign as fa
from fastalign.runtime.backends import BackendError
from fastalign.testing import (
    assert_close,
    gradient,
    gradient_scale,
    make_labels,
    make_logits,
    token_stats_truth,
)

VOCABS = (1, 2, 3, 127, 128, 129, 1000, 5003)
LARGE_VOCABS = (32000, 50257, 129920, 151936, 262144, 262145)


# --- accuracy -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "peaked", "flat", "offset"])
@pytest.mark.parametrize("vocab", VOCABS)
def test_accuracy_fp32(backend, device, vocab, kind):  # rows 5-9
    check_accuracy_fp32(device, vocab, kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab", (3, 129, 1000, 4099))
def test_accuracy_other_dtypes(backend, device, row_dtypes, vocab, dtype):  # row 17
    logits, labels = make_logits(4, vocab, dtype=dtype, device=device), make_labels(4, vocab, device=device)
    if dtype not in row_dtypes:
        with pytest.raises(BackendError, match="float64"):
            fa.token_logprobs(logits, labels)
        return
    check_rows(logits, labels)


@pytest.mark.parametrize("vocab", LARGE_VOCABS)
def test_accuracy_large_vocabularies(backend, device, slow_backend, vocab):  # row 5, E1, E5
    if slow_backend:
        vocab = vocab // 32 + vocab % 2
    for dtype, kind in ((torch.bfloat16, "normal"), (torch.float32, "peaked")):
        check_rows(
            make_logits(2, vocab, dtype=dtype, device=device, kind=kind), make_labels(2, vocab, device=device)
        )


@pytest.mark.parametrize("offset", [0.0, 1e2, -1e4, 1e4, 1e6, -1e6])
def test_common_offset_cancels(backend, device, offset):  # row 9, E6
    x = make_logits(4, 1003, device=device) + offset
    labels = make_labels(4, 1003, device=device)
    x.requires_grad_()
    stats = fa.token_stats(x, labels, outputs=("logprob", "entropy"))
    true = x.detach().double().requires_grad_()
    truth = token_stats_truth(true, labels)
    for name in ("logprob", "entropy"):
        assert float((getattr(stats, name).double() - truth[name]).abs().max()) <= 2e-6, name
    got = torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), x)[0]
    want = gradient(truth["logprob"].sum() + truth["entropy"].sum(), true)
    assert float((got.double() - want).abs().max()) <= 2e-6


@pytest.mark.parametrize(
    "scale,cap,temperature",
    [(1.0, 30.0, 1.0), (0.5, 5.0, 0.6), (3.0, None, 2.0), (0.0625, 2.0, 1e-2), (1.0, None, 1e-2)],
)
def test_scale_softcap_temperature(backend, device, scale, cap, temperature):  # rows 15, 16; E17, E18
    check_scale_softcap_temperature(device, scale, cap, temperature)


def test_softcap_of_huge_logits(backend, device):  # row 15
    x = (make_logits(3, 257, device=device) * 300).requires_grad_()
    labels = make_labels(3, 257, device=device)
    stats = fa.token_stats(x, labels, outputs=("logprob", "logsumexp"), softcap=30.0)
    truth = token_stats_truth(x.detach(), labels, softcap=30.0)
    assert_close(
        stats.logprob,
        truth["logprob"],
        token_stats_truth(x.detach(), labels, softcap=30.0, dtype=torch.float32)["logprob"],
    )
    assert float(stats.logsumexp.max()) <= 30.0 + math.log(257)
    assert bool(torch.isfinite(gradient(stats.logprob.sum(), x)).all())


# --- gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(n,) for n in DIFFERENTIABLE] + [DIFFERENTIABLE])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7, "logit_scale": 1.3}])
def test_gradcheck(backend, device, row_dtypes, names, options):  # row 40, E19
    if torch.float64 not in row_dtypes:
        check_rows(
            make_logits(4, 37, device=device),
            make_labels(4, 37, ignored=0.3, device=device),
            names,
            **options,
        )
        return
    x = make_logits(4, 37, dtype=torch.float64, device=device).requires_grad_()
    labels = make_labels(4, 37, ignored=0.3, device=device)

    def f(x):
        stats = fa.token_stats(x, labels, outputs=names, **options)
        return tuple(getattr(stats, n) for n in names)

    assert torch.autograd.gradcheck(f, (x,))


@pytest.mark.parametrize("upstream", [0.0, -3.0, 65536.0])
def test_gradient_is_linear_in_upstream(backend, device, upstream):  # row 18
    x = make_logits(3, 500, dtype=torch.float16, device=device).requires_grad_()
    labels = make_labels(3, 500, device=device)
    half = upstream / 2  # 65536 (1 - p) itself is beyond fp16
    truth = (
        gradient(token_stats_truth(t := x.detach().double().requires_grad_(), labels)["logprob"].sum(), t)
        * half
    )
    got = gradient((fa.token_logprobs(x, labels) * half).sum(), x)
    assert_close(got, truth, scale=gradient_scale(x.detach(), labels) * abs(half))


def test_gradient_rows_sum_to_zero(backend, device):  # row 5
    x = make_logits(4, 1001, device=device).requires_grad_()
    rows = gradient(fa.token_logprobs(x, make_labels(4, 1001, device=device)).sum(), x).double().sum(-1)
    assert float(rows.abs().max()) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1, 7, 130, 1031])
def test_inplace_backward_equals_out_of_place(backend, device, vocab, dtype):  # E21
    labels = make_labels(6, vocab, ignored=0.3, device=device)
    grads = []
    for inplace in (False, True):
        leaf = make_logits(6, vocab, dtype=dtype, device=device).requires_grad_()
        logits = leaf * 1.0
        stats = fa.token_stats(logits, labels, outputs=("logprob", "entropy"), inplace_backward=inplace)
        seen = [logits.data_ptr()]
        logits.register_hook(lambda g, seen=seen: seen.append(g.data_ptr()))
        (stats.logprob.sum() - 0.3 * stats.entropy.sum()).backward()
        grads.append(leaf.grad)
        assert (seen[0] == seen[1]) == inplace
        assert logits.shape == ((6, 0) if inplace else (6, vocab))
    assert torch.equal(*grads)


def test_inplace_backward_refuses_and_protects(backend, device):
    labels = make_labels(4, 9, device=device)
    leaf = make_logits(4, 9, device=device).requires_grad_()
    with pytest.raises(ValueError, match="leaf"):
        fa.token_logprobs(leaf, labels, inplace_backward=True)
    with pytest.raises(ValueError, match="share memory"):
        fa.token_logprobs((leaf[:1] * 1).expand(4, 9), labels, inplace_backward=True)
    logits = leaf * 1.0
    out = fa.token_logprobs(logits, labels, inplace_backward=True).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|version"):
        out.backward()
    logits = leaf * 1.0
    other = (logits * logits).sum()
    fa.token_logprobs(logits, labels, inplace_backward=True).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|version"):
        other.backward()


def test_grad_modes(backend, device):  # row 41, F3
    x, labels = make_logits(3, 50, device=device), make_labels(3, 50, device=device)
    want = fa.token_logprobs(x, labels)
    assert not want.requires_grad
    with torch.no_grad():
        assert torch.equal(want, fa.token_logprobs(x.clone().requires_grad_(), labels))
    with torch.inference_mode():
        assert torch.equal(want, fa.token_logprobs(x, labels))
    stats = fa.token_stats(x.clone().requires_grad_(), labels, outputs=ALL)
    assert [getattr(stats, n).requires_grad for n in ALL] == [True, True, True, False, False, False]


# --- masking and degenerate rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["labels", "mask"])
def test_masked_rows_are_exact_zeros_whatever_they_hold(backend, device, how):  # rows 2, 4; J5
    check_masked_rows_are_zeros(device, how)


def test_masked_rows_may_hold_any_label(backend, device):
    labels = torch.tensor([1, 10**9, -7], device=device)
    mask = torch.tensor([True, False, False], device=device)
    stats = fa.token_stats(make_logits(3, 20, device=device), labels, mask=mask, outputs=("logprob",))
    assert float(stats.logprob[0]) < 0 and stats.logprob[1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("vocab", [9, 600, 5003])
def test_minus_inf_logits(backend, device, vocab):  # row 10, E16
    check_minus_inf_logits(device, vocab)


def test_label_on_a_minus_inf_logit(backend, device):  # row 11
    x = make_logits(2, 40, device=device)
    x[0, 5] = -math.inf
    x.requires_grad_()
    lp = fa.token_logprobs(x, torch.tensor([5, 5], device=device))
    assert float(lp[0]) == -math.inf and math.isfinite(float(lp[1]))
    assert bool(torch.isfinite(gradient(lp.sum(), x)).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, "all -inf"])
@pytest.mark.parametrize("vocab", [5, 700])
def test_bad_rows_stay_alone(backend, device, vocab, bad):  # rows 12, 13
    check_bad_rows_stay_alone(device, vocab, bad)


def test_extreme_peak(backend, device):  # row 7
    x = torch.zeros(2, 1000, device=device)
    x[:, 3] = 1e4
    x.requires_grad_()
    labels = torch.tensor([3, 7], device=device)
    stats = fa.token_stats(x, labels, outputs=("logprob", "entropy"))
    assert stats.logprob.tolist() == pytest.approx(
        [0.0, -1e4], rel=3e-7, abs=2e-7
    ) and stats.entropy.tolist() == pytest.approx([0, 0], abs=2e-7)
    g = gradient(stats.logprob.sum() + stats.entropy.sum(), x)
    assert (
        bool(torch.isfinite(g).all())
        and float(g[0].abs().max()) <= 2e-7
        and g[1, [3, 7]].tolist() == pytest.approx([-1.0, 1.0], abs=2e-7)
    )


def test_one_word_vocabulary(backend, device):  # row 6
    x = make_logits(3, 1, device=device).requires_grad_()
    stats = fa.token_stats(x, torch.zeros(3, dtype=torch.long, device=device), outputs=ALL)
    for name, want in (("logprob", 0.0), ("entropy", 0.0), ("log_sum_sq_probs", 0.0), ("is_top1", 1.0)):
        assert getattr(stats, name).tolist() == pytest.approx([want] * 3, abs=2e-7), name
    assert gradient(stats.logprob.sum() + stats.entropy.sum(), x).flatten().tolist() == pytest.approx(
        [0.0] * 3, abs=2e-7
    )


def test_no_rows(backend, device):  # row 1, G8
    x = torch.empty(0, 30, device=device, requires_grad=True)
    stats = fa.token_stats(x, torch.empty(0, dtype=torch.long, device=device), outputs=ALL)
    assert all(getattr(stats, n).shape == (0,) for n in ALL)
    assert gradient(stats.logprob.sum() + stats.entropy.sum(), x).shape == (0, 30)


def test_top1_is_argmax(backend, device):
    check_top1_is_argmax(device)


@pytest.mark.parametrize("with_ref", [False, True])
def test_top1_is_argmax_where_the_cap_makes_equals(backend, device, with_ref):  # row 15
    x = torch.full((6, 700), 3.0)
    x[0, :3] = torch.tensor([300.0, 400.0, 3.0])
    x[1, 20], x[1, 690] = 300.0, 400.0  # far apart: by different threads, in different tiles
    x[2, 20], x[2, 690] = 400.0, 300.0
    x[3, 600], x[3, 650] = 400.0, 400.0  # a tie: the first
    x[4] = -math.inf
    x[5, 1:] = -math.inf
    x, places = x.to(device), x.argmax(-1).to(device)
    assert places.tolist() == [1, 690, 20, 600, 0, 0]
    for labels in (places, places + 1):
        stats = fa.token_stats(x, labels, ref_logits=x if with_ref else None, softcap=30.0,
                               outputs=("is_top1", "logprob", *(("kl_policy_ref",) if with_ref else ())))  # fmt: skip
        assert torch.equal(stats.is_top1, (labels == places).float())
        assert bool(torch.isfinite(stats.logprob).all())  # -inf is an ordinary logit behind the cap


# --- layouts ------------------------------------------------------------------------------------------------


def _layouts(device):
    base = torch.randn(3, 6, 45, generator=torch.Generator().manual_seed(5)).to(device)
    yield "shifted", base[:, :-1]
    yield "every other row", base[:, ::2]
    yield "batch slice", base[1:, 1:4]
    yield "transposed batch", base.transpose(0, 1)
    yield "strided vocabulary", base[..., ::2]
    yield (
        "unaligned",
        torch.randn(1 + 3 * 45, generator=torch.Generator().manual_seed(6)).to(device)[1:].view(3, 45),
    )
    yield "expanded", base[:1].expand(4, 6, 45)
    yield "three strided dims", torch.randn(2, 3, 4, 9).to(device)[:, ::2, ::3]
    yield "one row", base[0, 0]


@pytest.mark.parametrize("which", range(9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(backend, device, which, dtype):  # row 23, F4
    name, x = list(_layouts(device))[which]
    if dtype != torch.float32:
        x = (
            torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x)
            if name != "expanded"
            else x.to(dtype)
        )
    labels = make_labels(math.prod(x.shape[:-1]), x.shape[-1], device=device).view(x.shape[:-1])
    a, b = x.detach().requires_grad_(), x.detach().contiguous().clone().requires_grad_()
    got, want = (fa.token_stats(t, labels, outputs=("logprob", "entropy")) for t in (a, b))
    assert got.logprob.shape == labels.shape
    assert torch.equal(got.logprob, want.logprob) and torch.equal(got.entropy, want.entropy), name
    assert torch.equal(
        gradient(got.logprob.sum() + got.entropy.sum(), a),
        gradient(want.logprob.sum() + want.entropy.sum(), b),
    ), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1037, 5003])  # within one tile of every backend, and over several
def test_batch_invariance_and_alignment(backend, device, slow_backend, vocab, dtype):  # rows 20, 42; E10
    """A row's result is the same bits alone, in any batch, at any address, and in every run."""
    if backend == "reference" and vocab > 1037:
        return  # PyTorch's own sums of longer rows depend on the address
    row = make_logits(1, vocab, dtype=dtype, device=device)[0]
    label = torch.tensor([17], device=device)

    def run(logits, labels):
        logits = logits.detach().requires_grad_()
        stats = fa.token_stats(logits, labels, outputs=("logprob", "entropy", "log_sum_sq_probs"))
        g = gradient(stats.logprob.sum() + stats.entropy.sum(), logits)
        return stats.logprob[-1], stats.entropy[-1], stats.log_sum_sq_probs[-1], g[-1]

    want = run(row.unsqueeze(0), label)
    # elements of misalignment, and rows with those before it
    for before in (1, 8) if slow_backend else (0, 1, 2, 3, 5, 7, 8):
        for rows in (1, 3)[before % 2 :] if slow_backend else (1, 3):
            buffer = torch.randn(before + rows * vocab, device=device).to(dtype)
            logits = buffer[before:].view(rows, vocab)
            logits[-1] = row
            got = run(logits, label.expand(rows))
            for a, b in zip(got, want):
                assert torch.equal(a, b), (before, rows)


def test_topk_index(backend, device):  # A9
    check_several_labels(device)


def test_one_label_given_as_a_list_of_one_keeps_its_dim(backend, device):
    x, ref = (
        make_logits(6, 30, device=device).view(2, 3, 30),
        make_logits(6, 30, device=device, seed=1).view(2, 3, 30),
    )
    labels = make_labels(6, 30, device=device).view(2, 3, 1)
    stats = fa.token_stats(
        x, labels, ref_logits=ref, outputs=("logprob", "ref_logprob", "entropy", "is_top1")
    )
    assert stats.logprob.shape == stats.ref_logprob.shape == (
        2,
        3,
        1,
    ) and stats.entropy.shape == stats.is_top1.shape == (2, 3)
    flat = fa.token_stats(x, labels[..., 0], ref_logits=ref, outputs=("logprob", "ref_logprob"))
    assert flat.logprob.shape == (2, 3)
    assert torch.equal(stats.logprob[..., 0], flat.logprob) and torch.equal(
        stats.ref_logprob[..., 0], flat.ref_logprob
    )
    one, row = x[0, 0], labels[0, 0]
    for index in (row, row[0]):
        got = fa.selective_log_softmax(one, index)
        assert got.shape == index.shape and torch.equal(got.flatten(), stats.logprob[0, 0])


def test_topk_with_ignored_entries(backend, device):
    x = make_logits(3, 20, device=device).requires_grad_()
    labels = torch.tensor([[1, -100], [2, 3], [-100, -100]], device=device)
    stats = fa.token_stats(x, labels, outputs=("logprob", "entropy"))
    assert stats.logprob.shape == (3, 2)
    assert (
        stats.logprob[0, 1] == 0
        and (stats.logprob[2] == 0).all()
        and stats.entropy[2] == 0
        and stats.entropy[0] > 0
    )
    plain = torch.log_softmax(x.double(), -1)
    want = plain[0, 1] + plain[1, 2] + plain[1, 3]
    assert_close(gradient(stats.logprob.sum(), x), gradient(want, x), scale=2.0)


def test_label_out_of_range(backend, device):  # row 14, F6
    x = make_logits(3, 20, device=device)
    for label in (20, -1, -101, 10**12):
        labels = torch.tensor([1, label, 2], device=device)
        if device == "cpu":
            with pytest.raises(IndexError, match=r"labels\[1\]"):
                fa.token_logprobs(x, labels)
        else:
            lp = fa.token_logprobs(x, labels)
            assert math.isnan(float(lp[1])) and bool(torch.isfinite(lp[[0, 2]]).all())


@pytest.mark.parametrize("cuts", [(30,), (1, 2, 3), (16, 64, 80)])
def test_vocabulary_shards_merge(backend, device, cuts):  # row 43 for one rank: the row state is a monoid
    check_shards_merge(device, cuts)


def test_no_vocabulary_sized_temporary(
    backend, device
):  # A1: only kernels; the reference is the plain computation
    if backend == "reference":
        return
    from fastalign.runtime import ffi

    taken, plain = [], ffi.empty
    try:
        ffi.empty = lambda shape, dtype, device: taken.append(math.prod(shape)) or plain(shape, dtype, device)
        fa.token_stats(make_logits(8, 4000, device=device), make_labels(8, 4000, device=device), outputs=ALL)
    finally:
        ffi.empty = plain
    assert taken and sum(taken) < 8 * 40


# --- bad arguments ------------------------------------------------------------------------------------------


def test_errors_name_the_argument(backend, device):
    x, labels = make_logits(3, 10, device=device), make_labels(3, 10, device=device)
    cases = [
        (ValueError, "outputs", lambda: fa.token_stats(x, labels, outputs=("logprobs",))),
        (TypeError, "outputs", lambda: fa.token_stats(x, labels, outputs="entropy")),
        (ValueError, "labels is required", lambda: fa.token_stats(x, outputs=("logprob",))),
        (ValueError, "labels has shape", lambda: fa.token_logprobs(x, labels[:2])),
        (TypeError, "labels must be integers", lambda: fa.token_logprobs(x, labels.float())),
        (TypeError, "labels must be a tensor of integers, got list", lambda: fa.token_stats(x, [1, 2, 3])),
        (
            ValueError,
            r"labels has shape \(3, 0\).*K >= 1",
            lambda: fa.token_stats(x, labels.new_empty(3, 0), outputs=("entropy",)),
        ),
        (
            TypeError,
            "ignore_index must be an integer, got None",
            lambda: fa.token_stats(x, labels, ignore_index=None),
        ),
        (
            TypeError,
            "ignore_index must be an integer, got 1.0",
            lambda: fa.token_logprobs(x, labels, ignore_index=1.0),
        ),
        (
            ValueError,
            "ignore_index=.* is out of range",
            lambda: fa.token_logprobs(x, labels, ignore_index=1 << 64),
        ),
        (TypeError, "logits must be floating", lambda: fa.token_logprobs(x.long(), labels)),
        (ValueError, "mask has shape", lambda: fa.token_stats(x, labels, mask=labels[:2] > 0)),
        (ValueError, "temperature", lambda: fa.token_logprobs(x, labels, temperature=0.0)),
        (ValueError, "temperature", lambda: fa.token_logprobs(x, labels, temperature=-1.0)),
        (ValueError, "softcap", lambda: fa.token_logprobs(x, labels, softcap=0.0)),
        (ValueError, "logit_scale", lambda: fa.token_logprobs(x, labels, logit_scale=math.nan)),
        (ValueError, "vocabulary", lambda: fa.token_logprobs(x[:, :0], labels)),
        (TypeError, "unexpected keyword", lambda: fa.token_logprobs(x, labels, temprature=1.0)),
    ]
    if device == "cpu":
        cases.append(
            (ValueError, "temperature", lambda: fa.token_logprobs(x, labels, temperature=torch.tensor(-1.0)))
        )
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()
