"""A Python function of the user's as the judge, called as the trainer calls it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fastalign.feedback.judges.base import Pair, Response, Verdict
from fastalign.feedback.server import Failure
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.sampling.rewards import FunctionPreference, FunctionReward, import_function
from fastalign.train.sampling.rollout import Rollout

SILENT = Failure("not scored by the function", final=True)


class FunctionJudge:
    """`config.reward` scores, `config.preference` compares. A function is called for so many items at once."""

    at_once = 64

    def __init__(self, config: Any):
        self.config = config
        if config.reward is not None:
            self.function: Any = FunctionReward(import_function("--reward", config.reward), config.reward)
        else:
            function = import_function("--preference", config.preference)
            self.function = FunctionPreference(function, config.preference, 2)

    def check(self, items: Sequence[Pair | Response]) -> None:
        """Refuse data without a column that the function needs."""
        self.function.check([_example(item) for item in items])

    def contents(self) -> dict[str, str]:
        return {}

    def score(self, items: Sequence[Response]) -> list[Verdict]:
        return _verdicts(self.function([_rollout(item, item.text) for item in items]))

    def compare(self, items: Sequence[Pair]) -> list[Verdict]:
        sides = [[_rollout(item, text) for item, text in zip(items, texts)] for texts in
                 ([item.first for item in items], [item.second for item in items])]  # fmt: skip
        found = self.function.compare(*sides)
        if self.config.both_orders:
            found = (found + (1.0 - self.function.compare(*reversed(sides)))) / 2.0
        return _verdicts(found)


def _example(item: Pair | Response) -> TokenExample:
    """What a function reads of a response's prompt: the columns of its line."""
    return TokenExample(torch.empty(0, dtype=torch.int32), (), {**item.row, "prompt": item.prompt})


def _rollout(item: Pair | Response, text: str) -> Rollout:
    return Rollout(_example(item), True, text)


def _verdicts(values: torch.Tensor) -> list[Verdict]:
    return [Verdict(None, SILENT) if math.isnan(value) else Verdict(value) for value in values.tolist()]
