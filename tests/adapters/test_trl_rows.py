"""What stands in the place of TRL's functions: values, gradients, types and shapes over every option, held against
fp64 with TRL's own error as the measure."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from trl.kernels import chunked_divergence, chunked_logprob
from trl.trainer import utils

from fastalign.adapters.trl import ADAPTER
from fastalign.testing import assert_close

THEIRS = {
    "head": chunked_logprob.ChunkedLogProbFunction,
    "divergence": chunked_divergence.ChunkedDivergenceFunction,
    "selective": utils.selective_log_softmax,
    "entropy": utils.entropy_from_logits,
    "both": utils.selective_log_softmax_and_entropy,
}
DTYPES = (torch.float32, torch.bfloat16)
ROWS, WIDTH, VOCAB, CHUNK = 9, 12, 53, 16
STATISTICS = ("log_probs", *chunked_logprob.OPTIONAL_OUTPUTS)


@pytest.fixture
def ours():
    """The functions where TRL's trainers find them, patched."""
    with ADAPTER.patch():
        yield {
            "head": utils._ChunkedLogProbFunction,
            "divergence": chunked_divergence.ChunkedDivergenceFunction,
            "selective": utils.selective_log_softmax,
            "entropy": utils.entropy_from_logits,
            "both": utils.selective_log_softmax_and_entropy,
        }


def normal(*shape, dtype, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def leaves(tensors):
    return [None if x is None else x.detach().clone().requires_grad_(x.is_floating_point()) for x in tensors]


def run(function, tensors, weights):
    """The results, and the gradients of sum(weights * results) in every tensor."""
    own = leaves(tensors)
    results = function(*own)
    results = results if isinstance(results, tuple) else (results,)
    total = sum((w.to(y.dtype) * y).sum() for y, w in zip(results, weights) if w is not None)
    wanted = [x for x in own if x is not None]
    return results, torch.autograd.grad(total, wanted, allow_unused=True)


def compare(ours, theirs, exact, tensors, weights):
    """Ours may err at most twice as much as theirs, and has their types and shapes."""
    (mine, grads), (other, other_grads) = run(ours, tensors, weights), run(theirs, tensors, weights)
    truth, true_grads = run(exact, [None if x is None else x.double() for x in tensors], weights)
    assert [y is None for y in mine] == [y is None for y in other]
    for i, (y, t, b) in enumerate(zip(mine, truth, other)):
        if y is None:
            continue
        assert (y.dtype, y.shape, y.requires_grad) == (b.dtype, b.shape, b.requires_grad), i
        if y.dtype == torch.bool:
            assert torch.equal(y, t), i
        else:
            assert_close(y, t, b, what=f"result {i}")
    for i, (g, t, b) in enumerate(zip(grads, true_grads, other_grads)):
        assert (g.dtype, g.shape) == (b.dtype, b.shape), i
        assert_close(g, t, b, what=f"gradient {i}")


def statistics(z, targets, outputs):
    """TRL's five results of logits, in their own type."""
    p, logp = z.softmax(-1), z.log_softmax(-1)
    found = {
        "log_probs": logp.gather(-1, targets[:, None]).squeeze(-1), "entropy": -(p * logp).sum(-1),
        "log_sum_sq_probs": (p * p).sum(-1).log().detach(), "mean_logits": z.mean(-1).detach(),
        "is_top1": z.argmax(-1) == targets,
    }  # fmt: skip
    return tuple(found[name] if name in outputs or name == "log_probs" else None for name in STATISTICS)


def transformed(x, weight, bias, scale, cap, temperature):
    z = x @ weight.T if bias is None else x @ weight.T + bias
    z = z * scale
    return (z if cap is None else cap * torch.tanh(z / cap)) / temperature


# Every two options meet.
HEADS = [
    (torch.float32, True, None, 1.0, 1.0, STATISTICS, "both"),
    (torch.float32, False, 2.0, 0.5, 0.7, ("entropy",), "both"),
    (torch.bfloat16, False, None, 0.5, 0.7, STATISTICS, "both"),
    (torch.bfloat16, True, 2.0, 1.0, 1.0, ("log_probs",), "logprob"),
    (torch.float32, True, 2.0, 1.0, 0.7, ("is_top1", "mean_logits"), "logprob"),
    (torch.float32, False, None, 1.0, 1.0, ("entropy",), "entropy"),
    (torch.bfloat16, True, None, 1.0, 0.7, ("log_sum_sq_probs", "entropy"), "logprob"),
    (torch.float16, True, 2.0, 0.5, 1.0, STATISTICS, "entropy"),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "with_bias", "cap", "scale", "temperature", "outputs", "upstream"), HEADS)
def test_head(ours, dtype, with_bias, cap, scale, temperature, outputs, upstream):
    tensors = [
        normal(ROWS, WIDTH, dtype=dtype, seed=1), normal(VOCAB, WIDTH, dtype=dtype, seed=2),
        normal(VOCAB, dtype=dtype, seed=3) if with_bias else None,
    ]  # fmt: skip
    targets = (normal(ROWS, dtype=torch.float64, seed=4).abs() * 20).long() % VOCAB
    targets[0] = (tensors[0].double() @ tensors[1].double().T)[0].argmax()
    weights = [normal(ROWS, dtype=torch.float64, seed=5 + i) for i in range(2)]
    weights = [weights[0] if upstream != "entropy" else None, weights[1] if upstream != "logprob" else None]

    def called(function):
        return lambda x, w, b: function.apply(x, w, b, targets, temperature, CHUNK, cap, scale, outputs)

    def exact(x, w, b):
        return statistics(transformed(x, w, b, scale, cap, temperature), targets, outputs)

    compare(called(ours["head"]), called(THEIRS["head"]), exact, tensors, weights)


@pytest.mark.parametrize("types",
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16)])  # fmt: skip
@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_of_another_type_is_multiplied_in_theirs(ours, types, autocast):
    """Operands are rounded to the type of hidden, under autocast to its, also in backward; not the logits."""
    tensors = [normal(ROWS, WIDTH, dtype=types[0], seed=1), normal(VOCAB, WIDTH, dtype=types[1], seed=2)]
    targets, multiplied = torch.arange(ROWS), torch.bfloat16 if autocast else types[0]

    def called(function):
        def call(x, w):
            with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
                return function.apply(x, w, None, targets, 1.0, CHUNK)[0]

        return call

    def exact(x, w):
        z = x.to(multiplied).double() @ w.to(multiplied).double().T
        return z.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)

    truth = exact(*(x.double() for x in tensors))
    assert_close(called(ours["head"])(*tensors), truth, what="without rounded logits")
    compare(called(ours["head"]), called(THEIRS["head"]), exact, tensors, [normal(ROWS, dtype=torch.float64)])


def test_head_without_rows_or_gradient(ours):
    x, w = torch.zeros(0, WIDTH, requires_grad=True), normal(VOCAB, WIDTH, dtype=torch.float32)
    w.requires_grad_()
    logprobs, entropy, *_ = ours["head"].apply(x, w, None, torch.zeros(0, dtype=torch.int64), 1.0, CHUNK)
    (logprobs.sum() + entropy.sum()).backward()
    assert x.grad.shape == x.shape and not w.grad.any()
    with torch.no_grad():
        assert not ours["head"].apply(w, w, None, torch.arange(VOCAB), 1.0, CHUNK)[0].requires_grad
    frozen = ours["head"].apply(
        w, w.detach(), None, torch.arange(VOCAB), 1.0, CHUNK, None, 1.0, ("log_probs",)
    )
    assert [y is None for y in frozen] == [False, True, True, True, True]


@pytest.mark.parametrize("upstream", [(1.0, 0.0), (0.0, 1.0), (0.7, -0.3), (None, 1.0), (1.0, None)])
def test_frozen_head(ours, upstream):
    """The log-probs' gradient is made in forward, the entropy's only where one comes back."""
    x, w = normal(ROWS, WIDTH, dtype=torch.float32, seed=1), normal(VOCAB, WIDTH, dtype=torch.float32, seed=2)
    targets = torch.arange(ROWS)

    def called(function, last):
        return lambda x: function.apply(x, w.to(x.dtype), None, targets, 0.7, CHUNK, *last)[:2]

    compare(
        called(ours["head"], ()), called(THEIRS["head"], ()),
        lambda x: statistics(transformed(x, w.double(), None, 1.0, None, 0.7), targets, STATISTICS)[:2], [x],
        [None if g is None else torch.tensor(g, dtype=torch.float64) for g in upstream],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(VOCAB, WIDTH, dtype=torch.int8)},
            "lm_head.weight is torch.int8, of a quantised head; legal: "),
        ({"weight": torch.zeros(VOCAB, WIDTH).to(torch.float8_e4m3fn)},
            "lm_head.weight is torch.float8_e4m3fn, of a quant"),
        ({"outputs": ("entropie",)}, "outputs='entropie' is unknown; legal: log_probs"),
        ({"logit_scale": 0.0}, "logit_scale"),
        ({"temperature": 0.0}, "temperature"), ({"targets": torch.full((ROWS,), VOCAB)}, "labels"),
    ],
)  # fmt: skip
def test_what_the_head_cannot_honour_is_refused(ours, change, message):
    call = {
        "hidden": torch.zeros(ROWS, WIDTH), "weight": torch.zeros(VOCAB, WIDTH), "bias": None,
        "targets": torch.zeros(ROWS, dtype=torch.int64), "temperature": 1.0, "chunk_size": CHUNK,
        "final_logit_softcapping": None,
        "logit_scale": 1.0, "outputs": (),
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError, IndexError)) as error:
        ours["head"].apply(*(call | change).values())
    assert message in str(error.value) and "\n" not in str(error.value)


DIVERGENCES = [
    (torch.float32, 0.0, True, None, 1.0, 1.0), (torch.float32, 1.0, False, 2.0, 0.5, 0.7),
    (torch.bfloat16, 1.0, True, None, 1.0, 0.7),
    (torch.bfloat16, 0.0, False, 2.0, 0.5, 1.0), (torch.float32, 0.3, True, 2.0, 0.5, 0.7),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "beta", "with_bias", "cap", "scale", "temperature"), DIVERGENCES)
def test_divergence(ours, dtype, beta, with_bias, cap, scale, temperature):
    student = [normal(ROWS, WIDTH, dtype=dtype, seed=1), normal(VOCAB, WIDTH, dtype=dtype, seed=2)]
    teacher = [normal(ROWS, 7, dtype=dtype, seed=3), normal(VOCAB, 7, dtype=dtype, seed=4)]
    biases = [normal(VOCAB, dtype=dtype, seed=s) if with_bias else None for s in (5, 6)]

    def called(function):
        def call(x, w, b):
            options = (beta, temperature, scale, cap, scale, cap)
            divergence, entropy = function.apply(x, w, b, *teacher, biases[1], *options)
            assert not entropy.requires_grad
            return divergence, entropy

        return call

    def exact(x, w, b):
        z, zt = (
            transformed(*(None if y is None else y.double() for y in side), scale, cap,
                temperature).log_softmax(-1)
            for side in ((x, w, b), (*teacher, biases[1]))
        )  # fmt: skip
        entropy = -(z.exp() * z).sum(-1).detach()
        if beta in (0.0, 1.0):
            p, q = (zt, z) if beta == 0.0 else (z, zt)
            return (p.exp() * (p - q)).sum(-1), entropy
        m = ((1 - beta) * z.exp() + beta * zt.exp()).log()
        return beta * (zt.exp() * (zt - m)).sum(-1) + (1 - beta) * (z.exp() * (z - m)).sum(-1), entropy

    compare(
        called(ours["divergence"]), called(THEIRS["divergence"]), exact, [*student, biases[0]],
        [normal(ROWS, dtype=torch.float64)],
    )  # fmt: skip


def test_divergence_of_heads_with_different_scales_is_theirs(ours):
    student = [normal(ROWS, WIDTH, dtype=torch.float32, seed=s) for s in (1, 2)]
    heads = [normal(VOCAB, WIDTH, dtype=torch.float32, seed=s) for s in (3, 4)]
    call = (student[0], heads[0], None, student[1], heads[1], None, 1.0, 1.0, 1.0, None, 0.5, None)
    assert torch.equal(ours["divergence"].apply(*call)[0], THEIRS["divergence"].apply(*call)[0])
    same = ours["divergence"].apply(*call[:10], 1.0, None)[0]
    assert not torch.allclose(same, THEIRS["divergence"].apply(*call)[0], rtol=1e-2)


# --- functions of logits ------------------------------------------------------------------------------------


def rows_and_index(dtype, several=False):
    logits = normal(3, 5, VOCAB, dtype=dtype, seed=7, scale=3.0)
    index = torch.randint(VOCAB, (3, 5, 4) if several else (3, 5), generator=torch.Generator().manual_seed(8))
    return logits, index


@pytest.mark.parametrize(
    ("dtype", "several", "temperature", "masked"),
    [*itertools.product(DTYPES, (False, True), (1.0, 0.7), (False, True))]
)  # fmt: skip
def test_selective_log_softmax(ours, dtype, several, temperature, masked):
    logits, index = rows_and_index(dtype, several)
    mask = (torch.arange(index.numel()).view(index.shape) % 3 > 0) if masked else None

    def exact(x):
        found = (x / temperature).log_softmax(-1).gather(-1, index if several else index[..., None])
        found = found if several else found.squeeze(-1)
        return found if mask is None else found * mask

    compare(
        lambda x: ours["selective"](x, index, temperature, mask),
        lambda x: THEIRS["selective"](x, index, temperature, mask), exact,
        [logits], [normal(*index.shape, dtype=torch.float64)],
    )  # fmt: skip


@pytest.mark.parametrize(("dtype", "chunk_size"), [(torch.float32, 4), (torch.bfloat16, 128)])
def test_entropy_from_logits(ours, dtype, chunk_size):
    logits, _ = rows_and_index(dtype)
    compare(
        lambda x: ours["entropy"](x, chunk_size), lambda x: THEIRS["entropy"](x, chunk_size),
        lambda x: -(x.softmax(-1) * x.log_softmax(-1)).sum(-1), [logits], [normal(3, 5, dtype=torch.float64)],
    )  # fmt: skip
    with pytest.raises(ValueError, match="chunk_size"):
        ours["entropy"](logits, 0)


@pytest.mark.parametrize(
    ("dtype", "temperature", "masked", "entropy_requires_grad"),
    [*itertools.product(DTYPES, (1.0, 0.7), (False, True), (False, True))]
)  # fmt: skip
def test_both_in_one_pass(ours, dtype, temperature, masked, entropy_requires_grad):
    logits, index = rows_and_index(dtype)
    mask = (torch.arange(index.numel()).view(index.shape) % 3).int() if masked else None

    def exact(x):
        z = (x / temperature).log_softmax(-1)
        logprob, entropy = z.gather(-1, index[..., None]).squeeze(-1), -(z.exp() * z).sum(-1)
        logprob, entropy = (y if mask is None else y * (mask != 0) for y in (logprob, entropy))
        return logprob, entropy if entropy_requires_grad else entropy.detach()

    def called(function):
        return lambda x: function(
            x, index, entropy_requires_grad=entropy_requires_grad, temperature=temperature, row_mask=mask
        )

    weights = [normal(3, 5, dtype=torch.float64, seed=s) for s in (9, 10)]
    compare(called(ours["both"]), called(THEIRS["both"]), exact, [logits], weights)


def test_masked_rows_are_not_read(ours):
    logits, index = rows_and_index(torch.float32)
    mask = torch.arange(15).view(3, 5) % 2
    logits[mask == 0], index[mask == 0] = torch.nan, -100
    logits.requires_grad_()
    logprob, entropy = ours["both"](logits, index, row_mask=mask)
    (logprob.sum() + entropy.sum()).backward()
    for found in (logprob, entropy, logits.grad):
        assert not found[mask == 0].any() and torch.isfinite(found).all()
    with pytest.raises(ValueError, match="row_mask has shape"):
        ours["both"](logits, index, row_mask=mask[:1])
    with pytest.raises(IndexError):
        ours["both"](logits, index)
    with pytest.raises(ValueError, match="temperature"):
        ours["both"](logits, index.clamp(min=0), temperature=0.0)


@pytest.mark.parametrize("kernel", [True, False])
def test_the_result_type_is_theirs(ours, monkeypatch, kernel):
    """fp32 where TRL has a kernel for the call: here it has none, whatever is installed."""
    from fastalign.adapters.trl import rows

    monkeypatch.setattr(rows, "_supports_trl_loss_kernel", lambda *_: kernel)
    monkeypatch.setattr(rows, "is_triton_available", lambda: True)
    logits, index = rows_and_index(torch.bfloat16)
    wanted = torch.float32 if kernel else torch.bfloat16
    found = (ours["selective"](logits, index), ours["entropy"](logits), *ours["both"](logits, index))
    assert {y.dtype for y in found} == {wanted}
