"""Sizes that only a device has room for: offsets beyond 2^31 elements, a million rows, and bitwise equality
at real shapes."""

from __future__ import annotations

import pytest
import torch

import fastalign as fa
from fastalign.testing import make_batch, make_labels

GIB = 2**30


def _needs(gib):
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free device memory, {free / GIB:.0f} GiB are free")


def _random(rows, vocab, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.empty(rows, vocab, dtype=dtype, device="cuda").normal_(std=2.0, generator=generator)


def _run(logits, labels):
    """logprob, entropy and the gradient of their sum."""
    leaf = logits.detach().requires_grad_()
    stats = fa.token_stats(leaf, labels, outputs=("logprob", "entropy"))
    (grad,) = torch.autograd.grad(stats.logprob.sum() + stats.entropy.sum(), leaf)
    return stats.logprob.detach(), stats.entropy.detach(), grad


def test_offsets_beyond_int32(backend):
    """Row 21: the last rows of [17000, 128256] lie beyond 2^31 elements; they equal the same rows alone, bit
    by bit."""
    _needs(16)
    rows, vocab = 17_000, 128_256
    assert (rows - 3) * vocab > 2**31
    logits, labels = _random(rows, vocab), make_labels(rows, vocab, device="cuda")
    whole = _run(logits, labels)
    alone = _run(logits[-3:].clone(), labels[-3:])
    for a, b in zip(whole, alone):
        assert torch.equal(a[-3:], b)


def test_inplace_gradient_beyond_int32(backend):
    _needs(16)
    rows, vocab = 17_000, 128_256
    source, labels = _random(rows, vocab).requires_grad_(), make_labels(rows, vocab, device="cuda")
    tail = source.detach()[-3:].clone()
    logits = source * 1
    value = fa.token_logprobs(logits, labels, inplace_backward=True)
    (grad,) = torch.autograd.grad(value, logits, torch.ones_like(value))
    leaf = tail.requires_grad_()
    value = fa.token_logprobs(leaf, labels[-3:])
    (want,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    assert torch.equal(grad[-3:], want)


def test_stride_beyond_int32(backend):
    """A view whose second row begins beyond 2^31 elements."""
    _needs(8)
    stride = 2**31 + 5
    buffer = torch.zeros(stride + 1000, dtype=torch.bfloat16, device="cuda")
    logits = buffer.as_strided((2, 1000), (stride, 1))
    logits.copy_(_random(2, 1000))
    labels = make_labels(2, 1000, device="cuda")
    for a, b in zip(_run(logits, labels), _run(logits.clone(), labels)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [65_536, 1_048_576])
def test_many_rows(backend, rows):
    """Row 22: the token index has no grid limit."""
    logits, labels = _random(rows, 65, torch.float32), make_labels(rows, 65, device="cuda")
    logprob, entropy, _ = _run(logits, labels)
    want = torch.log_softmax(logits.double(), -1)
    assert float((logprob - want.gather(-1, labels.unsqueeze(-1)).squeeze(-1)).abs().max()) < 1e-5
    assert float((entropy + (want * want.exp()).sum(-1)).abs().max()) < 1e-5


def test_many_sequences_and_tokens(backend):
    """A million tokens in 200,000 sequences, a tenth of them empty."""
    sequences = 200_000
    lengths = torch.randint(0, 11, (sequences,), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to("cuda", torch.int32)
    tokens = int(cu_seqlens[-1])
    logprobs = -torch.rand(tokens, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    ref = logprobs * 1.1
    segment = torch.repeat_interleave(torch.arange(sequences, device="cuda"), lengths.cuda())
    want = torch.zeros(sequences, dtype=torch.float64, device="cuda").index_add(0, segment, logprobs.double())
    assert float((fa.sequence_sum(logprobs, cu_seqlens) - want).abs().max()) < 1e-5
    leaf = logprobs.clone().requires_grad_()
    out = fa.preference_loss(leaf, ref, cu_seqlens, mask=torch.ones_like(leaf, dtype=torch.bool))
    ratios = 0.1 * torch.zeros_like(want).index_add(0, segment, (logprobs - ref).double())
    valid = (lengths[0::2] + lengths[1::2]).cuda() > 0
    pair_losses = -torch.nn.functional.logsigmoid(ratios[0::2] - ratios[1::2])
    assert abs(float(out.loss.detach()) - float(pair_losses[valid].mean())) < 1e-5
    assert bool(torch.isfinite(torch.autograd.grad(out.loss, leaf)[0]).all())


@pytest.mark.parametrize("vocab", [50_257, 128_256, 151_936])
def test_repeatable_and_batch_invariant(backend, vocab):
    """Rows 20 and 42 at real vocabularies: the same bits in every run, alone, in any batch and at any
    address."""
    logits, labels = _random(600, vocab), make_labels(600, vocab, device="cuda")
    first = _run(logits, labels)
    for a, b in zip(first, _run(logits, labels)):
        assert torch.equal(a, b)
    for rows in (1, 2, 131, 133):
        for a, b in zip(first, _run(logits[:rows], labels[:rows])):
            assert torch.equal(a[:rows], b), rows
    row = logits[7]
    for shift in (1, 2, 3, 5, 8):  # elements of misalignment
        buffer = torch.empty(shift + vocab, dtype=logits.dtype, device="cuda")
        buffer[shift:].copy_(row)
        for a, b in zip(first, _run(buffer[shift:].view(1, vocab), labels[7:8])):
            assert torch.equal(a[7:8], b), shift


def test_preference_loss_is_repeatable(backend):
    """The last block to arrive differs from run to run; the result does not."""
    batch = make_batch(256, min_len=1, max_len=900, device="cuda")
    logprobs = batch.logprobs.clone().requires_grad_()
    runs = []
    for _ in range(20):
        out = fa.preference_loss(
            logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask
        )
        runs.append((out.loss.detach(), torch.autograd.grad(out.loss, logprobs)[0]))
    for loss, grad in runs[1:]:
        assert torch.equal(loss, runs[0][0]) and torch.equal(grad, runs[0][1])
