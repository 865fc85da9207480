"""Statistical rejection sampling: from many scored samples of one policy to some that look like samples of
the optimal one."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from fastalign.runtime.checks import check_number


def rejection_sample(
    rewards: Sequence[float], num_samples: int, *, beta: float = 0.5, seed: int = 0
) -> list[int]:
    """Which of a prompt's candidates to keep (RSO, Liu et al. 2023, arXiv 2309.06657, algorithm 1).

    Passes over the candidates that are left accept each with probability exp((r - r_max) / beta), r_max their
    highest reward as the pass begins, until `num_samples` are accepted: candidates drawn from the reference
    then follow pi_ref(y) exp(r(y) / beta) approximately. beta -> 0 keeps the best, beta -> infinity the
    first.

    Args:
        rewards: one number per candidate; a candidate whose reward is NaN is never kept.
        num_samples: how many to keep; all, in their order, where there are no more than that.
        beta: > 0. seed: of the draw; the same seed and rewards give the same choice.

    Returns:
        Indices into `rewards`, in the order of acceptance.

    Raises:
        ValueError: beta or num_samples not positive.
    """
    check_number("beta", beta, above=0.0)
    check_number("num_samples", num_samples, low=1)
    left = [i for i, reward in enumerate(rewards) if not math.isnan(reward)]
    if num_samples >= len(left):
        return left
    draw, accepted = random.Random(seed), []
    while len(accepted) < num_samples:
        highest = max(rewards[i] for i in left)
        for i in list(left):
            # Equal to the highest: certain, also where both are infinite.
            if rewards[i] == highest or draw.random() < math.exp((rewards[i] - highest) / beta):
                accepted.append(i)
                left.remove(i)
                if len(accepted) == num_samples:
                    break
    return accepted
