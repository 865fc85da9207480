"""Listwise losses: what binds them to the pair losses and to each other, gradients of the definition,
options, metrics, errors."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import fastalign as fa
from fastalign import losses
from fastalign.losses.list import LIST_FIELDS, ListPreset
from fastalign.ops.listwise.params import LIST_SCALAR_COUNT, ListParams
from fastalign.runtime import ffi
from fastalign.testing import make_batch

PAIRS = 4
OFFSETS = torch.arange(0, 2 * PAIRS + 1, 2)


def pairwise(name, batch, **options):
    lp = batch.logprobs.clone().requires_grad_()
    out = fa.preference_loss(
        lp, batch.ref_logprobs, batch.packed.cu_seqlens, mask=batch.packed.mask, loss=name, **options
    )
    return out, torch.autograd.grad(out.loss, lp)[0]


def listwise(name, batch, scores, offsets=OFFSETS, **options):
    lp = batch.logprobs.clone().requires_grad_()
    packed = batch.packed
    out = fa.listwise_loss(
        lp, batch.ref_logprobs, packed.cu_seqlens, offsets, scores, mask=packed.mask, loss=name, **options
    )
    return out, torch.autograd.grad(out.loss, lp)[0]


BETTER = torch.tensor([1.0, 0.0] * PAIRS)
E = 0.01
# (list loss, its options, scores, the same as a pair loss, its options, factor): lists of two against the
# pairs of the same batch.
IDENTITIES = [
    ("plackett_luce", {"beta": 0.3}, BETTER, "dpo", {"beta": 0.3}, 1.0),
    ("infonca", {"beta": 0.3, "alpha": 1e-4}, BETTER, "dpo", {"beta": 0.3}, 1.0),
    ("nca", {"alpha": 1e-4}, BETTER, "nca_pair", {}, 1.0),
    ("exo_list", {"alpha": 1 / math.log((1 - E) / E)}, BETTER, "exo_pair", {"label_smoothing": E}, 1.0),
    (
        "infonca",
        {"beta": 0.1, "alpha": 1 / math.log(0.7 / 0.3)},
        BETTER,
        "cdpo",
        {"label_smoothing": 0.3},
        1.0,
    ),
    ("lipo", {}, 2 * BETTER, "dpo", {"beta": 0.05}, 3 * (1 / math.log(2) - 1 / math.log(3))),
    ("rrhf", {}, BETTER, "rrhf_pair", {"sft_weight": 1.0, "sft_norm": "seq_mean"}, 1.0),
    # T = 1 for the pair; softmax over the own and the other's mean log-prob
    (
        "pro",
        {"sft_weight": 0.3},
        BETTER,
        "simpo",
        {"beta": 1.0, "gamma": 0.0, "sft_weight": 0.3, "sft_norm": "seq_sum"},
        1.0,
    ),
    ("kwise_rm", {}, BETTER, "bt_rm", {}, 1.0),
]


@pytest.mark.parametrize("name,options,scores,pair,pair_options,factor", IDENTITIES)
def test_lists_of_two_are_pairs(name, options, scores, pair, pair_options, factor):
    for seed in range(3):
        batch = make_batch(PAIRS, dtype=torch.float64, seed=seed)
        (got, g), (want, want_g) = (
            listwise(name, batch, scores, **options),
            pairwise(pair, batch, **pair_options),
        )
        assert abs(float(got.loss - factor * want.loss)) < 1e-9 * max(1.0, abs(float(want.loss)))
        assert float((g - factor * want_g).abs().max()) < 1e-9
        mine, theirs = got.metrics(), want.metrics()
        for key in (
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "logps/rejected",
        ):
            if factor == 1.0:
                assert abs(float(mine[key]) - float(theirs[key])) < 1e-9, key
        assert float(mine["rewards/top1_accuracies"]) == float(mine["rewards/accuracies"])


def test_one_list_is_the_mean_of_its_pairs():
    """kwise_rm over a list equals bt_rm over all its pairs; infonca over one-hot targets is the first step of
    plackett_luce."""
    rewards = torch.randn(5, dtype=torch.float64)
    scores = torch.tensor([3.0, 1.0, 2.0, 1.0, 0.0])
    index = [(i, j) for i in range(5) for j in range(5) if scores[i] > scores[j]]
    pairs = fa.reward_loss(*(rewards[[p[k] for p in index]] for k in (0, 1))).loss
    assert abs(float(fa.kwise_reward_loss(rewards, torch.tensor([0, 5]), scores).loss - pairs)) < 1e-12
    zero = torch.zeros(5, dtype=torch.float64)
    totals = rewards * 30
    order = scores.argsort(descending=True, stable=True)
    steps = sum(
        fa.listwise_loss_from_sums(
            totals[order[k:]],
            zero[k:],
            torch.tensor([0, 5 - k]),
            torch.arange(5.0 - k, 0, -1),
            loss="infonca",
            alpha=1e-4,
            beta=0.1,
        ).loss
        for k in range(5)
    )
    whole = fa.listwise_loss_from_sums(
        totals, zero, torch.tensor([0, 5]), scores, loss="plackett_luce", beta=0.1
    ).loss
    assert abs(float(steps - whole)) < 1e-10


@pytest.mark.parametrize("name", losses.LISTWISE)
def test_gradient_of_the_definition(name):
    """Finite differences of the reference in fp64, away from the kinks of rrhf and the ranks of lipo."""
    batch = make_batch(4, dtype=torch.float64, max_len=4, seed=3)
    packed = batch.packed
    scores, offsets = (
        torch.tensor([2.0, 0.5, 1.0, 0.0, 1.0, 3.0, 3.0, 0.3], dtype=torch.float64),
        torch.tensor([0, 4, 7, 8]),
    )

    def loss(lp):
        return fa.listwise_loss(
            lp,
            batch.ref_logprobs,
            packed.cu_seqlens,
            offsets,
            scores,
            mask=packed.mask,
            loss=name,
            reduction="none",
        ).loss

    with fa.use_backend("reference"):
        assert torch.autograd.gradcheck(loss, batch.logprobs.clone().requires_grad_())


def test_params_have_the_order_of_the_header():
    names = ffi._extension.list_scalar_names() + ffi._extension.list_switch_names()
    assert tuple(names) == ListParams._fields
    assert ListParams._fields[LIST_SCALAR_COUNT] == ffi._extension.list_switch_names()[0]


def test_every_field_reaches_the_kernel():
    """Changing any one field of a preset changes what the kernels get (or which log-ratios are summed): no
    field is silently ignored."""
    other = {
        "beta": 0.7, "length_norm": 1.0, "kind": "pro", "link": "hinge", "target": 2.0, "pair_gain": "lambda", "pair_mean": True,
        "reward_temperature": 2.0, "list_weight": 2.0, "sft_weight": 2.0, "sft_norm": "seq_sum", "sft_power": 1.0, "nonfinite": "drop",
    }  # fmt: skip
    assert set(other) | {"reference"} == set(LIST_FIELDS)
    for field, value in other.items():
        assert dataclasses.replace(ListPreset(), **{field: value}).params() != ListPreset().params(), field


def test_metrics_of_a_list():
    """Two lists, rewards given: counted by hand."""
    rewards = torch.tensor([5.0, 1.0, 3.0, 0.0, 2.0])
    scores = torch.tensor(
        [2.0, 3.0, 1.0, 1.0, 1.0]
    )  # best: 1 (reward 1), worst: 2; the second list has no pair
    out = fa.kwise_reward_loss(rewards, torch.tensor([0, 3, 5]), scores)
    assert out.best.tolist() == [1, 3] and out.worst.tolist() == [2, 4]
    metrics = {k: (float(m.sum), float(m.count)) for k, m in out.metrics().items()}
    assert metrics["rewards/accuracies"] == (1.0, 3.0)  # 1 > 0: no, 1 > 2: no, 0 > 2: yes
    assert metrics["rewards/margins"] == ((1 - 5) + (1 - 3) + (5 - 3), 3.0)
    assert metrics["rewards/top1_accuracies"] == (0.0, 1.0)
    assert metrics["rewards/chosen"] == (1.0, 2.0) and metrics["rewards/rejected"] == (5.0, 2.0)
    assert metrics["n_empty"] == (0.0, 2.0) and not any(m.sum.requires_grad for m in out.metrics().values())


def test_constants_of_the_loss():
    """The reference, the scores and beta pass no gradient; data that a loss does not need is not read."""
    batch = make_batch(PAIRS)
    ref, scores, beta = (
        batch.ref_logprobs.clone().requires_grad_(),
        BETTER.clone().requires_grad_(),
        torch.tensor(0.2, requires_grad=True),
    )
    lp = batch.logprobs.clone().requires_grad_()
    args = (batch.packed.cu_seqlens, OFFSETS, scores)
    fa.listwise_loss(lp, ref, *args, mask=batch.packed.mask, loss="nca", beta=beta).loss.backward()
    assert lp.grad is not None and ref.grad is None and scores.grad is None and beta.grad is None
    a, b = (
        fa.listwise_loss(lp, r, *args, mask=batch.packed.mask, loss="rrhf").loss
        for r in (None, torch.full_like(ref, math.nan))
    )
    assert torch.equal(a, b)


def test_input_types():
    """bf16 log-probs, integer scores, int32 offsets, views: widened, copied, the same numbers."""
    batch = make_batch(PAIRS)
    wide = torch.stack([batch.logprobs, torch.zeros_like(batch.logprobs)], -1)[:, 0]
    scores = torch.tensor([3, 1] * PAIRS)
    want = listwise("plackett_luce", batch, scores.float())
    for b, s, o in (
        (batch._replace(logprobs=wide), scores, OFFSETS.int()),
        (batch, scores.double(), OFFSETS),
    ):
        assert torch.equal(listwise("plackett_luce", b, s, o)[1], want[1])
    lp = batch.logprobs.bfloat16().requires_grad_()
    out = fa.listwise_loss(lp, batch.ref_logprobs.bfloat16(), batch.packed.cu_seqlens, OFFSETS, scores)
    assert out.loss.dtype == torch.float32 and torch.autograd.grad(out.loss, lp)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "loss,options,words",
    [
        ("rhf", {}, "loss='rhf' is unknown here; legal for lists: plackett_luce, rrhf"),
        ("nca", {"tau": 0.1}, "loss 'nca' has no option 'tau'; legal: alpha, beta"),
        ("nca", {"alpha": 0.0}, "reward_temperature=0.0 is out of range"),
        ("nca", {"alpha": 1.0, "reward_temperature": 1.0}, "sets reward_temperature a second time"),
        ("nca", {"link": "hinge"}, "'link' has no effect on loss 'nca'"),
        ("lipo", {"target": 1.0}, "'target' has no effect"),
        ("rrhf", {"link": "exo"}, "link='exo' is unknown"),
        ("plackett_luce", {"sft_norm": "seq_sum"}, "without sft_weight"),
        ("plackett_luce", {"list_weight": 0.0}, "no term"),
        ("plackett_luce", {"beta": -1.0}, "beta"),
        ("plackett_luce", {"beta": torch.ones(3)}, "beta has shape"),
        ("plackett_luce", {"reduction": "average"}, "reduction='average' is unknown"),
        ("plackett_luce", {"num_items": -1}, "num_items"),
    ],
)
def test_bad_options_name_themselves(loss, options, words):
    with pytest.raises(ValueError, match=words):
        listwise(loss, make_batch(PAIRS), BETTER, **options)


def test_missing_inputs_name_themselves():
    batch = make_batch(PAIRS)
    lp, rp, cu, mask = batch.logprobs, batch.ref_logprobs, batch.packed.cu_seqlens, batch.packed.mask
    for words, call in (
        ("mask is required", lambda: fa.listwise_loss(lp, None, cu, OFFSETS, BETTER, loss="rrhf")),
        ("needs ref_logprobs", lambda: fa.listwise_loss(lp, None, cu, OFFSETS, BETTER, mask=mask)),
        ("scores has shape", lambda: fa.listwise_loss(lp, rp, cu, OFFSETS, BETTER[:-1])),
        (
            "list_offsets must be a 1-D integer tensor",
            lambda: fa.listwise_loss(lp, rp, cu, OFFSETS.view(1, -1), BETTER),
        ),
        ("needs lengths", lambda: fa.listwise_loss_from_sums(lp[:8], None, OFFSETS, BETTER, loss="pro")),
        ("needs ref_totals", lambda: fa.listwise_loss_from_sums(lp[:8], None, OFFSETS, BETTER)),
        ("ranks lists: fastalign.listwise_loss", lambda: fa.preference_loss(lp, rp, cu, loss="rrhf")),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="list_offsets must be int32"):
        fa.listwise_loss(lp, rp, cu, OFFSETS.float(), BETTER)
    with pytest.raises(TypeError, match="'alpha' must be a number; tensors are legal for beta"):
        fa.listwise_loss(lp, rp, cu, OFFSETS, BETTER, loss="nca", alpha=torch.tensor(1.0))
    with pytest.raises(TypeError, match="must be a name or a ListPreset, got Preset"):
        fa.listwise_loss(lp, rp, cu, OFFSETS, BETTER, loss=losses.get("dpo"))
    with pytest.raises(TypeError, match="pass tensors to the loss"):
        losses.get_listwise("nca").replace(beta=torch.ones(2))


def test_defaults_are_the_published_ones():
    for name, fields in {
        "rrhf": {"length_norm": 1.0, "reference": False, "link": "hinge", "target": 0.0, "sft_weight": 1.0, "sft_norm": "seq_mean"},
        "pro": {"length_norm": 1.0, "reference": False, "sft_weight": 0.05, "sft_norm": "seq_sum", "sft_power": 2.0},
        "lipo": {"beta": 0.05, "pair_gain": "lambda", "pair_mean": False}, "infonca": {"beta": 0.01}, "nca": {"beta": 0.01},
        "plackett_luce": {"beta": 0.1}, "kwise_rm": {"pair_mean": True, "beta": 1.0},
    }.items():  # fmt: skip
        for field, value in fields.items():
            assert getattr(losses.get_listwise(name), field) == value, (name, field)
