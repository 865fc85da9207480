"""What every online method does in a step: sample responses, have them scored, learn from them."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastalign.train.data.examples import Batch, Schedule, fingerprint, pack_examples
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.errors import TrainingError
from fastalign.train.methods.base import join
from fastalign.train.metrics import MetricSums
from fastalign.train.online_config import OnlineConfig
from fastalign.train.optimise import Optimizer
from fastalign.train.sampling.actor import Actor
from fastalign.train.sampling.advantages import Rewarded, shaped_rewards
from fastalign.train.sampling.rewards import Reward
from fastalign.train.sampling.rollout import Rollout, Sampler


class OnlineTask:
    """The loop's `Task` for the online methods: sampling, scores, evaluation. A subclass says what is learnt from a step's responses.

    All chance comes from the seed and the number of the step, so that a resumed run goes on with the same samples."""

    excludes_unscored = False  # whether a response without a score is left out; otherwise it ends the run

    def __init__(
        self,
        method: str,
        config: OnlineConfig,
        actor: Actor,
        sampler: Sampler,
        reward: Reward,
        train: Sequence[TokenExample],
        evaluation: Sequence[TokenExample],
    ):
        self.method, self.config, self.actor, self.sampler, self.reward = method, config, actor, sampler, reward
        self.train, self.evaluation, self.evaluates = train, evaluation, bool(evaluation)
        self.schedule = Schedule(len(train), config)
        self.steps, self.steps_per_epoch = self.schedule.steps, self.schedule.steps_per_epoch
        self.data = fingerprint(train, evaluation)
        self.responses = 0  # sampled so far

    def describe(self) -> str:
        config = self.config
        samples = f"{config.samples_per_prompt} samples each, " if config.samples_per_prompt > 1 else ""
        return f"up to {config.batch_size} prompts each, {samples}loss {config.loss}"

    def modules(self) -> Mapping[str, torch.nn.Module]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        moves = {"reference": self.actor.reference.model.state_dict()} if self.config.ref_update_every else {}
        return {"responses": self.responses, **moves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.responses = int(state["responses"])
        if "reference" in state:
            self.actor.reference.model.load_state_dict(state["reference"])

    def step(self, step: int, optimizer: Optimizer) -> tuple[dict[str, float], int]:
        started = time.perf_counter()
        rollouts = self.sample([self.train[i] for i in self.schedule.indices(step)], self.config.samples_per_prompt, f"train/{step}")
        sampled = time.perf_counter()
        scores = self.scores(rollouts, f"step {step + 1}", self.excludes_unscored)
        metrics = self.learn(step, rollouts, scores, optimizer)
        if self.config.ref_update_every and (step + 1) % self.config.ref_update_every == 0:
            self.actor.update_reference(self.config.ref_mix)
        self.responses += len(rollouts)
        now = time.perf_counter()
        metrics |= {"episode": self.responses, "eps": len(rollouts) / (now - started), "time/sampling": sampled - started}
        return metrics, sum(rollout.example.tokens() for rollout in rollouts)

    def learn(self, step: int, rollouts: list[Rollout], scores: torch.Tensor, optimizer: Optimizer) -> dict[str, float]:
        """Update the weights; the step's metrics, "loss", "grad_norm" and "learning_rate" among them."""
        raise TypeError(f"{type(self).__name__} does not say what it learns")

    def evaluate(self) -> dict[str, float]:
        """From the same seed every time: what differs between two evaluations is the policy. "loss" is the negative objective."""
        rollouts = self.sample(self.evaluation, 1, "evaluation")
        seen = self.look(rollouts, [pack_examples([r.example for r in rollouts], range(len(rollouts)), self.config.tokens_per_batch)])
        sums = MetricSums()
        scores = self.scores(rollouts, "evaluation", may_lack=True)
        sums.add(shaped_rewards(self.config, self.rewarded(rollouts, scores, *seen), self.kl_coef())[1])
        metrics = sums.means()
        return {"loss": 0.0 - metrics.get("objective/rlhf_reward", math.nan), **metrics}

    def kl_coef(self) -> Any:
        return 0.0

    def sample(self, prompts: Sequence[TokenExample], count: int, purpose: str) -> list[Rollout]:
        return self.sampler(prompts, count, self.draw(purpose).getrandbits(60))

    def draw(self, purpose: str) -> random.Random:
        """A random generator of its own for every use of chance."""
        return random.Random(f"{self.config.seed}/{purpose}")

    def scores(self, rollouts: Sequence[Rollout], when: str, may_lack: bool) -> torch.Tensor:
        """[responses], on the CPU. An infinite score ends the run, and NaN (not scorable) unless some `may_lack` one."""
        scores = self.reward(rollouts)
        bad = scores.isinf() if may_lack else ~scores.isfinite()
        if bad.any():
            first = int(bad.nonzero()[0])
            raise TrainingError(
                f"{when}: the reward of {int(bad.sum())} of {len(scores)} responses is not finite; the first is "
                f"{float(scores[first])}, of {rollouts[first].text[:80]!r}"
                + ("" if may_lack else f" ({self.method} needs a score for each)")
            )
        return scores

    def look(self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Batch]]) -> tuple[list[Any], list[int]]:
        """(what the models say of every pack, the responses in the order of the packs)."""
        packs = [batch for batches in minibatches for batch in batches]
        return [self.actor.look(rollouts, batch) for batch in packs], [i for batch in packs for i in batch.members]

    def rewarded(self, rollouts: Sequence[Rollout], scores: torch.Tensor, seen: Sequence[Any], order: Sequence[int]) -> Rewarded:
        device, per_prompt = self.actor.lm.device, self.config.samples_per_prompt
        finished, lengths = torch.tensor([r.ended for r in rollouts]), torch.tensor([r.length for r in rollouts])
        columns = (scores, finished, lengths, torch.arange(len(rollouts)) // per_prompt)
        return Rewarded(join(seen), *(column[order].to(device) for column in columns))


def split_evenly(items: Sequence[int], parts: int) -> list[Sequence[int]]:
    """At most this many parts, whose sizes differ by at most one; none is empty."""
    parts = min(parts, len(items))
    bounds = [round(i * len(items) / parts) for i in range(parts + 1)]
    return [items[a:b] for a, b in zip(bounds, bounds[1:])]
