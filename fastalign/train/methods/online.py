"""What a method that learns from the policy's own samples is, and what each of them does in a step: sample
responses, have them scored, learn from them."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import torch

from fastalign.train.config import check_settings
from fastalign.train.data.examples import Batch, Schedule, fingerprint, pack_examples
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.errors import TrainingError, UserError
from fastalign.train.methods import METHODS, check_kind
from fastalign.train.methods.base import Learner, join
from fastalign.train.metrics import MetricSums
from fastalign.train.models.reference import mix_weights
from fastalign.train.online_config import PRESETS, OnlineConfig
from fastalign.train.optimise import Optimizer
from fastalign.train.sampling.actor import Actor
from fastalign.train.sampling.advantages import Rewarded, shaped_rewards
from fastalign.train.sampling.rewards import Reward
from fastalign.train.sampling.rollout import Rollout, Sampler


class OnlineMethod(Learner):
    """Base of the methods that learn from the policy's own samples, and the loop's `Task`: sampling, scores,
    evaluation. A subclass says in `learn` what is learnt from a step's responses.

    All chance comes from the seed and the number of the step, so that a resumed run goes on with the same
    samples.

    Args:
        config: the settings that were given. `self.config` has the preset's and the method's values where
            none was given.
        texts_in_memory: whether texts to mix in are given in place of `config.ptx_data`.

    Raises:
        UserError: settings that exclude each other, or would have no effect."""

    # Whether it compares the samples for one prompt: it needs two at least, and leaves out a response that
    # the reward cannot score. Otherwise such a response ends the run.
    compares_samples = False
    # Whether the reference, too, is sampled from.
    samples_reference = False

    def __init__(self, config: OnlineConfig, *, texts_in_memory: bool = False):
        check_kind(self.name, config, OnlineConfig)
        row = METHODS[self.name]
        check_settings(config, row.settings, f"fastalign train {self.name}")
        defaults = {**row.defaults, **PRESETS.get(config.preset or "", {})}
        if config.dpo_model is not None:
            defaults = {"dpo_coef": 0.05, "dpo_clip": 0.05, **defaults}
        missing = {name: value for name, value in defaults.items() if getattr(config, name) is None}
        self.method = self.name  # what the loop calls it
        self.config = dataclasses.replace(config, **missing)
        self._refuse_vain(config, texts_in_memory or config.ptx_data is not None)

    def _refuse_vain(self, given: OnlineConfig, has_texts: bool) -> None:
        """Refuse settings that exclude each other, or would have no effect."""
        config = self.config
        if config.kl_target is not None and not config.kl_coef:
            raise UserError("--kl-target adapts --kl-coef, which must not be 0 then")
        if config.kl_target is None and config.kl_horizon != OnlineConfig.kl_horizon:
            raise UserError("--kl-horizon has no effect without --kl-target")
        if not config.kl_coef and (given.kl_in is not None or given.kl_kind is not None):
            raise UserError("--kl-in and --kl-kind have no effect with --kl-coef 0")
        if config.kl_kind == "k3+" and config.kl_in == "reward":
            raise UserError(
                "--kl-kind k3+ differs from k3 in its gradient only, and a reward has none; choose k3, or "
                "--kl-in loss"
            )
        if config.ptx_coef and not has_texts:
            raise UserError(
                f"--ptx-coef is {config.ptx_coef:g}, so texts are needed: give --ptx-data, or --ptx-coef 0"
            )
        if (has_texts or config.ptx_batch != OnlineConfig.ptx_batch) and not config.ptx_coef:
            raise UserError("--ptx-data and --ptx-batch have no effect without --ptx-coef")
        if config.dpo_model is None and (config.dpo_coef is not None or config.dpo_clip is not None):
            raise UserError(
                "--dpo-coef, --dpo-clip and --preset rto weigh the reward of --dpo-model, which is missing"
            )
        if self.compares_samples and config.samples_per_prompt < 2:
            raise UserError(
                f"{self.name} compares samples for the same prompt: --samples-per-prompt must be at least 2, "
                f"not {config.samples_per_prompt}"
            )
        if config.ref_update_every and not (config.ref_model or self.needs_reference):
            raise UserError(
                "--ref-update-every: without --kl-coef or --ref-model there is no reference to update"
            )
        responses = config.batch_size * config.samples_per_prompt
        if given.minibatches is not None and given.minibatches > responses:
            raise UserError(f"--minibatches {given.minibatches} exceeds the {responses} responses of a step")

    @property
    def needs_reference(self) -> bool:
        """Whether it reads a reference model even where none is named."""
        return bool(self.config.kl_coef) or self.config.dpo_model is not None

    def start(self, actor: Actor, reward: Reward, directory: str | None) -> None:
        """Make what is trained besides the model. `directory`: where the model was loaded from."""

    def begin(
        self,
        actor: Actor,
        sampler: Sampler,
        reward: Reward,
        train: Sequence[TokenExample],
        evaluation: Sequence[TokenExample],
        texts: Sequence[TokenExample],
    ) -> None:
        """Take over what a run is made of. `texts`: to mix in (`ptx_data`)."""
        self.actor, self.sampler, self.reward = actor, sampler, reward
        self.train, self.evaluation, self.evaluates = train, evaluation, bool(evaluation)
        self.texts = texts
        self.schedule = Schedule(len(train), self.config)
        self.steps, self.steps_per_epoch = self.schedule.steps, self.schedule.steps_per_epoch
        self.data = fingerprint(train, evaluation)
        self.responses = 0  # sampled so far

    def describe(self) -> str:
        config = self.config
        samples = f"{config.samples_per_prompt} samples each, " if config.samples_per_prompt > 1 else ""
        return f"up to {config.batch_size} prompts each, {samples}loss {config.loss}"

    def state_dict(self) -> dict[str, Any]:
        moves = {"reference": self.actor.reference.model.state_dict()} if self.config.ref_update_every else {}
        return {"responses": self.responses, **moves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.responses = int(state["responses"])
        if "reference" in state:
            self.actor.reference.model.load_state_dict(state["reference"])

    def step(self, step: int, optimizer: Optimizer) -> tuple[dict[str, float], int]:
        started = time.perf_counter()
        rollouts = self.respond([self.train[i] for i in self.schedule.indices(step)], f"train/{step}")
        sampled = time.perf_counter()
        scores = self.scores(rollouts, f"step {step + 1}", self.compares_samples)
        metrics = self.learn(step, rollouts, scores, optimizer)
        if self.config.ref_update_every and (step + 1) % self.config.ref_update_every == 0:
            mix_weights(self.actor.reference, self.actor.lm, self.config.ref_mix)
        self.responses += len(rollouts)
        now = time.perf_counter()
        metrics |= {
            "episode": self.responses,
            "eps": len(rollouts) / (now - started),
            "time/sampling": sampled - started,
        }
        return metrics, sum(rollout.example.tokens() for rollout in rollouts)

    def learn(
        self, step: int, rollouts: list[Rollout], scores: torch.Tensor, optimizer: Optimizer
    ) -> dict[str, float]:
        """Update the weights; the step's metrics, "loss", "grad_norm" and "learning_rate" among them."""
        raise TypeError(f"{type(self).__name__} does not say what it learns")

    def evaluate(self) -> dict[str, float]:
        """From the same seed every time: what differs between two evaluations is the policy. "loss" is the
        negative objective."""
        rollouts = self.sample(self.evaluation, 1, "evaluation")
        seen = self.look(
            rollouts,
            [
                pack_examples(
                    [r.example for r in rollouts], range(len(rollouts)), self.config.tokens_per_batch
                )
            ],
        )
        sums = MetricSums()
        scores = self.evaluation_scores(rollouts)
        sums.add(shaped_rewards(self.config, self.rewarded(rollouts, scores, *seen), self.kl_coef())[1])
        metrics = sums.means()
        return {"loss": 0.0 - metrics.get("objective/rlhf_reward", math.nan), **metrics}

    def conclude(self) -> None: ...

    def kl_coef(self) -> Any:
        return 0.0

    def respond(self, prompts: Sequence[TokenExample], purpose: str) -> list[Rollout]:
        """What a step learns from: `samples_per_prompt` responses to each prompt, behind each other."""
        return self.sample(prompts, self.config.samples_per_prompt, purpose)

    def evaluation_scores(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        return self.scores(rollouts, "evaluation", may_lack=True)

    def sample(self, prompts: Sequence[TokenExample], count: int, purpose: str) -> list[Rollout]:
        return self.sampler(prompts, count, self.draw(purpose).getrandbits(60))

    def draw(self, purpose: str) -> random.Random:
        """A random generator of its own for every use of chance."""
        return random.Random(f"{self.config.seed}/{purpose}")

    def scores(self, rollouts: Sequence[Rollout], when: str, may_lack: bool) -> torch.Tensor:
        """[responses], on the CPU. An infinite score ends the run, and NaN (not scorable) unless some
        `may_lack` one."""
        scores = self.reward(rollouts)
        bad = scores.isinf() if may_lack else ~scores.isfinite()
        if bad.any():
            first = int(bad.nonzero()[0])
            raise TrainingError(
                f"{when}: the reward of {int(bad.sum())} of {len(scores)} responses is not finite; the first "
                "is "
                f"{float(scores[first])}, of {rollouts[first].text[:80]!r}"
                + ("" if may_lack else f" ({self.name} needs a score for each)")
            )
        return scores

    def look(
        self, rollouts: Sequence[Rollout], minibatches: Sequence[Sequence[Batch]]
    ) -> tuple[list[Any], list[int]]:
        """(what the models say of every pack, the responses in the order of the packs)."""
        packs = [batch for batches in minibatches for batch in batches]
        return [self.actor.look(rollouts, batch) for batch in packs], [
            i for batch in packs for i in batch.members
        ]

    def rewarded(
        self, rollouts: Sequence[Rollout], scores: torch.Tensor, seen: Sequence[Any], order: Sequence[int]
    ) -> Rewarded:
        device, per_prompt = self.actor.lm.device, self.config.samples_per_prompt
        finished, lengths = (
            torch.tensor([r.ended for r in rollouts]),
            torch.tensor([r.length for r in rollouts]),
        )
        columns = (scores, finished, lengths, torch.arange(len(rollouts)) // per_prompt)
        return Rewarded(join(seen), *(column[order].to(device) for column in columns))


def split_evenly(items: Sequence[int], parts: int) -> list[Sequence[int]]:
    """At most this many parts, whose sizes differ by at most one; none is empty."""
    parts = min(parts, len(items))
    bounds = [round(i * len(items) / parts) for i in range(parts + 1)]
    return [items[a:b] for a, b in zip(bounds, bounds[1:])]
