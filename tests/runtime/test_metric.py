"""Metrics of a batch are those of its parts, merged: for every metric of every loss, over packs and over
ranks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

import fastalign as fa
from fastalign import losses
from fastalign.losses import policy as policy_losses
from fastalign.losses.pair import TENSOR_ONLY
from fastalign.ops.columns import AGGREGATIONS
from fastalign.runtime.metric import (
    Deviation,
    ExplainedVariance,
    Largest,
    Metric,
    Smallest,
    Total,
    Variance,
    as_metric,
    extremes_of,
    merge_metrics,
    variance_of,
)
from fastalign.testing import make_batch
from fastalign.train.metrics import MetricSums

LENGTHS = (7, 1, 0, 18, 4, 3)
SPLITS = ([[0, 1], [2], [3, 4, 5]], [[5, 3], [0, 1, 2, 4]], [[0], [1], [2], [3], [4], [5]])


def close(parts, whole, what):
    """Merged, and added up as the trainer adds them; a name that nothing was seen of is absent there."""
    merged, sums = merge_metrics(*parts), MetricSums()
    for part in parts:
        sums.add(part)
    means = sums.means()
    assert set(merged) == set(whole), what
    for name, metric in whole.items():
        got, want = float(merged[name]), float(metric)
        same = math.isnan(got) and math.isnan(want) or got == pytest.approx(want, rel=2e-4, abs=2e-5)
        assert same and type(merged[name]) is type(metric), (what, name, got, want)
        assert math.isnan(want) or means[name] == got, (what, name)


def packed(seed=0):
    """Tokens of sequences whose ratios, values and returns have means of their own, so that a mean of
    variances is not the variance."""
    draw = torch.Generator().manual_seed(seed)
    n = sum(LENGTHS)
    noise, of = (
        torch.randn(6, n, generator=draw),
        torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)),
    )
    lp = -noise[0].abs() - 0.1
    return {
        "lp": lp, "old": lp - 0.3 * noise[1] - 0.4 * (of % 3 - 1), "adv": noise[2], "ref": lp + 0.2 * noise[3], "entropy": noise[4].abs(),
        "weight": (0.5 * noise[5]).exp(), "returns": 5.0 * (of % 4) + noise[3], "values": 2.0 * of + noise[2], "per": noise[2, : len(LENGTHS)],
        "mask": noise[5] > -1.2,
    }  # fmt: skip


def piece(x, sequences):
    bounds = [0, *itertools.accumulate(LENGTHS)]
    rows = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in sequences])
    cu = torch.tensor([0, *itertools.accumulate(LENGTHS[i] for i in sequences)], dtype=torch.int32)
    return {name: value[sequences] if name == "per" else value[rows] for name, value in x.items()}, cu


def policy(x, sequences, loss, **options):
    x, cu = piece(x, sequences)
    per_sequence = policy_losses.get(loss).needs_sequence_values
    if "norm" in options.get("aggregation", policy_losses.get(loss).aggregation):
        options["norm_length"] = 20.0
    weight = (
        {}
        if loss == "vespo" or per_sequence
        else {"is_weight": x["weight"], "is_mode": "truncate", "is_max": 1.2}
    )
    return fa.policy_loss(x["lp"], x["old"], x["per"] if per_sequence else x["adv"], loss=loss, cu_seqlens=cu, mask=x["mask"],
                          ref_logprobs=x["ref"], kl_coef=0.1, entropy=x["entropy"], **weight, **options).metrics()  # fmt: skip


@pytest.mark.parametrize("loss", policy_losses.PRESETS)
def test_policy_metrics(backend, loss):
    x = packed()
    for split in SPLITS:
        close([policy(x, part, loss) for part in split], policy(x, list(range(6)), loss), loss)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_policy_and_value_metrics_of_every_aggregation(backend, aggregation):
    x = packed(1)

    def value(sequences):
        y, cu = piece(x, sequences)
        norm = {"norm_length": 20.0} if aggregation.endswith("norm") else {}
        return fa.value_loss(y["values"], y["values"] - 0.3, y["returns"], cu_seqlens=cu, mask=y["mask"], aggregation=aggregation,
                             **norm).metrics()  # fmt: skip

    for split in SPLITS:
        close([policy(x, part, "ppo", aggregation=aggregation) for part in split], policy(x, list(range(6)), "ppo", aggregation=aggregation),
              aggregation)  # fmt: skip
        close([value(part) for part in split], value(list(range(6))), aggregation)


def test_variances_are_those_of_all_tokens(backend):
    x = packed()
    keep, whole = x["mask"], [policy(x, [i], "ppo") for i in range(6)]
    ratio = (x["lp"] - x["old"]).exp()[keep].double()
    merged = merge_metrics(*whole)
    assert float(merged["val/ratio_var"]) == pytest.approx(float(ratio.var(unbiased=False)), rel=1e-4)
    assert float(merged["val/ratio_var"].mean) == pytest.approx(float(ratio.mean()), rel=1e-5)


@pytest.mark.parametrize("name", [p.name for p in losses.available() if p.rule is None])
def test_preference_metrics(backend, name):
    batch, preset = make_batch(6), losses.get(name)
    numbers = torch.rand(6, generator=torch.Generator().manual_seed(3))
    needs = [*preset.requires, *(["soft_labels"] if preset.needs_soft_labels else [])]
    assert set(needs) <= {*TENSOR_ONLY, "target"}
    cu = batch.packed.cu_seqlens

    def metrics(pairs):
        chosen = [(2 * i, 2 * i + 1) for i in pairs]
        options = dict.fromkeys(needs, numbers[pairs]) | (
            {"kl_ref_policy": batch.kl_ref_policy} if preset.needs_kl else {}
        )
        return fa.preference_loss(batch.logprobs, batch.ref_logprobs, cu, loss=preset, pairs=torch.tensor(chosen, dtype=torch.int32),
                                  mask=batch.packed.mask, **options).metrics()  # fmt: skip

    for split in ([[0, 1, 2], [3], [4, 5]], [[5, 0], [1, 2, 3, 4]]):
        close([metrics(part) for part in split], metrics(list(range(6))), name)


@pytest.mark.parametrize("name", losses.LISTWISE)
def test_listwise_metrics(backend, name):
    draw = torch.Generator().manual_seed(0)
    sizes, lengths = (3, 1, 4, 2), (4, 2, 3, 1, 5, 2, 2, 3, 1, 6)
    lp, ref = -torch.rand(2, sum(lengths), generator=draw) - 0.1
    scores = torch.tensor([0.3, 0.1, 0.9, 0.5, 0.2, 0.2, 0.8, 0.1, 0.7, 0.7])
    starts, first = [0, *itertools.accumulate(lengths)], [0, *itertools.accumulate(sizes)]

    def metrics(lists):
        sequences = [i for part in lists for i in range(first[part], first[part + 1])]
        rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in sequences])
        cu = torch.tensor([0, *itertools.accumulate(lengths[i] for i in sequences)], dtype=torch.int32)
        offsets = torch.tensor([0, *itertools.accumulate(sizes[i] for i in lists)], dtype=torch.int32)
        return fa.listwise_loss(
            lp[rows], ref[rows], cu, offsets, scores[sequences], loss=name, mask=rows >= 0
        ).metrics()

    for split in ([[0], [1, 2], [3]], [[3, 1], [0, 2]]):
        close([metrics(part) for part in split], metrics([0, 1, 2, 3]), name)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired", "bco", "dro"])
def test_unpaired_metrics(backend, name):
    x, good = packed(), torch.tensor([True, False, True, True, False, False])

    def metrics(sequences):
        y, cu = piece(x, sequences)
        needs = (
            {"rewards": y["per"], "values": y["per"] * 0.5}
            if name == "dro"
            else {"baseline": 0.2}
            if name in ("kto", "bco")
            else {}
        )
        return fa.unpaired_loss(
            y["lp"], y["ref"], cu, good[sequences], loss=name, mask=y["mask"], **needs
        ).metrics()

    for split in SPLITS:
        close([metrics(part) for part in split], metrics(list(range(6))), name)


def test_forms():
    x = torch.tensor([3.0, -1.0, 7.0, 7.0, 0.5]) + 1e4
    parts = [variance_of(part) for part in (x[:2], x[2:2], x[2:])]
    assert float(parts[1].count) == 0 and math.isnan(float(parts[1]))

    def merged(form):
        return float(merge_metrics(*({"x": form(part)} for part in parts))["x"])

    assert merged(lambda v: v) == pytest.approx(float(x.double().var(unbiased=False)), rel=1e-9)
    assert merged(lambda v: Deviation(*v)) == pytest.approx(float(x.double().std()), rel=1e-9)
    targets, errors = torch.randn(2, 9) * torch.tensor([[3.0], [1.0]]) + 100.0
    cut = [
        ExplainedVariance.of(variance_of(targets[s]), variance_of(errors[s]))
        for s in (slice(0, 4), slice(4, 4), slice(4, 9))
    ]
    want = 1 - float(errors.double().var(unbiased=False) / targets.double().var(unbiased=False))
    assert float(merge_metrics(*({"x": part} for part in cut))["x"]) == pytest.approx(want, rel=1e-9)
    assert math.isnan(float(ExplainedVariance.of(variance_of(torch.full((7,), 0.1)), variance_of(targets))))
    low, high = zip(*(extremes_of(part) for part in (x[:2], x[2:2], x[2:])))
    found = merge_metrics(*({"low": a, "high": b} for a, b in zip(low, high)))
    assert (float(found["low"]), float(found["high"])) == (9999.0, 10007.0)
    assert math.isnan(
        float(merge_metrics({"x": Largest(*map(torch.tensor, (math.nan, 1.0)))}, {"x": high[0]})["x"])
    )
    assert float(merge_metrics({"x": (3, 4)}, {"x": Metric(*map(torch.tensor, (1.0, 4.0)))})["x"]) == 0.5
    assert float(merge_metrics({"x": Total(torch.tensor(3), 9)}, {"x": as_metric(Total(2, 1))})["x"]) == 5.0
    with pytest.raises(TypeError, match="'x' is a Total in one part and a Metric in another"):
        merge_metrics({"x": Total(1, 1)}, {"x": (1, 1)})


def test_what_nothing_was_seen_of_is_left_out():
    sums = MetricSums()
    sums.add(
        {
            "mean": (0, 0),
            "var": Variance(0, 0, 0),
            "low": Smallest(math.inf, 0),
            "number": Total(0, 0),
            "seen": (1, 2),
        }
    )
    assert sums.means() == {"number": 0.0, "seen": 0.5}


def _worker(rank):
    x = packed()
    with fa.use_backend("reference"):
        own = [policy(x, part, "ppo") for part in ([[0, 1], [2]], [[3], [4, 5]])[rank]]
        extremes = dict(zip(("low", "high"), extremes_of(x["lp"][:3] if rank else x["lp"][3:3])))
        found = merge_metrics(*own, extremes, group=dist.group.WORLD)
    return {name: (type(metric).__name__, float(metric)) for name, metric in found.items()}


def test_over_ranks():
    results = on_ranks(2, _worker)
    x = packed()
    with fa.use_backend("reference"):
        whole = policy(x, list(range(6)), "ppo")
    assert results[0] == results[1]
    assert results[0]["low"] == ("Smallest", float(x["lp"][:3].min())) and results[0]["high"] == (
        "Largest",
        float(x["lp"][:3].max()),
    )
    for name, metric in whole.items():
        assert results[0][name] == (
            type(metric).__name__,
            pytest.approx(float(metric), rel=1e-4, abs=1e-5),
        ), name
