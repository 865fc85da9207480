"""Preference losses from hidden states: the composition of `linear_token_stats` and `preference_loss`, value
and gradients, for every preset."""

from __future__ import annotations

import pytest
import torch

import fastalign as fa
from fastalign.losses.tables import PRESETS
from fastalign.rows import known
from fastalign.testing import assert_close

LENGTHS = (5, 9, 0, 7, 180, 3, 12, 12)  # a response longer than what fits at a time, an empty one
WIDTH, VOCAB = 8, 37
TOKENS = sum(LENGTHS)
BUDGETS = {"all": None, "chunks": 128 * VOCAB * 8 * 2}
RULES = {"beta_dpo": fa.BetaDPO, "alpha_dpo": fa.AlphaDPO, "bco": fa.BCODelta}


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(VOCAB, (TOKENS,), generator=g)
    labels[torch.rand(TOKENS, generator=g) < 0.3] = -100
    draw = [
        torch.randn(*s, generator=g, dtype=torch.float64)
        for s in ((TOKENS, WIDTH), (VOCAB, WIDTH), (VOCAB,), (TOKENS, 5), (VOCAB, 5))
    ]
    draw[0][labels == -100] = float("nan")
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return [x.requires_grad_(i < 3) for i, x in enumerate(draw)], labels, cu


def composed(inputs, loss, **options):
    (hidden, weight, bias, ref_hidden, ref_weight), labels, cu = inputs
    logits = torch.where((labels != -100).unsqueeze(-1), hidden, 0.0) @ weight.t() + bias
    outputs = ("logprob", "ref_logprob", "kl_ref_policy")
    stats = fa.token_stats(logits, labels, ref_logits=ref_hidden @ ref_weight.t(), outputs=outputs)
    return fa.preference_loss(
        stats.logprob,
        stats.ref_logprob,
        cu,
        mask=labels != -100,
        kl_ref_policy=stats.kl_ref_policy,
        loss=loss,
        **options,
    )


def check(inputs, loss, budget, **options):
    tensors, labels, cu = inputs
    hidden, weight, bias, ref_hidden, ref_weight = tensors
    rules = (
        [RULES[loss.rule]() for _ in range(2)] if isinstance(loss, fa.Preset) and loss.rule else [None, None]
    )
    got = fa.linear_preference_loss(
        hidden,
        weight,
        labels,
        cu,
        bias=bias,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        loss=loss,
        workspace_bytes=BUDGETS[budget],
        state=rules[0],
        **options,
    )
    want = composed(inputs, loss, state=rules[1], **options)
    torch.testing.assert_close(got.table, want.table)
    torch.testing.assert_close(got.sums, want.sums)
    upstream = torch.full_like(want.loss, -3.0)
    torch.testing.assert_close(got.loss, want.loss)
    for a, b in zip(
        torch.autograd.grad(got.loss, tensors[:3], upstream),
        torch.autograd.grad(want.loss, tensors[:3], upstream),
    ):
        torch.testing.assert_close(a, torch.nan_to_num(b))


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("loss", PRESETS.values(), ids=PRESETS.keys())
def test_every_preset(inputs, loss, budget):
    generator = torch.Generator().manual_seed(1)
    per_pair = {name: torch.rand(4, generator=generator, dtype=torch.float64) for name in loss.requires}
    if loss.needs_soft_labels:
        per_pair["soft_labels"] = torch.rand(4, generator=generator, dtype=torch.float64)
    check(inputs, loss, budget, **per_pair)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)},
        {"valid": torch.tensor([True, False, True, True])},
        {"weights": torch.linspace(-1, 2, TOKENS, dtype=torch.float64)},
        {"num_items": 7},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"pairs": torch.tensor([[4, 1], [0, 3], [7, 6]])},
        {"loss": "rpo", "reduction": "sum"},
        {"loss": "rpo", "num_sft_tokens": 50.0, "num_items": torch.tensor(3)},
        {"loss": [("dpo", 1.0), ("sft", 0.5)]},
        {"loss": fa.losses.get("dpo").replace(nonfinite="drop")},
    ],
    ids=str,
)
def test_options(inputs, options):
    check(inputs, options.pop("loss", "dpo"), "chunks", **options)


def test_pairs_are_multiplied_three_times(inputs, monkeypatch):
    """The gradient is made in the forward pass, of every pair that fits the workspace; a longer one is
    multiplied again."""
    (hidden, weight, bias, *_), labels, cu = inputs
    seen = []
    for name in ("push_logits", "pull"):
        real = getattr(known.walk, name)
        monkeypatch.setattr(
            known.walk,
            name,
            lambda call, block, *a, _real=real, _name=name: (
                seen.append((_name, block.spec.shape[0])) or _real(call, block, *a)
            ),
        )
    out = fa.linear_preference_loss(
        hidden,
        weight,
        labels,
        cu,
        bias=bias,
        ref_logprobs=torch.zeros(TOKENS),
        workspace_bytes=128 * VOCAB * 8,
    )
    scored = (labels != -100).split(LENGTHS)
    counts = [int(sum(s.sum() for s in scored[i : i + 2])) for i in range(0, len(LENGTHS), 2)]
    assert counts[2] > 128 or len([s for s in seen if s[0] == "pull"]) == 0
    assert sum(n for name, n in seen if name == "push_logits") == sum(counts)
    monkeypatch.setattr(known, "Workspace", lambda *a: pytest.fail("backward multiplies"))
    out.loss.backward()


def test_differentiated_once(inputs):
    (hidden, weight, *_), labels, cu = inputs
    out = fa.linear_preference_loss(hidden, weight, labels, cu, ref_logprobs=torch.zeros(TOKENS))
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        out.loss.backward()


def test_without_gradients(inputs):
    (hidden, weight, bias, ref_hidden, ref_weight), labels, cu = inputs
    with torch.no_grad():
        out = fa.linear_preference_loss(
            hidden, weight, labels, cu, bias=bias, ref_hidden=ref_hidden, ref_weight=ref_weight
        )
    assert_close(out.loss, composed(inputs, "dpo").loss)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_logprobs": None}, "needs a reference: either ref_logprobs or ref_hidden"),
        ({"loss": "tdpo2"}, "needs ref_hidden"),
        ({"loss": "nothing"}, "unknown"),
        ({"head_precision": "fp8"}, "head_precision='fp8' is unknown; legal: fp32, bf16, tf32"),
        ({"workspace_bytes": 0}, "workspace_bytes=0"),
        ({"cu_seqlens": torch.tensor([0, 5, 9], dtype=torch.int32)}, "end at the number of tokens"),
        ({"cu_seqlens": torch.tensor([0, TOKENS], dtype=torch.int32)}, "pairs is required"),
        ({"hidden": torch.randn(TOKENS, 3)}, "hidden has shape"),
        ({"bias": torch.randn(3)}, "bias has shape"),
        ({"labels": torch.full((TOKENS,), VOCAB)}, "outside"),
        ({"mask": torch.ones(1, dtype=torch.bool)}, "mask has shape"),
        ({"ref_logprobs": torch.zeros(3), "reduction": "none"}, "ref_logprobs has shape"),
        ({"ref_logprobs": torch.zeros(3), "pairs": torch.tensor([[0, 1]])}, "ref_logprobs has shape"),
        ({"wrong": 1}, "wrong"),
    ],
)
def test_errors_come_before_any_product(inputs, change, message, monkeypatch):
    monkeypatch.setattr("fastalign.rows.walk.logits_of", lambda *a: pytest.fail("multiplied"))
    (hidden, weight, *_), labels, cu = inputs
    arguments = {
        "hidden": hidden,
        "weight": weight,
        "labels": labels,
        "cu_seqlens": cu,
        "ref_logprobs": torch.zeros(TOKENS),
    } | change
    with pytest.raises((ValueError, TypeError, IndexError), match=message):
        fa.linear_preference_loss(**arguments)
