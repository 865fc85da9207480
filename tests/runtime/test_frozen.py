"""Presets, outputs and rules travel: pickle, deep copy, hash, asdict, another process."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.multiprocessing

import fastalign as fa
from fastalign import losses
from fastalign.losses import policy as policy_losses
from fastalign.preference.unpaired import UNPAIRED
from fastalign.runtime.frozen import FrozenDict
from fastalign.testing import make_batch

PRESETS = [
    *losses.PRESETS.values(),
    *losses.LISTWISE.values(),
    *policy_losses.PRESETS.values(),
    *UNPAIRED.values(),
]
COPIES = (
    copy.copy,
    copy.deepcopy,
    lambda x: pickle.loads(pickle.dumps(x)),
    lambda x: pickle.loads(bytes(ForkingPickler.dumps(x))),
)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: f"{type(p).__name__}-{p.name}")
def test_presets(preset):
    preset.params()
    for twin in [c(preset) for c in COPIES] + [
        type(preset)(**json.loads(json.dumps(dataclasses.asdict(preset))))
    ]:
        assert twin == preset and hash(twin) == hash(preset) and repr(twin.params()) == repr(preset.params())
    assert len({preset, copy.deepcopy(preset)}) == 1


def test_lists_and_dicts_in_a_preset_become_hashable():
    preset = fa.losses.get("dpo").replace(token_clamp=[-1.0, 1.0])
    assert preset.token_clamp == (-1.0, 1.0) and hash(preset) == hash(
        fa.losses.get("dpo").replace(token_clamp=(-1.0, 1.0))
    )
    custom = type(preset)(options={"b": "beta"})
    assert isinstance(custom.options, FrozenDict) and hash(custom) == hash(
        type(preset)(options={"b": "beta"})
    )
    for change in (
        lambda d: d.update(x=1),
        lambda d: d.__setitem__("x", 1),
        lambda d: d.pop("b"),
        lambda d: d.clear(),
    ):
        with pytest.raises(TypeError, match="cannot be changed"):
            change(custom.options)


def outputs():
    batch = make_batch(4)
    lp, ref, cu, mask = (
        batch.logprobs.requires_grad_(),
        batch.ref_logprobs,
        batch.packed.cu_seqlens,
        batch.packed.mask,
    )
    logits = torch.randn(3, 5, requires_grad=True)
    losses = {
        "preference": fa.preference_loss(lp, ref, cu, mask=mask),
        "mixture": fa.preference_loss(lp, ref, cu, mask=mask, loss=[("dpo", 1.0), ("ipo", 0.5)]),
        "unpaired": fa.unpaired_loss(lp, ref, cu, torch.arange(8) % 2 == 0, mask=mask, baseline=0.0),
        "listwise": fa.listwise_loss(lp, ref, cu, torch.tensor([0, 4, 8]), torch.arange(8.0), mask=mask),
        "policy": fa.policy_loss(lp, ref, ref, mask=mask, ref_logprobs=ref),
        "value": fa.value_loss(lp, ref, ref, mask=mask),
        "kl_loss": fa.token_kl_loss(logits, logits.detach() * 0.5, torch.ones(())),
    }
    metrics = {f"metrics of {name}": out.metrics() for name, out in losses.items() if hasattr(out, "metrics")}
    stats = fa.token_stats(logits, torch.zeros(3, dtype=torch.long), outputs=("logprob", "entropy"))
    return {
        **losses,
        **metrics,
        "stats": stats,
        "gae": fa.gae(ref, ref, cu),
        "batch": batch._replace(logprobs=ref),
        "packed": batch.packed,
    }


@pytest.mark.parametrize("name", outputs())
def test_outputs(name):
    out = outputs()[name]
    for copied in COPIES[1:]:
        twin = copied(out)
        assert type(twin) is type(out) and len(twin) == len(out)
        if hasattr(out, "loss"):
            assert torch.equal(twin.loss, out.loss) and not twin.loss.requires_grad
        if hasattr(out, "metrics"):
            assert repr({k: float(v) for k, v in twin.metrics().items()}) == repr(
                {k: float(v) for k, v in out.metrics().items()}
            )
    if isinstance(out, tuple):
        assert isinstance(hash(out), int) and list(out._asdict()) == list(out._fields)
        assert copy.copy(out) is out or not hasattr(out, "loss")  # a shallow copy keeps the graph


@pytest.mark.parametrize("rule", [fa.BetaDPO(seed=1), fa.AlphaDPO(), fa.BCODelta()], ids=lambda r: r.rule)
def test_rules_travel_with_their_memory(rule):
    batch = make_batch(4)

    def call(r):
        return float(
            fa.preference_loss(
                batch.logprobs,
                batch.ref_logprobs,
                batch.packed.cu_seqlens,
                mask=batch.packed.mask,
                loss=rule.rule,
                state=r,
            ).loss
        )

    call(rule)
    twins = [c(rule) for c in COPIES[1:]]
    want = call(rule)
    assert [call(t) for t in twins] == [want] * len(twins)
    assert twins[0].memory is not rule.memory and isinstance(hash(rule), int)


def test_a_rule_with_a_process_group_says_so():
    group = object()
    rule = fa.AlphaDPO()
    rule.group = group
    assert copy.deepcopy(rule).group is group
    with pytest.raises(
        TypeError, match="AlphaDPO holds a process group, which lives in this process: send its state_dict"
    ):
        pickle.dumps(rule)


def test_controllers_travel():
    controller = fa.AdaptiveKLController()
    controller.update(torch.tensor(3.0), torch.tensor(4.0))
    for copied in COPIES:
        assert float(copied(controller).value) == float(controller.value)
