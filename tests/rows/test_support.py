"""`logprobs_at` and `token_stats(support=)` on the CPU: truth in fp64, shapes of supports, order of sums."""

from __future__ import annotations

import pytest
import torch
from checks.support import (
    EMPTY,
    KEPT,
    ONE,
    OUTSIDE,
    ROWS,
    TWICE,
    UNSCORED,
    VOCAB,
    WIDTH,
    call,
    check_logprobs_at,
    check_token_stats,
    make_case,
    truth_of,
)

import fastalign as fa
from fastalign.rows import head, support
from fastalign.testing import assert_close


@pytest.fixture
def small():
    return make_case(torch.float64)


# --- values and gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workspace", [None, 1, 7 * 2 * WIDTH * 4], ids=["whole", "one", "seven"])
@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_truth(dtype, counts, workspace):
    check_logprobs_at("cpu", dtype, counts, workspace_bytes=workspace)


@pytest.mark.parametrize("counts", [True, False])
def test_truth_under_every_transform(counts):
    check_logprobs_at(
        "cpu", torch.float32, counts, softcap=3.0, logit_scale=1.5, temperature=torch.tensor(0.6)
    )


def test_gradcheck(small):
    """Of every result in all three inputs."""
    case, leaves = small.doubled()
    own = case._replace(hidden=case.hidden.detach().nan_to_num().requires_grad_())
    labels = case.labels.clone()
    labels[OUTSIDE] = -100  # -inf is constant, and no difference of it

    def run(h, w, b, with_mass=False):
        got = fa.logprobs_at(
            h,
            w,
            case.indices,
            labels,
            bias=b,
            mask=case.mask,
            softcap=3.0,
            temperature=0.7,
            with_mass=with_mass,
        )
        return got.log_mass if with_mass else (got.logprobs, got.label_logprob)

    inputs = (own.hidden, *leaves[1:])
    assert torch.autograd.gradcheck(run, inputs)
    # The logits of log_mass that forward kept are multiplied again the second time.
    assert torch.autograd.gradcheck(lambda *x: run(*x, with_mass=True), inputs, nondet_tol=1e-12)


def test_token_stats_in_fp64():
    check_token_stats("cpu", torch.float64)


def test_rows_with_something_of_their_own(small):
    got = call(small, labels=small.labels, with_mass=True)
    assert (
        got.logprobs[ONE].tolist() == [0.0] * KEPT and got.label_logprob[ONE] == 0.0
    )  # one token: probability 1
    assert got.label_logprob[OUTSIDE] == float("-inf") and bool(got.logprobs[OUTSIDE].isfinite().all())
    for row in (EMPTY, UNSCORED):
        assert not got.logprobs[row].any() and got.label_logprob[row] == 0.0 and got.log_mass[row] == 0.0
    assert got.logprobs[TWICE, 5] == got.logprobs[TWICE, 1] != 0.0
    assert_close(got.logprobs[TWICE, :5].exp().sum(), torch.tensor(1.0).double())
    assert not got.logprobs[small.indices < 0].any()


def test_unscored_rows_get_no_gradient(small):
    for counts in (True, False):
        case, leaves = small.leaves()
        got = call(case, labels=case.labels, with_mass=True, host_counts=counts)
        total = (
            got.logprobs.sum()
            + got.log_mass.sum()
            + got.label_logprob.masked_fill(~got.label_logprob.isfinite(), 0.0).sum()
        )
        grads = torch.autograd.grad(total, leaves)
        assert all(bool(g.isfinite().all()) for g in grads)
        assert not grads[0][[EMPTY, UNSCORED]].any() and bool(grads[0][OUTSIDE].any())


def test_padding_reads_no_row_of_the_weight():
    """-1 stands for no token, not for the first or the last, whatever those hold."""
    case = make_case()
    weight, bias = case.weight.clone(), case.bias.clone()
    spare = [v for v in range(VOCAB) if not (case.indices == v).any()]
    weight[[0, VOCAB - 1]], weight[spare] = float("nan"), float("inf")
    indices = case.indices.masked_fill((case.indices == 0) | (case.indices == VOCAB - 1), -1)
    for counts in (True, False):
        hidden = case.hidden.clone().requires_grad_()
        got = fa.logprobs_at(hidden, weight, indices, bias=bias, mask=case.mask, host_counts=counts).logprobs
        (grad,) = torch.autograd.grad(got.square().sum(), hidden)
        assert bool(got.isfinite().all()) and bool(grad.isfinite().all())


def test_all_of_the_vocabulary_is_no_restriction():
    case = make_case()
    hidden = case.hidden.nan_to_num()
    everything = torch.arange(VOCAB).expand(ROWS, VOCAB)
    got = fa.logprobs_at(
        hidden, case.weight, everything, case.labels.clamp(0), bias=case.bias, with_mass=True
    )
    full = torch.log_softmax(hidden.double() @ case.weight.double().t() + case.bias.double(), -1)
    assert_close(got.logprobs, full, scale=8.0)
    assert_close(got.log_mass, torch.zeros(ROWS).double(), scale=8.0)
    assert_close(
        got.label_logprob,
        fa.linear_token_logprobs(hidden, case.weight, case.labels.clamp(0), bias=case.bias).double(),
        scale=8.0,
    )
    logits = hidden @ case.weight.t() + case.bias
    names = ("logprob", "entropy", "logsumexp", "is_top1")
    labels = case.labels.clamp(0)
    for a, b in zip(
        fa.token_stats(logits, labels, outputs=names, support=everything),
        fa.token_stats(logits, labels, outputs=names),
    ):
        assert a is b is None or torch.equal(a, b)


def test_the_kept_mass_is_never_above_one():
    """Where the support has all of it, up to rounding."""
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(200, 16, generator=g), 3 * torch.randn(VOCAB, 16, generator=g)
    got = fa.logprobs_at(hidden, weight, torch.arange(VOCAB).expand(200, VOCAB), with_mass=True)
    assert bool((got.log_mass <= 0).all()) and not bool((got.log_mass == 0).all())


def test_a_row_whose_label_is_ignored_is_masked(small):
    """Its support may hold anything, as its hidden states."""
    labels = torch.where(small.mask, small.labels, -100)
    got = fa.logprobs_at(small.hidden, small.weight, small.indices, labels, bias=small.bias)
    assert torch.equal(got.logprobs, call(small).logprobs) and got.label_logprob[UNSCORED] == 0.0
    found, want = (
        fa.token_stats(small.logits(), x, support=small.indices, mask=mask, outputs=("logprob", "entropy"))
        for x, mask in ((labels, None), (small.labels, small.mask))
    )
    assert torch.equal(found.logprob, want.logprob) and torch.equal(found.entropy, want.entropy)


def test_compiled_in_one_graph():
    """Values and gradients are those of eager."""

    def of_hidden(h, w, b, case):
        got = fa.logprobs_at(h, w, case.indices, bias=b, mask=case.mask, softcap=5.0).logprobs
        return got, fa.token_stats(h @ w.t() + b, case.labels, support=case.indices, mask=case.mask).logprob

    case, leaves = make_case()._replace(labels=make_case().indices[:, 0].clamp(0)).leaves()
    torch._dynamo.reset()
    results = []
    for function in (of_hidden, torch.compile(of_hidden, backend="aot_eager", fullgraph=True)):
        got = function(*leaves, case)
        results.append([*got, *torch.autograd.grad(got[0].square().sum() + got[1][case.mask].sum(), leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_logits_of_minus_infinity(small):
    """By the bias: probability 0, and with nothing else NaN, in their own row."""
    bias = small.bias.clone()
    bias[small.indices[0, 1]] = float("-inf")
    got = call(small._replace(bias=bias)).logprobs
    assert got[0, 1] == float("-inf") and bool(got[0, [0, 2, 3]].isfinite().all())
    assert_close(got[0, [0, 2, 3]].exp().sum(), torch.tensor(1.0).double())
    bias[small.indices[ONE, 0]] = float("-inf")
    got = call(small._replace(bias=bias)).logprobs
    assert bool(got[ONE, 0].isnan()) and not bool(got[:1].isnan().any())


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_frozen_parts_get_no_gradient(small, needs):
    leaves = [x.clone().requires_grad_(need) for x, need in zip(small[:3], needs)]
    out = call(small._replace(hidden=leaves[0], weight=leaves[1], bias=leaves[2])).logprobs.square().sum()
    out.backward()
    assert [x.grad is not None for x in leaves] == list(needs)


def test_types_of_gradients():
    case = make_case(torch.bfloat16)
    hidden, weight = case.hidden.float().requires_grad_(), case.weight.clone().requires_grad_()
    got = fa.logprobs_at(hidden, weight, case.indices, mask=case.mask).logprobs
    grads = torch.autograd.grad(got.sum(), (hidden, weight))
    assert got.dtype == torch.float32 and [g.dtype for g in grads] == [torch.float32, torch.bfloat16]


def test_weight_gradient_is_summed_in_fp32():
    """One token in all rows: a sum of 4096 terms that bf16 would stop at 256."""
    hidden, weight = (
        torch.ones(4096, 1, dtype=torch.bfloat16),
        torch.zeros(4, 1, dtype=torch.bfloat16, requires_grad=True),
    )
    got = fa.logprobs_at(
        hidden, weight, torch.tensor([[1, 2]]).expand(4096, 2), workspace_bytes=4096
    ).logprobs
    (grad,) = torch.autograd.grad(got[:, 0].sum(), weight)
    assert grad.flatten().tolist() == [0.0, 2048.0, -2048.0, 0.0]


def test_precision_of_the_head():
    """ "bf16" and "tf32" round as the whole head does."""
    case = make_case()
    for name in head.PRECISIONS:
        got = fa.logprobs_at(
            case.hidden, case.weight, case.indices, bias=case.bias, mask=case.mask, head_precision=name
        ).logprobs
        x, w = case.hidden.nan_to_num(), case.weight
        if name == "tf32":
            x, w = head._tf32(x), head._tf32(w)
        kind = torch.bfloat16 if name == "bf16" else torch.float32
        logits = (x.to(kind).double() @ w.to(kind).double().t()).to(kind)
        logits += case.bias
        want = fa.token_stats(
            logits.float(), case.indices.clamp(0, VOCAB - 1), support=case.indices, mask=case.mask
        ).logprob
        real = (case.indices >= 0) & case.mask.unsqueeze(-1)
        assert_close(got[real], want[real].double(), scale=8.0, what=name)


def test_top_k_of_a_sampler():
    """The kept mass is that of the top k, and log-probs are the difference to it."""
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(5, 16, generator=g), torch.randn(101, 16, generator=g)
    full = torch.log_softmax(hidden.double() @ weight.double().t() / 0.9, -1)
    values, indices = full.topk(20)
    got = fa.logprobs_at(hidden, weight, indices, with_mass=True, temperature=0.9)
    assert_close(got.log_mass, values.logsumexp(-1), scale=16.0)
    assert_close(got.logprobs, values - values.logsumexp(-1, keepdim=True), scale=16.0)


# --- shapes -------------------------------------------------------------------------------------------------


def test_offsets_are_the_same_supports():
    case = make_case()
    indices, offsets = case.csr()
    padded = call(case, labels=case.labels, with_mass=True)
    for kind in (torch.int32, torch.int64):
        ragged = fa.logprobs_at(case.hidden, case.weight, indices, case.labels, bias=case.bias, mask=case.mask, offsets=offsets.to(kind),
                                with_mass=True)  # fmt: skip
        assert torch.equal(ragged.logprobs, padded.logprobs[case.indices >= 0])
        assert torch.equal(ragged.label_logprob, padded.label_logprob) and torch.equal(
            ragged.log_mass, padded.log_mass
        )


def test_leading_dims_and_strides():
    case = make_case()
    want = call(case, labels=case.labels)
    rows = slice(0, 10)
    hidden = case.hidden[rows].view(2, 5, WIDTH).transpose(0, 1)
    weight = case.weight.t().contiguous().t()
    indices, labels, mask = (
        x[rows].view(2, 5, *x.shape[1:]).transpose(0, 1) for x in (case.indices, case.labels, case.mask)
    )
    got = fa.logprobs_at(hidden, weight, indices.int(), labels.int(), bias=case.bias, mask=mask)
    assert got.logprobs.shape == (5, 2, KEPT) and got.label_logprob.shape == (5, 2)
    assert_close(got.logprobs.transpose(0, 1).reshape(10, KEPT), want.logprobs[rows].double())
    one = fa.logprobs_at(case.hidden[0], case.weight, case.indices[0], case.labels[0], bias=case.bias)
    assert one.logprobs.shape == (KEPT,) and one.label_logprob.shape == ()
    assert torch.equal(one.logprobs, want.logprobs[0])


@pytest.mark.parametrize("counts", [True, False])
def test_nothing(counts):
    """No row, no entry, no row that counts: zeros, and gradients that are there."""
    weight = torch.randn(5, 3, requires_grad=True)
    for hidden, indices, mask in (
        (torch.empty(0, 3), torch.empty(0, 2, dtype=torch.long), None),
        (torch.ones(2, 3), torch.empty(2, 0, dtype=torch.long), None),
        (torch.ones(2, 3), torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, dtype=torch.bool)),
    ):
        got = fa.logprobs_at(hidden, weight, indices, with_mass=True, mask=mask, host_counts=counts)
        assert got.logprobs.shape == indices.shape and not got.logprobs.any() and not got.log_mass.any()
        (grad,) = torch.autograd.grad(got.logprobs.sum() + got.log_mass.sum(), weight)
        assert not grad.any()


def test_the_order_of_a_support_does_not_matter():
    case = make_case()
    turned = case._replace(indices=case.indices.flip(-1))
    assert_close(call(turned).logprobs.flip(-1), call(case).logprobs.double())
    logits = case.logits()
    a, b = (
        fa.token_stats(logits, case.labels, support=c.indices, mask=case.mask).logprob for c in (case, turned)
    )
    assert torch.equal(a, b)


def test_first_of_equal_logits_is_the_top():
    logits = torch.tensor([[1.0, 3.0, 0.0, 3.0]]).expand(2, 4)
    got = fa.token_stats(
        logits, torch.tensor([1, 3]), support=torch.tensor([[3, 1], [3, 1]]), outputs=("is_top1",)
    )
    assert got.is_top1.tolist() == [1.0, 0.0]


def test_several_labels_per_row():
    case = make_case()
    labels = torch.stack(
        [case.labels, case.indices[:, 0].clamp(0, VOCAB - 1), torch.full_like(case.labels, -100)], -1
    )
    labels[UNSCORED] = 0
    got = fa.token_stats(case.logits(), labels, support=case.indices, mask=case.mask).logprob
    want = call(case, labels=case.labels)
    assert_close(got[:, 0], want.label_logprob.double(), scale=8.0)
    assert_close(got[:, 1], torch.where(case.mask, want.logprobs[:, 0], 0.0).double(), scale=8.0)
    assert not got[:, 2].any()


def test_products_are_of_the_support_alone(monkeypatch):
    """No more rows at once than the workspace holds, and only those that count."""
    case = make_case()
    seen = []
    real = support.rounded
    monkeypatch.setattr(
        support, "rounded", lambda precision, x: seen.append(x.shape[0]) or real(precision, x)
    )
    for workspace, most in ((None, 10**6), (7 * 2 * WIDTH * 4, 7), (1, 1)):
        seen.clear()
        call(case, workspace_bytes=workspace)
        assert max(seen) <= most and sum(seen) == 2 * int(
            ((case.indices >= 0) & case.mask.unsqueeze(-1)).sum()
        )


def test_sums_have_the_same_bits_every_time():
    case = make_case()
    found = []
    for _ in range(3):
        own, leaves = case.leaves()
        found.append(torch.autograd.grad(call(own, workspace_bytes=999).logprobs.sum(), leaves))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


def test_sums_on_a_device_are_the_same():
    """By index_put_ where index_add_ would use atomics."""
    index, values = torch.tensor([2, 0, 2, 2]), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    assert support.add_at(torch.zeros(3, 1), index, values).flatten().tolist() == [2.0, 0.0, 8.0]
    into = torch.zeros(3, 1).index_put_((index,), values, accumulate=True)
    assert into.flatten().tolist() == [2.0, 0.0, 8.0]


def test_differentiated_once(small):
    own, leaves = small.leaves()
    with pytest.raises(RuntimeError, match="logprobs_at can be differentiated once"):
        torch.autograd.grad(call(own).logprobs.square().sum(), leaves, create_graph=True)


def test_truth_of_the_checks(small):
    """The masked full log-softmax is a distribution over each support."""
    want = truth_of(small.doubled()[0])
    assert bool((want.log_mass <= 0).all())
    sums = torch.where(small.indices[0] >= 0, want.logprobs[0].exp(), 0.0).sum()
    assert_close(sums, torch.tensor(1.0).double())
