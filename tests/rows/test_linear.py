"""The fused head against `token_stats` of logits in fp64: every plan, every combination of gradients, on
every backend of the row kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
from checks.linear import (
    BUDGETS,
    ROWS,
    VOCAB,
    check_frozen,
    check_outputs,
    check_two_towers,
    leaves,
    make_case,
)

import fastalign as fa
from fastalign.rows import walk
from fastalign.testing import assert_close

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.mark.parametrize("needs", [n for n in itertools.product((True, False), repeat=3) if any(n)], ids=str)
@pytest.mark.parametrize("budget", BUDGETS)
def test_outputs_and_gradients(backend, device, budget, needs):  # E9, G4, rows 2, 4, 41
    check_outputs(device, budget, needs)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_two_towers_of_other_widths(backend, device, budget, frozen):
    check_two_towers(device, budget, frozen)


@pytest.mark.parametrize("output", ["logprob", "entropy", "logsumexp", "kl_policy_ref", "kl_ref_policy"])
@pytest.mark.parametrize("budget", ["all", "some rows"])
def test_frozen_head_multiplies_twice(backend, device, output, budget):  # G4
    check_frozen(device, output, budget)


def test_several_labels_per_row(backend, device):
    case = make_case(device=device)
    labels = torch.stack([case.labels, case.labels.clamp(min=0)], -1)
    own, asked = leaves(case._replace(hidden=torch.nan_to_num(case.hidden)), bias=False)
    got = fa.linear_token_logprobs(
        own.hidden, own.weight, labels, bias=own.bias, workspace_bytes=BUDGETS["parts"]
    )
    logits = own.hidden @ own.weight.t() + own.bias
    want = fa.token_logprobs(logits, labels)
    assert_close(got, want.double(), scale=8.0)
    for a, b in zip(torch.autograd.grad(got.sum(), asked), torch.autograd.grad(want.sum(), asked)):
        assert_close(a, b.double(), scale=8.0 * ROWS**0.5)


@pytest.mark.parametrize("counts", [True, False])
def test_unscored_rows(backend, device, counts, monkeypatch):  # D8, J1, J5
    """Garbage in them reaches nobody, and by counts they are not multiplied."""
    case = make_case(device=device, garbage=float("inf"))
    seen = []
    real = walk.logits_of
    monkeypatch.setattr(walk, "logits_of", lambda head, x, *a: seen.append(x.shape[0]) or real(head, x, *a))
    own, asked = leaves(case)
    mask = torch.arange(ROWS, device=device) % 2 == 1
    got = fa.linear_token_stats(
        own.hidden, own.weight, own.labels, outputs=("logprob", "entropy"), mask=mask, host_counts=counts
    )
    scored = mask & (own.labels != -100)
    assert seen == [int(scored.sum()) if counts else ROWS]
    assert not got.logprob[~scored].any() and not got.entropy[~scored].any() and got.logprob[scored].all()
    grads = torch.autograd.grad((got.logprob + got.entropy).sum(), asked[:2])
    assert not grads[0][~scored].any() and all(bool(g.isfinite().all()) for g in grads)


def test_rows_without_gradient_leave_the_products(monkeypatch):
    case = make_case()
    own, asked = leaves(case, bias=False)
    got = fa.linear_token_logprobs(own.hidden, own.weight, own.labels, workspace_bytes=BUDGETS["parts"])
    seen = []
    real = walk.bring_back
    monkeypatch.setattr(
        walk, "bring_back", lambda head, grad, *a: seen.append(grad.shape[0]) or real(head, grad, *a)
    )
    upstream = torch.zeros(ROWS)
    upstream[[3, 6, 8]] = torch.tensor([1.0, -2.0, 0.5])
    grads = torch.autograd.grad(got, asked, upstream)
    assert set(seen) == {3} and grads[0].any(-1).nonzero().flatten().tolist() == [3, 6, 8]


def test_plans():
    """The budgets of these tests lead to the plans that they are meant to."""
    own, _ = leaves(make_case())
    frozen, _ = leaves(own, weight=False, bias=False)
    both = ("logprob", "entropy")
    for case, outputs, kinds in (
        (own, both, "keep recompute recompute"),
        (frozen, ("logprob",), "frozen frozen frozen"),
        (frozen, both, "keep recompute recompute"),
    ):
        for kind, budget in zip(kinds.split(), BUDGETS.values()):
            text = fa.explain(
                "linear_token_stats", *case[:2], case.labels, outputs=outputs, workspace_bytes=budget
            )
            assert f": {kind}:" in text, text
    with torch.no_grad():
        assert ": forward: 1 GEMM, " in fa.explain("linear_token_logprobs", *own[:2], own.labels)


@pytest.mark.parametrize("outputs", [("logprob",), ("logprob", "entropy")])
@pytest.mark.parametrize("budget", BUDGETS)
def test_backward_twice(budget, outputs):
    """The logits that a plan kept are gone after the first time: the second multiplies again."""
    own, asked = leaves(make_case())
    got = fa.linear_token_stats(
        own.hidden, own.weight, own.labels, bias=own.bias, outputs=outputs, workspace_bytes=BUDGETS[budget]
    )
    total = sum(getattr(got, name).sum() for name in outputs)
    for a, b in zip(torch.autograd.grad(total, asked, retain_graph=True), torch.autograd.grad(total, asked)):
        assert_close(b, a.double(), scale=ROWS**0.5)


def test_no_rows():  # G8
    """Nothing scored, or nothing at all: zeros, and gradients that are there."""
    for case in (
        make_case(),
        make_case()._replace(hidden=torch.empty(0, 8), labels=torch.empty(0, dtype=torch.long)),
    ):
        own, asked = leaves(case)
        for budget in BUDGETS.values():
            got = fa.linear_token_logprobs(
                own.hidden,
                own.weight,
                torch.full_like(own.labels, -100),
                bias=own.bias,
                workspace_bytes=budget,
            )
            assert got.shape == own.labels.shape and not got.any()
            assert all(g is not None and not g.any() for g in torch.autograd.grad(got.sum(), asked))


def test_leading_dims_and_non_contiguous_inputs():
    case = make_case(garbage=0.0)
    hidden = case.hidden[:22].view(2, 11, 8).transpose(0, 1)
    labels = case.labels[:22].view(2, 11).t()
    weight = case.weight.t().contiguous().t()
    got = fa.linear_token_logprobs(hidden, weight, labels, bias=case.bias)
    assert got.shape == (11, 2)
    assert torch.equal(
        got.t().reshape(-1),
        fa.linear_token_logprobs(case.hidden, case.weight, case.labels, bias=case.bias)[:22],
    )


def test_tied_weight_gets_both_gradients():  # G5
    torch.manual_seed(0)
    weight = torch.randn(VOCAB, 8, requires_grad=True)
    ids = torch.randint(VOCAB, (ROWS,))
    labels = ids.roll(-1)
    fa.linear_token_logprobs(torch.nn.functional.embedding(ids, weight), weight, labels).sum().backward()
    twin = weight.detach().clone().requires_grad_()
    fa.token_logprobs(torch.nn.functional.embedding(ids, twin) @ twin.t(), labels).sum().backward()
    assert_close(weight.grad, twin.grad.double(), scale=ROWS**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_does_not_lose_with_chunks(dtype):  # E4
    """From 1 to 256 chunks of rows."""
    generator = torch.Generator().manual_seed(0)
    rows, width, vocab = 256 * 128, 4, 7
    hidden, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (rows, vocab))
    labels = torch.randint(vocab, (rows,), generator=generator)
    truth = weight.double().requires_grad_()
    fa.token_logprobs(hidden.double() @ truth.t(), labels).sum().backward()
    errors = []
    for budget in (rows * vocab * 4, 128 * vocab * 4):
        leaf = weight.clone().requires_grad_()
        plan = fa.linear_policy_loss(
            hidden,
            leaf,
            labels,
            None,
            torch.ones(rows),
            loss="reinforce",
            aggregation="token_sum",
            workspace_bytes=budget,
        )
        (-plan.loss).backward()
        errors.append(float((leaf.grad.double() - truth.grad).abs().max()))
    assert errors[1] <= 1.2 * errors[0] + torch.finfo(torch.float32).eps * float(truth.grad.abs().max())
