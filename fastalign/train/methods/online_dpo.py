"""Online DPO: the best and the worst of several samples for a prompt are a preference pair."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from fastalign.train.config import LossConfig, TrainConfig
from fastalign.train.data.examples import pack_examples
from fastalign.train.data.tokenise import TokenExample, token_pair
from fastalign.train.errors import UserError
from fastalign.train.methods.base import Split
from fastalign.train.methods.dpo import PreferenceMethod
from fastalign.train.methods.online import OnlineMethod
from fastalign.train.metrics import MetricSums
from fastalign.train.models.reference import LiveReference
from fastalign.train.offline import accumulate
from fastalign.train.online_config import OnlineConfig
from fastalign.train.optimise import Optimizer, learning_rate
from fastalign.train.sampling.actor import Actor
from fastalign.train.sampling.advantages import final_scores, shaped_rewards
from fastalign.train.sampling.rewards import Reward
from fastalign.train.sampling.rollout import Rollout


def make_learner(config: OnlineConfig) -> PreferenceMethod:
    """DPO, or what --loss names, on pairs of samples. Raises `UserError` for a loss that such pairs cannot
    serve."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(LossConfig)}
    learner = PreferenceMethod(TrainConfig(**shared))
    if learner.format.required:
        raise UserError(
            f"--loss {config.loss} needs columns ({', '.join(learner.format.required)}) that pairs of samples "
            "do not have"
        )
    return learner


class OnlineDPO(OnlineMethod):
    """Sample, score, pair the best with the worst response to each prompt, and take one step of a preference
    loss on the pairs.

    Prompts whose responses score the same give no pair. Responses that cannot be scored are left out. The
    loss takes log-probs at temperature 1."""

    name, compares_samples, needs_reference = "online_dpo", True, True

    def __init__(self, config: OnlineConfig, **options: Any):
        super().__init__(config, **options)
        self.learner = make_learner(self.config)

    def start(self, actor: Actor, reward: Reward, directory: str | None) -> None:
        self.learner.start(actor.lm)

    def begin(self, *parts: Any) -> None:
        super().begin(*parts)
        self.reference = (
            LiveReference(self.actor.reference, self.learner.token_stats)
            if self.learner.needs_reference
            else None
        )

    def modules(self) -> dict[str, torch.nn.Module]:
        return self.learner.modules()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"method": self.learner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.learner.load_state_dict(state["method"])

    def learn(
        self, step: int, rollouts: list[Rollout], scores: torch.Tensor, optimizer: Optimizer
    ) -> dict[str, float]:
        budget = self.config.tokens_per_batch
        seen, order = self.look(
            rollouts, [pack_examples([r.example for r in rollouts], range(len(rollouts)), budget)]
        )
        rewarded, judged = self.rewarded(rollouts, scores, seen, order), MetricSums()
        judged.add(shaped_rewards(self.config, rewarded, 0.0)[1])
        finals = torch.empty(len(rollouts))
        finals[order] = final_scores(self.config, rewarded).cpu()
        pairs = best_against_worst(rollouts, finals.tolist(), self.config.samples_per_prompt)
        metrics = {"loss": 0.0, "grad_norm": 0.0}
        if pairs:
            sums, _ = accumulate(
                self.actor.lm, self.learner, Split(pairs, self.reference), range(len(pairs)), backward=True
            )
            sums.add({"grad_norm": (optimizer.clip(), 1)})
            metrics = self.learner.derived(sums.means())
            optimizer.update(step, metrics)
        rate = learning_rate(step, self.steps, optimizer.config)
        return judged.means() | metrics | {"num_pairs": len(pairs), "learning_rate": rate}


def best_against_worst(
    rollouts: Sequence[Rollout], scores: Sequence[float], per_prompt: int
) -> list[TokenExample]:
    """A pair for every prompt whose responses differ in score (NaN: not scored)."""
    pairs = []
    for start in range(0, len(rollouts), per_prompt):
        known = [i for i in range(start, start + per_prompt) if not math.isnan(scores[i])]
        best, worst = (choose(known, key=scores.__getitem__, default=None) for choose in (max, min))
        if best is not None and scores[best] > scores[worst]:
            chosen, rejected = (rollouts[i].example.completions[0] for i in (best, worst))
            pairs.append(token_pair(rollouts[best].example.prompt, chosen, rejected))
    return pairs
