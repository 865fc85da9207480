"""Which of a prompt's scored responses become preference pairs. A rule is a row of `PAIR_RULES`; `pick` applies
it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import fastalign

Pair = tuple[int, int]
RANKINGS = ("first_round", "tournament")


class Choice(NamedTuple):
    """What a rule chooses among. `known`: the responses that have a score; `values`: the score of each response,
    its length taken off; `draw`: where chance comes from; the rest: see `pick`."""

    known: list[int]
    values: Sequence[float]
    draw: random.Random
    seed: int
    num_samples: int
    beta: float
    ranking: str


class PairRule(NamedTuple):
    """`pairs`: the candidates, in either order; `pick` drops ties and puts the better response first. `what`: one
    line for --help."""

    what: str
    pairs: Callable[[Choice], list[Pair]]


def _best(choice: Choice) -> int:
    return max(choice.known, key=choice.values.__getitem__)


def _max_min(choice: Choice) -> list[Pair]:
    return [(_best(choice), min(choice.known, key=choice.values.__getitem__))]


def _max_random(choice: Choice) -> list[Pair]:
    best = _best(choice)
    return [(best, choice.draw.choice([i for i in choice.known if i != best]))]


def _max_max(choice: Choice) -> list[Pair]:
    best, second = sorted(choice.known, key=choice.values.__getitem__, reverse=True)[:2]
    return [(best, second)]


def _margin(choice: Choice) -> list[Pair]:
    best = _best(choice)
    return [(best, other) for other in choice.known if other != best]


def _all(choice: Choice) -> list[Pair]:
    return [*itertools.combinations(choice.known, 2)]


def _rejection(choice: Choice) -> list[Pair]:
    """Statistical rejection sampling (RSO, Liu et al. 2023, arXiv 2309.06657), then disjoint pairs in random
    order; in a tournament (SLiC-HF, Zhao et al. 2023, arXiv 2305.10425) the better of each pair meets the
    next, until one is left. Who has no opponent goes on without one."""
    kept = fastalign.rejection_sample(
        [choice.values[i] for i in choice.known], choice.num_samples, beta=choice.beta, seed=choice.seed
    )
    field = [choice.known[i] for i in kept]
    choice.draw.shuffle(field)
    found = []
    while len(field) > 1:
        pairs = [*zip(field[::2], field[1::2])]
        found += pairs
        if choice.ranking == "first_round":
            break
        field = [max(pair, key=choice.values.__getitem__) for pair in pairs] + field[2 * len(pairs) :]
    return found


PAIR_RULES: dict[str, PairRule] = {
    "max_min": PairRule("the best with the worst", _max_min),
    "max_random": PairRule("the best with a random other", _max_random),
    "max_max": PairRule("the best with the second best", _max_max),
    "margin": PairRule("the best with every other", _margin),
    "all": PairRule("every two", _all),
    "rejection": PairRule("pairs of what statistical rejection sampling keeps (RSO)", _rejection),
}


def pick(
    rule: str,
    scores: Sequence[float],
    lengths: Sequence[float],
    *,
    seed: int,
    margin: float = 0.0,
    length_penalty: float = 0.0,
    num_samples: int = 8,
    beta: float = 0.5,
    ranking: str = "first_round",
) -> list[Pair]:
    """(better, worse) as indices, of the responses to one prompt.

    Everything is judged by score - length_penalty * length.

    Args:
        rule: a name of `PAIR_RULES`. "margin" and "all" keep every pair that is no tie.
        scores: one number per response; a response whose score is NaN takes no part.
        lengths: of the responses, in the unit that `length_penalty` is per; read where that is not 0.
        seed: of "max_random" and "rejection"; the same seed and scores give the same pairs.
        margin: a pair whose two differ by no more is a tie and is dropped; 0: equal ones are.
        num_samples, beta: of "rejection", see `fastalign.rejection_sample`.
        ranking: of "rejection": first_round, floor(n / 2) disjoint pairs; tournament, up to n - 1.

    Raises:
        ValueError: an unknown rule or ranking, a negative or NaN margin, numbers of scores and lengths that
            differ.
    """
    if rule not in PAIR_RULES:
        raise ValueError(f"rule {rule!r} is unknown; legal: {', '.join(PAIR_RULES)}")
    if ranking not in RANKINGS:
        raise ValueError(f"ranking {ranking!r} is unknown; legal: {', '.join(RANKINGS)}")
    if not margin >= 0:
        raise ValueError(f"margin is {margin}: it must not be negative")
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty is {length_penalty}: it must be a finite number")
    if len(lengths) != len(scores):
        raise ValueError(f"{len(scores)} scores and {len(lengths)} lengths: one length for each is legal")
    values = penalised(scores, lengths, length_penalty)
    known = [i for i, value in enumerate(values) if not math.isnan(value)]
    if len(known) < 2:
        return []
    draw = random.Random(f"pairs {seed}")  # not the stream that rejection_sample draws from
    found = PAIR_RULES[rule].pairs(Choice(known, values, draw, seed, num_samples, beta, ranking))
    ordered = [(i, j) if values[i] >= values[j] else (j, i) for i, j in found]
    return [(best, worst) for best, worst in ordered if values[best] - values[worst] > margin]


def penalised(scores: Sequence[float], lengths: Sequence[float], length_penalty: float) -> list[float]:
    """What `pick` judges by."""
    if length_penalty == 0:
        return [*scores]
    return [score - length_penalty * length for score, length in zip(scores, lengths)]
