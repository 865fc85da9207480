"""Each preset against its paper's formula, typed here independently in fp64, value and gradient; and the
behaviour of options."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

import fastalign as fa
from fastalign import losses
from fastalign.losses.pair import FIELDS, HOST_FIELDS, Preset
from fastalign.ops.preference.params import SCALAR_COUNT, PairParams
from fastalign.runtime import ffi
from fastalign.testing import make_batch


class Sums:
    """Per pair, by slicing, in fp64: c, r policy sums; rc, rr reference sums; nc, nr lengths; kc, kr sums of
    KL(ref || policy)."""

    def __init__(self, batch, kl):
        cu, mask = batch.packed.cu_seqlens.tolist(), batch.packed.mask
        for name, x in (("", batch.logprobs), ("r", batch.ref_logprobs), ("n", mask.double()), ("k", kl)):
            per_sequence = torch.stack([(x[a:b] * mask[a:b]).sum() for a, b in zip(cu, cu[1:])])
            for side, values in (("c", per_sequence[::2]), ("r", per_sequence[1::2])):
                setattr(self, name + side, values)
        self.dc, self.dr = self.c - self.rc, self.r - self.rr
        self.delta = self.dc - self.dr
        self.batch = batch


def sp(x):
    return -logsigmoid(-x)


def sg(x):
    return torch.sigmoid(x)


def ld_delta(s, alpha):
    """Tokens beyond the shorter response of the pair weighted by alpha, on policy and reference alike."""
    b, cu = s.batch, s.batch.packed.cu_seqlens.tolist()
    sides = []
    for i in range(len(cu) - 1):
        d = (b.logprobs - b.ref_logprobs)[cu[i] : cu[i + 1]][b.packed.mask[cu[i] : cu[i + 1]]]
        partner = int(b.packed.mask[cu[i ^ 1] : cu[(i ^ 1) + 1]].sum())
        sides.append(d[:partner].sum() + alpha * d[partner:].sum())
    sides = torch.stack(sides)
    return sides[::2] - sides[1::2]


def log_odds(a):
    return a - torch.log1p(-torch.exp(a))


def aot(d, e):
    return (1 - e) * sp(-0.01 * d) + e * sp(0.01 * d)


def bernoulli_kl(p, q):
    return p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q))


P = torch.tensor(
    [0.1, 0.3, 0.5, 0.7, 0.9, 0.95], dtype=torch.float64
)  # soft labels of the six pairs of the test
SOFT = {"soft_labels": P}
GAP = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64)
ORPO = lambda s: 0.1 * sp(-(log_odds(s.c / s.nc) - log_odds(s.r / s.nr))) - s.c.sum() / s.nc.sum()  # noqa: E731

# name -> (options, loss per pair); the mean over pairs is the loss. Everything typed from the papers, nothing
# shared with the package.
PAPERS = {
    "dpo": ({"beta": 0.3}, lambda s: sp(-0.3 * s.delta)),
    "cdpo": (
        {"beta": 0.2, "label_smoothing": 0.15},
        lambda s: 0.85 * sp(-0.2 * s.delta) + 0.15 * sp(0.2 * s.delta),
    ),
    "rdpo_robust": (
        {"label_smoothing": 0.1},
        lambda s: (0.9 * sp(-0.1 * s.delta) - 0.1 * sp(0.1 * s.delta)) / 0.8,
    ),
    "ipo": ({"tau": 0.2}, lambda s: (s.dc / s.nc - s.dr / s.nr - 1 / (2 * 0.2)) ** 2),
    "hinge_norm": ({"beta": 0.4}, lambda s: torch.clamp(1 - 0.4 * s.delta, min=0)),
    "slic_hf": ({"delta": 1.5, "sft_weight": 0.3}, lambda s: torch.clamp(1.5 - s.c + s.r, min=0) - 0.3 * s.c),
    "gpo_logistic": ({}, lambda s: sp(-0.1 * s.delta)),
    "gpo_hinge": ({}, lambda s: torch.clamp(1 - 0.1 * s.delta, min=0)),
    "gpo_squared": ({}, lambda s: (0.1 * s.delta - 1) ** 2),
    "gpo_exp": ({}, lambda s: torch.exp(-0.1 * s.delta)),
    "gpo_truncquad": ({}, lambda s: torch.clamp(1 - 0.1 * s.delta, min=0) ** 2),
    "gpo_savage": ({}, lambda s: 1 / (1 + torch.exp(0.1 * s.delta)) ** 2),
    "exo_pair": (
        {"label_smoothing": 0.01},
        lambda s: (
            sg(0.1 * s.delta) * (logsigmoid(0.1 * s.delta) - math.log(0.99))
            + sg(-0.1 * s.delta) * (logsigmoid(-0.1 * s.delta) - math.log(0.01))
        ),
    ),
    "discopop": (
        {},
        lambda s: (
            (1 - sg(s.delta * 0.05 / 0.05)) * sp(-0.05 * s.delta)
            + sg(s.delta * 0.05 / 0.05) * torch.exp(-0.05 * s.delta)
        ),
    ),
    "dno": (SOFT, lambda s: P * sp(-0.1 * s.delta) + (1 - P) * sp(0.1 * s.delta)),
    "rlaif_soft": (SOFT, lambda s: P * sp(-0.1 * s.delta) + (1 - P) * sp(0.1 * s.delta)),
    "rpo_bwd_kl": (SOFT, lambda s: bernoulli_kl(P, sg(0.1 * s.delta))),
    "rpo_fwd_kl": (SOFT, lambda s: bernoulli_kl(sg(0.1 * s.delta), P)),
    "rpo_sq": ({"target": GAP}, lambda s: (0.1 * s.delta - GAP) ** 2),
    "dpop": ({}, lambda s: sp(-0.3 * (s.delta - 50 * torch.clamp(s.rc - s.c, min=0)))),
    "r_dpo": ({"alpha": 0.2}, lambda s: sp(-(0.1 * s.delta + 0.2 * (s.nc - s.nr)))),
    "odpo": ({"gamma_ext": GAP}, lambda s: sp(-(0.1 * s.delta - GAP))),
    "tdpo1": ({}, lambda s: sp(-0.1 * (s.delta - (s.kr - s.kc)))),
    "tdpo2": ({"alpha": 0.4}, lambda s: sp(-0.1 * (s.delta - 0.4 * (s.kr - s.kc.detach())))),
    "ln_dpo": ({}, lambda s: sp(-5.0 * (s.dc / s.nc - s.dr / s.nr))),
    "ld_dpo": ({"ld_alpha": 0.3}, lambda s: sp(-0.1 * ld_delta(s, 0.3))),
    "f_dpo_js": (
        {},
        lambda s: sp(-0.1 * (torch.log(2 / (1 + torch.exp(-s.dc))) - torch.log(2 / (1 + torch.exp(-s.dr))))),
    ),
    "f_dpo_fkl": ({}, lambda s: sp(-0.1 * (-1 / torch.exp(s.dc) + 1 / torch.exp(s.dr)))),
    "f_dpo_alpha": (
        {"alpha": 0.3},
        lambda s: sp(-0.1 * ((1 - torch.exp(s.dc) ** -0.3) / 0.3 - (1 - torch.exp(s.dr) ** -0.3) / 0.3)),
    ),
    "d2o": ({"beta": 0.2, "alpha": 0.05}, lambda s: sp(-(0.2 * s.dc - 0.05 * s.dr))),
    "simpo": ({"beta": 2.0, "gamma": 0.7}, lambda s: sp(-(2.0 * s.c / s.nc - 2.0 * s.r / s.nr - 0.7))),
    "cpo": ({"beta": 0.2}, lambda s: sp(-0.2 * (s.c - s.r)) - s.c.sum() / s.nc.sum()),
    "cpo_simpo": (
        {"beta": 3.0, "gamma_beta_ratio": 0.2},
        lambda s: sp(-(3.0 * (s.c / s.nc - s.r / s.nr) - 0.6)) - s.c / s.nc,
    ),
    "alphapo": (
        {},
        lambda s: sp(
            -(
                2.5
                * ((1 - torch.exp(s.c / s.nc) ** -0.25) / 0.25 - (1 - torch.exp(s.r / s.nr) ** -0.25) / 0.25)
                - 0.1
            )
        ),
    ),
    "orpo": ({}, ORPO),
    "rrhf_pair": ({}, lambda s: torch.clamp(s.r / s.nr - s.c / s.nc, min=0)),
    "bt_rm": ({"gamma_ext": GAP}, lambda s: sp(-(s.c - s.r - GAP))),
    "sft": ({}, lambda s: (-s.c.sum() / s.nc.sum()).expand(6)),
    "rpo": ({"alpha": 0.5}, lambda s: sp(-0.1 * s.delta) - 0.5 * s.c.sum() / s.nc.sum()),
    "iterative_rpo": ({"alpha": 0.5}, lambda s: sp(-0.1 * s.delta) - 0.5 * s.c / s.nc),
    "regularized_po": ({}, lambda s: sp(-0.01 * s.delta) - 0.005 * s.c.sum() / s.nc.sum()),
    "nca_pair": ({}, lambda s: sp(-0.01 * s.dc) + 0.5 * sp(0.01 * s.dc) + 0.5 * sp(0.01 * s.dr)),
    "bco_pair": ({"delta": 0.02}, lambda s: sp(-(0.01 * s.dc - 0.02)) + sp(0.01 * s.dr - 0.02)),
    "apo_zero": ({}, lambda s: 1 - sg(0.1 * s.dc) + sg(0.1 * s.dr)),
    "apo_down": ({}, lambda s: sg(0.1 * s.dc) + 1 - sg(0.1 * s.delta)),
    "sppo_hard": ({"beta": 0.01}, lambda s: (s.dc - 0.5 / 0.01) ** 2 + (s.dr + 0.5 / 0.01) ** 2),
    "sppo": (
        {"beta": 0.01, **SOFT},
        lambda s: 0.5 * ((s.dc - (P - 0.5) / 0.01) ** 2 + (s.dr - (0.5 - P) / 0.01) ** 2),
    ),
    "wpo": ({"omega": P}, lambda s: P * sp(-0.01 * s.delta)),
    "aot": (
        {"label_smoothing": 0.1},
        lambda s: aot(torch.sort(s.c - s.r).values - torch.sort(s.rc - s.rr).values, 0.1),
    ),
    "aot_unpaired": ({}, lambda s: aot(torch.sort(s.dc).values - torch.sort(s.dr).values, 0.0)),
    "npo": ({}, lambda s: 2 / 0.1 * torch.log(1 + torch.exp(s.dr) ** 0.1)),
    **{
        name: ({}, lambda s: sp(-0.1 * s.delta))
        for name in ("dno_prct", "online_dpo", "iterative_dpo", "sdpo", "self_rewarding")
    },
}


def evaluate(name, batch, **options):
    """(loss, gradient in the log-probs, gradient in the KLs) of the package's reference backend."""
    lp, kl = batch.logprobs.clone().requires_grad_(), batch.kl_ref_policy.clone().requires_grad_()
    with fa.use_backend("reference"):
        packed = batch.packed
        out = fa.preference_loss(
            lp,
            batch.ref_logprobs,
            packed.cu_seqlens,
            mask=packed.mask,
            kl_ref_policy=kl,
            loss=name,
            **options,
        )
    return out.loss.detach(), *(
        torch.zeros_like(lp) if g is None else g
        for g in torch.autograd.grad(out.loss, (lp, kl), allow_unused=True)
    )


@pytest.mark.parametrize(
    "name", [n for n, p in losses.PRESETS.items() if p.rule is None]
)  # the others: test_rules.py
def test_preset_equals_its_paper(name):
    options, formula = PAPERS[name]
    for seed in range(3):
        batch = make_batch(6, dtype=torch.float64, seed=seed)
        got = evaluate(name, batch, **options)
        lp, kl = batch.logprobs.clone().requires_grad_(), batch.kl_ref_policy.clone().requires_grad_()
        loss = formula(Sums(batch._replace(logprobs=lp), kl)).mean()
        grads = torch.autograd.grad(loss, (lp, kl), allow_unused=True)
        want = (loss.detach(), *(torch.zeros_like(lp) if g is None else g for g in grads))
        for a, b in zip(got, want):
            assert float((a - b).abs().max()) <= 1e-10 * max(1.0, float(b.abs().max()))


def test_soft_labels_of_sppo_default_to_the_hard_version():
    batch = make_batch(3, dtype=torch.float64)
    assert (
        evaluate("sppo", batch)[0]
        == evaluate("sppo", batch, soft_labels=torch.ones(3, dtype=torch.float64))[0]
    )


# Identities between methods (and the two that are easily got wrong).
IDENTITIES = [
    ("cdpo", {"label_smoothing": 0.0}, "dpo", {}, 1.0),
    ("ld_dpo", {"ld_alpha": 1.0}, "dpo", {}, 1.0),
    ("dpop", {"pos_penalty": 0.0, "beta": 0.1}, "dpo", {}, 1.0),
    ("tdpo2", {"alpha": 0.0}, "dpo", {}, 1.0),
    ("ln_dpo", {"length_norm": 0.0, "beta": 0.1}, "dpo", {}, 1.0),
    ("f_dpo_alpha", {"alpha": 1e-9}, "dpo", {}, 1.0),
    ("f_dpo_alpha", {"alpha": 1.0}, "f_dpo_fkl", {}, 1.0),
    ("d2o", {"alpha": 0.1}, "dpo", {}, 1.0),
    ("gpo_squared", {"beta": 0.3}, "ipo", {"tau": 0.15, "length_norm": 0.0}, 0.09),
    ("slic_hf", {"delta": 2.0, "sft_weight": 0.0}, "hinge_norm", {"beta": 0.5, "reference": False}, 2.0),
]


@pytest.mark.parametrize("a,options_a,b,options_b,factor", IDENTITIES)
def test_identities(a, options_a, b, options_b, factor):
    batch = make_batch(6, dtype=torch.float64, seed=7)
    for x, y in zip(evaluate(a, batch, **options_a), evaluate(b, batch, **options_b)):
        assert float((x - factor * y).abs().max()) < 1e-7 * max(1.0, float(x.abs().max()))


def test_defaults_are_the_published_ones():
    defaults = {
        "dpo": {"beta": 0.1}, "cdpo": {"beta": 0.1, "labels": "smooth"}, "ipo": {"target": 5.0, "length_norm": 1.0},
        "hinge_norm": {"beta": 0.05, "target": 1.0}, "simpo": {"beta": 2.5, "gamma_beta_ratio": 0.55, "reference": False},
        "slic_hf": {"beta": 1.0, "target": 1.0, "sft_norm": "seq_sum", "reference": False}, "dpop": {"beta": 0.3, "pos_penalty": 50.0},
        "orpo": {"pair_weight": 0.1, "sft_weight": 1.0}, "sppo": {"beta": 1e-3}, "tdpo2": {"kl_rejected": 0.5, "detach_kl_chosen": True},
        "cpo": {"sft_norm": "token_mean_global"}, "cpo_simpo": {"sft_norm": "seq_mean"}, "exo_pair": {"label_smoothing": 1e-3},
    }  # fmt: skip
    for name, fields in defaults.items():
        for field, value in fields.items():
            assert getattr(losses.get(name), field) == value, (name, field)


def test_trl_names():
    assert losses.get("sigmoid") is losses.get("dpo") and losses.get("hinge") is losses.get("hinge_norm")
    assert "sigmoid" in losses.available() and "dpo" in losses.available()
    with pytest.raises(ValueError, match="loss='dop' is unknown; legal: dpo, "):
        losses.get("dop")


def test_params_have_the_order_of_the_header():
    names = ffi._extension.pair_scalar_names() + ffi._extension.pair_switch_names()
    assert tuple(names) == PairParams._fields
    assert PairParams._fields[SCALAR_COUNT] == ffi._extension.pair_switch_names()[0]


def test_every_field_reaches_the_kernel_or_the_host():
    """Changing any one field of a preset changes what the kernels get: no field is silently ignored."""
    base = Preset(
        link="squared",
        point_link="squared",
        point_chosen=(1.0, 0.0),
        sft_weight=0.1,
        labels="smooth",
        label_smoothing=0.1,
        kl_chosen=0.5,
    )
    other = {
        "beta": 0.7, "beta_rejected": 0.3, "reference": False, "length_norm": 1.0, "ld_alpha": 0.5, "token_clamp": (-1.0, 1.0),
        "transform": "logsig", "transform_alpha": 0.9, "gamma": 1.0, "gamma_beta_ratio": 1.0, "len_coef": 1.0, "pos_penalty": 1.0,
        "kl_chosen": 1.0, "kl_rejected": 1.0, "detach_kl_chosen": True, "link": "linear", "target": 2.0, "link_tau": 0.9, "labels": "robust",
        "label_smoothing": 0.3, "label_entropy": True, "pair_weight": 2.0, "point_link": "linear", "point_chosen": (2.0, 0.0),
        "point_rejected": (0.0, 1.0), "point_beta": 3.0, "point_beta_power": 1.0, "point_target": "soft", "anchor": 1.0, "sft_weight": 2.0,
        "sft_norm": "seq_sum", "sft_include_prompt": True, "nonfinite": "drop",
    }  # fmt: skip
    assert set(other) | set(HOST_FIELDS) == set(FIELDS)
    for field, value in other.items():
        changed = dataclasses.replace(base, **{field: value})
        assert repr(changed.params()) != repr(base.params()), field


@pytest.mark.parametrize(
    "loss,options,words",
    [
        ("dpo", {"betta": 0.1}, "no option 'betta'; legal: label_smoothing, beta"),
        ("dpo", {"tau": 0.1}, "no option 'tau'"),
        ("dpo", {"target": 2.0}, "'target' has no effect"),
        ("dpo", {"link_tau": 0.1}, "no effect"),
        ("dpo", {"sft_norm": "seq_sum"}, "without sft_weight"),
        ("dpo", {"link": "cubic"}, "link='cubic' is unknown; legal: logistic"),
        ("dpo", {"beta": -0.1}, "beta"),
        ("dpo", {"beta": math.nan}, "beta"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing"),
        ("dpo", {"labels": "robust", "label_smoothing": 0.6}, "label_smoothing"),
        ("hinge_norm", {"label_smoothing": 0.1}, "no effect"),
        ("ipo", {"tau": 0.0}, "tau"),
        ("ipo", {"tau": 0.1, "target": 3.0}, "both set target"),
        ("dpo", {"link": "exo"}, "label_smoothing"),
        ("dpo", {"transform": "logodds"}, "reference=False"),
        ("dpo", {"soft_labels": torch.ones(4)}, "does not use soft_labels"),
        ("dpo", {"labels": "soft"}, "needs soft_labels"),
        ("dpo", {"beta": torch.ones(3)}, "beta has shape"),
        ("dpo", {"reduction": "average"}, "reduction='average' is unknown"),
        ("dpo", {"num_items": -1}, "num_items"),
        ("dpo", {"token_clamp": (1.0, 0.0)}, "token_clamp"),
        ("dpo", {"pair_weight": 0.0}, "no term"),
        ("dpo", {"token_clamp": 3.0}, "token_clamp"),
        ("dpo", {"point_link": "logistic"}, "'point_link' has no effect"),
        ("nca_pair", {"gamma": 1.0}, "'gamma' has no effect"),
        ("nca_pair", {"gamma_ext": torch.ones(4)}, "'gamma_ext' has no effect"),
        ("nca_pair", {"link": "hinge"}, "'link' has no effect"),
        ("nca_pair", {"point_link": "exo"}, "point_link='exo' is unknown"),
        ("nca_pair", {"point_chosen": (1.0, 2.0, 3.0)}, "point_chosen"),
        ("bco_pair", {"labels": "smooth", "label_smoothing": 0.2}, "no effect"),
        ("apo_zero", {"beta_rejected": 0.2}, "'beta_rejected' has no effect"),
        ("sft", {"omega": torch.ones(4)}, "'omega' has no effect"),
        ("sft", {"length_norm": 1.0}, "'length_norm' has no effect"),
        ("rpo_fwd_kl", {"label_entropy": True}, "subtract the labels' entropy twice"),
        ("dno", {"soft_labels": torch.tensor([0.5, 2.0, 0.0, 1.0])}, "soft_labels are probabilities"),
        ("dpo", {"beta": torch.tensor(-1.0)}, "beta must not be negative"),
    ],
)
def test_bad_options_name_themselves(loss, options, words):
    batch = make_batch(4)
    with pytest.raises(ValueError, match=words):
        fa.preference_loss(
            batch.logprobs,
            batch.ref_logprobs,
            batch.packed.cu_seqlens,
            mask=batch.packed.mask,
            loss=loss,
            **options,
        )


def test_missing_inputs_name_themselves():
    batch = make_batch(4)
    lp, rp, cu, mask = batch.logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, batch.packed.mask
    for words, call in (
        ("mask is required", lambda: fa.preference_loss(lp, rp, cu, loss="ipo")),
        ("needs ref_logprobs", lambda: fa.preference_loss(lp, None, cu, mask=mask)),
        ("ref_logprobs has shape", lambda: fa.preference_loss(lp, rp[:-1], cu, mask=mask)),
        (
            "pairs is required",
            lambda: fa.preference_loss(
                lp, rp, cu[:-1].clone().index_fill(0, torch.tensor([7]), len(lp)), mask=mask
            ),
        ),
        (
            "pairs must be integers",
            lambda: fa.preference_loss(lp, rp, cu, pairs=torch.zeros(2, 3, dtype=torch.int64)),
        ),
        ("kl_ref_policy", lambda: fa.preference_loss(lp, rp, cu, mask=mask, kl_rejected=0.5)),
        ("chosen_lengths", lambda: fa.preference_loss_from_sums(lp[:2], lp[:2], loss="simpo")),
        ("ref_chosen", lambda: fa.preference_loss_from_sums(lp[:2], lp[:2])),
        ("single tokens", lambda: fa.preference_loss_from_sums(lp[:2], lp[:2], lp[:2], lp[:2], ld_alpha=0.5)),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(IndexError, match="pairs holds sequence numbers from 0 to 8"):
        fa.preference_loss(lp, rp, cu, pairs=torch.tensor([[0, 8]]))
    with pytest.raises(TypeError, match="'omega' must be a tensor"):
        fa.preference_loss(lp, rp, cu, omega=2.0)
    with pytest.raises(TypeError, match="'sft_weight' must be a number"):
        fa.preference_loss(lp, rp, cu, mask=mask, sft_weight=torch.tensor(1.0))
    assert (
        fa.preference_loss(lp, rp, cu, mask=mask, loss="simpo").loss
        == fa.preference_loss(lp, None, cu, mask=mask, loss="simpo").loss
    )


def test_compose_without_new_code():
    mine = losses.get("dpo").replace(link="hinge", length_norm=1.0, target=0.4, beta=2.0)
    batch = make_batch(5, dtype=torch.float64)
    got = fa.preference_loss(
        batch.logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask, loss=mine
    ).loss
    s = Sums(batch, batch.kl_ref_policy)
    assert abs(float(got - torch.clamp(0.4 - 2.0 * (s.dc / s.nc - s.dr / s.nr), min=0).mean())) < 1e-10
    with pytest.raises(ValueError, match="no option 'nonsense'"):
        losses.get("dpo").replace(nonsense=1)
    with pytest.raises(TypeError, match="pass tensors to the loss"):
        losses.get("dpo").replace(beta=torch.ones(2))


def test_metrics_use_trl_names_and_omit_nothing():
    batch = make_batch(5)
    out = fa.preference_loss(
        batch.logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask, loss="slic_hf"
    )
    metrics = out.metrics()
    assert {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "nll_loss",
    } <= set(metrics)
    total, count = metrics["rewards/margins"]
    assert float(count) == 5 and abs(float(total) / 5 - float(out.margins.mean())) < 1e-6
    assert not any(m.sum.requires_grad for m in metrics.values())


def test_stop_gradients():
    """The reference, beta and every per-pair tensor are constants of the loss."""
    batch = make_batch(4)
    ref = batch.ref_logprobs.clone().requires_grad_()
    beta = torch.full((4,), 0.3, requires_grad=True)
    omega = torch.ones(4, requires_grad=True)
    lp = batch.logprobs.clone().requires_grad_()
    out = fa.preference_loss(lp, ref, batch.packed.cu_seqlens, beta=beta, omega=omega)
    out.loss.backward()
    assert lp.grad is not None and ref.grad is None and beta.grad is None and omega.grad is None


def test_a_tensor_changes_no_preset():
    """The preset is the same object, which nothing has to check again; what has no effect is refused all the
    same."""
    preset = fa.losses.get("dpo")
    resolved, tensors = preset.with_options({"beta": torch.tensor(0.3)})
    assert resolved is preset and list(tensors) == ["beta"]
    with pytest.raises(ValueError, match="'target' has no effect"):
        preset.with_options({"target": torch.ones(())})
