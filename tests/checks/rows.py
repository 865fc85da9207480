"""Checks of the row ops: every output and gradient against fp64, and what holds of single rows. The backend
is the one in force."""

from __future__ import annotations

import math

import pytest
import torch
from row_calls import rows_of

import fastalign as fa
from fastalign.ops.token_stats.contract import OUTPUT_BITS, TokenStatsFwd
from fastalign.ops.token_stats.op import token_stats_fwd
from fastalign.testing import (
    assert_close,
    gradient,
    gradient_scale,
    make_labels,
    make_logits,
    token_stats_truth,
)

ALL = ("logprob", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logit", "is_top1")
DIFFERENTIABLE = ("logprob", "entropy", "logsumexp")


def check_rows(logits, labels, names=ALL, **options):
    """Forward and backward of each output against fp64 truth, with plain PyTorch in fp32 as the yardstick. Of
    fp64 the truth is no better than what is tested; there the yardstick is the truth itself with the
    vocabulary in reverse, whose sums round otherwise."""
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    mine, true, plain = (logits.detach().clone().requires_grad_() for _ in range(3))
    stats = fa.token_stats(mine, labels, outputs=names, **options)
    truth = token_stats_truth(true, labels, **options)
    turned, places = (
        (plain.flip(-1), labels.new_tensor(plain.shape[-1] - 1) - labels)
        if acc == torch.float64
        else (plain, labels)
    )
    base = token_stats_truth(turned, places.where(labels >= 0, labels), dtype=acc, **options)
    for name in names:
        got = getattr(stats, name)
        assert got.dtype == acc
        assert_close(got, truth[name], base[name], what=name)
    weights = torch.linspace(-1.0, 1.5, labels.numel(), device=logits.device).view(labels.shape)
    for name in set(names) & set(DIFFERENTIABLE):
        got = torch.autograd.grad(getattr(stats, name), mine, weights.to(acc), retain_graph=True)[0]
        assert got.dtype == logits.dtype and got.shape == logits.shape
        want = torch.autograd.grad(truth[name], true, weights.double(), retain_graph=True)[0]
        yard = torch.autograd.grad(base[name], plain, weights.to(acc), retain_graph=True)[0]
        scale = weights.abs().double().unsqueeze(-1) * gradient_scale(
            logits.detach(), labels, name, **options
        )
        assert_close(got, want, yard, what=f"gradient of {name}", scale=scale)
    return stats


def check_accuracy_fp32(device, vocab, kind):
    labels = make_labels(5, vocab, ignored=0.2, device=device)
    stats = check_rows(make_logits(5, vocab, device=device, kind=kind), labels)
    assert bool((stats.logprob <= 0).all()) and bool((stats.entropy >= 0).all())
    assert float(stats.entropy.detach().max()) <= math.log(vocab) * (1 + 4e-7) + 2e-7


def check_scale_softcap_temperature(device, scale, cap, temperature):
    x, labels = make_logits(4, 300, device=device) * 4, make_labels(4, 300, device=device)
    names = tuple(
        n for n in ALL if n != "is_top1"
    )  # capping may create ties, and argmax then depends on rounding
    check_rows(x, labels, names, logit_scale=scale, softcap=cap, temperature=temperature)
    tensor = torch.tensor(temperature, device=device)
    by_tensor = fa.token_logprobs(x, labels, logit_scale=scale, softcap=cap, temperature=tensor)
    assert torch.equal(
        by_tensor, fa.token_logprobs(x, labels, logit_scale=scale, softcap=cap, temperature=temperature)
    )


def check_masked_rows_are_zeros(device, how):
    x = make_logits(6, 300, device=device)
    labels = make_labels(6, 300, device=device)
    keep = torch.tensor([True, False, True, False, False, True], device=device)
    dirty = x.clone()
    dirty[1], dirty[3], dirty[4] = math.nan, math.inf, -math.inf
    options = {"mask": keep} if how == "mask" else {}
    masked_labels = labels if how == "mask" else torch.where(keep, labels, -100)
    results = []
    for logits in (x, dirty):
        logits = logits.clone().requires_grad_()
        stats = fa.token_stats(logits, masked_labels, outputs=ALL, **options)
        for name in ALL:
            assert bool((getattr(stats, name)[~keep] == 0).all()), name
        g = gradient(stats.logprob.sum() + stats.entropy.sum() + stats.logsumexp.sum(), logits)
        assert bool((g[~keep] == 0).all())
        results.append([getattr(stats, n) for n in ALL] + [g[keep]])
    for clean, soiled in zip(*results):
        assert torch.equal(clean, soiled)


def check_minus_inf_logits(device, vocab):
    x = make_logits(4, vocab, device=device)
    x[0, : vocab - 2] = -math.inf  # a prefix longer than any tile
    x[1, 2:] = -math.inf
    x[2, ::2] = -math.inf
    labels = torch.tensor([vocab - 1, 0, 1, 3], device=device)
    check_rows(x, labels)
    logits = x.clone().requires_grad_()
    stats = fa.token_stats(logits, labels, outputs=("logprob", "entropy"))
    g = gradient(stats.logprob.sum() + stats.entropy.sum(), logits)
    assert bool((g[torch.isneginf(x)] == 0).all()) and bool(torch.isfinite(g).all())


def check_bad_rows_stay_alone(device, vocab, bad):
    x = make_logits(3, vocab, device=device)
    labels = make_labels(3, vocab, device=device)
    clean = fa.token_stats(x, labels, outputs=ALL)
    dirty = x.clone()
    if bad == "all -inf":
        dirty[1] = -math.inf
    else:
        dirty[1, vocab // 2] = bad
    dirty.requires_grad_()
    stats = fa.token_stats(dirty, labels, outputs=ALL)
    for name in ("logprob", "entropy", "log_sum_sq_probs"):
        assert math.isnan(float(getattr(stats, name)[1])), name
    for name in ALL:
        assert torch.equal(getattr(stats, name)[[0, 2]], getattr(clean, name)[[0, 2]]), name
    g = gradient(stats.logprob.sum() + stats.entropy.sum(), dirty)
    assert bool(torch.isnan(g[1]).all()) and bool(torch.isfinite(g[[0, 2]]).all())


def check_top1_is_argmax(device):
    x = torch.randint(-3, 4, (40, 61), generator=torch.Generator().manual_seed(3)).to(
        device, torch.bfloat16
    )  # full of ties
    for labels in (x.float().argmax(-1), make_labels(40, 61, device=device)):
        got = fa.token_stats(x, labels, outputs=("is_top1",)).is_top1
        # argmax on the CPU returns the first maximum
        assert torch.equal(got, (x.float().cpu().argmax(-1).to(device) == labels).float())


def check_several_labels(device):
    x = make_logits(5, 80, device=device).requires_grad_()
    index = torch.randint(80, (5, 3), generator=torch.Generator().manual_seed(1)).to(device)
    index[2] = index[2, 0]  # duplicates add up
    weights = torch.randn(5, 3, device=device)
    got = fa.selective_log_softmax(x, index)
    want = torch.log_softmax(x.double(), -1).gather(-1, index)
    assert_close(got, want, torch.log_softmax(x, -1).gather(-1, index))
    assert_close(gradient((got * weights).sum(), x), gradient((want * weights).sum(), x), scale=4.0)
    with pytest.raises(IndexError) if device == "cpu" else pytest.raises(AssertionError):
        assert bool(torch.isfinite(fa.selective_log_softmax(x, torch.full((5,), -100, device=device))).all())


def check_shards_merge(device, cuts):
    vocab, rows = 97, 5
    x = make_logits(rows, vocab, device=device)
    x[0, : cuts[0]] = -math.inf
    labels = torch.tensor([[vocab - 1], [cuts[0] - 1], [cuts[0]], [0], [-100]], device=device)
    bits = sum(OUTPUT_BITS[name] for name in ALL)
    whole = token_stats_fwd(TokenStatsFwd(rows_of(x, labels), bits, None, None))
    state = target = None
    edges = [0, *cuts, vocab]
    for lo, hi in zip(edges, edges[1:]):
        part = rows_of(x[:, lo:hi].contiguous(), labels, start=lo, total=vocab)
        *outputs, state, target = token_stats_fwd(TokenStatsFwd(part, bits, state, target))
    for name, got, want in zip(ALL, outputs, whole):
        assert_close(got, want.double(), what=name)
