"""What is kept from call to call depends on the options alone, and on all of them."""

from __future__ import annotations

import pytest
import torch

import fastalign as fa
from fastalign import losses
from fastalign.losses import policy as policy_losses
from fastalign.runtime import memo


def loss(**options):
    lp = torch.tensor([-1.0, -2.0, -0.5])
    return float(fa.preference_loss(lp, lp * 1.5, torch.tensor([0, 1, 3], dtype=torch.int32), **options).loss)


def test_every_option_counts():
    first = [loss(beta=b, loss=name) for b in (0.1, 0.5) for name in ("dpo", "gpo_hinge")]
    again = [loss(beta=b, loss=name) for b in (0.1, 0.5) for name in ("dpo", "gpo_hinge")]
    assert first == again and len(set(first)) == 4
    assert loss(beta=torch.tensor(0.5)) == loss(beta=0.5)  # a tensor is nobody's key
    assert loss(loss=losses.get("dpo").replace(beta=0.5)) == loss(beta=0.5)


def test_equal_values_of_other_types_are_other_options():
    assert loss(beta=1) == loss(beta=1.0)
    with pytest.raises(TypeError, match="beta must be a number"):
        loss(beta=True)


def test_a_refusal_is_not_kept():
    for _ in range(2):
        with pytest.raises(ValueError, match="no option 'bete'"):
            loss(bete=0.1)
        with pytest.raises(ValueError, match="out of range"):
            policy_losses.resolve("ppo", {"dual_clip": 0.5})


def test_the_same_object_comes_back_and_its_parameters_too():
    one, two = (losses.resolve("dpo", {"beta": 0.3})[0] for _ in range(2))
    assert one is two and one.params("mean") is two.params("mean") and one.params("mean") != one.params("sum")
    assert policy_losses.get("gspo").params(True, False) != policy_losses.get("gspo").params(False, True)
    assert one == losses.get("dpo").replace(beta=0.3), "what is kept is no field"


def test_the_memory_is_bounded(monkeypatch):
    calls = []

    @memo.by_options
    def resolve(name, options):
        calls.append(options)
        return len(calls), {}

    monkeypatch.setattr(memo, "_MOST", 3)
    for value in (0.1, 0.2, 0.3, 0.4, 0.1, 0.4):
        resolve("x", {"beta": value})
    assert len(calls) == 5  # 0.4 made room for itself, 0.1 was forgotten, 0.4 was not
