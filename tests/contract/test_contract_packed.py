"""The contract of the ops on packed scalars (sequence_sum, kl_estimate, the pair kernel), on every
backend."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from checks.pairs import PAIR_VARIANTS, PLAIN_PRESETS, compare_pairs, preset_of, presets_for, run_pairs

import fastalign as fa
from fastalign import losses
from fastalign.losses.pair import Preset
from fastalign.ops.columns import LINKS
from fastalign.testing import assert_close, gradient, make_batch

LN2 = math.log(2.0)

# --- sequence_sum -------------------------------------------------------------------------------------------


def loop_sum(x, cu_seqlens, mask=None, weights=None, mean=False):
    """fp64, one Python loop."""
    out = []
    for lo, hi in itertools.pairwise(cu_seqlens.tolist()):
        rows = [i for i in range(lo, hi) if mask is None or bool(mask[i])]
        total = sum((float(x[i]) * (1.0 if weights is None else float(weights[i])) for i in rows), 0.0)
        out.append(total / max(len(rows), 1) if mean else total)
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("cu", [[0, 5], [0, 0, 1, 1, 4, 40, 40], [0], [0, 0, 0], [0, 300, 301, 1300]])
def test_sequence_sum(backend, device, cu, with_weights, mean):  # rows 1, 3, 38, 39
    cu_seqlens = torch.tensor(cu, dtype=torch.int32, device=device)
    tokens = cu[-1]
    x = torch.randn(tokens, device=device)
    mask = torch.rand(tokens, device=device) < 0.7
    x = torch.where(mask, x, math.nan).requires_grad_()
    weights = torch.where(mask, torch.randn(tokens, device=device), math.nan) if with_weights else None
    got = fa.sequence_sum(x, cu_seqlens, mask=mask, weights=weights, mean=mean)
    want = loop_sum(x.detach(), cu_seqlens, mask, weights, mean)
    assert_close(got.cpu(), want, scale=8.0 if not mean else 2.0)
    upstream = torch.arange(1.0, len(cu), device=device)
    g = gradient(got, x, upstream)
    assert bool((g[~mask] == 0).all())
    lengths = torch.tensor(
        [max(int(mask[a:b].sum()), 1) if mean else 1 for a, b in itertools.pairwise(cu)], dtype=torch.float64
    )
    per_token = torch.repeat_interleave(upstream.cpu().double() / lengths, torch.tensor(cu).diff())
    want_g = torch.where(mask.cpu(), per_token * (1.0 if weights is None else weights.cpu().double()), 0.0)
    assert_close(g.cpu(), want_g, scale=16.0)


def test_sequence_sum_of_a_long_sequence(backend, device, slow_backend):  # row 38
    tokens = 20_000 if slow_backend else 1_000_000
    x = torch.rand(tokens, device=device)
    got = fa.sequence_sum(x, torch.tensor([0, 3, tokens], dtype=torch.int32, device=device))
    want = torch.stack([x[:3].double().sum(), x[3:].double().sum()])
    assert_close(got, want, torch.stack([x[:3].sum(), x[3:].sum()]))
    assert torch.equal(
        got, fa.sequence_sum(x, torch.tensor([0, 3, tokens], dtype=torch.int32, device=device))
    )


@pytest.mark.parametrize(
    "cu,words",
    [([1, 4], "start at 0"), ([0, 3], "end at the number"), ([0, 3, 2, 4], "decreases at position 2")],
)
def test_cu_seqlens_are_checked(backend, device, cu, words):
    if device != "cpu":
        return
    with pytest.raises(ValueError, match=words):
        fa.sequence_sum(torch.ones(4), torch.tensor(cu, dtype=torch.int32))
    with pytest.raises(ValueError, match=words):
        fa.preference_loss(
            torch.ones(4), torch.ones(4), torch.tensor(cu, dtype=torch.int32), pairs=torch.tensor([[0, 0]])
        )


# --- kl_estimate --------------------------------------------------------------------------------------------

KL = {
    "k1": lambda d: (d, torch.ones_like(d)),
    "k2": lambda d: (d * d / 2, d),
    "k3": lambda d: (
        torch.expm1(torch.clamp(-d, max=20.0)) - torch.clamp(-d, max=20.0),
        -torch.expm1(torch.clamp(-d, max=20.0)),
    ),
    "abs": lambda d: (d.abs(), d.sign()),
}


@pytest.mark.parametrize("kind", KL)
def test_kl_estimate(backend, device, kind):  # rows 24, 25; E12
    d = torch.tensor(
        [0.0, 1e-7, -1e-7, 1e-6, -1e-3, 0.049, -0.051, 0.3, -2.0, 20.0, -20.0, 88.0, -88.0, -89.0, 1e4, -1e4],
        device=device,
    )
    lp = d.clone().requires_grad_()
    rp = torch.zeros_like(d).requires_grad_()
    value = fa.kl_estimate(lp, rp, kind)
    assert torch.equal(
        fa.kl_estimate(lp.detach(), rp.detach(), kind), value
    )  # without a slope: the same value
    want, slope = KL[kind](d.double())
    if kind == "k3":  # fp64's own cancellation below 1e-4 is worse than the series
        tiny = d.double().abs() < 1e-2
        series = d.double() ** 2 / 2 - d.double() ** 3 / 6 + d.double() ** 4 / 24
        want = torch.where(tiny, series, want)
        assert bool((value >= 0).all())
    assert float(((value.double() - want).abs() / want.abs().clamp(min=1e-30)).max()) < 2e-6 and value[0] == 0
    g = torch.autograd.grad(value.sum(), (lp, rp))
    assert float(((g[0].double() - slope).abs() / slope.abs().clamp(min=1e-30)).max()) < 1e-6
    assert torch.equal(g[0], -g[1])


def test_kl_estimate_keeps_nan_and_equal_infinities(backend, device):
    lp = torch.tensor([math.nan, -math.inf, -1.0], device=device)
    rp = torch.tensor([-1.0, -math.inf, -math.inf], device=device)
    for kind in KL:
        out = fa.kl_estimate(lp, rp, kind).tolist()
        assert math.isnan(out[0]) and out[1] == 0.0 and out[2] == math.inf, kind
    with pytest.raises(ValueError, match="kind='k4'.*legal: k1, k2, k3, abs"):
        fa.kl_estimate(lp, rp, "k4")
    assert fa.kl_estimate(lp[:0], rp[:0]).shape == (0,)


# --- the pair kernel ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIR_VARIANTS)
def test_pair_kernel(backend, device, name):
    compare_pairs(make_batch(5, device=device, seed=len(name)), **PAIR_VARIANTS[name])


def test_pair_tensors(backend, device):
    batch = make_batch(4, device=device)
    beta = torch.tensor([0.1, 0.5, 0.0, 2.0], device=device)
    compare_pairs(
        batch,
        loss="dpo",
        beta=beta,
        omega=torch.tensor([1.0, 0.0, -0.5, 3.0], device=device),
        gamma_ext=torch.linspace(-1, 1, 4, device=device),
    )
    compare_pairs(
        batch, loss="dpo", labels="soft", soft_labels=torch.tensor([0.0, 0.3, 0.5, 1.0], device=device)
    )
    compare_pairs(batch, loss="ipo", tau=torch.tensor([0.1, 0.2, 0.3, 0.4], device=device))
    compare_pairs(batch, loss="dpo", valid=torch.tensor([True, False, True, True], device=device))
    scalar = fa.preference_loss(
        batch.logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, beta=torch.tensor(0.3, device=device)
    ).loss
    assert torch.equal(
        scalar, fa.preference_loss(batch.logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, beta=0.3).loss
    )
    soft = preset_of(
        pair_weight=0.0,
        point_link="squared",
        point_chosen=(0.5, 0.0),
        point_rejected=(0.5, 0.0),
        point_beta_power=-2.0,
        point_target="soft",
    )
    compare_pairs(batch, loss=soft, soft_labels=torch.tensor([0.0, 0.3, 0.5, 1.0], device=device))
    points = preset_of(point_link="logistic", point_chosen=(1.0, 0.0))
    compare_pairs(batch, loss=points, anchor=torch.tensor([0.1, -0.2, 0.3, 0.0], device=device))


@pytest.mark.parametrize("name", ["preset dpo", "ld", "sft seq_mean", "kl"])
def test_explicit_pairs_with_shared_sequences(backend, device, name):
    pairs = torch.tensor([[0, 3], [2, 3], [0, 1], [5, 0], [4, 4]], device=device)
    compare_pairs(make_batch(3, device=device), pairs=pairs, **PAIR_VARIANTS[name])
    natural = torch.arange(6, device=device).view(3, 2)
    a, b = (run_pairs(make_batch(3, device=device), pairs=p, **PAIR_VARIANTS[name]) for p in (natural, None))
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_weights(backend, device):  # row 39
    batch = make_batch(3, device=device)
    for weights in (torch.randn_like(batch.logprobs), torch.zeros_like(batch.logprobs)):
        compare_pairs(batch, weights=weights, loss=preset_of(sft_weight=0.5))


def test_masked_tokens_do_not_leak(backend, device):  # row 4, J5
    batch = make_batch(3, device=device)
    mask = batch.packed.mask
    for name in ("preset dpo", "ld", "kl", "token clamp"):
        clean = run_pairs(batch, **PAIR_VARIANTS[name])
        for garbage in (math.nan, math.inf, -math.inf):
            dirty = batch._replace(
                **{
                    k: torch.where(mask, getattr(batch, k), garbage)
                    for k in ("logprobs", "ref_logprobs", "kl_ref_policy")
                }
            )
            soiled = run_pairs(dirty, weights=torch.where(mask, 1.0, garbage), **PAIR_VARIANTS[name])
            for key in clean:
                assert torch.equal(clean[key], soiled[key]), (name, key)
        assert bool((clean["d logprobs"][~mask] == 0).all()) and bool((clean["d kl"][~mask] == 0).all())


def test_empty_and_single_token_responses(backend, device, slow_backend):  # rows 3, 38; J1
    packed = fa.pack(
        [[1, 2, 3], [1], [], [4, 5], [1, 2], [], []],
        [[0, 1, 1], [0], [], [0, 1], [0, 1], [], []],
        device=device,
    )
    lp = torch.where(packed.mask, -1.0, 0.0).to(device)
    pairs = torch.tensor([[0, 1], [2, 3], [4, 3], [5, 6]], device=device)
    for name in presets_for(slow_backend):
        x = lp.clone().requires_grad_()
        out = fa.preference_loss(x, lp, packed.cu_seqlens, pairs=pairs, mask=packed.mask, loss=name)
        assert out.valid.tolist() == [True, True, True, False]
        assert bool(torch.isfinite(out.loss)) and bool(torch.isfinite(gradient(out.loss, x)).all()), name
        assert float(out.metrics()["n_empty"].sum) == 3
    x = lp.clone().requires_grad_()
    only_empty = fa.preference_loss(x, lp, packed.cu_seqlens, pairs=pairs[3:], mask=packed.mask)
    assert float(only_empty.loss.detach()) == 0.0 and gradient(only_empty.loss, x).abs().sum() == 0
    none = fa.preference_loss(x, lp, packed.cu_seqlens, pairs=pairs[:0], mask=packed.mask)
    assert float(none.loss.detach()) == 0.0 and gradient(none.loss, x).abs().sum() == 0


def test_no_tokens_at_all(backend, device):
    x = torch.empty(0, device=device, requires_grad=True)
    out = fa.preference_loss(x, x.detach(), torch.zeros(3, dtype=torch.int32, device=device))
    assert float(out.loss.detach()) == 0.0 and gradient(out.loss, x).shape == (0,)
    mask = torch.empty(0, dtype=torch.bool, device=device)
    out = fa.preference_loss(
        x, x.detach(), torch.zeros(3, dtype=torch.int32, device=device), loss="ld_dpo", mask=mask
    )
    assert float(out.loss.detach()) == 0.0 and gradient(out.loss, x).shape == (0,)


def test_step_zero_is_ln2(backend, device):  # E23
    batch = make_batch(6, device=device)
    out = fa.preference_loss(batch.logprobs, batch.logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask)
    assert (
        abs(float(out.loss) - LN2) < 1e-6
        and out.chosen_rewards.abs().max() == 0
        and out.margins.abs().max() == 0
    )
    assert float(out.metrics()["rewards/accuracies"]) == 0.0


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_huge_margins(backend, device, link, sign):  # rows 28, 30
    preset = preset_of(link=link, beta=1.0, label_smoothing=0.01 if link == "exo" else 0.0)
    for h in (1e-3, 50.0, 1e4):
        chosen = torch.tensor([sign * h], device=device).requires_grad_()
        zero = torch.zeros(1, device=device)
        out = fa.preference_loss_from_sums(chosen, zero, zero, zero, loss=preset)
        assert bool(torch.isfinite(out.loss)), (link, h)
        assert bool(torch.isfinite(gradient(out.loss, chosen)).all()), (link, h)
    if link == "logistic":
        assert float(out.loss.detach()) == (0.0 if sign > 0 else 1e4)


@pytest.mark.parametrize("name", [n for n in PLAIN_PRESETS if n != "ld_dpo"])
def test_from_sums_where_policy_and_reference_are_equal(backend, device, name):
    """The first step of every run: log-ratios are 0, their gradients are not."""
    chosen, rejected = (
        torch.tensor(x, device=device).requires_grad_() for x in ([-10.0, -20.0], [-11.0, -21.0])
    )
    lengths = torch.ones(2, device=device)

    def call(ref_chosen, ref_rejected):
        out = fa.preference_loss_from_sums(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            loss=name,
            chosen_lengths=lengths,
            rejected_lengths=lengths,
        )
        return torch.cat(torch.autograd.grad(out.loss, (chosen, rejected)))

    got, near = call(chosen, rejected), call(chosen.detach() - 1e-4, rejected.detach() - 1e-4)
    assert bool((got != 0).any()) == bool((near != 0).any())
    assert_close(got, near.double(), scale=1e3 * max(1.0, float(near.abs().max())))


def test_hinge_of_infinite_margins(backend, device):
    lp = torch.tensor([-1.0, -math.inf], device=device).requires_grad_()
    for name in ("rrhf_pair", "hinge_norm", "slic_hf"):
        out = fa.preference_loss(lp, torch.full_like(lp, -1.0), torch.arange(3, dtype=torch.int32, device=device), loss=name,
                                 mask=torch.ones(2, dtype=torch.bool, device=device))  # fmt: skip
        slope = gradient(out.loss, lp)
        assert (
            bool(torch.isfinite(out.loss)) and bool(torch.isfinite(slope).all()) and float(slope[1]) == 0
        ), name


def test_infinite_logprobs(backend, device):
    packed = fa.pack([[1, 2], [1, 2], [3, 4], [3, 4]], [[0, 1]] * 4, device=device)
    lp = torch.tensor([-math.inf, 0, -1.0, 0, -1.0, 0, -2.0, 0], device=device)
    kept = fa.preference_loss(
        lp, torch.full_like(lp, -1.0), packed.cu_seqlens, mask=packed.mask, nonfinite="drop"
    )
    assert kept.valid.tolist() == [False, True] and bool(torch.isfinite(kept.loss))
    assert math.isinf(
        float(fa.preference_loss(lp, torch.full_like(lp, -1.0), packed.cu_seqlens, mask=packed.mask).loss)
    )
    same = fa.preference_loss(
        lp, lp, packed.cu_seqlens, mask=packed.mask
    )  # equal infinities: a log-ratio of 0
    assert abs(float(same.loss) - LN2) < 1e-6


@pytest.mark.parametrize(
    "name", ["preset dpo", "preset simpo", "ld", "kl", "sft token_mean_global", "points"]
)
def test_invariance_to_packing_and_micro_batches(backend, device, name):  # C1, C4
    batch = make_batch(4, device=device)
    cu = batch.packed.cu_seqlens.tolist()
    options = PAIR_VARIANTS[name]
    preset = fa.losses.get(options["loss"]) if isinstance(options["loss"], str) else options["loss"]
    whole = run_pairs(batch, **options)
    rows = [slice(a, b) for a, b in itertools.pairwise(cu)]
    order = [5, 4, 0, 1, 7, 6, 2, 3]
    index = torch.cat([torch.arange(rows[s].start, rows[s].stop) for s in order]).to(device)
    moved_cu = torch.tensor(
        [0, *itertools.accumulate(cu[s + 1] - cu[s] for s in order)], dtype=torch.int32, device=device
    )
    moved = batch._replace(
        packed=batch.packed._replace(cu_seqlens=moved_cu, mask=batch.packed.mask[index]),
        logprobs=batch.logprobs[index], ref_logprobs=batch.ref_logprobs[index],
        kl_ref_policy=batch.kl_ref_policy[index],
    )  # fmt: skip
    pairs = torch.tensor([[order.index(2 * p), order.index(2 * p + 1)] for p in range(4)], device=device)
    repacked = run_pairs(moved, pairs=pairs, **options)
    assert_close(repacked["loss"], whole["loss"].double())
    assert_close(repacked["d logprobs"], whole["d logprobs"][index].double(), scale=1.0)
    total, grads = 0.0, []
    sft_tokens = sum(int(batch.packed.mask[rows[2 * p]].sum()) for p in range(4))
    for half in (slice(0, cu[4]), slice(cu[4], cu[8])):
        part_cu = torch.tensor(
            [c - half.start for c in cu if half.start <= c <= half.stop], dtype=torch.int32, device=device
        )
        part = batch._replace(
            packed=batch.packed._replace(cu_seqlens=part_cu, mask=batch.packed.mask[half]),
            logprobs=batch.logprobs[half], ref_logprobs=batch.ref_logprobs[half],
            kl_ref_policy=batch.kl_ref_policy[half],
        )  # fmt: skip
        extra = {"num_sft_tokens": sft_tokens} if preset.sft_weight else {}
        out = run_pairs(part, num_items=4, **extra, **options)
        total, grads = total + out["loss"].double(), [*grads, out["d logprobs"]]
    assert_close(whole["loss"], total)
    assert_close(whole["d logprobs"], torch.cat(grads).double(), scale=1.0)


def test_from_sums_equals_packed(backend, device, slow_backend):
    batch = make_batch(5, device=device)
    cu, mask = batch.packed.cu_seqlens, batch.packed.mask
    for name in [n for n in presets_for(slow_backend) if n != "ld_dpo"]:  # its weights are per token
        sums, refs, kls, lengths = (
            fa.sequence_sum(x, cu, mask=mask)
            for x in (
                batch.logprobs,
                batch.ref_logprobs,
                batch.kl_ref_policy,
                torch.ones_like(batch.logprobs),
            )
        )
        chosen, rejected = sums[::2].clone().requires_grad_(), sums[1::2].clone().requires_grad_()
        got = fa.preference_loss_from_sums(
            chosen,
            rejected,
            refs[::2],
            refs[1::2],
            loss=name,
            chosen_lengths=lengths[::2],
            rejected_lengths=lengths[1::2],
        )
        lp = batch.logprobs.clone().requires_grad_()
        want = fa.preference_loss(lp, batch.ref_logprobs, cu, mask=mask, loss=name)
        assert_close(got.loss, want.loss.double(), scale=50.0)
        assert_close(got.chosen_logprobs, want.chosen_logprobs.double(), scale=50.0)
        g, per_token = torch.autograd.grad(got.loss, (chosen, rejected)), gradient(want.loss, lp)
        first_scored = [int((mask[a:b]).nonzero()[0]) + a for a, b in itertools.pairwise(cu.tolist())]
        assert_close(torch.stack(g, -1).flatten(), per_token[first_scored].double(), scale=50.0)


def test_runs_are_bitwise_equal(backend, device):  # row 42
    batch = make_batch(6, device=device)
    for name in ("preset dpo", "ld", "kl", "sft token_mean_global"):
        a, b = run_pairs(batch, **PAIR_VARIANTS[name]), run_pairs(batch, **PAIR_VARIANTS[name])
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_many_pairs_and_long_sequences(backend, device, slow_backend):
    pairs, length = (40, 20) if slow_backend else (120, 300)
    compare_pairs(make_batch(pairs, min_len=1, max_len=length, device=device, noise=0.02), loss="dpo")
    compare_pairs(
        make_batch(pairs // 10, min_len=1, max_len=10 * length // 4, device=device, noise=0.01),
        loss=preset_of(ld_alpha=0.5),
    )


def test_a_row_of_data_is_a_loss(backend, device, monkeypatch):
    """A row that stands in losses.PRESETS and nowhere else: known by its name, listed, evaluated by this
    backend's kernel."""
    row = Preset(
        "made_up",
        "relu(2 - h)^2 + sg(-u_c)",
        link="truncquad",
        target=2.0,
        beta=0.3,
        point_link="sigmoid",
        point_chosen=(1.0, 0.0),
    )
    monkeypatch.setattr(losses.options, "PRESETS", {**losses.PRESETS, row.name: row})
    batch = make_batch(4, device=device)
    cu, mask = batch.packed.cu_seqlens, batch.packed.mask
    lp = batch.logprobs.clone().requires_grad_()
    out = fa.preference_loss(lp, batch.ref_logprobs, cu, mask=mask, loss="made_up")
    leaf = batch.logprobs.double().cpu().requires_grad_()
    d = torch.where(mask.cpu(), leaf - batch.ref_logprobs.double().cpu(), 0.0)
    u = 0.3 * torch.stack([d[a:b].sum() for a, b in itertools.pairwise(cu.tolist())])
    want = (torch.clamp(2 - u[::2] + u[1::2], min=0) ** 2 + torch.sigmoid(-u[::2])).mean()
    assert_close(out.loss.cpu(), want, scale=10.0 * max(1.0, float(want.detach())))
    assert_close(gradient(out.loss, lp).cpu(), gradient(want, leaf), scale=10.0)
    assert "| made_up |" in losses.available().markdown()
