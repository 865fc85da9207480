"""Policy losses and the exact KL loss from hidden states: the composition of `linear_token_stats` and the
loss, value and gradients."""

from __future__ import annotations

import pytest
import torch

import fastalign as fa
from fastalign.losses.policy import PRESETS

LENGTHS = (5, 9, 0, 7, 180, 3, 12, 1, 1, 1)
WIDTH, VOCAB, TOKENS = 8, 37, sum(LENGTHS)
BUDGETS = {"all": None, "chunks": 128 * VOCAB * 8}


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(VOCAB, (TOKENS,), generator=g)
    labels[torch.rand(TOKENS, generator=g) < 0.3] = -100
    shapes = ((TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,), (TOKENS, 5), (VOCAB, 5))
    tensors = [
        torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_(i < 3) for i, s in enumerate(shapes)
    ]
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    old, ref, adv = (torch.randn(TOKENS, generator=g, dtype=torch.float64) * 0.3 for _ in range(3))
    return tensors, labels, cu, old - 4.0, ref - 4.0, adv


def check(inputs, budget, **options):
    tensors, labels, cu, old, ref, adv = inputs
    hidden, weight, bias = tensors[:3]
    preset = fa.policy_losses.get(options["loss"])
    advantages = adv[: len(LENGTHS)] if preset.needs_sequence_values else adv
    if preset.aggregation == "seq_mean_token_sum_norm":
        options["norm_length"] = 40.0
    common = {"cu_seqlens": cu, "ref_logprobs": ref, **options}
    got = fa.linear_policy_loss(
        hidden, weight, labels, old, advantages, bias=bias, workspace_bytes=BUDGETS[budget], **common
    )
    stats = fa.token_stats(hidden @ weight.t() + bias, labels, outputs=("logprob", "entropy"))
    entropy = stats.entropy if "entropy_coef" in options else None
    want = fa.policy_loss(stats.logprob, old, advantages, mask=labels != -100, entropy=entropy, **common)
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.stats, want.stats)
    for a, b in zip(
        torch.autograd.grad(-3.0 * got.loss, tensors[:3]), torch.autograd.grad(-3.0 * want.loss, tensors[:3])
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "extra", [{}, {"kl_coef": 0.1}, {"entropy_coef": torch.tensor(0.02)}, {"num_items": 11}], ids=str
)
@pytest.mark.parametrize("loss", PRESETS)
def test_every_preset(inputs, loss, extra, budget):
    check(inputs, budget, loss=loss, **extra)


@pytest.mark.parametrize("budget", BUDGETS)
def test_importance_weights_per_sequence(inputs, budget):
    """A chunk that holds as many sequences as tokens must not mistake one for the other."""
    weights = torch.linspace(0.5, 2, len(LENGTHS), dtype=torch.float64)
    for loss in ("ppo", "dr_grpo", "gspo"):
        check(inputs, budget, loss=loss, is_weight=weights, is_mode="truncate", is_max=1.5)


def test_errors_come_before_any_product(inputs, monkeypatch):
    tensors, labels, cu, old, _, adv = inputs
    monkeypatch.setattr("fastalign.rows.walk.logits_of", lambda *a: pytest.fail("multiplied"))
    for change, message in (
        ({"loss": "gspo"}, "advantages has shape"),
        ({"cu_seqlens": None, "loss": "grpo"}, "needs cu_seqlens"),
        ({"kl_coef": 0.1}, "kl_coef needs ref_logprobs"),
        ({"mask": torch.ones(1, dtype=torch.bool)}, "mask has shape"),
        ({"entropy": old}, "with_entropy"),
        ({"clip_hi": 0.1}, "clip_hi"),
        ({"batch_invarient": True}, "batch_invarient"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            fa.linear_policy_loss(tensors[0], tensors[1], labels, old, adv, **{"cu_seqlens": cu} | change)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("direction", ["policy_ref", "ref_policy"])
@pytest.mark.parametrize("budget", [*BUDGETS, "parts"])
def test_kl_loss(inputs, budget, direction, masked):
    tensors = inputs[0]
    hidden, weight, bias, ref_hidden, ref_weight = tensors
    coef = torch.linspace(-1, 1, TOKENS, dtype=torch.float64)
    mask = torch.arange(TOKENS) % 3 > 0 if masked else None
    got = fa.linear_token_kl_loss(
        hidden,
        weight,
        ref_hidden,
        ref_weight,
        coef,
        bias=bias,
        direction=direction,
        mask=mask,
        workspace_bytes=BUDGETS.get(budget, 5000),
    )
    want = fa.token_kl_loss(
        hidden @ weight.t() + bias, ref_hidden @ ref_weight.t(), coef, direction=direction, mask=mask
    )
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.kl, want.kl)
    for a, b in zip(
        torch.autograd.grad(2.0 * got.loss, tensors[:3]), torch.autograd.grad(2.0 * want.loss, tensors[:3])
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_is_scored(rows, frozen):  # G8
    """No rows, or none that counts: a loss of 0 with a graph, and zeros for whatever needs a gradient."""
    hidden, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(7, 4, requires_grad=not frozen)
    labels, nothing = torch.full((rows,), -100), torch.zeros(rows)
    mask = torch.zeros(rows, dtype=torch.bool)
    policy = fa.linear_policy_loss(hidden, weight, labels, nothing, nothing)
    kl = fa.linear_token_kl_loss(
        hidden, weight, torch.randn(rows, 3), torch.randn(7, 3), torch.ones(rows), mask=mask
    )
    pairs = fa.linear_preference_loss(
        hidden, weight, labels, torch.tensor([0, 0, rows], dtype=torch.int32), ref_logprobs=nothing
    )
    logprobs = fa.linear_token_logprobs(hidden, weight, labels).sum()
    for loss in (policy.loss, kl.loss, pairs.loss, logprobs):
        assert loss.item() == 0.0
        wanted = (hidden,) if frozen else (hidden, weight)
        grads = torch.autograd.grad(loss, wanted)
        assert all(g.shape == x.shape and not g.any() for g, x in zip(grads, wanted))
