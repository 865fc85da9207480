"""Statistical rejection sampling: limits, frequencies, degenerate inputs."""

import math

import pytest

import fastalign as fa


def test_limits_of_beta():
    rewards = [0.3, 0.9, 0.1, 0.7, 0.5]
    assert sorted(fa.rejection_sample(rewards, 2, beta=1e-6)) == [1, 3]
    assert fa.rejection_sample(rewards, 2, beta=1e9) == [0, 1]


def test_acceptance_frequencies():
    """One of (low, high): the low one comes first and is accepted with e^((r_low - r_high) / beta)."""
    kept = [fa.rejection_sample([0.0, 1.0], 1, beta=0.8, seed=seed) for seed in range(4000)]
    expected = math.exp(-1.0 / 0.8)
    assert sum(choice == [0] for choice in kept) / 4000 == pytest.approx(
        expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000)
    )


def test_the_highest_reward_is_that_of_the_candidates_left():
    """Once the outlier is accepted the others compete among themselves; had r_max stayed, the loop would
    hardly ever end."""
    assert sorted(fa.rejection_sample([1e6, 0.0, 0.0], 2, beta=0.5)) in ([0, 1], [0, 2])


def test_degenerate_inputs():
    assert fa.rejection_sample([], 3) == []
    assert fa.rejection_sample([1.0, math.nan, 2.0], 3) == [0, 2]
    assert fa.rejection_sample([1.0, math.nan, 2.0], 1, beta=1e-9) == [2]
    assert fa.rejection_sample([-math.inf, math.inf, 0.0], 2, beta=0.5) == [1, 2]
    assert fa.rejection_sample([-math.inf, -math.inf, -math.inf], 2) == [0, 1]
    assert fa.rejection_sample([0.1] * 9, 4, seed=3) == fa.rejection_sample([0.1] * 9, 4, seed=3)
    for options in ({"beta": 0.0}, {"beta": math.nan}, {"num_samples": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            fa.rejection_sample([1.0, 2.0], **{"num_samples": 1, **options})
