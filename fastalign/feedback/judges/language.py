"""A language model as the judge: it is asked in words, by templates."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastalign.feedback.judges.asker import Choice, ModelAsker, Question, ServerAsker
from fastalign.feedback.judges.base import Pair, Response, Verdict
from fastalign.feedback.judges.options import mean_score
from fastalign.feedback.server import Failure
from fastalign.feedback.texts import Templates, as_text, read_constitution
from fastalign.feedback.writers import Request, seed_of
from fastalign.train.data.formats import Messages
from fastalign.train.errors import UserError

# Bai et al. 2022, arXiv 2212.08073: labels after reasons would be all but certain.
CLAMP = (0.4, 0.6)
SCORES = tuple(str(i) for i in range(1, 11))
MALFORMED = Failure("malformed answer", final=True)
_SCORE = re.compile(r"score\W*?(\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*(\d+))?", re.IGNORECASE)


class LanguageJudge:
    """`config`: a `LabelConfig`. How it is asked: `ask`.

    compare: which of two is better, under each of `principles` principles, in both orders; P is the mean.
    With `reasons` it writes these first, and P is clamped to [0.4, 0.6]. score: P of the scores 1 to 10 ->
    `mean_score`. rubric: points from 0 to 5, the mean of `judgements` reviews."""

    def __init__(self, config: Any, asker: ServerAsker | ModelAsker):
        self.config, self.asker, self.at_once = config, asker, asker.at_once
        pair = {"prompt": "", "first": "", "second": "", "principle": ""}
        names, variables = {
            "compare": (("reasons", "answer") if config.reasons else ("compare",), pair),
            "score": (("score",), {"prompt": "", "response": ""}),
            "rubric": (("rubric",), {"prompt": "", "response": ""}),
        }[config.ask]
        self.templates = Templates(names, config.templates, variables)
        self.principles, self._contents = [""], {}
        if config.principles:
            principles, self._contents = read_constitution(config.constitution, "compare")
            if config.principles > len(principles):
                raise UserError(
                    f"--principles is {config.principles}: the constitution has {len(principles)}"
                )
            self.principles = principles[: config.principles]

    def contents(self) -> dict[str, str]:
        return self.asker.contents() | self.templates.contents | self._contents

    # --- which is better ------------------------------------------------------------------------------------

    def compare(self, items: Sequence[Pair]) -> list[Verdict]:
        orders = (False, True) if self.config.both_orders else (False,)
        tasks = [
            (i, p, swapped)
            for i in range(len(items))
            for p in range(len(self.principles))
            for swapped in orders
        ]
        choices = self._ask([(items[i], p, swapped) for i, p, swapped in tasks])
        verdicts = []
        for i in range(len(items)):
            own = {task[1:]: choice for task, choice in zip(tasks, choices) if task[0] == i}
            verdicts.append(self._mean(own, orders))
        return verdicts

    def _mean(self, own: dict[tuple[int, bool], Choice], orders: Sequence[bool]) -> Verdict:
        """The mean over principles and orders. A principle counts if every order was answered: one alone would
        favour a place."""
        failures = [choice.failure for choice in own.values() if choice.failure is not None]
        if lasting := [failure for failure in failures if not failure.final]:
            return Verdict(None, lasting[0])
        means = []
        for p in range(len(self.principles)):
            answers = [own[p, swapped].probabilities for swapped in orders]
            if None not in answers:
                shares = [1.0 - each[0] if swapped else each[0] for each, swapped in zip(answers, orders)]
                means.append(sum(shares) / len(shares))
        if not means:
            return Verdict(None, failures[0])
        mean = sum(means) / len(means)
        return Verdict(min(max(mean, CLAMP[0]), CLAMP[1]) if self.config.reasons else mean)

    def _ask(self, tasks: Sequence[tuple[Pair, int, bool]]) -> list[Choice]:
        """The choice between "1" and "2" of each (pair, principle, whether the two change places)."""
        asked: list[Messages] = []
        variables = []
        for item, p, swapped in tasks:
            first, second = (item.second, item.first) if swapped else (item.first, item.second)
            variables.append(
                {
                    "prompt": as_text(item.prompt),
                    "first": first,
                    "second": second,
                    "principle": self.principles[p],
                }
            )
            name = "reasons" if self.config.reasons else "compare"
            asked.append([_user(self.templates.render(name, **variables[-1]))])
        choices: list[Choice | None] = [None] * len(tasks)
        if self.config.reasons:
            seeds = [
                seed_of(self.config.seed, item.prompt, item.first, item.second, p, s) for item, p, s in tasks
            ]
            requests = [Request(item.source, *pair) for (item, *_), *pair in zip(tasks, asked, seeds)]
            for i, reply in enumerate(self.asker.write_here(requests)):
                if reply.text is None or not reply.text.strip():
                    choices[i] = Choice(None, reply.failure or MALFORMED)
                    continue
                answer = self.templates.render("answer", **variables[i])
                asked[i] = [*asked[i], {"role": "assistant", "content": reply.text.strip()}, _user(answer)]
        open_ones = [i for i, choice in enumerate(choices) if choice is None]
        answers = self.asker.choose([Question(tasks[i][0].source, asked[i], ("1", "2")) for i in open_ones])
        for i, choice in zip(open_ones, answers):
            choices[i] = choice
        return choices  # type: ignore[return-value]

    # --- how good it is -------------------------------------------------------------------------------------

    def score(self, items: Sequence[Response]) -> list[Verdict]:
        asked = [
            [_user(self.templates.render(self.config.ask, prompt=as_text(item.prompt), response=item.text))]
            for item in items
        ]
        if self.config.ask == "rubric":
            return self._review(items, asked)
        choices = self.asker.choose(
            [Question(item.source, messages, SCORES) for item, messages in zip(items, asked)]
        )
        return [
            Verdict(None, c.failure) if c.probabilities is None else Verdict(mean_score(c.probabilities))
            for c in choices
        ]

    def _review(self, items: Sequence[Response], asked: Sequence[Messages]) -> list[Verdict]:
        count, requests = self.config.judgements, []
        for item, messages in zip(items, asked):
            seeds = [seed_of(self.config.seed, item.prompt, item.text, j) for j in range(count)]
            requests += [Request(item.source, messages, seed) for seed in seeds]
        replies, verdicts = self.asker.write_here(requests), []
        for i in range(len(items)):
            own = replies[i * count : (i + 1) * count]
            failures = [reply.failure for reply in own if reply.failure is not None]
            points = [
                p for reply in own if reply.text is not None and (p := points_of(reply.text)) is not None
            ]
            lasting = [failure for failure in failures if not failure.final]
            if lasting or not points:
                verdicts.append(Verdict(None, [*lasting, *failures, MALFORMED][0]))
            else:
                verdicts.append(Verdict(sum(points) / len(points)))
        return verdicts


def points_of(review: str) -> float | None:
    """N of the last "Score: N" (or N/5), from 0 to 5; None: there is none."""
    found = _SCORE.findall(review)
    if not found:
        return None
    number, out_of = found[-1]
    return float(number) if float(number) <= 5 and out_of in ("", "5") else None


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
