"""Reward-model losses against their formulas, typed here in fp64, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import logsigmoid

import fastalign as fa
from fastalign.testing import assert_close, gradient

CHOSEN = torch.tensor([1.0, -0.5, 2.0, 0.0], dtype=torch.float64)
REJECTED = torch.tensor([0.3, 0.5, -40.0, 0.0], dtype=torch.float64)
MARGIN, SOFT = (
    torch.tensor([0.0, 1.0, 1 / 3, -0.5], dtype=torch.float64),
    torch.tensor([1.0, 0.8, 0.5, 0.0], dtype=torch.float64),
)
FORMS = {
    "bradley_terry": ({}, lambda c, r: -logsigmoid(c - r)),
    "margin": ({"margin": MARGIN}, lambda c, r: -logsigmoid(c - r - MARGIN)),
    "soft": ({"soft_labels": SOFT}, lambda c, r: -SOFT * logsigmoid(c - r) - (1 - SOFT) * logsigmoid(r - c)),
    "centering": ({"centering": 0.01}, lambda c, r: -logsigmoid(c - r) + 0.01 * (c + r) ** 2),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", FORMS)
def test_reward_loss(backend, device, name, reduction):
    options, formula = FORMS[name]
    options = {k: v.float().to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    leaves = [x.float().to(device).requires_grad_() for x in (CHOSEN, REJECTED)]
    plain = [x.clone().requires_grad_() for x in (CHOSEN, REJECTED)]
    out = fa.reward_loss(*leaves, reduction=reduction, **options)
    want = formula(*plain)
    want = {"mean": want.mean(), "sum": want.sum(), "none": want}[reduction]
    upstream = torch.linspace(1.0, 2.0, want.numel(), dtype=torch.float64).view(want.shape)
    assert_close(out.loss.cpu(), want, scale=10.0 * max(1.0, float(want.detach().abs().max())))
    grads = torch.autograd.grad(out.loss, leaves, upstream.float().to(device))
    for got, truth in zip(grads, torch.autograd.grad(want, plain, upstream)):
        assert_close(got.cpu(), truth, scale=10.0)
    metrics = out.metrics()
    assert (
        float(metrics["rewards/accuracies"]) == 0.5
        and abs(float(metrics["rewards/chosen"]) - float(CHOSEN.mean())) < 1e-6
    )


def test_kwise_reward_loss(backend, device):
    """Ties make no pair; a list without a pair gives 0 and counts; lists of their own lengths."""
    rewards = torch.tensor([1.0, -1.0, 0.5, 2.0, 0.0, 3.0], device=device).requires_grad_()
    ranks = torch.tensor([1, 3, 3, 2, 1, 1], device=device)
    offsets = torch.tensor([0, 4, 6], device=device)
    out = fa.kwise_reward_loss(rewards, offsets, -ranks)
    leaf = rewards.detach().double().cpu().requires_grad_()
    pairs = [(0, 1), (0, 2), (0, 3), (3, 1), (3, 2)]
    want = -torch.stack([logsigmoid(leaf[i] - leaf[j]) for i, j in pairs]).mean() / 2
    assert_close(out.loss.cpu(), want, scale=10.0)
    g = gradient(out.loss, rewards)
    assert_close(g.cpu(), gradient(want, leaf), scale=10.0)
    assert g[4:].tolist() == [0.0, 0.0]
    none = fa.kwise_reward_loss(rewards, offsets, torch.zeros_like(ranks))
    assert float(none.loss.detach()) == 0.0 and float(gradient(none.loss, rewards).abs().sum()) == 0.0


@pytest.mark.parametrize("options", [{}, {"centering": 0.01}])
def test_micro_batches(options):
    whole = fa.reward_loss(CHOSEN, REJECTED, **options).loss
    parts = [
        fa.reward_loss(CHOSEN[s], REJECTED[s], num_items=4, **options).loss
        for s in (slice(0, 1), slice(1, 4))
    ]
    assert abs(float(whole - sum(parts))) < 1e-12
    empty = fa.reward_loss(CHOSEN[:0], REJECTED[:0], **options).loss
    assert float(empty) == 0.0


def test_errors():
    for words, call in (
        ("centering=-1.0 is out of range", lambda: fa.reward_loss(CHOSEN, REJECTED, centering=-1.0)),
        ("rejected has shape", lambda: fa.reward_loss(CHOSEN, REJECTED[:2])),
        ("margin has shape", lambda: fa.reward_loss(CHOSEN, REJECTED, margin=MARGIN[:2])),
        ("soft_labels has shape", lambda: fa.reward_loss(CHOSEN, REJECTED, soft_labels=SOFT[:2])),
        ("scores has shape", lambda: fa.kwise_reward_loss(CHOSEN, torch.tensor([0, 4]), MARGIN[:3])),
    ):
        with pytest.raises(ValueError, match=words):
            call()
