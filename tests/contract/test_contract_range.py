"""Logits of any finite size at any temperature, and rows in which one element has all the mass: exactly what
fp64 gives of the same numbers."""

from __future__ import annotations

import math

import pytest
import torch
from row_calls import rows_of

import fastalign as fa
from fastalign.testing import assert_close

OUTPUTS = ("logprob", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logit", "is_top1")
KLS = ("ref_logprob", "kl_policy_ref", "kl_ref_policy")
MAX = torch.finfo(torch.float32).max


def rows(vocab=37, seed=0):
    """(logits, name of each row): common offsets, mask values, the ends of fp32."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(16, vocab, generator=g)
    made = {"ordinary": noise[0] * 3}
    for i, offset in enumerate((-1e9, 1e9, 3e9, -3e9, 1e12, -1e20, 1e30, -1e30)):
        made[f"offset {offset:g}"] = (
            noise[i + 1].double() * 3 * max(abs(offset) * 2.0**-24, 1.0) + offset
        ).float()
    made["all equal to the minimum"] = torch.full((vocab,), -MAX)
    made["all equal to the maximum"] = torch.full((vocab,), MAX)
    made["both ends"] = torch.where(noise[9] > 0, MAX, -MAX)
    made["one ordinary number"] = torch.full((vocab,), -MAX)
    made["one ordinary number"][5] = 1.5
    made["huge spread"] = noise[10] * 1e30
    made["minus infinities"] = torch.where(noise[11] > 1, -1e10, -math.inf)
    made["minus infinities"][3] = -1e10
    made["near the limit"] = (noise[12].double() * 200 + 2.0**29.5).float()
    return torch.stack(list(made.values())), list(made)


def truth(x, labels, temperature, scale, cap=None):
    """In fp64: (logits in nats, log-probs, finished outputs)."""
    z = x.double() * scale
    z = (z if cap is None else cap * torch.tanh(z / cap)) / temperature
    lp = z.log_softmax(-1)
    p = lp.exp()
    out = {
        "logprob": lp.gather(-1, labels.unsqueeze(-1)).squeeze(-1), "entropy": -torch.where(p > 0, p * lp, 0.0).sum(-1),
        "logsumexp": z.logsumexp(-1), "log_sum_sq_probs": torch.logsumexp(2 * lp, -1), "mean_logit": z.mean(-1),
        "is_top1": (x.argmax(-1) == labels).double(),
    }  # fmt: skip
    return lp, out


def check(got, want, name, scale):
    want = want.to(torch.float32).double()  # what fp32 can hold of it
    finite = want.abs() < 2e38  # beyond, the same number in bits overflows
    beyond = ~torch.isfinite(want)
    assert bool((got.double()[beyond] == want[beyond]).all()), f"{name}: {got[beyond]} for {want[beyond]}"
    assert_close(got[finite], want[finite], what=name, scale=scale[finite])


@pytest.mark.parametrize(
    "temperature, logit_scale", [(1.0, 1.0), (1e-6, 1.0), (0.7, 1e4), (1e-30, 1e-5), (1e8, 1.0), (3e35, 1.0)]
)
def test_any_finite_logits(backend, device, slow_backend, temperature, logit_scale):
    x, _ = rows(vocab=9 if slow_backend else 37)
    for labels in (x.argmax(-1), x.argmin(-1), torch.arange(len(x)) % x.shape[1])[slow_backend:]:
        leaf = x.clone().to(device).requires_grad_()
        _, want = truth(x, labels, temperature, logit_scale)
        stats = fa.token_stats(
            leaf, labels.to(device), outputs=OUTPUTS, temperature=temperature, logit_scale=logit_scale
        )
        for name in OUTPUTS:
            scale = 10.0 * torch.clamp(
                torch.nan_to_num(want[name].float().double().abs(), posinf=0.0, neginf=0.0), min=8.0
            )
            check(getattr(stats, name).detach().cpu(), want[name], f"{name} at {temperature}", scale)
        z = x.double().requires_grad_()
        lp, exact = truth(z, labels, temperature, logit_scale)
        upstream = torch.linspace(0.5, 1.5, len(x))
        usable = torch.isfinite(exact["logprob"].float())  # the others have an infinite value in fp32
        (g,) = torch.autograd.grad(
            (stats.logprob * upstream.to(device))[usable.to(device)].sum(), leaf, retain_graph=True
        )
        (w,) = torch.autograd.grad((exact["logprob"] * upstream)[usable].sum(), z)
        unit = logit_scale / temperature
        assert_close(g.cpu() / unit, torch.nan_to_num(w) / unit, what="gradient", scale=16.0)
        assert bool(torch.isfinite(g).all()) or unit > 1e30


@pytest.mark.parametrize("swap", [False, True])
def test_kl_of_any_finite_logits(backend, device, swap):
    x, names = rows(seed=1)
    near = {n: i for i, n in enumerate(names)}
    ref = x.roll(1, 0)
    for name in names:  # a reference of the row's own kind
        ref[near[name]] = torch.where(
            torch.rand(x.shape[1], generator=torch.Generator().manual_seed(3)) < 0.1,
            x[near[name]].roll(1),
            x[near[name]],
        )
    ref[0], ref[near["offset 1e+09"]] = x[near["offset 1e+09"]], x[0]  # and of the other one
    x, ref = (ref, x) if swap else (x, ref)
    labels = x.argmax(-1)
    leaf = x.clone().to(device).requires_grad_()
    stats = fa.token_stats(leaf, labels.to(device), ref_logits=ref.to(device), outputs=("logprob", *KLS))
    lp, _ = truth(x, labels, 1.0, 1.0)
    lq, _ = truth(ref, labels, 1.0, 1.0)
    p, q = lp.exp(), lq.exp()
    want = {"ref_logprob": lq.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
            "kl_policy_ref": torch.where(p > 0, p * (lp - lq), 0.0).sum(-1), "kl_ref_policy": torch.where(q > 0, q * (lq - lp), 0.0).sum(-1)}  # fmt: skip
    for name in KLS:
        scale = 16.0 * torch.clamp(
            torch.nan_to_num(want[name].float().double().abs(), posinf=0.0, neginf=0.0), min=8.0
        )
        sums = want[name].abs() < 1e36  # sums of a few larger terms overflow
        check(getattr(stats, name).detach().cpu()[sums], want[name][sums], name, scale[sums])
    for name in KLS[1:]:
        keep = want[name] < 1e6
        (g,) = torch.autograd.grad(getattr(stats, name)[keep.to(device)].sum(), leaf, retain_graph=True)
        exact = p * (lp - lq - want["kl_policy_ref"].unsqueeze(-1)) if name == "kl_policy_ref" else p - q
        exact = torch.where(
            keep.unsqueeze(-1), torch.where(p > 0, exact, exact if name == "kl_ref_policy" else 0.0), 0.0
        )
        size = 1.0 + float(want[name][keep].max())
        assert_close(g.cpu(), torch.nan_to_num(exact), what=f"gradient of {name}", scale=16.0 * size)


@pytest.mark.parametrize("cuts", [(30,), (1, 2, 3)])
def test_vocabulary_shards_of_any_finite_logits_merge(backend, device, cuts):
    from fastalign.ops.token_stats.contract import OUTPUT_BITS, TokenStatsFwd
    from fastalign.ops.token_stats.op import token_stats_fwd

    x, names = rows()
    ref = x.roll(1, 1)
    labels = (torch.arange(len(x)) % x.shape[1]).unsqueeze(-1).to(device)
    bits = sum(OUTPUT_BITS.values())
    x, ref, vocab, edges = x.to(device), ref.to(device), x.shape[1], [0, *cuts, x.shape[1]]
    whole = token_stats_fwd(TokenStatsFwd(rows_of(x, labels, ref=ref), bits, None, None))
    state = target = None
    for lo, hi in zip(edges, edges[1:]):
        part = rows_of(
            x[:, lo:hi].contiguous(), labels, ref=ref[:, lo:hi].contiguous(), start=lo, total=vocab
        )
        *outputs, state, target = token_stats_fwd(TokenStatsFwd(part, bits, state, target))
    for name, got, want in zip(OUTPUT_BITS, outputs, whole):
        finite = torch.isfinite(want)
        assert torch.equal(got[~finite], want[~finite]), name
        size = want.double().abs()
        if name in KLS[1:]:  # from shard to shard they move by differences of rounded maxima
            size = torch.maximum(size, torch.maximum(x.abs().amax(-1), ref.abs().amax(-1)).double())
        assert_close(got[finite], want[finite].double(), what=name, scale=16.0 * size[finite].clamp(min=8.0))


@pytest.mark.parametrize("cap", [None, 30.0, 50.0, 1e-3])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-7])
def test_one_element_has_all_the_mass(backend, device, slow_backend, cap, temperature):
    """A vocabulary of one, and rows that are -inf but for one element: log-prob, entropy and both KLs are 0
    to the bit."""
    g = torch.Generator().manual_seed(0)
    for vocab in (1, 9) if slow_backend else (1, 9, 300):
        if vocab > 1 and cap is not None:
            continue  # behind a cap -inf is an ordinary logit
        count = 4 if slow_backend else 40
        x, ref = (torch.randn(count, 1, generator=g) * 20 for _ in range(2))
        labels = torch.arange(count) % vocab
        at = torch.arange(vocab) == labels.unsqueeze(-1)
        x, ref = torch.where(at, x, -math.inf), torch.where(at, ref, -math.inf)
        options = {"temperature": temperature, "softcap": cap}
        leaf = x.to(device).requires_grad_()
        stats = fa.token_stats(
            leaf,
            labels.to(device),
            ref_logits=ref.to(device),
            outputs=("logprob", "entropy", *KLS),
            **options,
        )
        for name in ("logprob", "entropy", *KLS):
            assert bool((getattr(stats, name) == 0).all()), f"{name} with V = {vocab}"
        for outputs in (("logprob",), ("entropy",)):  # the sums that losses ask for
            out = getattr(fa.token_stats(leaf, labels.to(device), outputs=outputs, **options), outputs[0])
            assert bool((out == 0).all()), f"{outputs} alone with V = {vocab}"
            (grad,) = torch.autograd.grad(out.sum(), leaf)
            # At 1e-7 exponents count from up to 16 bits beside the maximum, which the gradient of the entropy
            # cancels in fp32.
            assert float(grad.abs().max()) <= (4e-7 if temperature > 1e-3 else 3e-6) / temperature and bool(
                (grad[~at] == 0).all()
            )


def test_label_goes_through_the_sweeps_softcap(backend, device, slow_backend):
    """With one function for both no log-prob is above 0, and a row's probabilities sum to 1 as well as the
    sums allow."""
    rows = 16 if slow_backend else 64
    x = torch.randn(rows, 5, generator=torch.Generator().manual_seed(0)) * 40
    z = 20.0 * torch.tanh(x.double() / 20.0) / 0.01
    for k in range(5):
        labels = torch.full((rows,), k)
        lp = fa.token_logprobs(x.to(device), labels.to(device), softcap=20.0, temperature=0.01)
        assert_close(lp, z.log_softmax(-1)[:, k], scale=8.0 * 20.0 / 0.01)


def test_scales_that_fp32_does_not_hold_are_refused(backend, device):
    x, labels = torch.randn(2, 3, device=device), torch.zeros(2, dtype=torch.long, device=device)
    for options in (
        {"temperature": 1e-45},
        {"temperature": 1e39},
        {"logit_scale": 1e39},
        {"softcap": 1e39},
        {"softcap": 1e-39, "logit_scale": 10.0},
    ):
        with pytest.raises(ValueError, match="fp32"):
            fa.token_logprobs(x, labels, **options)
