"""What the annotator of the arena says: labels from the gold reward, some of them wrong, in every form that a
method learns from. A policy can be asked in its place."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch

import fastalign
from fastalign.arena.review_task import Sample, gold_reward, score_samples
from fastalign.train.data.tokenise import TokenExample, token_pair

RSO_GROUP, RSO_KEPT, RSO_BETA = 16, 4, 0.2  # of that many responses to one prompt, so many are kept
Groups = Sequence[Sequence[Sample]]  # the responses to each prompt


class Annotator:
    """Knows the gold reward, and errs with probability `noise`: the worse response of a pair is then called
    the better one, a label is turned, and in place of a score comes that of another response, drawn from
    `scores`. `answers` counts the responses it has seen."""

    def __init__(self, noise: float, seed: str, scores: Sequence[float]):
        self.noise, self.draw, self.scores, self.answers = noise, random.Random(seed), list(scores), 0
        self.middle = sorted(scores)[len(scores) // 2]

    def errs(self) -> bool:
        return self.draw.random() < self.noise

    def score(self, text: str) -> float:
        self.answers += 1
        return self.draw.choice(self.scores) if self.errs() else gold_reward(text)

    def good(self, text: str) -> bool:
        """Whether its reward is at least the median of the SFT model's."""
        self.answers += 1
        return (gold_reward(text) >= self.middle) != self.errs()

    def compare(self, first: Sample, second: Sample) -> tuple[Sample, Sample, float] | None:
        """(chosen, rejected, probability that chosen is the better one); None: a tie."""
        self.answers += 2
        a, b = gold_reward(first.text), gold_reward(second.text)
        if a == b:
            return None
        wrong = self.errs()
        chosen, rejected = (first, second) if (a > b) != wrong else (second, first)
        return chosen, rejected, self.noise if wrong else 1.0 - self.noise

    def rate(self, samples: Sequence[Sample]) -> list[float]:
        return self.reward([sample.text for sample in samples])

    def reward(self, completions: Sequence[str]) -> list[float]:
        """As a reward function of an online method."""
        return [self.score(text) for text in completions]


class OwnJudge:
    """A policy that rates its own responses by its implicit reward, log pi(y|x) - log ref(y|x), in the
    annotator's place (Chen et al. 2024, arXiv 2406.09760): a model of letters cannot be asked for a verdict in
    words."""

    def __init__(self, policy: torch.nn.Module, reference: torch.nn.Module):
        self.models = policy, reference

    def rate(self, samples: Sequence[Sample]) -> list[float]:
        own, other = (score_samples(model, samples) for model in self.models)
        return [float(a.double().sum() - b.double().sum()) for a, b in zip(own, other)]


Judge = Annotator | OwnJudge


def tokens(ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int32)


def pair(chosen: Sample, rejected: Sample, **values: float) -> TokenExample:
    return token_pair(tokens(chosen.prompt), tokens(chosen.completion), tokens(rejected.completion), **values)


def one(sample: Sample, **values: float | bool) -> TokenExample:
    return TokenExample(tokens(sample.prompt), (tokens(sample.completion),), values)


def _compared(groups: Groups, annotator: Annotator) -> list[tuple[Sample, Sample, float]]:
    """The first response to a prompt against the second, the third against the fourth, ...; ties are left
    out."""
    told = [
        annotator.compare(*group[i : i + 2]) for group in groups for i in range(0, len(group) // 2 * 2, 2)
    ]
    return [each for each in told if each is not None]


def pairs(groups: Groups, annotator: Annotator) -> list[TokenExample]:
    return [pair(chosen, rejected) for chosen, rejected, _ in _compared(groups, annotator)]


def soft_pairs(groups: Groups, annotator: Annotator) -> list[TokenExample]:
    """Pairs with the true probability that chosen is the better one."""
    return [
        pair(chosen, rejected, soft_label=sure) for chosen, rejected, sure in _compared(groups, annotator)
    ]


def rso_pairs(groups: Groups, annotator: Annotator) -> list[TokenExample]:
    """Statistical rejection sampling (`fastalign.rejection_sample`) by the annotator's scores, then pairs of
    what is kept. Groups of the same prompt are taken together."""
    alike = sorted((sample for group in groups for sample in group), key=lambda sample: sample.prompt)
    made = []
    for _, same in groupby(alike, key=lambda sample: sample.prompt):
        samples = list(same)
        for start in range(0, len(samples), RSO_GROUP):
            group = samples[start : start + RSO_GROUP]
            scores = annotator.rate(group)
            number = max(2, len(group) * RSO_KEPT // RSO_GROUP)
            kept = fastalign.rejection_sample(scores, number, beta=RSO_BETA, seed=start)
            for a, b in zip(kept[::2], kept[1::2]):
                if scores[a] != scores[b]:
                    best, worst = (a, b) if scores[a] > scores[b] else (b, a)
                    made.append(pair(group[best], group[worst]))
    return made


def best_worst(groups: Groups, judge: Judge) -> list[TokenExample]:
    """The highest rated response to a prompt against the lowest; groups that are rated alike are left out."""
    made = []
    for group in groups:
        ranked = sorted(zip(judge.rate(group), range(len(group))))
        (lowest, worst), (highest, best) = ranked[0], ranked[-1]
        made += [pair(group[best], group[worst])] if highest > lowest else []
    return made


def best(groups: Groups, judge: Judge) -> list[TokenExample]:
    """The highest rated response to each prompt, to be imitated."""
    made = []
    for group in groups:
        ratings = judge.rate(group)
        made.append(one(group[ratings.index(max(ratings))]))
    return made


def labels(groups: Groups, annotator: Annotator) -> list[TokenExample]:
    return [one(sample, label=annotator.good(sample.text)) for group in groups for sample in group]


def scores(groups: Groups, annotator: Annotator) -> list[TokenExample]:
    return [one(sample, score=annotator.score(sample.text)) for group in groups for sample in group]


def lists(groups: Groups, annotator: Annotator) -> list[TokenExample]:
    return [
        TokenExample(
            tokens(group[0].prompt),
            tuple(tokens(sample.completion) for sample in group),
            {"scores": tuple(annotator.rate(group))},
        )
        for group in groups
    ]


# Form of the data -> (what makes it of groups of responses, what it is called).
FORMS: Mapping[str, tuple[Callable[[Groups, Any], list[TokenExample]], str]] = {
    "pairs": (pairs, "pairs, the better response first"),
    "soft_pairs": (soft_pairs, "pairs with the true probability of the label"),
    "rso_pairs": (rso_pairs, "pairs of responses that rejection sampling kept"),
    "best_worst": (best_worst, "pairs of the highest and the lowest rated response to a prompt"),
    "best": (best, "the highest rated response to each prompt"),
    "labels": (labels, "single responses, good or bad"),
    "scores": (scores, "single responses with a score"),
    "lists": (lists, "lists of responses with a score each"),
}
