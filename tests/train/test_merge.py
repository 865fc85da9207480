"""Merging weights: linear and TIES on numbers that can be checked by eye."""

import pytest
import torch

from fastalign.train import UserError, merge_weights

BASE = {"w": torch.tensor([1.0, 1.0, 1.0, 1.0]), "steps": torch.tensor(3)}
ONE = {"w": torch.tensor([3.0, 0.0, 1.5, 1.0]), "steps": torch.tensor(9)}  # differences 2, -1, 0.5, 0
OTHER = {"w": torch.tensor([2.0, 3.0, 1.1, 1.0]), "steps": torch.tensor(9)}  # differences 1, 2, 0.1, 0


def test_linear():
    assert merge_weights(BASE, [ONE, OTHER])["w"].tolist() == pytest.approx([2.5, 1.5, 1.3, 1.0])
    merged = merge_weights(BASE, [ONE, OTHER], weights=[1.0, 0.0])
    assert torch.equal(merged["w"], ONE["w"]) and merged["steps"] == 3


def test_ties_keeps_the_largest_and_the_sign_that_wins():
    """Half of each: (2, -1, 0, 0) and (1, 2, 0, 0). Signs of the sums: +, +. Means of those that agree: 1.5
    and 2."""
    assert merge_weights(BASE, [ONE, OTHER], method="ties", density=0.5)["w"].tolist() == [2.5, 3.0, 1.0, 1.0]


def test_the_start_keeps_its_dtype():
    halves = [
        {name: value.bfloat16() if value.is_floating_point() else value for name, value in model.items()}
        for model in (BASE, ONE)
    ]
    assert merge_weights(halves[0], halves[1:])["w"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "tuned, options, words",
    [
        ([ONE], {"method": "slerp"}, "legal: linear, ties"),
        ([], {}, "0 tuned models"),
        ([ONE], {"weights": [1.0, 2.0]}, "1 tuned models and 2 weights"),
        ([ONE], {"method": "ties", "density": 0.0}, "density is 0.0"),
        ([{"w": torch.zeros(3), "steps": torch.tensor(1)}], {}, "differ in w"),
        ([{"w": BASE["w"]}], {}, "differ in steps"),
    ],
)
def test_what_is_refused(tuned, options, words):
    with pytest.raises(UserError, match=words):
        merge_weights(BASE, tuned, **options)
