"""Checks of the row ops with reference logits: both log-probs, the exact KLs and their gradients against
fp64."""

from __future__ import annotations

import math

import pytest
import torch
from row_calls import rows_of

import fastalign as fa
from fastalign.ops.token_stats.contract import OUTPUT_BITS, RowGradients, TokenStatsBwd, TokenStatsFwd
from fastalign.ops.token_stats.op import token_stats_bwd, token_stats_fwd
from fastalign.testing import assert_close, gradient, make_labels, make_logits
from fastalign.testing import token_stats_truth as one_row

KLS = ("kl_policy_ref", "kl_ref_policy")
NAMES = ("ref_logprob", *KLS)


def log_softmaxes(logits, ref_logits, dtype, temperature=1.0, logit_scale=1.0, softcap=None):
    for x in (logits, ref_logits):
        x = x.to(dtype) * logit_scale
        yield torch.log_softmax(
            (x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature, -1
        )


def kl_truth(logits, ref_logits, labels, dtype=torch.float64, mask=None, ignore_index=-100, **options):
    """The outputs with a reference, written with log_softmax in `dtype` as the papers spell them; 0 log 0 =
    0."""
    log_p, log_q = log_softmaxes(logits, ref_logits, dtype, **options)
    p, q = log_p.exp(), log_q.exp()
    out = {
        "kl_policy_ref": torch.where(p == 0, 0.0, p * (log_p - torch.where(p == 0, 0.0, log_q))).sum(-1),
        "kl_ref_policy": torch.where(q == 0, 0.0, q * (log_q - torch.where(q == 0, 0.0, log_p))).sum(-1),
    }
    scored = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if mask is None else mask
    if labels is not None:
        scored = scored & (labels != ignore_index)
        out["ref_logprob"] = log_q.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return {name: torch.where(scored, value, torch.zeros_like(value)) for name, value in out.items()}


def kl_magnitude(logits, ref_logits, **options):
    """Of the terms whose rounding shows in a KL and its gradient: the largest |log p| and |log q| of each
    row."""
    return 1.0 + sum(
        torch.nan_to_num(x, neginf=0.0).abs().amax(-1)
        for x in log_softmaxes(logits, ref_logits, torch.float64, **options)
    )


def kl_gradient_size(logits, ref_logits, labels, temperature=1.0, logit_scale=1.0, softcap=None, **_):
    """Magnitude of the terms whose rounding shows in the gradients, entry by entry, for upstream gradients of
    1: those of `testing.gradient_scale` for the KLs, p (1 + |log p|) (2 + |log p| + |log q| + KL) + q (1 +
    |log q|), and 1 at the label."""
    log_p, log_q = log_softmaxes(logits, ref_logits, torch.float64, temperature, logit_scale, softcap)
    p, q, a, b = (
        log_p.exp(),
        log_q.exp(),
        1.0 - torch.nan_to_num(log_p, neginf=0.0),
        1.0 - torch.nan_to_num(log_q, neginf=0.0),
    )
    size = p * a * (a + b + (p * (b - a)).sum(-1, keepdim=True).abs()) + q * b
    size = size.scatter_add(-1, labels.clamp(min=0).unsqueeze(-1), torch.ones_like(size[..., :1]))
    return size * (logit_scale / float(temperature))


def make_row_pair(rows, vocab, *, noise=0.5, dtype=torch.float32, device="cpu", kind="normal", seed=0):
    """Policy logits, and reference logits that differ from them by `noise`."""
    x = make_logits(rows, vocab, device="cpu", kind=kind, seed=seed)
    ref = x + noise * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed + 100))
    return x.to(device=device, dtype=dtype), ref.to(device=device, dtype=dtype)


def total_of(stats, weights):
    return sum((weight * stats[name]).sum() for name, weight in weights.items())


def check_row_pairs(logits, ref_logits, labels, names=(*NAMES, "logprob", "entropy"), **options):
    """Every output against fp64, with plain PyTorch in fp32 as the yardstick; then the gradient of each KL,
    and of a mix of all that is differentiable."""
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    mine, true, yard = (logits.detach().clone().requires_grad_() for _ in range(3))
    stats = fa.token_stats(mine, labels, ref_logits=ref_logits, outputs=names, **options)
    truth, base = (
        {**kl_truth(x, ref_logits, labels, t, **options), **one_row(x, labels, dtype=t, **options)}
        for x, t in ((true, torch.float64), (yard, acc))
    )
    scale = kl_magnitude(logits, ref_logits, **options)
    for name in names:
        got = getattr(stats, name)
        assert got.dtype == acc and got.shape == labels.shape
        assert_close(got, truth[name], base[name], what=name, scale=scale)
    rows = torch.linspace(-1.0, 1.5, labels.numel(), device=logits.device, dtype=acc).view(labels.shape)
    differentiable = [n for n in names if getattr(stats, n).requires_grad]
    size = kl_gradient_size(logits, ref_logits, labels, **options) * rows.abs().double().unsqueeze(-1)
    mix = {n: rows * (i + 1) for i, n in enumerate(differentiable)}
    for upstream in [{n: rows} for n in differentiable if n in KLS] + ([mix] if mix else []):
        got, want, plainly = (
            torch.autograd.grad(total_of(values, upstream), x, retain_graph=True)[0]
            for values, x in ((stats._asdict(), mine), (truth, true), (base, yard))
        )
        assert got.dtype == logits.dtype and got.shape == logits.shape
        assert_close(got, want, plainly, what=f"gradient of {tuple(upstream)}", scale=len(upstream) * size)
    return stats


def check_kl_accuracy_fp32(device, vocab, kind):
    stats = check_row_pairs(
        *make_row_pair(4, vocab, device=device, kind=kind), make_labels(4, vocab, ignored=0.2, device=device)
    )
    assert all(bool((getattr(stats, n) >= 0).all()) for n in KLS) and bool((stats.ref_logprob <= 0).all())


def check_identical_rows_are_zero(device, vocab, dtype):
    x = make_logits(3, vocab, dtype=dtype, device=device)
    x[1, ::3] = -math.inf
    x[2] = 1e4 * x[2].float().sign().to(dtype)
    for shift in (0, 1, 3):  # of the reference in memory
        buffer = torch.zeros(shift + 3 * vocab, dtype=dtype, device=device)
        ref = buffer[shift:].view(3, vocab)
        ref.copy_(x)
        leaf = x.clone().requires_grad_()
        stats = fa.token_stats(leaf, ref_logits=ref, outputs=KLS)
        for name in KLS:
            assert bool((getattr(stats, name) == 0).all()), name
            assert bool(
                (torch.autograd.grad(getattr(stats, name).sum(), leaf, retain_graph=True)[0] == 0).all()
            ), name


def check_masked_row_pairs_are_zeros(device):
    x, ref = make_row_pair(6, 130, device=device)
    keep = torch.tensor([True, False, True, False, False, True], device=device)
    labels = make_labels(6, 130, device=device)
    dirty, dirty_ref = x.clone(), ref.clone()
    dirty[1], dirty[3], dirty_ref[3], dirty_ref[4] = math.nan, math.inf, math.nan, -math.inf
    for options in ({"mask": keep, "labels": labels}, {"labels": torch.where(keep, labels, -100)}):
        results = []
        for logits, reference in ((x, ref), (dirty, dirty_ref)):
            leaf = logits.clone().requires_grad_()
            stats = fa.token_stats(leaf, ref_logits=reference, outputs=("logprob", *NAMES), **options)
            g = gradient(
                total_of(stats._asdict(), {"logprob": 1.0, "kl_policy_ref": 1.0, "kl_ref_policy": 0.5}), leaf
            )
            assert all(bool((getattr(stats, n)[~keep] == 0).all()) for n in NAMES) and bool(
                (g[~keep] == 0).all()
            )
            results.append([getattr(stats, n)[keep].detach() for n in NAMES] + [g[keep]])
        assert all(torch.equal(a, b) for a, b in zip(*results))


def check_minus_inf_in_both(device, vocab):
    x, ref = make_row_pair(3, vocab, device=device)
    for z in (x, ref):
        z[0, : vocab - 2] = -math.inf  # a prefix longer than any tile
        z[1, 2:] = -math.inf
        z[2, ::2] = -math.inf
    labels = torch.tensor([vocab - 1, 0, 1], device=device)
    truth = kl_truth(x, ref, labels)
    leaf = x.clone().requires_grad_()
    stats = fa.token_stats(leaf, labels, ref_logits=ref, outputs=("logprob", *NAMES))
    for name in NAMES:
        assert_close(getattr(stats, name), truth[name], what=name, scale=8.0)
    for name in KLS:
        g = torch.autograd.grad(getattr(stats, name).sum(), leaf, retain_graph=True)[0]
        assert bool((g[torch.isneginf(x)] == 0).all()) and bool(torch.isfinite(g).all())
        # the same rows without the masked part
        kept = torch.isfinite(x[2])
        small = x[2, kept].clone().requires_grad_()
        value = getattr(fa.token_stats(small, ref_logits=ref[2, kept], outputs=(name,)), name)
        assert_close(g[2, kept], gradient(value, small).double(), scale=2.0)


def check_mass_on_a_token_without_mass(device):
    """+inf where the first distribution has mass and the second none; a token that only the second one has is
    no trouble. Other rows are not touched."""
    x, ref = make_row_pair(4, 300, device=device)
    clean = fa.token_stats(x, ref_logits=ref, outputs=KLS)
    x[1, 5], ref[2, 7] = -math.inf, -math.inf
    leaf = x.clone().requires_grad_()
    stats = fa.token_stats(leaf, ref_logits=ref, outputs=KLS)
    truth = kl_truth(x, ref, None)
    for name, infinite in (("kl_policy_ref", 2), ("kl_ref_policy", 1)):
        got = getattr(stats, name)
        assert float(got[infinite]) == math.inf
        assert_close(got, truth[name], scale=8.0)
        assert torch.equal(got[[0, 3]], getattr(clean, name)[[0, 3]])
    g = torch.autograd.grad(stats.kl_policy_ref.sum(), leaf, retain_graph=True)[0]
    assert bool(torch.isnan(g[2]).all()) and bool(torch.isfinite(g[[0, 1, 3]]).all()) and float(g[1, 5]) == 0
    g = torch.autograd.grad(stats.kl_ref_policy.sum(), leaf, retain_graph=True)[0]
    assert bool(torch.isfinite(g).all()) and float(g[1, 5]) == 0
    stats = fa.token_stats(leaf, ref_logits=ref, outputs=("entropy", *KLS))
    mixed = torch.autograd.grad(stats.kl_ref_policy.sum() + stats.entropy.sum(), leaf)[0]
    assert bool(torch.isfinite(mixed).all())
    p, q = torch.softmax(x.double(), -1), torch.softmax(ref.double(), -1)
    assert_close(g[1], torch.where(torch.isneginf(x[1]), 0.0, (p - q)[1]), scale=1.0)


def check_bad_rows_of_either_model_stay_alone(device, bad, where):
    x, ref = make_row_pair(3, 300, device=device)
    labels = make_labels(3, 300, device=device)
    names = ("logprob", "entropy", *NAMES)
    clean = fa.token_stats(x, labels, ref_logits=ref, outputs=names)
    dirty = x if where == "policy" else ref
    if bad == "all -inf":
        dirty[1] = -math.inf
    else:
        dirty[1, 150] = bad
    leaf = x.clone().requires_grad_()
    stats = fa.token_stats(leaf, labels, ref_logits=ref, outputs=names)
    for name in names:
        assert torch.equal(getattr(stats, name)[[0, 2]], getattr(clean, name)[[0, 2]]), name
        own = name in KLS or (name == "ref_logprob") == (where == "reference")
        assert math.isnan(float(getattr(stats, name)[1])) == own, name
    g = torch.autograd.grad(
        total_of(stats._asdict(), {"logprob": 1.0, "kl_policy_ref": 1.0}), leaf, retain_graph=True
    )[0]
    assert bool(torch.isnan(g[1]).all()) and bool(torch.isfinite(g[[0, 2]]).all())
    if where == "reference":  # no upstream gradient of a KL in that row: its reference does not matter
        weight = torch.tensor([1.0, 0.0, 1.0], device=device)
        g = torch.autograd.grad(
            total_of(stats._asdict(), {"logprob": 1.0, "kl_ref_policy": weight, "kl_policy_ref": weight}),
            leaf,
        )[0]
        alone = x[1:2].clone().requires_grad_()
        want = gradient(fa.token_logprobs(alone, labels[1:2]).sum(), alone)
        assert_close(g[1:2], want.double(), scale=1.0)


def check_large_finite_mask_values(device):
    """-1e30 and the dtype's minimum in place of -inf, in both models: no mass, no trouble."""
    hidden = 2100  # more than a tile
    x, ref = make_row_pair(2, hidden + 200, device=device)
    want = fa.token_stats(
        x[:, hidden:].contiguous(), ref_logits=ref[:, hidden:].contiguous(), outputs=("logsumexp", *KLS)
    )
    for value in (-1e30, torch.finfo(torch.float32).min):
        x[:, :hidden] = ref[:, :hidden] = value
        assert_close(fa.token_stats(x, outputs=("logsumexp",)).logsumexp, want.logsumexp.double(), scale=8.0)
        leaf = x.clone().requires_grad_()
        stats = fa.token_stats(leaf, ref_logits=ref, outputs=KLS)
        for name in KLS:
            assert_close(getattr(stats, name), getattr(want, name).double(), scale=8.0)
            g = torch.autograd.grad(getattr(stats, name).sum(), leaf, retain_graph=True)[0]
            assert bool((g[:, :hidden] == 0).all()) and bool(torch.isfinite(g).all())


def check_shards_of_both_rows_merge(device, cuts, masked):
    vocab, rows = 97, 4
    x, ref = make_row_pair(rows, vocab, device=device)
    if "policy" in masked:
        x[0, : cuts[0]] = -math.inf
    if "reference" in masked:
        ref[0, : cuts[0]] = -math.inf
    labels = torch.tensor([[vocab - 1], [cuts[0] - 1], [0], [-100]], device=device)
    bits = sum(OUTPUT_BITS.values())
    whole = token_stats_fwd(TokenStatsFwd(rows_of(x, labels, ref=ref), bits, None, None))
    state = target = None
    edges = [0, *cuts, vocab]
    parts = [
        rows_of(x[:, lo:hi].contiguous(), labels, ref=ref[:, lo:hi].contiguous(), start=lo, total=vocab)
        for lo, hi in zip(edges, edges[1:])
    ]
    for part in parts:
        *outputs, state, target = token_stats_fwd(TokenStatsFwd(part, bits, state, target))
    for name, got, want in zip(OUTPUT_BITS, outputs, whole):
        assert_close(got, want.double(), what=name, scale=8.0)
    g = [torch.linspace(-1, 1, rows, device=device) * k for k in (1.0, 0.5, -0.7)]
    upstream = RowGradients(g_logprob=g[0].unsqueeze(-1), g_kl_policy_ref=g[1], g_kl_ref_policy=g[2])
    got = torch.cat([token_stats_bwd(TokenStatsBwd(part, state, upstream)) for part in parts], -1)
    want = token_stats_bwd(TokenStatsBwd(rows_of(x, labels, ref=ref), whole[-2], upstream))
    assert_close(got, want.double(), scale=16.0)


def check_kl_loss(device, vocab, dtype, direction):
    """The bits of token_kl and of its backward, out of place and in place; masked rows 0 whatever their
    coefficient."""
    x, ref = make_row_pair(4, vocab, dtype=dtype, device=device)
    mask = torch.tensor([True, True, False, True], device=device)
    x[2], coef = math.nan, torch.tensor([0.5, -1.0, math.nan, 0.0], device=device)
    leaf = x.clone().requires_grad_()
    kl = fa.token_kl(leaf, ref, direction=direction, mask=mask)
    want = torch.autograd.grad(kl, leaf, torch.where(mask, coef, 0.0))[0]
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        logits = leaf * 1
        out = fa.token_kl_loss(logits, ref, coef, direction=direction, mask=mask, inplace=inplace)
        assert torch.equal(out.kl, kl) and not out.kl.requires_grad and out.loss.dtype == torch.float32
        assert_close(out.loss, (kl.double() * torch.where(mask, coef, 0.0)).sum())
        assert logits.shape == ((4, 0) if inplace else (4, vocab))
        out.loss.backward(retain_graph=True)
        assert torch.equal(leaf.grad, want)
        with pytest.raises(RuntimeError, match="token_kl_loss can be differentiated once"):
            out.loss.backward()
