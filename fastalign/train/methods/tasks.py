"""Several tasks in one run of preference pairs, each with a weight: fixed, by its share of the data, or
group-robust."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fastalign.runtime.checks import shown
from fastalign.train.config import TrainConfig
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.errors import UserError

KINDS = ("fixed", "proportional", "robust")


class TaskWeights:
    """The weights w_k of the tasks in L = sum over tasks k of w_k L_k, where L_k is the loss of the step's
    pairs of task k alone. They add up to 1.

    fixed: as `--task-weight` says, 1 for a task that it does not name. proportional: n_k^(1/T), n_k the
    number of training pairs. robust: they begin as the fixed ones; after every step w_k <- w_k exp(eta L_k) /
    Z for the tasks that it contained, Z such that their weights add up to what they did (Ramesh et al. 2024,
    arXiv 2405.20304; Sagawa et al. 2020, arXiv 1911.08731).

    Args:
        config: `task_weights`, one of KINDS; `task_weight`, `task_temperature`, `task_step`.

    Raises:
        UserError: settings without effect, or a weight that is none."""

    def __init__(self, config: TrainConfig):
        self.kind, self.given = config.task_weights, {str(k): w for k, w in config.task_weight.items()}
        self.temperature, self.step = config.task_temperature, config.task_step
        self.weights: dict[str, float] = {}
        for name, weight in self.given.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
                raise UserError(f"--task-weight {name}={shown(weight)}: it must be a number, at least 0")

    @staticmethod
    def of(config: TrainConfig) -> TaskWeights | None:
        """None: all pairs are of one task. Refuses settings without effect."""
        kind, default = config.task_weights, TrainConfig()
        for name, flag, kinds in (
            ("task_weight", "--task-weight", ("fixed", "robust")),
            ("task_temperature", "--task-temperature", ("proportional",)),
            ("task_step", "--task-step", ("robust",)),
        ):
            if getattr(config, name) != getattr(default, name) and kind not in kinds:
                raise UserError(f"{flag} has no effect without --task-weights {' or '.join(kinds)}")
        return None if kind is None else TaskWeights(config)

    def read(self, train: Sequence[TokenExample], evaluation: Sequence[TokenExample]) -> None:
        """Take the tasks of the training data."""
        counts = Counter(task_of(example) for example in train)
        names = sorted(counts)
        for name in [*self.given, *map(task_of, evaluation)]:
            if name not in counts:
                where = (
                    f"--task-weight {name}" if name in self.given else f"the evaluation data's task {name!r}"
                )
                raise UserError(f"{where}: the training data has no such task; it has: {', '.join(names)}")
        raw = [self.given.get(name, 1.0) for name in names]
        if self.kind == "proportional":
            most = max(counts.values())
            raw = [(counts[name] / most) ** (1.0 / self.temperature) for name in names]
        if not sum(raw) > 0:
            raise UserError("--task-weight: every task has weight 0")
        self.weights = {name: weight / sum(raw) for name, weight in zip(names, raw)}
        shares = (f"{name} {counts[name]} (weight {weight:.4g})" for name, weight in self.weights.items())
        print(f"tasks: {', '.join(shares)}")

    def update(self, losses: Mapping[str, float]) -> None:
        """After a step whose tasks had these losses."""
        if self.kind != "robust" or not losses:
            return
        top = max(losses.values())  # taken off all: exp of the largest is 1
        grown = {
            name: self.weights[name] * math.exp(self.step * (loss - top)) for name, loss in losses.items()
        }
        before, after = sum(self.weights[name] for name in losses), sum(grown.values())
        if after > 0:
            self.weights |= {name: before * weight / after for name, weight in grown.items()}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.weights)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights = {name: float(state[name]) for name in self.weights}


def task_of(example: TokenExample) -> str:
    return str(example.values["task"])


def members(examples: Sequence[TokenExample]) -> dict[str, list[int]]:
    """Task -> the examples that are of it, by name."""
    found: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        found.setdefault(task_of(example), []).append(i)
    return dict(sorted(found.items()))
