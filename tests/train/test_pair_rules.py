"""Pair rules: which responses of a prompt are paired, by hand and against closed forms."""

import collections
import itertools
import math

import pytest

from fastalign.train.sampling.pair_rules import PAIR_RULES, pick

SCORES = [0.5, 2.0, -1.0, 1.5]
NONE = [0, 0, 0, 0]
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("rule", "scores", "options", "pairs"),
    [
        ("max_min", SCORES, {}, [(1, 2)]),
        ("max_max", SCORES, {}, [(1, 3)]),
        ("margin", SCORES, {"margin": 0.5}, [(1, 0), (1, 2)]),
        ("all", SCORES, {}, [(1, 0), (0, 2), (3, 0), (1, 2), (1, 3), (3, 2)]),
        ("all", SCORES, {"margin": 1.5}, [(1, 2), (3, 2)]),
        ("max_min", SCORES, {"margin": 3.0}, []),
        ("max_min", [1.0, NAN, 3.0, NAN], {}, [(2, 0)]),
        ("all", [NAN, NAN, NAN, 1.0], {}, []),
        ("max_max", [3.0, 3.0, 1.0, 0.0], {}, []),
        ("max_min", [1.0, 1.0, 1.0, 1.0], {}, []),
        ("max_min", [INF, INF, 0.0, -INF], {}, [(0, 3)]),
        ("max_max", [INF, INF, 0.0, -INF], {}, []),
        ("max_min", SCORES, {"length_penalty": 0.1, "lengths": [0, 40, 0, 1]}, [(3, 1)]),
        ("max_min", SCORES, {"length_penalty": -1.0, "lengths": [0, 0, 9, 0]}, [(2, 0)]),
        ("max_max", [1.0, 1.0, 0.0, NAN], {"length_penalty": 0.5, "lengths": [1, 2, 9, 0]}, [(0, 1)]),
    ],
)  # fmt: skip
def test_rules_by_hand(rule, scores, options, pairs):
    options = {"lengths": NONE, **options}
    assert pick(rule, scores, seed=3, **options) == pairs


@pytest.mark.parametrize("rule", PAIR_RULES)
@pytest.mark.parametrize(
    "scores", [[], [1.0], [NAN], [1.0, NAN], [NAN, NAN], [2.0, 2.0], [INF, INF], [-INF, -INF, NAN]]
)
def test_what_cannot_be_compared_gives_no_pair(rule, scores):
    assert pick(rule, scores, [1] * len(scores), seed=0) == []


@pytest.mark.parametrize("rule", PAIR_RULES)
def test_every_rule_orders_its_pairs_and_repeats_them(rule):
    scores = [0.3, NAN, 0.3, 1.0, -2.0, 0.9, 5.0, NAN, 0.1]
    for seed in range(20):
        pairs = pick(rule, scores, [0] * 9, seed=seed, num_samples=5, ranking="tournament")
        assert pairs == pick(rule, scores, [0] * 9, seed=seed, num_samples=5, ranking="tournament")
        assert all(scores[best] > scores[worst] for best, worst in pairs)
        assert len(pairs) == len(set(pairs))


def test_max_random_meets_every_other_equally_often():
    found = collections.Counter(pick("max_random", SCORES, NONE, seed=seed)[0] for seed in range(3000))
    assert set(found) == {(1, 0), (1, 2), (1, 3)}
    assert all(abs(count / 3000 - 1 / 3) < 5 * math.sqrt(2 / 9 / 3000) for count in found.values())


def acceptance_law(rewards, wanted, beta):
    """Probability of each set that RSO's passes accept, by enumerating every outcome of every pass."""
    law = collections.Counter()

    def visit(left, accepted, chance):
        if chance < 1e-12:
            return
        highest = max(rewards[i] for i in left)
        rates = {i: math.exp((rewards[i] - highest) / beta) for i in left}
        for outcome in itertools.product((False, True), repeat=len(left)):
            taken, weight = [], chance
            for i, accept in zip(left, outcome):
                if len(accepted) + len(taken) == wanted:
                    weight *= not accept  # the pass is over: one outcome stands for the rest
                else:
                    weight *= rates[i] if accept else 1 - rates[i]
                    taken += [i] * accept
            if weight and len(accepted) + len(taken) == wanted:
                law[frozenset(accepted + taken)] += weight
            elif weight:
                visit([i for i in left if i not in taken], accepted + taken, weight)

    visit(list(range(len(rewards))), [], 1.0)
    return law


@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_rejection_follows_its_law(beta):
    """Two of four are kept, which are the pair; the law of the sets by enumeration, the frequencies over seeds."""
    rewards, seeds = [0.2, 1.0, 0.6, -0.5], 3000
    law = acceptance_law(rewards, 2, beta)
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-6)
    found = collections.Counter(
        frozenset(pick("rejection", rewards, NONE, seed=seed, num_samples=2, beta=beta)[0])
        for seed in range(seeds)
    )
    for kept, p in law.items():
        assert abs(found[kept] / seeds - p) < 5 * math.sqrt(p * (1 - p) / seeds) + 1e-3, (sorted(kept), p)


@pytest.mark.parametrize(
    ("count", "ranking", "pairs"),
    [(8, "first_round", 4), (8, "tournament", 7), (7, "first_round", 3), (7, "tournament", 6), (1, "tournament", 0)],
)  # fmt: skip
def test_rankings(count, ranking, pairs):
    scores = [float(i) for i in range(64)]
    found = pick("rejection", scores, [0] * 64, seed=1, num_samples=count, beta=8.0, ranking=ranking)
    assert len(found) == pairs
    losers = [worst for _, worst in found]
    assert len(set(losers)) == len(losers)  # who has lost does not play on
    if ranking == "first_round":
        assert len({i for pair in found for i in pair}) == 2 * pairs


def test_more_samples_than_candidates_and_equal_texts():
    """All are returned, and candidates are told apart by their index."""
    assert (
        len(pick("rejection", [1.0, 2.0, NAN, 3.0], NONE, seed=0, num_samples=9, ranking="tournament")) == 2
    )


@pytest.mark.parametrize(
    ("rule", "options", "words"),
    [
        ("best", {}, "'best' is unknown; legal: max_min, max_random"),
        ("all", {"margin": -1.0}, "margin is -1.0"),
        ("all", {"margin": NAN}, "margin is nan"),
        ("all", {"length_penalty": INF}, "length_penalty is inf"),
        ("rejection", {"ranking": "swiss"}, "legal: first_round, tournament"),
        ("rejection", {"beta": 0.0}, "beta"),
        ("rejection", {"num_samples": 0}, "num_samples"),
        ("all", {"lengths": [1]}, "4 scores and 1 lengths"),
    ],
)
def test_wrong_arguments(rule, options, words):
    with pytest.raises(ValueError, match=words):
        pick(rule, SCORES, seed=0, **{"lengths": NONE, **options})
