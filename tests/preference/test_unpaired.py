"""Binary feedback: every unpaired loss against its paper's formula in fp64, one-class and empty batches,
anchors that pass no gradient."""

from __future__ import annotations

import math

import pytest
import torch

import fastalign as fa
from fastalign.runtime import op
from fastalign.testing import gradient, make_batch

DESIRABLE = torch.tensor([True, False, False, True, True, False])
OMEGA = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 3.0], dtype=torch.float64)
REWARDS, VALUES = torch.linspace(-1, 2, 6, dtype=torch.float64), torch.linspace(1, -1, 6, dtype=torch.float64)


def sg(x):
    return torch.sigmoid(x)


def sp(x):
    return -torch.nn.functional.logsigmoid(-x)


# name -> (options, loss per response of D and the boolean)
PAPERS = {
    "kto": (
        {"baseline": 0.3, "beta": 0.2, "desirable_weight": 1.3, "undesirable_weight": 0.7},
        lambda d, good: torch.where(good, 1.3 * (1 - sg(0.2 * (d - 0.3))), 0.7 * (1 - sg(0.2 * (0.3 - d)))),
    ),
    "apo_zero_unpaired": ({}, lambda d, good: torch.where(good, 1 - sg(0.1 * d), sg(0.1 * d))),
    "bco": (
        {"baseline": 0.05, "omega": OMEGA},
        lambda d, good: torch.where(good, sp(-(0.01 * d - 0.05)), OMEGA * sp(0.01 * d - 0.05)),
    ),
    "dro": (
        {"tau": 0.5, "rewards": REWARDS, "values": VALUES, "rescale": False},
        lambda d, good: 0.5 * (REWARDS - VALUES - 0.5 * d) ** 2,
    ),
}


def call(batch, lp=None, desirable=DESIRABLE, **options):
    packed = batch.packed
    return fa.unpaired_loss(
        batch.logprobs if lp is None else lp,
        batch.ref_logprobs,
        packed.cu_seqlens,
        desirable,
        mask=packed.mask,
        **options,
    )


def log_ratios(batch, lp):
    cu, mask = batch.packed.cu_seqlens.tolist(), batch.packed.mask
    return torch.stack([((lp - batch.ref_logprobs)[a:b] * mask[a:b]).sum() for a, b in zip(cu, cu[1:])])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", PAPERS)
def test_loss_equals_its_paper(name, reduction, backend):
    options, formula = PAPERS[name]
    batch = make_batch(3, dtype=torch.float64)
    lp, plain = (batch.logprobs.clone().requires_grad_() for _ in range(2))
    got = call(batch, lp, loss=name, reduction=reduction, **options).loss
    want = formula(log_ratios(batch, plain), DESIRABLE)
    want = {"mean": want.mean(), "sum": want.sum(), "none": want}[reduction]
    upstream = torch.linspace(1, 2, want.numel(), dtype=torch.float64).view(want.shape)
    assert float((got - want).abs().max()) < 1e-10
    assert float((gradient(got, lp, upstream) - gradient(want, plain, upstream)).abs().max()) < 1e-10


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired", "bco"])
def test_one_launch_each_way(name, monkeypatch):
    """Both classes and the anchor in one evaluation of the pair kernel; only a rule that must see all sums
    first (bco's state) takes two."""
    calls = []
    run = op.Op._run
    monkeypatch.setattr(op.Op, "_run", lambda op, *args: (calls.append(op.name), run(op, *args))[1])
    batch = make_batch(3)
    call(batch, batch.logprobs.requires_grad_(), loss=name, **PAPERS[name][0]).loss.backward()
    assert calls == ["preference_fwd", "preference_bwd"]


def test_micro_batches_with_num_items():
    batch = make_batch(3, dtype=torch.float64)
    cut = int(batch.packed.cu_seqlens[4])
    total = 0.0
    for rows, cu, d in (
        (slice(0, cut), slice(0, 5), slice(0, 4)),
        (slice(cut, None), slice(4, 7), slice(4, 6)),
    ):
        cu_seqlens = batch.packed.cu_seqlens[cu] - batch.packed.cu_seqlens[cu][0]
        part = batch._replace(
            packed=batch.packed._replace(cu_seqlens=cu_seqlens, mask=batch.packed.mask[rows]),
            logprobs=batch.logprobs[rows], ref_logprobs=batch.ref_logprobs[rows],
        )  # fmt: skip
        total += float(call(part, desirable=DESIRABLE[d], baseline=0.1, num_items=6).loss)
    assert abs(total - float(call(batch, baseline=0.1).loss)) < 1e-12


@pytest.mark.parametrize("name", PAPERS)
def test_one_class_odd_and_empty_batches(name):  # row 32, J4
    packed = fa.pack([[1, 2, 3], [1], [], [4, 5], [1, 2]], [[0, 1, 1], [0], [], [0, 1], [0, 1]])
    lp = torch.where(packed.mask, -1.0, 0.0)
    extra = {
        "kto": {"baseline": 0.0},
        "bco": {"baseline": 0.0},
        "dro": {"rewards": torch.ones(5), "values": torch.zeros(5)},
    }.get(name, {})
    for desirable in (
        torch.ones(5, dtype=torch.bool),
        torch.zeros(5, dtype=torch.bool),
        torch.tensor([True, False, True, False, True]),
    ):
        x = lp.clone().requires_grad_()
        out = fa.unpaired_loss(
            x, lp * 1.5, packed.cu_seqlens, desirable, mask=packed.mask, loss=name, **extra
        )
        assert out.valid.tolist() == [True, False, False, True, True]
        assert math.isfinite(float(out.loss.detach())) and bool(torch.isfinite(gradient(out.loss, x)).all())
        metrics = out.metrics()
        assert float(metrics["rewards/chosen"].count) + float(metrics["rewards/rejected"].count) == 3
        assert math.isnan(float(metrics["rewards/rejected"])) == bool(desirable.all())
    x = lp.clone().requires_grad_()
    nothing = fa.unpaired_loss(
        x, lp, packed.cu_seqlens, desirable, mask=torch.zeros_like(packed.mask), loss=name, **extra
    )
    assert float(nothing.loss.detach()) == 0.0 and gradient(nothing.loss, x).abs().sum() == 0


def test_kto_baseline():
    batch = make_batch(3, dtype=torch.float64)
    d = log_ratios(batch, batch.logprobs)
    args = (batch.packed.cu_seqlens,)
    got = fa.kto_baseline(
        batch.logprobs.clone().requires_grad_(), batch.ref_logprobs, *args, mask=batch.packed.mask
    )
    assert abs(float(got) - max(0.0, float(d.mean()))) < 1e-12 and not got.requires_grad
    swapped = fa.kto_baseline(batch.ref_logprobs, batch.logprobs, *args, mask=batch.packed.mask)
    assert float(got) == 0.0 or float(swapped) == 0.0
    assert (
        float(
            fa.kto_baseline(
                batch.logprobs, batch.ref_logprobs, *args, mask=torch.zeros_like(batch.packed.mask)
            )
        )
        == 0.0
    )


def test_bco_state_keeps_the_running_mean():
    rule, seen = fa.BCODelta(), []
    for seed in range(3):
        batch = make_batch(3, dtype=torch.float64, seed=seed)
        seen.append(0.01 * log_ratios(batch, batch.logprobs))
        got = call(batch, loss="bco", state=rule).loss
        assert abs(float(got - call(batch, loss="bco", baseline=float(torch.cat(seen).mean())).loss)) < 1e-10


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired", "bco"])
def test_beta_as_a_tensor(loss):
    batch = make_batch(3)
    given = {} if loss == "apo_zero_unpaired" else {"baseline": 0.3}
    want, got = (call(batch, loss=loss, beta=beta, **given) for beta in (0.25, torch.tensor(0.25)))
    assert (
        torch.equal(got.loss, want.loss)
        and torch.equal(got.rewards, want.rewards)
        and torch.equal(got.anchor, want.anchor)
    )
    with pytest.raises(ValueError, match="beta must be a number or a tensor of one element"):
        call(batch, loss=loss, beta=torch.ones(2), **given)


def test_dro_gradients_of_policy_and_value():
    batch = make_batch(3, dtype=torch.float64)
    grads = {}
    for rescale in (True, False):
        lp, values = batch.logprobs.clone().requires_grad_(), VALUES.clone().requires_grad_()
        out = call(batch, lp, loss="dro", tau=0.5, rewards=REWARDS, values=values, rescale=rescale)
        grads[rescale] = torch.autograd.grad(out.loss, (lp, values))
    residual = REWARDS - VALUES - 0.5 * log_ratios(batch, batch.logprobs)
    assert float((grads[True][1] + residual / 6).abs().max()) < 1e-12 and torch.equal(
        grads[True][1], grads[False][1]
    )
    assert float((grads[True][0] - grads[False][0] / 0.5).abs().max()) < 1e-12


def test_errors():
    batch = make_batch(3)
    for words, options in (
        ("loss='ktoo' is unknown; legal: kto", {"loss": "ktoo"}),
        ("needs baseline=", {}),
        ("needs either baseline", {"loss": "bco"}),
        ("no option 'gamma'; legal: beta", {"gamma": 1.0}),
        ("has no baseline", {"loss": "dro", "baseline": 0.1}),
        ("needs rewards= and values=", {"loss": "dro"}),
        ("desirable has shape", {"desirable": DESIRABLE[:2], "baseline": 0.0}),
        ("beta", {"beta": 0.0, "baseline": 0.0}),
        ("tau", {"loss": "dro", "tau": 0.0, "rewards": REWARDS, "values": VALUES}),
        ("desirable_weight", {"desirable_weight": -1.0, "baseline": 0.0}),
        ("state is a BCODelta", {"loss": "kto", "state": fa.BCODelta(), "baseline": 0.0}),
    ):
        with pytest.raises(ValueError, match=words):
            call(batch, **options)
    with pytest.raises(TypeError, match="desirable must be bool, got torch.int64"):
        call(batch, desirable=DESIRABLE.long(), baseline=0.0)
