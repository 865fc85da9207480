"""The contract of the policy and value losses on every backend: the kernels against the fp64 reference, which
test_policy_presets.py holds against the papers."""

from __future__ import annotations

import contextlib
import itertools
import math

import numpy
import pytest
import torch
from checks.policy import FULL, NORM, compare_policy, make_policy_batch, run_policy

import fastalign as fa
from fastalign.losses.policy import PRESETS, PolicyPreset
from fastalign.ops.columns import AGGREGATIONS, KL_KINDS, VALUE_STATS
from fastalign.testing import assert_close

VARIANTS = {
    **{f"preset {n}": {"loss": n, **NORM.get(n, {})} for n in PRESETS},
    **{f"preset {n} with all": {"loss": n, **NORM.get(n, {}), **FULL} for n in PRESETS if n != "vespo"},
    **{f"aggregation {a}": {"aggregation": a, **({"norm_length": 11.0} if a.endswith("norm") else {})} for a in AGGREGATIONS},
    **{f"kl {k}": {"needs": ("ref_logprobs",), "kl_coef": 0.3, "kl_kind": k} for k in KL_KINDS},
    **{f"kl clamped {k}": {"needs": ("ref_logprobs",), "kl_coef": 0.3, "kl_kind": k, "kl_clamp": 0.03, "kl_bias_correction": k == "abs"}
       for k in KL_KINDS},
    "kl corrected": {"needs": ("ref_logprobs",), "kl_coef": 0.3, "kl_bias_correction": True},
    "kl of reinforce": {"loss": "reinforce", "needs": ("ref_logprobs",), "kl_coef": 0.3, "kl_bias_correction": True},
    "only metrics": {"needs": ("ref_logprobs", "entropy", "is_weight")},
    "dual clip": {"dual_clip": 1.3, "clip_low": 0.1, "clip_high": 0.1},
    "mask weights": {"needs": ("is_weight",), "is_mode": "mask", "is_max": 1.5, "is_min": 0.7},
    "advantage per sequence": {"advantages": "per_sequence"},
    "cispo per sequence": {"loss": "cispo", "ratio": "seq_mean", "ratio_max": 1.1, "ratio_min": 0.9},
    "sapo per sequence": {"loss": PolicyPreset(surrogate="sapo", ratio="seq_sum")},
    "gspo token mean": {"loss": "gspo", "aggregation": "token_mean", "clip_low": 0.1, "clip_high": 0.1},
    "num_items": {"loss": "grpo", "num_items": 17},
    "token_sum": {"aggregation": "token_sum", "needs": ("entropy",), "entropy_coef": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_policy_loss(backend, device, name):
    compare_policy(make_policy_batch(device, seed=len(name)), **VARIANTS[name])


def test_policy_far_ratios(backend, device):  # row 24
    """|lp - old| up to 1e4 for either sign of A: finite values and gradients, the surrogate's slope kept at
    the clamp."""
    d = torch.tensor([0.0, 1e-7, -1e-7, 20.0, -20.0, 88.0, -89.0, 1e4, -1e4] * 2, device=device)
    a = torch.ones_like(d)
    a[9:] = -1.0
    cu, mask = (
        torch.arange(len(d) + 1, dtype=torch.int32, device=device),
        torch.ones_like(d, dtype=torch.bool),
    )
    for name in PRESETS:
        got, want = [], []
        for dtype, keep in ((torch.float32, got), (torch.float64, want)):
            with contextlib.nullcontext() if keep is got else fa.use_backend("reference"):
                x = d.to(dtype).requires_grad_()
                out = fa.policy_loss(x, torch.zeros_like(x), a.to(dtype), loss=name, cu_seqlens=cu, ref_logprobs=torch.zeros_like(x), kl_coef=1.0,
                                     mask=mask, **NORM.get(name, {}))  # fmt: skip
                keep += [out.loss, torch.autograd.grad(out.loss, x)[0]]
        for x, y in zip(got, want):
            assert bool(torch.isfinite(x).all()), name
            # The exponential carries the rounding of an exponent of 20, the loss sums terms of opposite
            # signs.
            size = torch.full_like(y, math.exp(20.0)) if y.dim() == 0 else y.abs()
            assert_close(x, y, what=name, scale=20.0 * torch.clamp(size, min=1.0))


@pytest.mark.parametrize("dual", [None, 3.0])
def test_policy_clip_grid(backend, device, dual):  # K8, row 34
    """Ratio below, inside, above the bounds x the advantage's sign, for values, slopes and flags; boundaries
    inclusive."""
    rho, a = (
        torch.tensor(x, device=device)
        for x in zip(*itertools.product((0.5, 0.95, 1.0, 1.1, 2.0, 6.0), (-1.5, 0.0, 0.7)))
    )
    lp = rho.log().requires_grad_()
    upstream = torch.ones((), device=device)
    out = fa.policy_loss(
        lp, torch.zeros_like(rho), a, aggregation="token_sum", clip_low=0.2, clip_high=0.28, dual_clip=dual
    )
    (g,) = torch.autograd.grad(out.loss, lp, upstream)
    high, low = (a > 0) & (rho > 1.28), (a < 0) & (rho < 0.8)
    lower = (a < 0) & (rho > (dual or math.inf))
    value = torch.maximum(-a * rho, -a * rho.clamp(0.8, 1.28)).double()
    value = torch.where(a < 0, torch.minimum(value, -a * (dual or math.inf)), value)
    assert_close(out.loss, value.sum(), scale=20.0)
    assert_close(
        g,
        torch.where(high | low | lower, 0.0, -a * rho).double(),
        scale=4.0 * torch.clamp(rho.double(), min=1.0),
    )
    m = {k: float(v.sum) for k, v in out.metrics().items()}
    assert (m["policy/clipfrac_high"], m["policy/clipfrac_low"], m["policy/clipfrac_lower"]) == (
        int(high.sum()),
        int(low.sum()),
        int(lower.sum()),
    )


def test_policy_on_policy_gradient_is_exact(backend, device):
    b = make_policy_batch(device)
    lp = b["logprobs"].clone().requires_grad_()
    n = int(b["mask"].sum())
    for old in (b["logprobs"], None):
        out = fa.policy_loss(lp, old, b["advantages"], mask=b["mask"])
        (g,) = torch.autograd.grad(out.loss, lp)
        assert torch.equal(g, torch.where(b["mask"], -b["advantages"] / n, 0.0))
        m = out.metrics()
        assert (
            float(m["val/ratio"]) == 1.0
            and float(m["val/ratio_var"]) == 0.0
            and float(m["policy/approxkl"]) == 0.0
        )


def test_policy_masked_tokens_do_not_matter(backend, device):  # J5, row 4
    b = make_policy_batch(device)
    for name in ("ppo", "gspo", "gmpo", "vespo"):
        options = (
            FULL
            if name != "vespo"
            else {"needs": ("ref_logprobs", "entropy"), "kl_coef": 0.1, "entropy_coef": 0.1}
        )
        clean = {k: torch.nan_to_num(v) if v.is_floating_point() else v for k, v in b.items()}
        for x, y in zip(
            run_policy(b, loss=name, **options).values(), run_policy(clean, loss=name, **options).values()
        ):
            assert torch.equal(x, y)
        for x in run_policy(b, loss=name, **options).values():
            assert bool(torch.isfinite(x).all())


def test_policy_nan_and_inf_tokens_are_counted(backend, device):
    b = {k: torch.nan_to_num(v) if v.is_floating_point() else v for k, v in make_policy_batch(device).items()}
    where = b["mask"].nonzero().flatten()[:2]
    b["logprobs"][where[0]] = math.nan
    out = fa.policy_loss(b["logprobs"], b["old_logprobs"], b["advantages"], mask=b["mask"])
    assert math.isnan(float(out.loss)) and float(out.metrics()["nonfinite_tokens"].sum) == 1
    b["logprobs"][where[0]] = b["old_logprobs"][where[0]] = -math.inf  # equal infinities: ratio 1
    lp = b["logprobs"].requires_grad_()
    out = fa.policy_loss(lp, b["old_logprobs"], b["advantages"], mask=b["mask"])
    assert bool(torch.isfinite(torch.autograd.grad(out.loss, lp)[0]).all()) and math.isfinite(
        float(out.loss.detach())
    )


def test_policy_nothing_to_learn_from(backend, device):  # row 1
    """No tokens, no scored tokens, empty sequences: loss 0, gradient 0."""
    for tokens, cu in ((0, [0]), (0, [0, 0, 0]), (5, [0, 2, 5])):
        lp = torch.full((tokens,), -1.0, device=device, requires_grad=True)
        cu = torch.tensor(cu, dtype=torch.int32, device=device)
        a = torch.ones(len(cu) - 1, device=device)
        for name in PRESETS:
            out = fa.policy_loss(
                lp,
                lp.detach(),
                a,
                loss=name,
                cu_seqlens=cu,
                mask=torch.zeros(tokens, dtype=torch.bool, device=device),
                **NORM.get(name, {}),
            )
            (g,) = torch.autograd.grad(out.loss, lp)
            assert float(out.loss) == 0.0 and not bool(g.any()) and g.shape == lp.shape, name
            assert all(float(m.count) == 0 or float(m.sum) == 0 for k, m in out.metrics().items()), name
        v = fa.value_loss(
            lp, lp.detach(), lp.detach(), mask=torch.zeros(tokens, dtype=torch.bool, device=device)
        )
        assert (
            float(v.loss) == 0.0
            and not bool(torch.autograd.grad(v.loss, lp)[0].any())
            and math.isnan(float(v.explained_variance))
        )


@pytest.mark.parametrize("loss", ["dapo", "grpo", "gspo", "gmpo", "rloo"])
def test_policy_packing_order_and_micro_batches(backend, device, loss):
    """The same sequences in another order, and split over micro-batches under num_items: the same loss and
    gradient."""
    b = make_policy_batch(device)
    names = ("logprobs", "old_logprobs", "mask", "per_sequence", "lengths")

    def pieces(order):
        spans = list(itertools.pairwise(b["cu_seqlens"].tolist()))
        rows = torch.cat([torch.arange(*spans[i]) for i in order]).to(device)
        lengths = [spans[i][1] - spans[i][0] for i in order]
        cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        return rows, dict(
            zip(
                names,
                (b["logprobs"][rows], b["old_logprobs"][rows], b["mask"][rows], b["per_sequence"][order], cu),
            )
        )

    def gradient(order, items):
        rows, x = pieces(order)
        lp = x["logprobs"].clone().requires_grad_()
        out = fa.policy_loss(
            lp,
            x["old_logprobs"],
            x["per_sequence"],
            loss=loss,
            cu_seqlens=x["lengths"],
            mask=x["mask"],
            num_items=items,
        )
        g = torch.zeros_like(b["logprobs"])
        g[rows] = torch.autograd.grad(out.loss, lp)[0]
        return float(out.loss), g, out.metrics()

    items = float(b["mask"].sum()) if loss == "dapo" else float((b["cu_seqlens"].diff() > 2).sum())
    whole = gradient(range(6), None)
    for parts in ([[5, 1, 3, 0, 2, 4]], [[0, 1], [2], [3, 4, 5]]):
        results = [gradient(part, items if len(parts) > 1 else None) for part in parts]
        assert abs(sum(r[0] for r in results) - whole[0]) < 1e-6 * max(1.0, abs(whole[0]))
        assert_close(sum(r[1] for r in results), whole[1].double(), what=str(parts))
        for name, metric in whole[2].items():
            if name != "val/ratio_var":  # within each call
                both = [sum(float(r[2][name][k]) for r in results) for k in (0, 1)]
                assert both[1] == float(metric.count) and abs(both[0] - float(metric.sum)) < 1e-4, name


def test_policy_bitwise_repeat(backend, device):  # row 42
    b = make_policy_batch(device, lengths=(70, 0, 31, 3))
    for name in ("ppo", "gspo", "gmpo"):
        for x, y in zip(run_policy(b, loss=name, **FULL).values(), run_policy(b, loss=name, **FULL).values()):
            assert torch.equal(x, y)


@pytest.mark.parametrize("tokens", [1, 255, 2049, 5000])
def test_policy_many_tokens(backend, device, slow_backend, tokens):
    """Around the edges of blocks and tiles, with and without sequences."""
    if slow_backend and tokens == 5000:
        return
    for per_sequence in (False, True):
        b = make_policy_batch(device, lengths=(tokens,), seed=tokens)
        compare_policy(b, **({"loss": "gspo", "clip_low": 0.01} if per_sequence else {}), **FULL)


def test_policy_inputs_of_other_types_and_strides(backend, device):  # rows 17, 23
    b = make_policy_batch(device)
    mask = b["mask"]
    b = {k: torch.nan_to_num(v) if v.is_floating_point() else v for k, v in b.items()}
    want = fa.policy_loss(
        b["logprobs"].bfloat16().float(), b["old_logprobs"].half().float(), b["advantages"], mask=mask
    ).loss
    lp = torch.stack([b["logprobs"], b["old_logprobs"]], -1).bfloat16()[:, 0].requires_grad_()
    out = fa.policy_loss(lp, b["old_logprobs"].half(), b["advantages"], mask=mask.to(torch.int64))
    assert torch.equal(out.loss, want) and torch.autograd.grad(out.loss, lp)[0].dtype == torch.bfloat16


def test_policy_coefficients_as_tensors(backend, device):
    b = make_policy_batch(device)
    numbers = run_policy(b, needs=FULL["needs"], kl_coef=0.25, entropy_coef=0.125)
    tensors = run_policy(
        b,
        needs=FULL["needs"],
        kl_coef=torch.tensor(0.25, device=device),
        entropy_coef=torch.tensor([0.125], device=device),
    )
    for x, y in zip(numbers.values(), tensors.values()):
        assert torch.equal(x, y)


# --- the KL term --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [-20.0, -25.0, -1e4, -6e8, -1e30, -math.inf])
def test_k3_far_below_stays_at_its_clamp(backend, device, d):  # row 24
    lp = torch.tensor([d, 0.0, -30.0], device=device).requires_grad_()
    ref = torch.zeros(3, device=device)
    value = fa.kl_estimate(lp, ref, "k3")
    (slope,) = torch.autograd.grad(value.sum(), lp)
    want = torch.tensor([math.expm1(20.0) - 20.0, 0.0], dtype=torch.float64)
    assert_close(value[:2], want, scale=want.clamp(min=1.0))
    assert_close(
        slope[:2], -torch.tensor([math.expm1(20.0), 0.0], dtype=torch.float64), scale=want.clamp(min=1.0)
    )
    assert value[0] == value[2] and slope[0] == slope[2] < 0  # flat, and the slope is kept
    out = fa.policy_loss(lp, lp.detach(), torch.zeros(3, device=device), mask=ref == 0, ref_logprobs=ref, kl_coef=1.0, loss="reinforce",
                         aggregation="token_sum", kl_clamp=None)  # fmt: skip
    if math.isfinite(d):  # an advantage of 0 times an infinite log-prob is NaN
        assert float(out.loss) == float(value.sum())
    out = fa.policy_loss(
        lp,
        lp.detach(),
        torch.ones(3, device=device),
        mask=ref == 0,
        ref_logprobs=ref,
        kl_coef=1.0,
        aggregation="token_sum",
        kl_clamp=None,
    )
    (slope,) = torch.autograd.grad(out.loss, lp)
    assert 9e8 < float(out.loss) < 1e9 and bool(torch.isfinite(slope).all())


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_kl_estimate_without_upstream_gradient_gives_none(backend, device, kind):
    lp = torch.tensor([-math.inf, -1.0, math.nan, math.inf, -2.0], device=device).requires_grad_()
    ref = torch.tensor([-1.0, -math.inf, -1.0, -1.0, -1.5], device=device).requires_grad_()
    value = fa.kl_estimate(lp, ref, kind)
    chosen = torch.tensor([False, False, False, False, True], device=device)
    got = torch.autograd.grad(torch.where(chosen, value, 0.0).sum(), (lp, ref))
    alone = torch.autograd.grad(fa.kl_estimate(lp[4:], ref[4:], kind).sum(), (lp, ref))
    for x, y in zip(got, alone):
        assert x[:4].tolist() == [0.0] * 4 and x[4] == y[4] != 0


# --- value_loss ---------------------------------------------------------------------------------------------

VALUES = {
    "clipped": {}, "unclipped": {"clip": None}, "no room": {"clip": 0.0}, "num_items": {"num_items": 7.0},
    **{f"aggregation {a}": {"aggregation": a, **({"norm_length": 11.0} if a.endswith("norm") else {})} for a in AGGREGATIONS},
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_value_loss(backend, device, name):  # K7, row 37
    b = make_policy_batch(device)
    results = []
    for mine in (True, False):
        v, old, r = (b[k] if mine else b[k].double() for k in ("logprobs", "old_logprobs", "advantages"))
        v = v.clone().requires_grad_()
        with contextlib.nullcontext() if mine else fa.use_backend("reference"):
            out = fa.value_loss(v, old, r, cu_seqlens=b["cu_seqlens"], mask=b["mask"], **VALUES[name])
            results.append((out.loss, torch.autograd.grad(out.loss, v)[0], out.stats, out.explained_variance))
    for x, y in zip(*results):
        assert_close(x, y, what=name, scale=10.0 * torch.clamp(y.abs(), min=1.0))
    assert len(results[0][2]) == len(VALUE_STATS)


def test_value_loss_of_extreme_values(backend, device):  # row 37
    v = torch.tensor([1.0, 2.0, 3.0], device=device, requires_grad=True)
    old = torch.tensor([math.inf, -math.inf, 3.0], device=device)
    out = fa.value_loss(
        v, old, torch.zeros(3, device=device), mask=torch.ones(3, dtype=torch.bool, device=device)
    )
    assert float(out.metrics()["nonfinite_tokens"].sum) == 2 and float(out.loss) == math.inf
    (g,) = torch.autograd.grad(out.loss, v)
    assert g.tolist() == [0.0, 0.0, 1.0]


# --- bad arguments ------------------------------------------------------------------------------------------


def test_options_without_effect_are_refused(backend, device):
    x, mask = torch.zeros(4, device=device), torch.ones(4, dtype=torch.bool, device=device)
    for words, options in (
        ("kl_bias_correction=True has no effect without kl_coef", {"kl_bias_correction": True}),
        (
            "kl_bias_correction=True has no effect without kl_coef",
            {"kl_bias_correction": True, "ref_logprobs": x},
        ),
        ("kl_kind='k2' has no effect without ref_logprobs", {"kl_kind": "k2"}),
    ):
        with pytest.raises(ValueError, match=words):
            fa.policy_loss(x, x, x, mask=mask, **options)
    # A coefficient that is 0 for now, or a tensor, is one; the metric has a kind, too.
    fa.policy_loss(x, x, x, mask=mask, ref_logprobs=x, kl_bias_correction=True, kl_coef=0.0)
    fa.policy_loss(
        x, x, x, mask=mask, ref_logprobs=x, kl_bias_correction=True, kl_coef=torch.tensor(0.1, device=device)
    )
    fa.policy_loss(x, x, x, mask=mask, ref_logprobs=x, kl_kind="k2")


@pytest.mark.parametrize(
    "cu,words",
    [([1, 4], "start at 0"), ([0, 3], "end at the number"), ([0, 3, 2, 4], "decreases at position 2")],
)
def test_boundaries_are_checked_also_where_they_are_not_needed(backend, device, cu, words):
    x, mask = torch.zeros(4, device=device), torch.ones(4, dtype=torch.bool, device=device)
    cu = torch.tensor(cu, dtype=torch.int32, device=device)
    for call in (
        lambda: fa.policy_loss(x, x, x, mask=mask, cu_seqlens=cu),
        lambda: fa.policy_loss(x, x, x, mask=mask, cu_seqlens=cu, loss="grpo"),
        lambda: fa.value_loss(x, x, x, mask=mask, cu_seqlens=cu),
        lambda: fa.value_loss(x, x, x, mask=mask, cu_seqlens=cu, aggregation="seq_mean_token_sum"),
    ):
        if device == "cpu":
            with pytest.raises(ValueError, match=words):
                call()
    with pytest.raises(TypeError, match="cu_seqlens must be int32"):
        fa.value_loss(x, x, x, mask=mask, cu_seqlens=cu.float())


def test_mask_may_be_left_out_where_nothing_is_counted(backend, device):
    x = torch.randn(4, device=device)
    cu = torch.tensor([0, 1, 4], dtype=torch.int32, device=device)
    for options, legal in (
        ({"aggregation": "token_sum"}, True), ({"aggregation": "token_mean"}, False),
        ({"aggregation": "token_mean", "num_items": 4}, True),
        ({"aggregation": "seq_mean_token_sum", "num_items": 2}, True),
        ({"aggregation": "seq_mean_token_mean", "num_items": 2}, False),
        ({"aggregation": "seq_mean_token_sum_norm", "norm_length": 5.0, "num_items": 2}, True),
        ({"aggregation": "token_sum", "ratio": "seq_mean_token"}, False),
        ({"aggregation": "token_sum", "loss": "reinforce"}, True),
    ):  # fmt: skip
        calls = [lambda mask, o=options: fa.policy_loss(x, x, x, cu_seqlens=cu, mask=mask, **o)]
        if not {"ratio", "loss"} & set(options):
            calls.append(lambda mask, o=options: fa.value_loss(x, x, x, cu_seqlens=cu, mask=mask, **o))
        for call in calls:
            if legal:
                assert torch.equal(call(None).loss, call(torch.ones_like(x, dtype=torch.bool)).loss)
            else:
                with pytest.raises(ValueError, match="mask is required"):
                    call(None)


def test_num_items_of_numpy(backend, device):
    x, mask = torch.randn(4, device=device), torch.ones(4, dtype=torch.bool, device=device)
    for loss in (
        lambda n: fa.policy_loss(x, x, x, mask=mask, num_items=n).loss,
        lambda n: fa.value_loss(x, x, x, mask=mask, num_items=n).loss,
    ):
        for n in (numpy.int64(7), numpy.uint8(7), numpy.float64(7.0)):
            assert torch.equal(loss(n), loss(7))
        for wrong in (True, numpy.bool_(True), "7"):
            with pytest.raises(TypeError, match="num_items must be a number"):
                loss(wrong)
