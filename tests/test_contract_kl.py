"""The contract of the row ops with reference logits, on every backend: both log-probs, the exact KLs, their gradients, and the loss whose gradient
is made in the forward pass (row numbers in comments refer to the table of numeric edge cases that every kernel must survive)."""

from __future__ import annotations

import math

import pytest
import torch

import fastalign as fa
from fastalign.testing import assert_close, make_labels, make_logits

KLS = ("kl_policy_ref", "kl_ref_policy")
NAMES = ("ref_logprob", *KLS)


def log_softmaxes(logits, ref_logits, dtype, temperature=1.0, logit_scale=1.0, softcap=None):
    for x in (logits, ref_logits):
        x = x.to(dtype) * logit_scale
        yield torch.log_softmax((x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature, -1)


def plain(logits, ref_logits, labels, dtype=torch.float64, mask=None, ignore_index=-100, **options):
    """The outputs with a reference written with log_softmax in `dtype`, as spelled in the papers; 0 log 0 = 0."""
    log_p, log_q = log_softmaxes(logits, ref_logits, dtype, **options)
    p, q = log_p.exp(), log_q.exp()
    log_p, log_q = log_p.masked_fill(p == 0, -math.inf), log_q.masked_fill(q == 0, -math.inf)
    out = {
        "kl_policy_ref": torch.where(p == 0, 0.0, p * (log_p - torch.where(p == 0, 0.0, log_q))).sum(-1),
        "kl_ref_policy": torch.where(q == 0, 0.0, q * (log_q - torch.where(q == 0, 0.0, log_p))).sum(-1),
    }
    scored = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if mask is None else mask
    if labels is not None:
        scored = scored & (labels != ignore_index)
        out["ref_logprob"] = log_q.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return {name: torch.where(scored, value, torch.zeros_like(value)) for name, value in out.items()}


def magnitude(logits, ref_logits, **options):
    """Of the terms whose rounding shows in a KL and its gradient: the largest |log p| and |log q| of each row."""
    return sum(torch.nan_to_num(x, neginf=0.0).abs().amax(-1) for x in log_softmaxes(logits, ref_logits, torch.float64, **options))


def make_pair(rows, vocab, *, noise=0.5, dtype=torch.float32, device="cpu", kind="normal", seed=0):
    """Policy logits, and reference logits that differ from them by `noise`."""
    x = make_logits(rows, vocab, device="cpu", kind=kind, seed=seed)
    ref = x + noise * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed + 100))
    return x.to(device=device, dtype=dtype), ref.to(device=device, dtype=dtype)


@pytest.mark.parametrize("names", [("kl_policy_ref",), ("kl_ref_policy",), ("logprob", "entropy", "logsumexp", *NAMES)])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "temperature": 0.7, "logit_scale": 1.3}])
def test_gradcheck_of_the_definition(names, options):
    x, ref = make_pair(4, 37, dtype=torch.float64)
    x.requires_grad_()
    labels = make_labels(4, 37, ignored=0.3)

    def f(x):
        stats = fa.token_stats(x, labels, ref_logits=ref, outputs=names, **options)
        return tuple(getattr(stats, n) for n in names)

    with fa.use_backend("reference"):
        assert torch.autograd.gradcheck(f, (x,))
        truth = plain(x, ref, labels, **options)
        scale = magnitude(x.detach(), ref, **options)
        for name, got in zip(names, f(x)):
            if name in truth:
                assert_close(got, truth[name], what=name, scale=scale)
                if name != "ref_logprob":
                    g, want = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for y in (got, truth[name]))
                    assert_close(g, want, what=name, scale=scale.unsqueeze(-1))
