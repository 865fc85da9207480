"""Every named policy loss against its paper's formula, typed here a second time for one sequence at a time
and differentiated by autograd, in fp64."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

import fastalign as fa
from fastalign.losses import policy as policy_losses
from fastalign.losses.policy import FIELDS, PRESETS, PolicyPreset
from fastalign.ops.columns import STATS, VALUE_STATS
from fastalign.ops.policy.params import SCALAR_COUNT, PolicyParams
from fastalign.runtime import ffi

NORM = 9.0  # dr_grpo's constant
OPTIONS = {"dr_grpo": {"norm_length": NORM}}


def ppo(lp, old, a, lo, hi):
    rho = torch.exp(lp - old)
    return torch.maximum(-a * rho, -a * torch.clamp(rho, 1 - lo, 1 + hi))


def gspo(lp, old, a, sequence_ratio):
    return torch.maximum(-a * sequence_ratio, -a * torch.clamp(sequence_ratio, 1 - 3e-4, 1 + 4e-4))


def s_mean(lp, old):
    return torch.exp((lp - old).sum() / len(lp))


def gmpo(lp, old, a):
    """Zhao et al. 2025, eq. 4: the geometric mean of min-clipped ratios, by products."""
    sign = 1.0 if a[0] > 0 else -1.0
    rho = torch.exp(lp - old)
    clipped = torch.clamp(rho, math.exp(-0.4), math.exp(0.4))
    kept = sign * torch.minimum(sign * rho, sign * clipped)
    return -a[0] * torch.prod(kept) ** (1.0 / len(lp))


def vespo(lp, old, a):
    w = torch.exp((lp - old).sum()).detach()
    k, lam = (2.0, 3.0) if a[0] >= 0 else (3.0, 2.0)
    return -(math.e**lam * w**k * torch.exp(-lam * w)) * a * lp


def sapo(lp, old, a):
    rho = torch.exp(lp - old)
    tau = torch.where(a > 0, 1.0, torch.full_like(a, 1.05))
    return -a * 4.0 / tau / (1.0 + torch.exp(-tau * (rho - 1.0)))


# (one sequence's lp, old, A [L]) -> (its loss before the division by items; what it counts in items)
PAPERS = {
    "ppo": lambda lp, old, a: (ppo(lp, old, a, 0.2, 0.2).sum(), len(lp)),
    "reinforce": lambda lp, old, a: (-(a * lp).sum(), 1),
    "grpo": lambda lp, old, a: (ppo(lp, old, a, 0.2, 0.2).mean(), 1),
    "dr_grpo": lambda lp, old, a: (ppo(lp, old, a, 0.2, 0.2).sum() / NORM, 1),
    "dapo": lambda lp, old, a: (ppo(lp, old, a, 0.2, 0.28).sum(), len(lp)),
    "gspo": lambda lp, old, a: (gspo(lp, old, a[0], s_mean(lp, old)), 1),
    "gspo_token": lambda lp, old, a: (
        gspo(lp, old, a, s_mean(lp, old).detach() * torch.exp(lp - lp.detach())).mean(),
        1,
    ),
    "cispo": lambda lp, old, a: (
        -(torch.clamp(torch.exp(lp - old), 0.0, 5.0).detach() * a * lp).sum(),
        len(lp),
    ),
    "rloo": lambda lp, old, a: (ppo(lp.sum(), old.sum(), a[0], 0.2, 0.2), 1),
    "luspo": lambda lp, old, a: (len(lp) * gspo(lp, old, a[0], s_mean(lp, old)), 1),
    "sapo": lambda lp, old, a: (sapo(lp, old, a).mean(), 1),
    "gmpo": lambda lp, old, a: (gmpo(lp, old, a), 1),
    "vespo": lambda lp, old, a: (vespo(lp, old, a).sum(), len(lp)),
}


def sequences(seed, spread=0.25, lengths=(5, 1, 0, 8, 3), per_token=False):
    """A packed fp64 batch with unscored tokens at the front of every sequence: (lp, old, A [S] or [T],
    cu_seqlens, mask)."""
    g = torch.Generator().manual_seed(seed)
    prompt = 2
    cu = torch.tensor([0, *itertools.accumulate(n + prompt for n in lengths)], dtype=torch.int32)
    mask = torch.cat([torch.arange(n + prompt) >= prompt for n in lengths])
    tokens = len(mask)
    lp = -3.0 * torch.rand(tokens, generator=g, dtype=torch.float64)
    old = lp + spread * torch.randn(tokens, generator=g, dtype=torch.float64)
    lp, old = (torch.where(mask, x, math.nan) for x in (lp, old))
    advantages = torch.randn(tokens if per_token else len(lengths), generator=g, dtype=torch.float64)
    return lp, old, advantages, cu, mask


def truth(name, lp, old, advantages, cu, mask):
    """(loss, d loss / d lp) from PAPERS."""
    lp = lp.clone().requires_grad_()
    total, items = 0.0, 0
    for i, (lo, hi) in enumerate(itertools.pairwise(cu.tolist())):
        where = mask[lo:hi].nonzero().flatten() + lo
        if len(where):
            a = advantages[where] if len(advantages) == len(lp) else advantages[i].expand(len(where))
            value, count = PAPERS[name](lp[where], old[where], a)
            total, items = total + value, items + count
    loss = total / items
    return loss.detach(), torch.autograd.grad(loss, lp)[0]


def ours(lp, old, advantages, cu, mask, **options):
    lp = lp.clone().requires_grad_()
    with fa.use_backend("reference"):
        out = fa.policy_loss(lp, old, advantages, cu_seqlens=cu, mask=mask, **options)
        return out, torch.autograd.grad(out.loss, lp)[0]


def close(x, y, bound=1e-10):
    assert float((x - y).abs().max()) <= bound * max(1.0, float(y.abs().max())), (x, y)


@pytest.mark.parametrize("spread", [1e-3, 0.25, 1.5])
@pytest.mark.parametrize("name", PRESETS)
def test_preset_equals_its_paper(name, spread):
    for seed in range(3):
        batch = sequences(seed, spread)
        out, g = ours(*batch, loss=name, **OPTIONS.get(name, {}))
        want, want_g = truth(name, *batch)
        close(out.loss, want)
        close(g, want_g)
        assert bool((g[~batch[4]] == 0).all())


@pytest.mark.parametrize(
    "name", [n for n, p in PRESETS.items() if not p.needs_sequence_values and n != "vespo"]
)
def test_an_advantage_per_token(name):
    batch = sequences(3, per_token=True)
    out, g = ours(*batch, loss=name, **OPTIONS.get(name, {}))
    want, want_g = truth(name, *batch)
    close(out.loss, want)
    close(g, want_g)


# The 3 x 3 grid: ratio below, inside, above the bounds (twice above, for the dual clip) x the advantage's
# sign.
RATIOS = (0.5, 0.95, 1.0, 1.1, 2.0, 6.0)
SIGNS = (-1.5, 0.0, 0.7)


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("rho,a", list(itertools.product(RATIOS, SIGNS)))
def test_clip_grid(rho, a, dual):  # K8, row 34
    lp = torch.tensor([math.log(rho)], dtype=torch.float64)
    value = max(-a * rho, -a * min(max(rho, 0.8), 1.28))
    clipped = (a > 0 and rho > 1.28) or (a < 0 and rho < 0.8)
    lower = False
    if dual is not None and a < 0:
        lower = rho > dual
        value = min(value, -a * dual)
    out, g = ours(
        lp,
        torch.zeros_like(lp),
        torch.tensor([a], dtype=torch.float64),
        None,
        torch.ones(1, dtype=torch.bool),
        loss="dapo",
        dual_clip=dual,
    )
    close(out.loss, torch.tensor(value, dtype=torch.float64))
    close(g, torch.tensor([0.0 if clipped or lower else -a * rho], dtype=torch.float64))
    m = {k: float(v) for k, v in out.metrics().items()}
    assert m["policy/clipfrac_high"] == float(a > 0 and rho > 1.28) and m["policy/clipfrac_low"] == float(
        a < 0 and rho < 0.8
    )
    assert m["policy/clipfrac_lower"] == float(lower) and m["policy/clipfrac"] == float(clipped or lower)


def test_bounds_are_inclusive():
    """At the bound itself the gradient still flows."""
    lp = torch.tensor([math.log(1.25), math.log(0.75)], dtype=torch.float64)
    a = torch.tensor([1.0, -1.0], dtype=torch.float64)
    rho = lp.exp()
    _, g = ours(
        lp,
        torch.zeros_like(lp),
        a,
        None,
        torch.ones(2, dtype=torch.bool),
        ratio_min=float(rho[1]),
        ratio_max=float(rho[0]),
    )
    close(g, -a * rho / 2)


def test_kl_entropy_and_importance_weights():
    g = torch.Generator().manual_seed(5)
    lp, old, _, cu, mask = sequences(4)
    tokens = len(lp)
    a, noise, h, w = (torch.randn(tokens, generator=g, dtype=torch.float64) for _ in range(4))
    ref, w = lp + 0.3 * noise, w.exp()
    kinds = {
        "k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: torch.exp(-d) - 1 + d, "abs": torch.abs,
        "k3+": lambda d: (torch.exp(-d) - 1 + d).detach() + d * d / 2 - (d * d / 2).detach(),
    }  # fmt: skip
    modes = {
        None: (lambda x: x, {}), "truncate": (lambda x: torch.clamp(x, max=1.3), {"is_max": 1.3}),
        "mask": (lambda x: torch.where((x < 0.5) | (x > 1.3), 0.0, x), {"is_max": 1.3, "is_min": 0.5}),
    }  # fmt: skip
    for (kind, k), (mode, (weigh, bounds)), corrected in itertools.product(
        kinds.items(), modes.items(), (False, True)
    ):
        if corrected and kind == "k3+":
            continue
        x, y = lp.clone().requires_grad_(), h.clone().requires_grad_()
        d = x[mask] - ref[mask]
        term = k(d) * (torch.exp((x - old)[mask]) if corrected else 1.0)
        want = (
            weigh(w[mask]) * ppo(x[mask], old[mask], a[mask], 0.2, 0.2) + 0.3 * term - 0.05 * y[mask]
        ).mean()
        want_g = torch.autograd.grad(want, (x, y))
        with fa.use_backend("reference"):
            out = fa.policy_loss(x, old, a, mask=mask, ref_logprobs=ref, entropy=y, kl_coef=0.3, kl_kind=kind, entropy_coef=0.05, is_weight=w,
                                 is_mode=mode, kl_bias_correction=corrected, **bounds)  # fmt: skip
            same = fa.policy_loss(x, old, a, mask=mask, ref_logprobs=ref, entropy=y, kl_coef=torch.tensor(0.3, dtype=torch.float64), kl_kind=kind,
                                  entropy_coef=torch.tensor(0.05, dtype=torch.float64), is_weight=w, is_mode=mode,
                                  kl_bias_correction=corrected, **bounds)  # fmt: skip
        close(out.loss, want.detach())
        assert torch.equal(out.loss, same.loss)
        for got, g_ in zip(torch.autograd.grad(out.loss, (x, y)), want_g):
            close(got, g_)
        m = {n: float(v) for n, v in out.metrics().items()}
        assert math.isclose(m["policy/kl"], float(kinds["k3" if kind == "k3+" else kind](d).mean()))
        assert math.isclose(m["policy/entropy"], float(y[mask].mean())) and math.isclose(
            m["is_weight/mean"], float(w[mask].mean())
        )


def test_identities():  # spec 17
    lp, _, a, cu, mask = sequences(6)
    _, on_policy = ours(lp, lp, a, cu, mask, loss="gspo")
    _, plain = ours(lp, None, a, cu, mask, loss="reinforce", aggregation="seq_mean_token_mean")
    close(on_policy, plain)
    _, grad = ours(lp, None, a, cu, mask, loss="rloo")
    per_token = torch.repeat_interleave(a, cu.diff().long()) / int((cu.diff() > 2).sum())
    assert torch.equal(grad, torch.where(mask, -per_token, 0.0))
    _, token = ours(*sequences(7), loss="gspo_token")
    _, sequence = ours(*sequences(7), loss="gspo")
    close(token, sequence)
    tokens = sequences(8, per_token=True)
    exact = torch.where(mask, -tokens[2] / int(mask.sum()), 0.0)
    assert torch.equal(ours(lp, lp, tokens[2], None, mask)[1], exact)  # rho = 1: -A / N, to the bit


def test_aggregations():
    lp, old, a, cu, mask = sequences(9, per_token=True)
    x = torch.where(mask, ppo(lp, old, a, 0.2, 0.2), 0.0)
    parts = [x[lo:hi].sum() for lo, hi in itertools.pairwise(cu.tolist())]
    lengths = [int(mask[lo:hi].sum()) for lo, hi in itertools.pairwise(cu.tolist())]
    n = sum(length > 0 for length in lengths)
    want = {
        "token_mean": x.sum() / sum(lengths), "token_sum": x.sum(), "seq_mean_token_sum": sum(parts) / n,
        "seq_mean_token_mean": sum(p / max(length, 1) for p, length in zip(parts, lengths)) / n,
        "seq_mean_token_sum_norm": sum(parts) / (n * 7.0),
    }  # fmt: skip
    assert set(want) == set(policy_losses.AGGREGATIONS)
    for name, value in want.items():
        options = {"norm_length": 7.0} if name.endswith("norm") else {}
        close(ours(lp, old, a, cu, mask, aggregation=name, **options)[0].loss, value)
        if name != "token_sum":
            close(
                ours(
                    lp,
                    old,
                    a,
                    cu,
                    mask,
                    aggregation=name,
                    num_items=3 * (sum(lengths) if name == "token_mean" else n),
                    **options,
                )[0].loss,
                value / 3,
            )


@pytest.mark.parametrize("name", PRESETS)
def test_gradcheck(name):
    lp, old, a, cu, mask = sequences(1, 0.1, lengths=(3, 2))
    lp, old = torch.where(mask, lp, 0.0).requires_grad_(), torch.where(mask, old, 0.0)
    if PRESETS[name].surrogate in ("cispo", "vespo"):
        return  # the weight is a constant of the gradient, not of the value; test_preset_equals_its_paper covers them
    surrogate = {"ratio": "seq_mean"} if PRESETS[name].ratio == "seq_mean_token" else {}

    def loss(x):
        return fa.policy_loss(
            x, old, a, loss=name, cu_seqlens=cu, mask=mask, **surrogate, **OPTIONS.get(name, {})
        ).loss

    with fa.use_backend("reference"):
        assert torch.autograd.gradcheck(loss, lp, eps=1e-7)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_loss(clip):
    g = torch.Generator().manual_seed(2)
    v, old, target = (torch.randn(64, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(64, generator=g) < 0.8
    v, old, target = (torch.where(mask, x, math.inf) for x in (v, old + v, target))
    x = v.clone().requires_grad_()
    error = (x - target)[mask] ** 2
    if clip is not None:
        held = torch.minimum(torch.maximum(x, old - clip), old + clip)
        error = torch.maximum(error, (held - target)[mask] ** 2)
    want = 0.5 * error.mean()
    with fa.use_backend("reference"):
        out = fa.value_loss(x, old, target, mask=mask, clip=clip)
    close(out.loss, want.detach())
    close(torch.autograd.grad(out.loss, x)[0], torch.nan_to_num(torch.autograd.grad(want, x)[0]))
    e, r = (v - target)[mask], target[mask]
    close(out.explained_variance, 1 - e.var(correction=0) / r.var(correction=0))
    m = {k: float(t) for k, t in out.metrics().items()}
    assert math.isclose(m["returns/mean"], float(r.mean())) and math.isclose(
        m["returns/var"], float(r.var(correction=0))
    )
    if clip is not None:
        share = ((held - target)[mask] ** 2 > (x - target)[mask] ** 2).double().mean()
        assert math.isclose(m["val/clipfrac"], float(share)) and 0 < m["val/clipfrac"] < 1


def test_ratio_metrics():
    lp, old, a, cu, mask = sequences(2, per_token=True)
    m = {k: float(v) for k, v in ours(lp, old, a, cu, mask)[0].metrics().items()}
    d = (lp - old)[mask]
    assert math.isclose(m["policy/approxkl"], float((d * d).mean() / 2)) and math.isclose(
        m["val/ratio"], float(d.exp().mean())
    )
    assert math.isclose(m["val/ratio_var"], float(d.exp().var(correction=0))) and m["nonfinite_tokens"] == 0


def test_defaults_are_the_published_ones():
    bounds = {n: (p.params().ratio_min, p.params().ratio_max) for n, p in PRESETS.items()}
    for name in ("ppo", "grpo", "dr_grpo", "rloo"):
        assert bounds[name] == (0.8, 1.2)
    assert bounds["dapo"] == (0.8, 1.28) and bounds["cispo"] == (0.0, 5.0) and bounds["gmpo"] == (-0.4, 0.4)
    for name in ("gspo", "gspo_token", "luspo"):
        assert bounds[name] == (1 - 3e-4, 1 + 4e-4)
    assert all(
        p.kl_coef == 0 and p.entropy_coef == 0 and p.dual_clip is None and p.kl_kind == "k3"
        for p in PRESETS.values()
    )
    assert (PRESETS["sapo"].tau_pos, PRESETS["sapo"].tau_neg) == (1.0, 1.05)


def test_names_have_the_order_of_the_header():
    params, stats, value_stats = ffi._extension.policy_names()
    assert tuple(params) == PolicyParams._fields and params[SCALAR_COUNT] == "surrogate"
    assert tuple(stats) == STATS and tuple(value_stats) == VALUE_STATS


def test_every_field_reaches_the_kernel():
    base = PolicyPreset(is_mode="mask", is_max=2.0)
    other = {
        "surrogate": "sapo", "ratio": "seq_mean", "clip_low": 0.1, "clip_high": 0.1, "ratio_min": 0.5, "ratio_max": 2.0, "dual_clip": 3.0,
        "tau_pos": 2.0, "tau_neg": 2.0, "k_pos": 1.0, "lam_pos": 1.0, "k_neg": 1.0, "lam_neg": 1.0, "kl_coef": 0.1, "kl_kind": "k2",
        "kl_bias_correction": True, "entropy_coef": 0.1, "is_mode": "truncate", "is_min": 0.1, "is_max": 3.0, "aggregation": "token_sum",
        "norm_length": 5.0, "kl_clamp": 3.0,
    }  # fmt: skip
    assert set(other) == set(FIELDS)
    for field, value in other.items():
        assert dataclasses.replace(base, **{field: value}).params() != base.params(), field


@pytest.mark.parametrize(
    "loss,options,words",
    [
        ("pp", {}, "loss='pp' is unknown; legal: ppo, reinforce"),
        ("ppo", {"eps": 0.1}, "no option 'eps'; legal: surrogate, ratio"),
        ("ppo", {"aggregation": "mean"}, "aggregation='mean' is unknown; legal: token_mean"),
        ("ppo", {"kl_kind": "k4"}, "kl_kind='k4' is unknown"),
        ("ppo", {"kl_clamp": 0}, "kl_clamp"),
        ("ppo", {"kl_clamp": 5.0}, "kl_clamp=5.0 has no effect without kl_coef"),
        ("ppo", {"clip_low": -0.1}, "clip_low"),
        ("ppo", {"clip_low": 1.5}, "clip_low"),
        ("ppo", {"clip_low": 0.1, "ratio_min": 0.9}, "same side"),
        ("ppo", {"ratio_min": 1.3}, "nothing between"),
        ("ppo", {"dual_clip": 1.0}, "dual_clip"),
        ("ppo", {"dual_clip": math.nan}, "dual_clip"),
        ("cispo", {"dual_clip": 3.0}, "'dual_clip' has no effect"),
        ("reinforce", {"clip_low": 0.1}, "'clip_low' has no effect"),
        ("sapo", {"clip_high": 0.1}, "'clip_high' has no effect"),
        ("ppo", {"tau_pos": 1.0}, 'without surrogate="sapo"'),
        ("ppo", {"k_neg": 1.0}, 'without surrogate="vespo"'),
        ("ppo", {"norm_length": 5.0}, "'norm_length' has no effect"),
        ("dr_grpo", {}, "needs norm_length"),
        ("ppo", {"is_max": 2.0}, "'is_max' has no effect"),
        ("ppo", {"is_mode": "truncate"}, "needs is_max"),
        ("ppo", {"is_mode": "truncate", "is_max": 2.0}, "is_mode needs is_weight"),
        ("ppo", {"kl_coef": 0.1}, "kl_coef needs ref_logprobs"),
        ("ppo", {"entropy_coef": 0.1}, "entropy_coef needs entropy"),
        ("ppo", {"mask": None}, "mask is required"),
        ("gspo", {"mask": None, "num_items": 4}, "mask is required"),
        ("grpo", {"cu_seqlens": None}, "needs cu_seqlens"),
        ("ppo", {"cu_seqlens": None, "advantages": torch.zeros(5)}, "one per sequence, with cu_seqlens"),
        ("ppo", {"advantages": torch.zeros(4)}, "advantages has shape"),
        ("gspo", {"advantages": torch.zeros(27)}, "one ratio per sequence"),
        ("gspo", {"is_weight": torch.zeros(27)}, "one ratio per sequence"),
        ("vespo", {"is_weight": torch.zeros(27)}, "old_logprobs instead of is_weight"),
        ("gspo", {"kl_bias_correction": True}, 'ratio must be "token"'),
        ("gmpo", {"ratio": "seq_sum"}, 'ratio must be "seq_mean"'),
        ("ppo", {"aggregation": "token_sum", "num_items": 4}, "num_items has no effect"),
        ("ppo", {"num_items": torch.ones(2)}, "num_items must be"),
        ("ppo", {"ref_logprobs": torch.zeros(3)}, "ref_logprobs has shape"),
        (
            "ppo",
            {
                "cu_seqlens": torch.tensor([0, 5, 3, 9, 9, 27], dtype=torch.int32),
                "aggregation": "seq_mean_token_sum",
            },
            "decreases",
        ),
    ],
)
def test_bad_options_name_themselves(loss, options, words):
    lp, old, a, cu, mask = sequences(0)
    assert len(lp) == 27
    with pytest.raises((ValueError, TypeError), match=words):
        fa.policy_loss(
            lp, old, options.pop("advantages", a), loss=loss, **{"cu_seqlens": cu, "mask": mask, **options}
        )


def test_options_compose():
    mine = policy_losses.get("gspo").replace(aggregation="token_mean", clip_high=0.1)
    assert mine.params().ratio_max == 1.1 and mine.params().ratio_min == 1 - 3e-4
    assert policy_losses.get("cispo").replace(clip_high=0.2).params()[:2] == (0.0, 1.2)
    assert policy_losses.get("ppo").replace(ratio_max=2.0).params()[:2] == (0.8, 2.0)
    with pytest.raises(TypeError, match="pass tensors to the loss"):
        mine.replace(kl_coef=torch.tensor(0.1))
    lp, old, a, cu, mask = sequences(0)
    with pytest.raises(TypeError, match="'clip_low' must be a number"):
        fa.policy_loss(lp, old, a, loss=mine, cu_seqlens=cu, mask=mask, clip_low=torch.tensor(0.1))
    with pytest.raises(TypeError, match="loss must be a name or a PolicyPreset"):
        fa.policy_loss(lp, old, a, loss=3)
    with pytest.raises(ValueError, match="clip needs old_values"):
        fa.value_loss(lp, None, lp, mask=mask)
    with pytest.raises(ValueError, match="counts tokens"):
        fa.value_loss(lp, lp, lp)
    with pytest.raises(ValueError, match="norm_length"):
        fa.value_loss(lp, lp, lp, mask=mask, norm_length=3.0)


def test_constants_get_no_gradient():
    lp, old, a, cu, mask = (t.clone() for t in sequences(0, per_token=True))
    leaves = [t.requires_grad_() for t in (lp, old, a)]
    ref = lp.detach().clone().requires_grad_()
    coef = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    fa.policy_loss(lp, old, a, mask=mask, ref_logprobs=ref, kl_coef=coef).loss.backward()
    assert leaves[0].grad is not None and all(t.grad is None for t in (*leaves[1:], ref, coef))
