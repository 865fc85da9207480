"""What the methods share that learn from which of two responses is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastalign.train.methods.online import OnlineMethod
from fastalign.train.sampling.rewards import FunctionPreference
from fastalign.train.sampling.rollout import Rollout, Sampler


class Comparing(OnlineMethod):
    """Base of these methods, before any other base. Which is better is said by a reward's scores or, in their
    place, by a pairwise judge (`judge`, None: there is none)."""

    needs_reference = True

    def begin(self, *parts: Any) -> None:
        super().begin(*parts)
        self.judge = self.reward if isinstance(self.reward, FunctionPreference) else None
        self.from_reference = self.sampler.of(self.actor.reference)

    def opponents(self, sampler: Sampler, rollouts: Sequence[Rollout], purpose: str) -> list[Rollout]:
        """A response of this sampler beside each one."""
        seed = self.draw(f"opponents/{purpose}").getrandbits(60)
        return sampler([rollout.example for rollout in rollouts], 1, seed)

    def preferences(self, first: Sequence[Rollout], second: Sequence[Rollout], when: str) -> torch.Tensor:
        """P(first is better), [pairs] on the CPU, NaN where it cannot be said: what the judge says, or sigmoid of
        the difference of the scores over T (`label_temperature`)."""
        if self.judge is not None:
            return self.judge.compare(first, second)
        scores = super().scores([*first, *second], when, may_lack=True)
        return torch.sigmoid((scores[: len(first)] - scores[len(first) :]) / self.config.label_temperature)

    def evaluation_scores(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        """Where there is a judge, P(better than a response of the reference)."""
        if self.judge is None:
            return super().scores(rollouts, "evaluation", may_lack=True)
        return self.judge.compare(rollouts, self.opponents(self.from_reference, rollouts, "evaluation"))
