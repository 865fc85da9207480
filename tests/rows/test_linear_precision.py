"""What a logit is: the option head_precision, mixed types, autocast; and that a batch-invariant row does not
see its neighbours."""

from __future__ import annotations

import pytest
import torch
from checks.linear import BUDGETS, leaves, make_case

import fastalign as fa
from fastalign.rows import head, planner, vocab_parallel
from fastalign.testing import assert_close

pytestmark = pytest.mark.usefixtures("small_tiles")


def tf32(x):
    """By arithmetic: to a multiple of 2^-10 of its power of two, ties to even."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp(torch.round(mantissa * 2048) / 2048, exponent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "tf32"])
def test_head_precision(precision, dtype):  # E9
    case = make_case(dtype, garbage=0.0)
    round_operand = {"fp32": torch.Tensor.double, "bf16": lambda x: x.bfloat16().double(), "tf32": tf32}[
        precision
    ]
    logits = round_operand(case.hidden) @ round_operand(case.weight).t()
    if precision == "bf16":
        logits = logits.to(torch.bfloat16).double()
    got = fa.linear_token_logprobs(case.hidden, case.weight, case.labels, head_precision=precision)
    want = fa.token_logprobs(logits, case.labels)
    # Of a bf16 logit the rounding of the sums may fall the other way now and then.
    granted = 2e-2 if precision == "bf16" else 1e-5
    assert got.dtype == torch.float32 and float((got - want).abs().max()) < granted
    if dtype == torch.float32 and precision != "fp32":
        exact = fa.linear_token_logprobs(case.hidden, case.weight, case.labels)
        assert float((got - exact).abs().max()) > 1e-5


@pytest.mark.parametrize("hidden_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", BUDGETS)
def test_mixed_types(hidden_type, weight_type, budget):  # row 45
    """Multiplied in the wider type; every gradient comes back in its own."""
    case = make_case(garbage=0.0)
    own, asked = leaves(case._replace(hidden=case.hidden.to(hidden_type), weight=case.weight.to(weight_type)))
    truth, wanted = leaves(
        own._replace(hidden=own.hidden.double(), weight=own.weight.double(), bias=own.bias.double())
    )
    got = fa.linear_token_stats(
        own.hidden,
        own.weight,
        own.labels,
        bias=own.bias,
        outputs=("logprob", "entropy"),
        workspace_bytes=BUDGETS[budget],
    )
    want = fa.token_stats(
        truth.hidden @ truth.weight.t() + truth.bias, own.labels, outputs=("logprob", "entropy")
    )
    assert_close(got.logprob, want.logprob, scale=8.0)
    for x, a, b in zip(
        asked,
        torch.autograd.grad((got.logprob + got.entropy).sum(), asked),
        torch.autograd.grad((want.logprob + want.entropy).sum(), wanted),
    ):
        assert a.dtype == x.dtype
        assert_close(a, b, scale=b.abs().clamp(min=16.0))


def test_autocast_rounds_the_operands_as_linear_does():
    case = make_case(garbage=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = fa.linear_token_logprobs(case.hidden, case.weight, case.labels)
    want = fa.linear_token_logprobs(case.hidden.bfloat16(), case.weight.bfloat16(), case.labels)
    assert torch.equal(got, want) and not torch.equal(
        got, fa.linear_token_logprobs(case.hidden, case.weight, case.labels)
    )


def test_a_process_that_multiplies_less_exactly():
    """torch.set_float32_matmul_precision is the user's for the rest of the model; log-probs stay fp32, and
    the setting stays."""
    case = make_case(garbage=0.0)
    want = fa.linear_token_logprobs(case.hidden, case.weight, case.labels)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(fa.linear_token_logprobs(case.hidden, case.weight, case.labels), want)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "vocab"), [(8, 37), (96, 9001), (257, 4096 * 4 + 3)])
def test_batch_invariant(dtype, width, vocab):  # E10
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, width, generator=generator).to(dtype) for n in (600, vocab))
    labels = torch.randint(vocab, (600,), generator=generator)
    options = {"outputs": ("logprob", "entropy", "logsumexp"), "batch_invariant": True}
    whole = fa.linear_token_stats(hidden, weight, labels, **options)
    for count in (1, 255, 256, 300, 599):
        rows = torch.randperm(600, generator=generator)[:count]
        part = fa.linear_token_stats(
            hidden[rows], weight, labels[rows], workspace_bytes=1000 * count, **options
        )
        for name in options["outputs"]:
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), f"{name}, {count} rows"
    assert_close(
        whole.logprob, fa.linear_token_logprobs(hidden, weight, labels).double(), scale=64.0 * width**0.5
    )


def test_batch_invariant_gradients():
    own, asked = leaves(make_case())
    a = fa.linear_token_logprobs(own.hidden, own.weight, own.labels, bias=own.bias, batch_invariant=True)
    b = fa.linear_token_logprobs(own.hidden, own.weight, own.labels, bias=own.bias)
    for x, y in zip(torch.autograd.grad(a.sum(), asked), torch.autograd.grad(b.sum(), asked)):
        assert_close(x, y.double(), scale=64.0)


@pytest.mark.parametrize(
    "types",
    [
        (torch.float32, "fp32"),
        (torch.bfloat16, "fp32"),
        (torch.float32, "bf16"),
        (torch.bfloat16, "bf16"),
        (torch.float16, "fp32"),
        (torch.float64, "fp32"),
        (torch.float64, "bf16"),
    ],
    ids=str,
)
def test_operands_are_cast_in_parts(types, monkeypatch):
    """What meets in a product has one type, on the CPU that of the result; a weight in another type is never
    cast as a whole."""
    dtype, precision = types
    monkeypatch.setattr(head, "CAST_BYTES", 64 * 8 * 4)
    acc = torch.float64 if types == (torch.float64, "fp32") else torch.float32
    seen, real = [], head.product

    def product(out, a, b, add=False):
        assert a.dtype == b.dtype == out.dtype
        seen.append(out.dtype)
        if b.shape[1] == 8 and dtype != acc:  # on the way back
            assert b.shape[0] <= 64
        real(out, a, b, add)

    monkeypatch.setattr(head, "product", product)
    own, asked = leaves(make_case(dtype, garbage=0.0))
    stats = fa.linear_token_stats(
        own.hidden, own.weight, own.labels, outputs=("logprob", "entropy"), head_precision=precision
    )
    torch.autograd.grad((stats.logprob + stats.entropy).sum(), asked[:2])
    assert len(seen) >= 3 and seen[-1] == acc


@pytest.mark.parametrize(
    ("vocab", "ranks", "legal"),
    [
        (100, 1, True),
        (100, 2, True),
        (50, 2, True),
        (51, 2, False),
        (25, 4, True),
        (33, 3, False),
        (10, 8, False),
    ],
)
def test_batch_invariant_needs_parts_that_one_rank_would_have(vocab, ranks, legal, monkeypatch):
    monkeypatch.setattr(vocab_parallel.dist, "get_world_size", lambda group: ranks)
    monkeypatch.setattr(vocab_parallel.dist, "get_rank", lambda group: ranks - 1)
    assert vocab_parallel.place(vocab, "group") == ((ranks - 1) * vocab, ranks * vocab)
    if legal:
        assert vocab_parallel.place(vocab, "group", True) == vocab_parallel.place(vocab, "group")
        assert vocab % -(-vocab * ranks // planner.SHARDS) == 0
    else:
        with pytest.raises(
            ValueError, match=f"batch_invariant=True with a vocabulary of {vocab * ranks} on {ranks} ranks"
        ):
            vocab_parallel.place(vocab, "group", True)
