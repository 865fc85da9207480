"""Nash-MD (Munos et al. 2023, arXiv 2312.00886): policy gradient on being preferred to a mixture of policy and
reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastalign.train.errors import UserError
from fastalign.train.methods.comparing import Comparing
from fastalign.train.methods.policy_gradient import PolicyGradient
from fastalign.train.sampling.rollout import Rollout


class NashMD(Comparing, PolicyGradient):
    """A response y of the policy meets one, y', of the geometric mixture policy^(1 - mixture_coef)
    reference^mixture_coef. Its reward is P(y better than y') - 1/2, less the KL of its tokens; a token's
    advantage is what follows it of both. A pair that cannot be judged is left out."""

    name, estimator, samples_reference = "nash_md", "returns", True

    def begin(self, *parts: Any) -> None:
        super().begin(*parts)
        share = self.config.mixture_coef
        self.mixture = self.sampler.of(self.actor.lm, self.actor.reference if share else None, share)
        if self.judge is not None and self.config.label_temperature != 1.0:
            raise UserError(
                "--label-temperature has no effect with --preference, which says the probability itself"
            )

    def learn(self, step: int, rollouts: list[Rollout], scores: torch.Tensor, *rest: Any) -> dict[str, float]:
        known = scores[~scores.isnan()]
        rate = {"objective/win_rate": float(known.mean()) + 0.5} if len(known) else {}
        return super().learn(step, rollouts, scores, *rest) | rate

    def scores(self, rollouts: Sequence[Rollout], when: str, may_lack: bool) -> torch.Tensor:
        return self.preferences(rollouts, self.opponents(self.mixture, rollouts, when), when) - 0.5
