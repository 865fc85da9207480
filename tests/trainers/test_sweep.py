"""A part of benchmarks/adapters/functions_sweep.py, by the same code: every function on a few random batches."""

from __future__ import annotations

import sys

import pytest
import run_all

sys.path.insert(0, str(run_all.ROOT / "benchmarks" / "adapters"))
import functions_cases
import functions_sweep

import fastalign.adapters.openrlhf as ours


def test_functions_on_random_batches():
    found = functions_sweep.sweep(4)
    assert len(found) == 25
    assert not {name: entry["different"] for name, entry in found.items() if entry["equal"] != entry["calls"]}
    assert len(functions_sweep.table(found).splitlines()) == 27


@pytest.mark.parametrize("wrong", [lambda x: x * 1.0001, lambda x: x.bfloat16(), lambda x: x.flatten()])
def test_the_sweep_sees_a_difference(monkeypatch, wrong):
    call = functions_cases.openrlhf_cases(functions_cases.Batch(0))["OpenRLHF ValueLoss"]
    assert functions_sweep.largest_difference(call) <= 1.0
    right = ours.value_loss
    monkeypatch.setattr(ours, "value_loss", lambda *args, **kwargs: wrong(right(*args, **kwargs)))
    assert functions_sweep.largest_difference(call) > 1.0
