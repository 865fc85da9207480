"""Merging weights: every method on numbers that can be checked by eye, or against its closed form."""

import math

import pytest
import torch

from fastalign.train import UserError, merge_weights
from fastalign.train.merge import METHODS, _largest

BASE = {"w": torch.tensor([1.0, 1.0, 1.0, 1.0]), "steps": torch.tensor(3)}
ONE = {"w": torch.tensor([3.0, 0.0, 1.5, 1.0]), "steps": torch.tensor(9)}  # differences 2, -1, 0.5, 0
OTHER = {"w": torch.tensor([2.0, 3.0, 1.1, 1.0]), "steps": torch.tensor(9)}  # differences 1, 2, 0.1, 0


def of(start, *tuned, **options):
    """The merge of models of one vector, as a difference from the start."""
    return merge_weights({"w": start}, [{"w": each} for each in tuned], **options)["w"] - start


def test_linear_and_task_arithmetic():
    assert merge_weights(BASE, [ONE, OTHER])["w"].tolist() == pytest.approx([2.5, 1.5, 1.3, 1.0])
    merged = merge_weights(BASE, [ONE, OTHER], weights=[1.0, 0.0])
    assert torch.equal(merged["w"], ONE["w"]) and merged["steps"] == 3
    summed = merge_weights(BASE, [ONE, OTHER], method="task_arithmetic")
    assert summed["w"].tolist() == pytest.approx([4.0, 2.0, 1.6, 1.0])
    assert of(
        torch.zeros(2), torch.tensor([1.0, 2.0]), method="task_arithmetic", weights=[-0.5]
    ).tolist() == [-0.5, -1]


def test_ties_keeps_the_largest_and_the_sign_that_wins():
    """Half of each: (2, -1, 0, 0) and (1, 2, 0, 0). Signs of the sums: +, +. Means of those that agree: 1.5
    and 2."""
    assert merge_weights(BASE, [ONE, OTHER], method="ties", density=0.5)["w"].tolist() == [2.5, 3.0, 1.0, 1.0]


def test_the_largest_are_those_of_a_sort():
    """Of equal magnitudes the last are kept, whatever their number."""
    torch.manual_seed(0)
    for values in (torch.randn(101), torch.randint(-3, 4, (101,)).float(), torch.zeros(5), torch.ones(1)):
        for density in (0.01, 0.2, 0.5, 0.99, 1.0):
            drop = len(values) - max(1, round(density * len(values)))
            expected = values.scatter(0, values.abs().argsort(stable=True)[:drop], 0.0)
            assert torch.equal(_largest(values, density), expected)


def test_dare_drops_at_random_and_rescales():
    """Each entry is 0 or d / density, independently; the mean over draws is the linear merge."""
    n, density, draws = 4000, 0.3, 40
    start, one = torch.zeros(n), torch.linspace(1, 2, n)
    found = torch.stack([of(start, one, method="dare", density=density, seed=seed) for seed in range(draws)])
    kept = found != 0
    assert torch.allclose(found[kept], (one / density).expand(draws, n)[kept])
    share, error = kept.float().mean().item(), math.sqrt(density * (1 - density) / (n * draws))
    assert abs(share - density) < 5 * error
    assert abs(found.mean().item() - one.mean().item()) < 5 * error * 1.5 / density
    assert torch.equal(found[0], of(start, one, method="dare", density=density, seed=0))
    assert not torch.equal(kept[0], kept[1])
    # two models are drawn apart: half the mean of both by default
    both = of(start, one, one, method="dare", density=density)
    assert {0.0, 0.5, 1.0} == set((both / one * density).mul(100).round().div(100).tolist())


def test_dare_does_not_hang_on_the_order_of_the_tensors():
    base = {name: torch.zeros(50) for name in "abc"}
    tuned = {name: torch.ones(50) for name in "abc"}
    forward = merge_weights(base, [tuned], method="dare", seed=3)
    backward = merge_weights(
        dict(reversed(base.items())), [dict(reversed(tuned.items()))], method="dare", seed=3
    )
    assert all(torch.equal(forward[name], backward[name]) for name in "abc")
    assert not torch.equal(forward["a"], forward["b"])


def test_dare_ties_elects_among_what_was_left():
    start, one, other = torch.zeros(500), torch.full((500,), 3.0), torch.full((500,), -1.0)
    a, b = (of(start, *pair, method="dare", density=0.5, weights=w, seed=4)
            for pair, w in (((one, other), [1, 0]), ((one, other), [0, 1])))  # fmt: skip
    found = of(start, one, other, method="dare_ties", density=0.5, seed=4)
    expected = torch.where(a != 0, a, b)  # 6 wins against -2; alone each has its own sign
    assert torch.equal(found, expected) and found.unique().tolist() == [-2.0, 0.0, 6.0]


def test_slerp():
    x, y = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
    start = torch.tensor([5.0, 5.0, 5.0])
    for t in (0.0, 0.25, 0.5, 1.0):
        expected = math.cos(t * math.pi / 2) * x + math.sin(t * math.pi / 2) * y
        assert torch.allclose(of(start, start + x, start + y, method="slerp", t=t), expected, atol=1e-6)
    # 60 degrees: sin(30) / sin(60) of each half way; lengths stay 1 on the circle
    y = torch.tensor([0.5, math.sqrt(3) / 2, 0.0])
    middle = of(torch.zeros(3), x, y, method="slerp")
    assert torch.allclose(middle, (x + y) / math.sqrt(3)) and middle.norm().item() == pytest.approx(1)
    # parallel, opposite, absent: on the line
    for other in (3 * x, -3 * x, 0 * x):
        assert torch.allclose(of(torch.zeros(3), x, other, method="slerp", t=0.25), 0.75 * x + 0.25 * other)
    # a small angle is one, where the arc cosine of float32 would be none
    turned = torch.tensor([math.cos(1e-4), math.sin(1e-4), 0.0], dtype=torch.float64)
    found = of(torch.zeros(3, dtype=torch.float64), x.double(), turned, method="slerp", t=0.5)
    assert found[1].item() == pytest.approx(math.sin(0.5e-4), rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_returns_what_all_agree_on(method):
    """Models that are the base give the base; nothing but floating point is touched; the dtype is the base's."""
    merged = merge_weights(BASE, [BASE, BASE], method=method)
    assert torch.equal(merged["w"], BASE["w"]) and merged["steps"] == 3
    halves = [
        {name: value.bfloat16() if value.is_floating_point() else value for name, value in model.items()}
        for model in (BASE, ONE, OTHER)
    ]
    assert merge_weights(halves[0], halves[1:], method=method)["w"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "tuned, options, words",
    [
        ([ONE], {"method": "nonsense"}, "legal: linear, task_arithmetic, ties, dare, dare_ties, slerp"),
        ([], {}, "0 tuned models"),
        ([ONE], {"weights": [1.0, 2.0]}, "1 tuned models and 2 weights"),
        ([ONE], {"weights": [math.nan]}, "a weight is nan: it must be finite"),
        ([ONE], {"method": "ties", "density": 0.0}, "density is 0.0"),
        ([ONE], {"method": "dare", "density": 1.5}, "density is 1.5"),
        (
            [ONE],
            {"density": 0.5},
            "density is given, and linear has none; it belongs to ties, dare, dare_ties",
        ),
        ([ONE], {"method": "ties", "t": 0.5}, "t is given, and ties has none; it belongs to slerp"),
        ([ONE, OTHER], {"method": "slerp", "t": 1.5}, "t is 1.5"),
        ([ONE], {"method": "slerp"}, "slerp takes two models .*, got 1"),
        ([ONE, OTHER], {"method": "slerp", "weights": [1, 1]}, "slerp takes two models .* with weights"),
        ([{"w": torch.zeros(3), "steps": torch.tensor(1)}], {}, "differ in w"),
        ([{"w": BASE["w"]}], {}, "differ in steps"),
    ],
)
def test_what_is_refused(tuned, options, words):
    with pytest.raises(UserError, match=words):
        merge_weights(BASE, tuned, **options)
