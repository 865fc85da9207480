"""Each preset against its paper's formula, typed here independently in fp64, value and gradient; and the behaviour of options."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

import fastalign as fa
from fastalign import ffi, losses
from fastalign.losses import FIELDS, Preset
from fastalign.testing import gradient, make_batch


def _sums(batch):
    """Per pair: policy sums, reference sums, lengths of chosen and rejected, by slicing."""
    cu, mask = batch.packed.cu_seqlens.tolist(), batch.packed.mask
    out = []
    for x in (batch.logprobs, batch.ref_logprobs, mask.double()):
        per_sequence = torch.stack([(x[a:b] * mask[a:b]).sum() for a, b in zip(cu, cu[1:])])
        out += [per_sequence[::2], per_sequence[1::2]]
    return out


# name -> (options, loss per pair of (chosen, rejected, ref chosen, ref rejected, length chosen, length rejected), extra batch term)
PAPERS = {
    "dpo": ({"beta": 0.3}, lambda c, r, rc, rr, nc, nr: -logsigmoid(0.3 * ((c - rc) - (r - rr)))),
    "cdpo": (
        {"beta": 0.2, "label_smoothing": 0.15},
        lambda c, r, rc, rr, nc, nr: -0.85 * logsigmoid(0.2 * (c - rc - r + rr)) - 0.15 * logsigmoid(-0.2 * (c - rc - r + rr)),
    ),
    "ipo": ({"tau": 0.2}, lambda c, r, rc, rr, nc, nr: ((c - rc) / nc - (r - rr) / nr - 1 / (2 * 0.2)) ** 2),
    "hinge_norm": ({"beta": 0.4}, lambda c, r, rc, rr, nc, nr: torch.clamp(1 - 0.4 * (c - rc - r + rr), min=0)),
    "simpo": ({"beta": 2.0, "gamma": 0.7}, lambda c, r, rc, rr, nc, nr: -logsigmoid(2.0 * c / nc - 2.0 * r / nr - 0.7)),
    "slic_hf": ({"delta": 1.5, "sft_weight": 0.3}, lambda c, r, rc, rr, nc, nr: torch.clamp(1.5 - c + r, min=0) - 0.3 * c),
}


@pytest.mark.parametrize("name", losses.PRESETS)
def test_preset_equals_its_paper(name):
    options, formula = PAPERS[name]
    for seed in range(3):
        batch = make_batch(6, dtype=torch.float64, seed=seed)
        with fa.use_backend("reference"):
            lp = batch.logprobs.clone().requires_grad_()
            got = fa.preference_loss(lp, batch.ref_logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask, loss=name, **options)
        truth = batch.logprobs.clone().requires_grad_()
        want = formula(*_sums(batch._replace(logprobs=truth))).mean()
        assert abs(float(got.loss - want)) < 1e-10
        assert float((gradient(got.loss, lp) - gradient(want, truth)).abs().max()) < 1e-10


def test_defaults_are_the_published_ones():
    defaults = {
        "dpo": {"beta": 0.1}, "cdpo": {"beta": 0.1, "labels": "smooth"}, "ipo": {"target": 5.0, "length_norm": 1.0},
        "hinge_norm": {"beta": 0.05, "target": 1.0}, "simpo": {"beta": 2.5, "gamma_beta_ratio": 0.55, "reference": False},
        "slic_hf": {"beta": 1.0, "target": 1.0, "sft_norm": "seq_sum", "reference": False},
    }  # fmt: skip
    assert set(defaults) == set(losses.PRESETS)
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
    assert tuple(names) == losses.PairParams._fields
    assert losses.PairParams._fields[losses.SCALAR_COUNT] == ffi._extension.pair_switch_names()[0]


def test_every_field_reaches_the_kernel_or_the_host():
    """Changing any one field of a preset changes what the kernels get: no field is silently ignored."""
    base = Preset(
        link="squared", point_link="squared", point_chosen=(1.0, 0.0), sft_weight=0.1, labels="smooth", label_smoothing=0.1, kl_chosen=0.5
    )
    other = {
        "beta": 0.7, "beta_rejected": 0.3, "reference": False, "length_norm": 1.0, "ld_alpha": 0.5, "token_clamp": (-1.0, 1.0),
        "transform": "logsig", "transform_alpha": 0.9, "gamma": 1.0, "gamma_beta_ratio": 1.0, "len_coef": 1.0, "pos_penalty": 1.0,
        "kl_chosen": 1.0, "kl_rejected": 1.0, "detach_kl_chosen": True, "link": "linear", "target": 2.0, "link_tau": 0.9, "labels": "robust",
        "label_smoothing": 0.3, "label_entropy": True, "pair_weight": 2.0, "point_link": "linear", "point_chosen": (2.0, 0.0),
        "point_rejected": (0.0, 1.0), "point_beta": 3.0, "point_beta_power": 1.0, "point_target": "soft", "anchor": 1.0, "sft_weight": 2.0,
        "sft_norm": "seq_sum", "sft_include_prompt": True, "nonfinite": "drop",
    }  # fmt: skip
    assert set(other) == set(FIELDS)
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
    ],
)
def test_bad_options_name_themselves(loss, options, words):
    batch = make_batch(4)
    with pytest.raises(ValueError, match=words):
        fa.preference_loss(batch.logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask, loss=loss, **options)


def test_missing_inputs_name_themselves():
    batch = make_batch(4)
    lp, rp, cu, mask = batch.logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, batch.packed.mask
    for words, call in (
        ("mask is required", lambda: fa.preference_loss(lp, rp, cu, loss="ipo")),
        ("needs ref_logprobs", lambda: fa.preference_loss(lp, None, cu, mask=mask)),
        ("ref_logprobs has shape", lambda: fa.preference_loss(lp, rp[:-1], cu, mask=mask)),
        ("pairs is required", lambda: fa.preference_loss(lp, rp, cu[:-1].clone().index_fill(0, torch.tensor([7]), len(lp)), mask=mask)),
        ("pairs must be integers", lambda: fa.preference_loss(lp, rp, cu, pairs=torch.zeros(2, 3, dtype=torch.int64))),
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
    assert fa.preference_loss(lp, rp, cu, mask=mask, loss="simpo").loss == fa.preference_loss(lp, None, cu, mask=mask, loss="simpo").loss


def test_compose_without_new_code():
    mine = losses.get("dpo").replace(link="hinge", length_norm=1.0, target=0.4, beta=2.0)
    batch = make_batch(5, dtype=torch.float64)
    got = fa.preference_loss(batch.logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask, loss=mine).loss
    c, r, rc, rr, nc, nr = _sums(batch)
    assert abs(float(got - torch.clamp(0.4 - 2.0 * ((c - rc) / nc - (r - rr) / nr), min=0).mean())) < 1e-10
    with pytest.raises(ValueError, match="no option 'nonsense'"):
        losses.get("dpo").replace(nonsense=1)
    with pytest.raises(TypeError, match="pass tensors to the loss"):
        losses.get("dpo").replace(beta=torch.ones(2))


def test_metrics_use_trl_names_and_omit_nothing():
    batch = make_batch(5)
    out = fa.preference_loss(batch.logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask, loss="slic_hf")
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
