"""Online DPO: pairs of samples for a prompt, better and worse, under any loss of pairs. XPO: one of the two is the
reference's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

import fastalign
from fastalign.train.config import LossConfig, TrainConfig
from fastalign.train.data.examples import pack_examples
from fastalign.train.data.tokenise import TokenExample, token_pair
from fastalign.train.errors import UserError
from fastalign.train.methods.base import Scored, Split
from fastalign.train.methods.comparing import Comparing
from fastalign.train.methods.dpo import PreferenceMethod
from fastalign.train.metrics import Metrics, MetricSums
from fastalign.train.models.reference import LiveReference
from fastalign.train.offline import accumulate
from fastalign.train.online_config import OnlineConfig
from fastalign.train.optimise import Optimizer, learning_rate
from fastalign.train.sampling.actor import Actor
from fastalign.train.sampling.advantages import final_scores, shaped_rewards
from fastalign.train.sampling.pair_rules import penalised, pick
from fastalign.train.sampling.rewards import Reward
from fastalign.train.sampling.rollout import Rollout


class OnlineDPO(Comparing):
    """Sample, score, pair the responses to each prompt by `pair_rule`, and take one step of a preference loss
    on the pairs.

    Prompts whose responses score the same give no pair. Responses that cannot be scored are left out. The
    loss takes log-probs at temperature 1. What it needs to know of a pair beside which is better comes from the
    scores: see `numbers`."""

    name, compares_samples = "online_dpo", True

    def __init__(self, config: OnlineConfig, **options: Any):
        super().__init__(config, **options)
        self.learner = self.make_learner()
        self.learner.columns = self.learner.wanted_columns()
        if lacking := set(self.learner.format.required) - {*self.learner.columns} | {
            *self.learner.columns
        } - {*self.numbers(1.0)}:
            raise UserError(
                f"--loss {config.loss} needs columns ({', '.join(sorted(lacking))}) that pairs of samples do "
                "not have"
            )
        if config.label_temperature != 1.0 and not self.learner.columns:
            raise UserError(
                f"--label-temperature has no effect: --loss {self.config.loss} takes nothing but which "
                "response is better"
            )

    def make_learner(self) -> PreferenceMethod:
        """DPO, or what --loss names, on pairs of samples."""
        return PreferenceMethod(loss_settings(self.config))

    def numbers(self, gap: float) -> dict[str, float]:
        """Column of a pair -> its value for this difference of the scores: under the Bradley-Terry model of the
        reward / T the probability that the better response is preferred, and the difference itself / T."""
        scaled = gap / self.config.label_temperature
        return {"soft_label": 1.0 / (1.0 + math.exp(-scaled)), "margin": scaled, "target": scaled}

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
        finals, metrics, judged = *self.final_scores(rollouts, scores), MetricSums()
        judged.add(metrics)
        pairs = self.pairs(step, rollouts, finals.tolist())
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

    def final_scores(self, rollouts: Sequence[Rollout], scores: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        """(what pairs are made by, [responses] on the CPU, and the metrics of the rewards)."""
        packs = pack_examples(
            [r.example for r in rollouts], range(len(rollouts)), self.config.tokens_per_batch
        )
        seen, order = self.look(rollouts, [packs])
        rewarded = self.rewarded(rollouts, scores, seen, order)
        finals = torch.empty(len(rollouts))
        finals[order] = final_scores(self.config, rewarded).cpu()
        return finals, shaped_rewards(self.config, rewarded, 0.0)[1]

    def pairs(self, step: int, rollouts: Sequence[Rollout], scores: Sequence[float]) -> list[TokenExample]:
        """The pairs of a step (NaN: not scored), with the numbers that the loss reads."""
        config, draw, pairs = self.config, self.draw(f"pairs/{step}"), []
        lengths = [rollout.length for rollout in rollouts]
        values = penalised(scores, lengths, config.length_penalty)
        for start in range(0, len(rollouts), config.samples_per_prompt):
            group = slice(start, start + config.samples_per_prompt)
            chosen = pick(
                config.pair_rule,
                values[group],
                lengths[group],
                seed=draw.getrandbits(60),
                margin=config.pair_margin,
            )
            for best, worst in chosen:
                numbers = self.numbers(values[start + best] - values[start + worst])
                known = {name: numbers[name] for name in self.learner.columns} | self.known(best)
                prompt, *sides = (
                    rollouts[start].example.prompt,
                    *(rollouts[start + i].example.completions[0] for i in (best, worst)),
                )
                pairs.append(token_pair(prompt, *sides, **known))
        return pairs

    def known(self, best: int) -> dict[str, float]:
        """What the learner needs to know of a pair whose better response is this one of the prompt's."""
        return {}


class XPO(OnlineDPO):
    """Exploratory preference optimisation (Xie et al. 2024, arXiv 2405.21046): one response is the policy's,
    the other the reference's; the loss of the pair, plus alpha log pi(the reference's)."""

    name, samples_reference = "xpo", True

    def make_learner(self) -> PreferenceMethod:
        return OptimisticPreference(loss_settings(self.config, ref_model=None), self.config.optimism_coef)

    def respond(self, prompts: Sequence[TokenExample], purpose: str) -> list[Rollout]:
        own = self.sample(prompts, 1, purpose)
        return [r for pair in zip(own, self.opponents(self.from_reference, own, purpose)) for r in pair]

    def final_scores(self, rollouts: Sequence[Rollout], scores: torch.Tensor) -> tuple[torch.Tensor, Metrics]:
        """The metrics are of the policy's responses."""
        (own, metrics), (theirs, _) = (
            super(XPO, self).final_scores(rollouts[i::2], scores[i::2]) for i in (0, 1)
        )
        return torch.stack([own, theirs], 1).flatten(), metrics

    def known(self, best: int) -> dict[str, float]:
        return {"reference_side": 1.0 - best}


class OptimisticPreference(PreferenceMethod):
    """A loss of pairs, plus per pair alpha times the policy's log-prob of the response that the reference gave.
    `reference_side` of a pair: 0, that is the chosen one; 1, the rejected one."""

    def __init__(self, config: TrainConfig, alpha: float):
        super().__init__(config)
        self.alpha = alpha

    def loss(self, scored: Scored, *, training: bool, **known: Any) -> tuple[torch.Tensor, Metrics]:
        loss, metrics = super().loss(scored, training=training, **known)
        packed, pairs = scored.packed, len(scored.examples)
        totals = fastalign.sequence_sum(scored.policy["logprob"], packed.cu_seqlens, mask=packed.mask)
        side = scored.column("reference_side").long()[:, None]
        theirs = totals.view(pairs, 2).gather(1, side).sum()
        bonus = self.alpha / known.get("num_items", pairs) * theirs
        won = (side == 1).sum()
        return loss + bonus, {
            **metrics,
            "logps/reference": (theirs.detach(), pairs),
            "objective/win_rate": (won, pairs),
        }


def loss_settings(config: OnlineConfig, **changes: Any) -> TrainConfig:
    """The settings of the loss, for a learner on pairs; how the reference moves is the loop's."""
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(LossConfig)}
    return TrainConfig(**{**shared, "ref_update_every": 0, "ref_mix": 1.0, **changes})
