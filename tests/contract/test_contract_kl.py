"""The contract of the row ops with reference logits, on every backend: both log-probs, the exact KLs and their gradients (row numbers in comments
refer to the table of numeric edge cases that every kernel must survive). Losses made of them: test_contract_kl_loss.py."""

from __future__ import annotations

import math

import pytest
import torch
from row_calls import rows_of

import fastalign as fa
from fastalign.testing import assert_close, gradient, make_labels, make_logits
from fastalign.testing import token_stats_truth as one_row

KLS = ("kl_policy_ref", "kl_ref_policy")
NAMES = ("ref_logprob", *KLS)


def log_softmaxes(logits, ref_logits, dtype, temperature=1.0, logit_scale=1.0, softcap=None):
    for x in (logits, ref_logits):
        x = x.to(dtype) * logit_scale
        yield torch.log_softmax((x if softcap is None else softcap * torch.tanh(x / softcap)) / temperature, -1)


def plain(logits, ref_logits, labels, dtype=torch.float64, mask=None, ignore_index=-100, **options):
    """The outputs with a reference, written with log_softmax in `dtype` as the papers spell them; 0 log 0 = 0."""
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


def magnitude(logits, ref_logits, **options):
    """Of the terms whose rounding shows in a KL and its gradient: the largest |log p| and |log q| of each row."""
    return 1.0 + sum(torch.nan_to_num(x, neginf=0.0).abs().amax(-1) for x in log_softmaxes(logits, ref_logits, torch.float64, **options))


def gradient_size(logits, ref_logits, labels, temperature=1.0, logit_scale=1.0, softcap=None, **_):
    """Magnitude of the terms whose rounding shows in the gradients, entry by entry, for upstream gradients of 1: those of `testing.gradient_scale`
    for the KLs, p (1 + |log p|) (2 + |log p| + |log q| + KL) + q (1 + |log q|), and 1 at the label."""
    log_p, log_q = log_softmaxes(logits, ref_logits, torch.float64, temperature, logit_scale, softcap)
    p, q, a, b = log_p.exp(), log_q.exp(), 1.0 - torch.nan_to_num(log_p, neginf=0.0), 1.0 - torch.nan_to_num(log_q, neginf=0.0)
    size = p * a * (a + b + (p * (b - a)).sum(-1, keepdim=True).abs()) + q * b
    size = size.scatter_add(-1, labels.clamp(min=0).unsqueeze(-1), torch.ones_like(size[..., :1]))
    return size * (logit_scale / float(temperature))


def make_pair(rows, vocab, *, noise=0.5, dtype=torch.float32, device="cpu", kind="normal", seed=0):
    """Policy logits, and reference logits that differ from them by `noise`."""
    x = make_logits(rows, vocab, device="cpu", kind=kind, seed=seed)
    ref = x + noise * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed + 100))
    return x.to(device=device, dtype=dtype), ref.to(device=device, dtype=dtype)


def total_of(stats, weights):
    return sum((weight * stats[name]).sum() for name, weight in weights.items())


def check(logits, ref_logits, labels, names=(*NAMES, "logprob", "entropy"), **options):
    """Every output against fp64, with plain PyTorch in fp32 as the yardstick; then the gradient of each KL, and of a mix of all that is
    differentiable."""
    acc = torch.float64 if logits.dtype == torch.float64 else torch.float32
    mine, true, yard = (logits.detach().clone().requires_grad_() for _ in range(3))
    stats = fa.token_stats(mine, labels, ref_logits=ref_logits, outputs=names, **options)
    truth, base = (
        {**plain(x, ref_logits, labels, t, **options), **one_row(x, labels, dtype=t, **options)}
        for x, t in ((true, torch.float64), (yard, acc))
    )
    scale = magnitude(logits, ref_logits, **options)
    for name in names:
        got = getattr(stats, name)
        assert got.dtype == acc and got.shape == labels.shape
        assert_close(got, truth[name], base[name], what=name, scale=scale)
    rows = torch.linspace(-1.0, 1.5, labels.numel(), device=logits.device, dtype=acc).view(labels.shape)
    differentiable = [n for n in names if getattr(stats, n).requires_grad]
    size = gradient_size(logits, ref_logits, labels, **options) * rows.abs().double().unsqueeze(-1)
    mix = {n: rows * (i + 1) for i, n in enumerate(differentiable)}
    for upstream in [{n: rows} for n in differentiable if n in KLS] + ([mix] if mix else []):
        got, want, plainly = (
            torch.autograd.grad(total_of(values, upstream), x, retain_graph=True)[0]
            for values, x in ((stats._asdict(), mine), (truth, true), (base, yard))
        )
        assert got.dtype == logits.dtype and got.shape == logits.shape
        assert_close(got, want, plainly, what=f"gradient of {tuple(upstream)}", scale=len(upstream) * size)
    return stats


# --- the definition -----------------------------------------------------------------------------------------------------------------------


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


# --- accuracy -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["normal", "peaked", "offset"])
@pytest.mark.parametrize("vocab", (1, 2, 3, 127, 129, 1000, 5003))
def test_kl_accuracy_fp32(backend, device, slow_backend, vocab, kind):
    vocab = min(vocab, 1500) if slow_backend else vocab
    stats = check(*make_pair(4, vocab, device=device, kind=kind), make_labels(4, vocab, ignored=0.2, device=device))
    assert all(bool((getattr(stats, n) >= 0).all()) for n in KLS) and bool((stats.ref_logprob <= 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab", (3, 129, 1000))
def test_kl_accuracy_other_dtypes(backend, device, row_dtypes, vocab, dtype):  # row 17
    if dtype in row_dtypes:
        check(*make_pair(3, vocab, dtype=dtype, device=device), make_labels(3, vocab, device=device))


@pytest.mark.parametrize(
    "names", [("kl_policy_ref",), ("kl_ref_policy",), ("ref_logprob",), ("logprob", "ref_logprob", "kl_ref_policy"), NAMES]
)
def test_each_output_alone_and_together(backend, device, names):
    check(*make_pair(3, 700, device=device), make_labels(3, 700, device=device), names)


@pytest.mark.parametrize("vocab", (32000, 50257, 129920, 262145))
def test_kl_accuracy_large_vocabularies(backend, device, slow_backend, vocab):
    vocab = vocab // 64 + vocab % 2 if slow_backend else vocab
    check(*make_pair(2, vocab, dtype=torch.bfloat16, device=device), make_labels(2, vocab, device=device))


@pytest.mark.parametrize("scale,cap,temperature", [(1.0, 30.0, 1.0), (0.5, 5.0, 0.6), (3.0, None, 2.0), (1.0, None, 1e-2)])
def test_scale_softcap_temperature_of_both_rows(backend, device, scale, cap, temperature):  # rows 15, 16: both rows alike
    x, ref = make_pair(3, 300, device=device)
    check(x * 3, ref * 3, make_labels(3, 300, device=device), logit_scale=scale, softcap=cap, temperature=temperature)


@pytest.mark.parametrize("offset,ref_offset", [(1e2, 0.0), (0.0, -1e4), (1e6, 1e6), (-1e6, 1e4)])
def test_common_offsets_cancel(backend, device, offset, ref_offset):  # row 9, for each row its own
    x, ref = make_pair(3, 501, device=device)
    x, ref = (x + offset).requires_grad_(), ref + ref_offset
    truth = plain(x.double(), ref.double(), None)
    for name in KLS:
        value = getattr(fa.token_stats(x, ref_logits=ref, outputs=(name,)), name)
        assert float((value.double() - truth[name]).detach().abs().max()) <= 2e-6, name
        got, want = gradient(value.sum(), x), torch.autograd.grad(truth[name].sum(), x, retain_graph=True)[0]
        assert float((got - want).abs().max()) <= 2e-6, name


# --- nearly equal rows --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [7, 1031, 2500])
def test_identical_rows_are_exactly_zero(backend, device, vocab, dtype):  # row 26
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
            assert bool((torch.autograd.grad(getattr(stats, name).sum(), leaf, retain_graph=True)[0] == 0).all()), name


@pytest.mark.parametrize("distance", [1e-4, 2e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearly_equal_rows(backend, device, dtype, distance):  # row 26; E8
    """Values never below -1e-7; at a total variation of 0.02 the gradient is right to 0.3 %."""
    x = make_logits(4, 900, device=device)
    noise = torch.randn(4, 900, generator=torch.Generator().manual_seed(5)).to(device)
    if dtype == torch.bfloat16:  # differences that bf16 can hold: some logits one step away
        x = x.to(dtype)
        ref = torch.where(noise.abs() < 2.5 - 50 * distance, x, x * (1 + 2**-7))
    else:
        ref = x + 2.5 * distance * noise
    log_p, log_q = log_softmaxes(x, ref, torch.float64)
    if dtype == torch.float32:
        assert 0.4 * distance < float((log_p.exp() - log_q.exp()).abs().sum(-1).mean() / 2) < 2.5 * distance
    leaf, true = x.clone().requires_grad_(), x.double().requires_grad_()
    truth = plain(true, ref.double(), None)
    for name in KLS:
        value = getattr(fa.token_stats(leaf, ref_logits=ref, outputs=(name,)), name)
        assert float(value.detach().min()) >= -1e-7
        assert float((value.double() - truth[name]).detach().abs().max()) <= 3e-7
        if distance == 2e-2:
            got, want = gradient(value.sum(), leaf).double(), torch.autograd.grad(truth[name].sum(), true, retain_graph=True)[0]
            assert float((got - want).norm() / want.norm()) <= 3e-3, name


# --- masked, infinite and bad rows --------------------------------------------------------------------------------------------------------


def test_masked_pairs_of_rows_are_exact_zeros(backend, device):  # rows 2, 4
    x, ref = make_pair(6, 130, device=device)
    keep = torch.tensor([True, False, True, False, False, True], device=device)
    labels = make_labels(6, 130, device=device)
    dirty, dirty_ref = x.clone(), ref.clone()
    dirty[1], dirty[3], dirty_ref[3], dirty_ref[4] = math.nan, math.inf, math.nan, -math.inf
    for options in ({"mask": keep, "labels": labels}, {"labels": torch.where(keep, labels, -100)}):
        results = []
        for logits, reference in ((x, ref), (dirty, dirty_ref)):
            leaf = logits.clone().requires_grad_()
            stats = fa.token_stats(leaf, ref_logits=reference, outputs=("logprob", *NAMES), **options)
            g = gradient(total_of(stats._asdict(), {"logprob": 1.0, "kl_policy_ref": 1.0, "kl_ref_policy": 0.5}), leaf)
            assert all(bool((getattr(stats, n)[~keep] == 0).all()) for n in NAMES) and bool((g[~keep] == 0).all())
            results.append([getattr(stats, n)[keep].detach() for n in NAMES] + [g[keep]])
        assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("vocab", [9, 600, 2100])
def test_minus_inf_in_both(backend, device, vocab):  # row 10, E16
    x, ref = make_pair(3, vocab, device=device)
    for z in (x, ref):
        z[0, : vocab - 2] = -math.inf  # a prefix longer than any tile
        z[1, 2:] = -math.inf
        z[2, ::2] = -math.inf
    labels = torch.tensor([vocab - 1, 0, 1], device=device)
    truth = plain(x, ref, labels)
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


def test_mass_on_a_token_without_mass(backend, device):  # row 27
    """+inf where the first distribution has mass and the second none; a token that only the second one has is no trouble. Other rows are not touched."""
    x, ref = make_pair(4, 300, device=device)
    clean = fa.token_stats(x, ref_logits=ref, outputs=KLS)
    x[1, 5], ref[2, 7] = -math.inf, -math.inf
    leaf = x.clone().requires_grad_()
    stats = fa.token_stats(leaf, ref_logits=ref, outputs=KLS)
    truth = plain(x, ref, None)
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


@pytest.mark.parametrize("bad", [math.nan, math.inf, "all -inf"])
@pytest.mark.parametrize("where", ["policy", "reference"])
def test_bad_rows_of_either_model_stay_alone(backend, device, bad, where):  # rows 12, 13
    x, ref = make_pair(3, 300, device=device)
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
    g = torch.autograd.grad(total_of(stats._asdict(), {"logprob": 1.0, "kl_policy_ref": 1.0}), leaf, retain_graph=True)[0]
    assert bool(torch.isnan(g[1]).all()) and bool(torch.isfinite(g[[0, 2]]).all())
    if where == "reference":  # no upstream gradient of a KL in that row: its reference does not matter
        weight = torch.tensor([1.0, 0.0, 1.0], device=device)
        g = torch.autograd.grad(total_of(stats._asdict(), {"logprob": 1.0, "kl_ref_policy": weight, "kl_policy_ref": weight}), leaf)[0]
        alone = x[1:2].clone().requires_grad_()
        want = gradient(fa.token_logprobs(alone, labels[1:2]).sum(), alone)
        assert_close(g[1:2], want.double(), scale=1.0)


def test_extreme_peaks(backend, device):  # row 7
    x, ref = torch.zeros(3, 400, device=device), torch.zeros(3, 400, device=device)
    x[0, 3] = x[1, 3] = ref[0, 3] = ref[1, 7] = x[2, 3] = 1e4
    leaf = x.requires_grad_()
    stats = fa.token_stats(leaf, ref_logits=ref, outputs=KLS)
    assert stats.kl_policy_ref.tolist() == pytest.approx([0.0, 1e4, math.log(400)], rel=3e-7, abs=2e-7)
    assert stats.kl_ref_policy.tolist()[:2] == pytest.approx([0.0, 1e4], rel=3e-7, abs=2e-7)
    for name in KLS:
        g = torch.autograd.grad(getattr(stats, name).sum(), leaf, retain_graph=True)[0]
        assert bool(torch.isfinite(g).all()) and float(g[0].abs().max()) <= 2e-7
        want = [1.0, -1.0] if name == "kl_ref_policy" else [0.0, 0.0]
        assert g[1, [3, 7]].tolist() == pytest.approx(want, abs=2e-3 if name == "kl_policy_ref" else 2e-7)


def test_large_finite_mask_values(backend, device):
    """-1e30 and the dtype's minimum in place of -inf, in both models: no mass, no trouble."""
    hidden = 2100  # more than a tile
    x, ref = make_pair(2, hidden + 200, device=device)
    want = fa.token_stats(x[:, hidden:].contiguous(), ref_logits=ref[:, hidden:].contiguous(), outputs=("logsumexp", *KLS))
    for value in (-1e30, torch.finfo(torch.float32).min):
        x[:, :hidden] = ref[:, :hidden] = value
        assert_close(fa.token_stats(x, outputs=("logsumexp",)).logsumexp, want.logsumexp.double(), scale=8.0)
        leaf = x.clone().requires_grad_()
        stats = fa.token_stats(leaf, ref_logits=ref, outputs=KLS)
        for name in KLS:
            assert_close(getattr(stats, name), getattr(want, name).double(), scale=8.0)
            g = torch.autograd.grad(getattr(stats, name).sum(), leaf, retain_graph=True)[0]
            assert bool((g[:, :hidden] == 0).all()) and bool(torch.isfinite(g).all())


# --- layouts, repeatability ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_of_both_rows(backend, device, dtype):  # row 23
    base, other = (z.view(2, 4, 45) for z in make_pair(2 * 4, 45, dtype=dtype, device=device))
    padded = torch.full((4, 2, 51), math.nan, dtype=dtype, device=device)
    padded[..., 2:47] = other.transpose(0, 1)
    pairs = [
        (base, padded[..., 2:47].transpose(0, 1)),
        (padded[..., 2:47].transpose(0, 1), base),
        (base[:, ::2], other[:, ::2].contiguous()),
        (base[..., ::2], other[..., ::2]),
        (base, other[:1].expand(2, 4, 45)),
    ]
    for x, ref in pairs:
        leaves = [x.detach().requires_grad_(), x.detach().contiguous().clone().requires_grad_()]
        results = []
        for leaf, reference in zip(leaves, (ref, ref.contiguous())):
            stats = fa.token_stats(leaf, ref_logits=reference, outputs=KLS)
            results.append([*(getattr(stats, n) for n in KLS), gradient(stats.kl_policy_ref.sum() - stats.kl_ref_policy.sum(), leaf)])
        assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [1037, 2600])
def test_kl_batch_invariance_and_alignment(backend, device, vocab, dtype):  # rows 20, 42; E10
    """A row's result is the same bits alone, in any batch, at any address of either row, and in every run."""
    if backend == "reference" and vocab > 1037:
        return  # PyTorch's own sums of longer rows depend on the address
    row, ref_row = make_pair(1, vocab, dtype=dtype, device=device)

    def run(logits, ref_logits):
        leaf = logits.detach().requires_grad_()
        stats = fa.token_stats(leaf, ref_logits=ref_logits, outputs=KLS)
        return *(getattr(stats, n)[-1] for n in KLS), gradient(stats.kl_policy_ref.sum() + stats.kl_ref_policy.sum(), leaf)[-1]

    want = run(row, ref_row)
    for skip, ref_skip, rows in ((0, 0, 3), (1, 0, 1), (0, 3, 1), (5, 2, 3), (8, 7, 2)):
        placed = []
        for content, before in ((row, skip), (ref_row, ref_skip)):
            buffer = torch.randn(before + rows * vocab, device=device).to(dtype)
            placed.append(buffer[before:].view(rows, vocab))
            placed[-1][-1] = content[0]
        assert all(torch.equal(a, b) for a, b in zip(run(*placed), want)), (skip, ref_skip, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [7, 130, 1031])
def test_kl_inplace_backward_equals_out_of_place(backend, device, vocab, dtype):  # E21
    labels = make_labels(4, vocab, ignored=0.3, device=device)
    grads = []
    for inplace in (False, True):
        x, ref = make_pair(4, vocab, dtype=dtype, device=device)
        leaf = x.requires_grad_()
        logits = leaf * 1.0
        stats = fa.token_stats(logits, labels, ref_logits=ref, outputs=("logprob", *KLS), inplace_backward=inplace)
        total_of(stats._asdict(), {"logprob": 1.0, "kl_policy_ref": 0.3, "kl_ref_policy": -0.2}).backward()
        assert logits.shape == ((4, 0) if inplace else (4, vocab))
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("cuts", [(30,), (1, 2, 3), (16, 64, 80)])
@pytest.mark.parametrize("masked", [(), ("policy",), ("policy", "reference")])
def test_vocabulary_shards_of_both_rows_merge(backend, device, cuts, masked):  # row 43 for one rank, both rows
    from fastalign.ops.token_stats.contract import OUTPUT_BITS, RowGradients, TokenStatsBwd, TokenStatsFwd
    from fastalign.ops.token_stats.op import token_stats_bwd, token_stats_fwd

    vocab, rows = 97, 4
    x, ref = make_pair(rows, vocab, device=device)
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
        rows_of(x[:, lo:hi].contiguous(), labels, ref=ref[:, lo:hi].contiguous(), start=lo, total=vocab) for lo, hi in zip(edges, edges[1:])
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


def test_ref_logprobs_of_several_labels(backend, device):  # A9
    x, ref = make_pair(4, 60, device=device)
    index = torch.randint(60, (4, 3), generator=torch.Generator().manual_seed(1)).to(device)
    index[1, 2] = -100
    stats = fa.token_stats(x.requires_grad_(), index, ref_logits=ref, outputs=("logprob", *NAMES))
    want = torch.log_softmax(ref.double(), -1).gather(-1, index.clamp(min=0)).masked_fill(index == -100, 0.0)
    assert_close(stats.ref_logprob, want, torch.log_softmax(ref, -1).gather(-1, index.clamp(min=0)), scale=8.0)
    true = x.detach().double().requires_grad_()
    log_p = torch.log_softmax(true, -1).gather(-1, index.clamp(min=0)).masked_fill(index == -100, 0.0)
    truth = (log_p.sum() + plain(true, ref.double(), None)["kl_policy_ref"].sum(), true)
    assert_close(gradient(stats.logprob.sum() + stats.kl_policy_ref.sum(), x), gradient(*truth), scale=8.0)


def test_reference_is_a_constant(backend, device):
    x, ref = (z.requires_grad_() for z in make_pair(2, 20, device=device))
    loss = fa.token_kl(x, ref).sum() + fa.token_kl_loss(x, ref, torch.ones(2, device=device)).loss
    assert torch.autograd.grad(loss, (x, ref), allow_unused=True)[1] is None
    assert not fa.token_kl(x.detach(), ref).requires_grad


def test_no_rows_and_one_word(backend, device):  # rows 1, 6
    x = torch.empty(0, 30, device=device, requires_grad=True)
    assert gradient(fa.token_kl(x, torch.empty(0, 30, device=device)).sum(), x).shape == (0, 30)
    assert float(fa.token_kl_loss(x, x.detach(), torch.ones((), device=device)).loss) == 0
    x = make_logits(3, 1, device=device).requires_grad_()
    for direction in ("policy_ref", "ref_policy"):
        kl = fa.token_kl(x, torch.zeros(3, 1, device=device), direction=direction)
        assert kl.tolist() == pytest.approx([0.0] * 3, abs=2e-7)
        assert gradient(kl.sum(), x).flatten().tolist() == pytest.approx([0.0] * 3, abs=2e-7)


def test_kl_makes_no_vocabulary_sized_temporary(backend, device):  # A1
    if backend == "reference":
        return
    from fastalign.runtime import ffi

    taken, empty = [], ffi.empty
    try:
        ffi.empty = lambda shape, dtype, device: taken.append(math.prod(shape)) or empty(shape, dtype, device)
        fa.token_stats(*make_pair(4, 3000, device=device)[:1], ref_logits=make_logits(4, 3000, device=device), outputs=KLS)
    finally:
        ffi.empty = empty
    assert taken and sum(taken) < 4 * 40


# --- bad arguments ------------------------------------------------------------------------------------------------------------------------


def test_kl_errors_name_the_argument(backend, device):
    x, ref = make_pair(3, 10, device=device)
    one = torch.ones((), device=device)
    for error, words, call in (
        (ValueError, "ref_logits is required for outputs kl_policy_ref", lambda: fa.token_stats(x, outputs=("kl_policy_ref",))),
        (ValueError, "labels is required for outputs ref_logprob", lambda: fa.token_stats(x, ref_logits=ref, outputs=("ref_logprob",))),
        (ValueError, "ref_logits has shape", lambda: fa.token_kl(x, ref[:2])),
        (TypeError, "ref_logits is torch.bfloat16 but logits is torch.float32", lambda: fa.token_kl(x, ref.bfloat16())),
        (TypeError, "ref_logits must be a tensor", lambda: fa.token_kl_loss(x, None, one)),
        (ValueError, "direction='forward' is unknown; legal: policy_ref, ref_policy", lambda: fa.token_kl(x, ref, direction="forward")),
        (ValueError, "coef has shape", lambda: fa.token_kl_loss(x, ref, one.expand(2))),
        (TypeError, "coef must be a tensor", lambda: fa.token_kl_loss(x, ref, 0.1)),
        (ValueError, "temperature", lambda: fa.token_kl(x, ref, temperature=0.0)),
    ):
        with pytest.raises(error, match=words):
            call()
