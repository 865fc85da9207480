"""Checks of the losses over ranked lists: the papers' formulas as loops in fp64, and everything one call
returns against the reference in fp64."""

from __future__ import annotations

import itertools
import math

import torch
from torch.nn.functional import logsigmoid

import fastalign as fa
from checks.compare import assert_results_close, in_fp64, on_reference
from fastalign.ops.columns import MAX_LIST
from fastalign.testing import assert_close, gradient, make_batch


def best_of(r):
    return max(range(len(r)), key=lambda i: (float(r[i]), -i))


def ranked(r):
    """Best to worst; equal scores in the order of the list."""
    return sorted(range(len(r)), key=lambda i: -float(r[i]))


def pairs_of(r):
    return [(i, j) for i in range(len(r)) for j in range(len(r)) if float(r[i]) > float(r[j])]


def plackett_luce(a, total, length, r, beta=0.1):
    s = beta * a[ranked(r)]
    return sum((torch.logsumexp(s[k:], 0) - s[k] for k in range(len(s) - 1)), 0 * s.sum())


def rrhf(a, total, length, r, sft_weight=1.0):
    p, b = total / length, best_of(r)
    return (
        sum((torch.clamp(p[j] - p[i], min=0) for i, j in pairs_of(r)), 0 * p.sum())
        - sft_weight * total[b] / length[b]
    )


def pro(a, total, length, r, sft_weight=0.05):
    p, order = total / length, ranked(r)
    out = -sft_weight * (len(r) - 1) ** 2 * total[order[0]]
    for k, i in enumerate(order):
        gaps = {j: r[i] - r[j] for j in order[k + 1 :] if r[i] > r[j]}
        if gaps:
            t = max(gaps.values())
            terms = torch.stack([p[i] * t, *(p[j] * g for j, g in gaps.items())])
            out = out - torch.log_softmax(terms, 0)[0]
    return out


def lipo(a, total, length, r, beta=0.05):
    s, out = beta * a, 0.0 * a.sum()
    by_s = ranked(s.detach())
    rank = {i: 1 + n for n, i in enumerate(by_s)}
    for i, j in pairs_of(r):
        gain = abs(2 ** float(r[i]) - 2 ** float(r[j]))
        out = out - gain * abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j])) * logsigmoid(
            s[i] - s[j]
        )
    return out


def infonca(a, total, length, r, beta=0.01, alpha=1.0):
    return -(torch.softmax(r / alpha, 0) * torch.log_softmax(beta * a, 0)).sum()


def nca(a, total, length, r, beta=0.01, alpha=1.0):
    return -(torch.softmax(r / alpha, 0) * logsigmoid(beta * a)).sum() - logsigmoid(-beta * a).mean()


def exo_list(a, total, length, r, beta=0.1, alpha=1.0):
    log_q = torch.log_softmax(beta * a, 0)
    return (log_q.exp() * (log_q - torch.log_softmax(r / alpha, 0))).sum()


def kwise_rm(a, total, length, r):
    pairs = pairs_of(r)
    return -sum((logsigmoid(total[i] - total[j]) for i, j in pairs), 0 * total.sum()) / max(len(pairs), 1)


PAPERS = {f.__name__: f for f in (plackett_luce, rrhf, pro, lipo, infonca, nca, exo_list, kwise_rm)}
SIZES = (4, 0, 1, 5)  # responses of the lists of the tests


def make_lists(sizes=SIZES, *, ties=False, noise=0.3, dtype=torch.float32, device="cpu", seed=0, **options):
    """(batch of the lists' sequences, list_offsets, scores)."""
    count = sum(sizes)
    batch = make_batch((count + 1) // 2, noise=noise, dtype=dtype, device=device, seed=seed, **options)
    cu = batch.packed.cu_seqlens[: count + 1]
    tokens = int(cu[-1])
    packed = batch.packed._replace(cu_seqlens=cu, mask=batch.packed.mask[:tokens])
    batch = batch._replace(
        packed=packed, logprobs=batch.logprobs[:tokens], ref_logprobs=batch.ref_logprobs[:tokens]
    )
    scores = torch.rand(count, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64) * 3.0
    scores = scores.round() if ties else scores
    return (
        batch,
        torch.tensor([0, *itertools.accumulate(sizes)], device=device),
        scores.to(device=device, dtype=dtype),
    )


def list_truth(name, lists, **options):
    """[L] losses of the lists, and the logprobs leaf that they depend on, in fp64."""
    batch, offsets, scores = lists
    lp, mask, cu = (
        batch.logprobs.detach().double().cpu().requires_grad_(),
        batch.packed.mask.cpu(),
        batch.packed.cu_seqlens.tolist(),
    )
    d = lp - batch.ref_logprobs.double().cpu()
    a, total = (
        torch.stack([torch.where(mask, x, 0.0)[i:j].sum() for i, j in itertools.pairwise(cu)])
        for x in (d, lp)
    )
    length = torch.stack([mask[i:j].sum() for i, j in itertools.pairwise(cu)]).clamp(min=1).double()
    out = []
    for i, j in itertools.pairwise(offsets.tolist()):
        r = scores[i:j].double().cpu()
        out.append(PAPERS[name](a[i:j], total[i:j], length[i:j], r, **options) if i < j else 0 * lp.sum())
    return torch.stack(out), lp


def list_loss(lists, lp=None, **options):
    batch, offsets, scores = lists
    lp = batch.logprobs if lp is None else lp
    return fa.listwise_loss(
        lp, batch.ref_logprobs, batch.packed.cu_seqlens, offsets, scores, mask=batch.packed.mask, **options
    )


def check_list_loss(name, lists, **options):
    lp = lists[0].logprobs.clone().requires_grad_()
    got = list_loss(lists, lp, loss=name, **options)
    each, leaf = list_truth(name, lists, **options)
    valid = torch.tensor([j > i for i, j in itertools.pairwise(lists[1].tolist())])
    assert torch.equal(got.valid.cpu(), valid)
    want = each.sum() / max(int(valid.sum()), 1)
    # 40 ulp of the largest list's loss, and of the largest gradient: exponentials of sums of a dozen tokens
    assert_close(got.loss.cpu(), want, scale=10.0 * max(1.0, float(each.detach().abs().max())), what=name)
    g, want_g = gradient(got.loss, lp), gradient(want, leaf)
    assert_close(
        g.cpu(), want_g, scale=10.0 * max(1.0, float(want_g.abs().max())), what=f"gradient of {name}"
    )
    return got


def check_the_longest_list(device, name):
    generator = torch.Generator().manual_seed(0)
    sizes, count = (MAX_LIST, 1, MAX_LIST - 1), 2 * MAX_LIST
    totals, ref, scores = (
        torch.randn(count, generator=generator, dtype=torch.float64).float() for _ in range(3)
    )
    scores, lengths = (2 * scores).round() / 2, torch.arange(count) % 7 + 1.0
    leaf, plain = totals.to(device).requires_grad_(), totals.double().requires_grad_()
    offsets = torch.tensor([0, *itertools.accumulate(sizes)])
    got = fa.listwise_loss_from_sums(
        leaf, ref.to(device), offsets.to(device), scores.to(device), loss=name, lengths=lengths.to(device)
    )
    parts = [x.split(sizes) for x in (plain - ref.double(), plain, lengths.double(), scores.double())]
    want = torch.stack([PAPERS[name](*part) for part in zip(*parts)]).mean()
    assert_close(got.loss.cpu(), want, scale=10.0 * max(1.0, float(want.detach().abs())))
    want_g = gradient(want, plain)
    assert_close(gradient(got.loss, leaf).cpu(), want_g, scale=10.0 * max(1.0, float(want_g.abs().max())))


def run_lists(lists, truth=False, **options):
    """Everything that one call returns; the truth in fp64 on the reference."""
    batch, offsets, scores = lists
    if truth:
        batch = batch._replace(logprobs=batch.logprobs.double(), ref_logprobs=batch.ref_logprobs.double())
        options = in_fp64(options)
    lp = batch.logprobs.detach().clone().requires_grad_()
    with on_reference(truth):
        out = list_loss((batch, offsets, scores.to(lp.dtype)), lp, **options)
        upstream = torch.linspace(-1.0, 2.0, out.loss.numel(), device=lp.device, dtype=lp.dtype).view(
            out.loss.shape
        )
        g = gradient(out.loss, lp, upstream if out.loss.dim() else None)
    return {"loss": out.loss.detach(), "d logprobs": g, "rewards": out.rewards, "table": out.table}


def compare_lists(lists, **options):
    got = run_lists(lists, **options)
    assert_results_close(got, run_lists(lists, truth=True, **options), what=options)
    return got
