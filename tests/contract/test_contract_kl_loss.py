"""The contract of the losses over exact KLs, on every backend: the one whose gradient is made in the forward
pass, and token-level DPO."""

from __future__ import annotations

import pytest
import torch
from checks.row_pairs import check_kl_loss, kl_gradient_size, make_row_pair

import fastalign as fa
from fastalign import testing
from fastalign.testing import assert_close, gradient

# --- the loss with its gradient made in the forward pass ----------------------------------------------------


@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [5, 1037])
def test_kl_loss(backend, device, vocab, dtype, direction):
    check_kl_loss(device, vocab, dtype, direction)


def test_kl_loss_is_linear_in_upstream(backend, device):  # row 18
    x, ref = make_row_pair(3, 300, device=device)
    leaf = x.requires_grad_()
    coef = torch.full((), 0.25, device=device)
    want = gradient(fa.token_kl(leaf, ref).sum(), leaf).double() * 0.25
    for upstream in (1.0, -3.0, 0.0, 65536.0):
        got = gradient(fa.token_kl_loss(leaf, ref, coef).loss * upstream, leaf)
        assert_close(got, want * upstream, scale=max(1.0, abs(upstream)))
    with torch.no_grad():
        out = fa.token_kl_loss(leaf, ref, coef, inplace=True)  # nothing to write
    assert torch.equal(leaf, x) and torch.equal(out.kl, fa.token_kl(x, ref))


def test_kl_loss_protects_other_consumers(backend, device):
    x, ref = make_row_pair(3, 30, device=device)
    leaf = x.requires_grad_()
    with pytest.raises(ValueError, match="inplace=True would overwrite a leaf"):
        fa.token_kl_loss(leaf, ref, torch.ones(3, device=device), inplace=True)
    logits = leaf * 1
    other = (logits * logits).sum()
    fa.token_kl_loss(logits, ref, torch.ones(3, device=device), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|version"):
        other.backward()


# --- token-level DPO on logits ------------------------------------------------------------------------------


def tdpo(logits, ref_logits, labels, mask, cu_seqlens, beta, alpha):
    """The loss of arXiv 2404.11999, section 4, sequence by sequence: (chosen, rejected) at even and odd
    numbers; alpha None: TDPO1."""
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(ref_logits, -1)
    pick = labels.clamp(min=0).unsqueeze(-1)
    ratio = (log_p.gather(-1, pick) - log_q.gather(-1, pick)).squeeze(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    u, sequence_kl = [], []
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        u.append(ratio[begin:end][mask[begin:end]].sum())
        sequence_kl.append(kl[begin:end][mask[begin:end]].sum())
    losses = []
    for w in range(0, len(u), 2):
        chosen_kl, rejected_kl = sequence_kl[w], sequence_kl[w + 1]
        delta = rejected_kl - chosen_kl if alpha is None else alpha * (rejected_kl - chosen_kl.detach())
        losses.append(-torch.nn.functional.logsigmoid(beta * (u[w] - u[w + 1] - delta)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss,alpha", [("tdpo1", None), ("tdpo2", 0.5)])
def test_tdpo_from_logits(backend, device, loss, alpha, dtype):
    """Loss and gradient with respect to the logits, on packed sequences of unequal lengths."""
    packed = testing.make_batch(3, min_len=1, max_len=4, prompt=1, vocab=150, device=device).packed
    x, ref = make_row_pair(packed.labels.numel(), 150, dtype=dtype, device=device)
    leaf, true, yard = x.clone().requires_grad_(), x.double().requires_grad_(), x.float().requires_grad_()
    stats = fa.token_stats(
        leaf, packed.labels, ref_logits=ref, outputs=("logprob", "ref_logprob", "kl_ref_policy")
    )
    out = fa.preference_loss(
        stats.logprob,
        stats.ref_logprob,
        packed.cu_seqlens,
        mask=packed.mask,
        kl_ref_policy=stats.kl_ref_policy,
        loss=loss,
        beta=0.3,
    )
    truth, plainly = (
        tdpo(z, ref.to(z.dtype), packed.labels, packed.mask, packed.cu_seqlens.cpu(), 0.3, alpha)
        for z in (true, yard)
    )
    assert_close(out.loss, truth, plainly, what="loss")
    scale = 0.3 * kl_gradient_size(x, ref, packed.labels)
    assert_close(
        gradient(out.loss, leaf), gradient(truth, true), gradient(plainly, yard), what="gradient", scale=scale
    )
