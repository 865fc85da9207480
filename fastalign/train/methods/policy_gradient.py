"""What PPO, GRPO, RLOO and REINFORCE++ share: several updates of a policy-gradient loss on the responses of a
step."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastalign
from fastalign.train.config import check_booleans
from fastalign.train.data.examples import Batch, fingerprint, pack_examples
from fastalign.train.errors import UserError
from fastalign.train.methods.base import Scored
from fastalign.train.methods.online import OnlineMethod, split_evenly
from fastalign.train.metrics import MetricSums
from fastalign.train.models.causal import PackedCausalLM
from fastalign.train.models.heads import ValueHead
from fastalign.train.models.scorer import score_head, score_shift
from fastalign.train.online_config import OnlineConfig
from fastalign.train.optimise import Optimizer, learning_rate
from fastalign.train.sampling.actor import Actor
from fastalign.train.sampling.advantages import ESTIMATORS, Estimate, estimate
from fastalign.train.sampling.rewards import ModelReward, Reward
from fastalign.train.sampling.rollout import Rollout

# Fields of a policy preset that have settings of their own.
_OWN_FLAGS = {"kl_coef": "--kl-coef", "kl_kind": "--kl-kind", "entropy_coef": "--entropy-coef"}


@dataclass
class Part:
    """A pack of a minibatch: what was seen of it before the first update, and its share of the estimate."""

    seen: Scored
    advantages: Tensor
    returns: Tensor | None
    mask: Tensor
    tokens: int  # that are learnt from
    sequences: int


class PolicyGradient(OnlineMethod):
    """Sample, score, estimate advantages over the whole step, then `rollout_epochs` passes of `minibatches`
    updates each. A subclass names its `estimator`, a row of `ESTIMATORS`.

    The responses are dealt to minibatches and packs once per step; the old log-probs come from these very
    packs, so that the first update of a step sees ratios of exactly 1."""

    estimator: str

    def __init__(self, config: OnlineConfig, **options: Any):
        super().__init__(config, **options)
        self.preset, target = self._resolve_loss(), config.kl_target
        self.controller = (
            None
            if target is None
            else fastalign.AdaptiveKLController(self.config.kl_coef, target, config.kl_horizon)
        )

    @property
    def compares_samples(self) -> bool:
        return not ESTIMATORS[self.estimator].per_token

    def _resolve_loss(self) -> fastalign.PolicyPreset:
        """The preset that --loss and --set name. Raises `UserError` that lists the legal names, or says why
        the trainer cannot serve it."""
        config = self.config
        for name, flag in _OWN_FLAGS.items():
            if name in config.loss_options:
                raise UserError(f"--set {name} is given by {flag} here")
        for name in ("kl_clamp", "kl_bias_correction"):
            if name in config.loss_options and not (config.kl_coef and config.kl_in == "loss"):
                raise UserError(
                    f"--set {name} has no effect: it is of the KL in the loss (--kl-in loss and --kl-coef "
                    "above 0)"
                )
        options = {"entropy_coef": config.entropy_coef} | (
            {"kl_kind": config.kl_kind} if config.kl_in == "loss" else {}
        )
        try:
            check_booleans(config.loss_options, fastalign.policy_losses.PolicyPreset)
            preset, _ = fastalign.policy_losses.resolve(config.loss, {**config.loss_options, **options})
            if preset.aggregation == "seq_mean_token_sum_norm" and preset.norm_length is None:
                preset = preset.replace(norm_length=config.max_new_tokens)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from None
        if preset.is_mode is not None:
            raise UserError(
                "--set is_mode corrects for a sampler with other weights, and this trainer samples from the "
                "policy itself"
            )
        if preset.needs_sequence_values and not self.compares_samples:
            fitting = [
                name for name, p in fastalign.policy_losses.PRESETS.items() if not p.needs_sequence_values
            ]
            raise UserError(
                f"--loss {config.loss} takes one advantage per response, and {self.name} has one per token; "
                f"legal: {', '.join(fitting)}"
            )
        return preset

    def start(self, actor: Actor, reward: Reward, directory: str | None) -> None:
        actor.differentiable = ("logprob", "entropy") if self.preset.entropy_coef else ("logprob",)
        if ESTIMATORS[self.estimator].reads_values:
            actor.value_head = self._value_head(actor.lm, reward, directory)

    def _value_head(self, lm: PackedCausalLM, reward: Reward, directory: str | None) -> ValueHead:
        """The value head that an earlier run of this method left beside the model in `directory`; else a new
        one: that of the reward model where its hidden states have the policy's size, or zeros."""
        size = lm.model.get_output_embeddings().weight.shape[1]
        head = ValueHead(size).to(lm.device)
        if directory is not None and head.load_beside(directory, method=self.name):
            print(f"value head: that of the {self.name.upper()} run in {directory}")
            return head
        source = score_head(reward.scorer.model) if isinstance(reward, ModelReward) else None
        if source is not None and source.weight.shape == head.linear.weight.shape:
            with torch.no_grad():
                head.linear.weight.copy_(source.weight)
                if source.bias is not None:
                    head.linear.bias.copy_(source.bias)
                head.linear.bias += score_shift(reward.scorer.model)
            print("value head: that of the reward model")
        return head

    def begin(self, *parts: Any) -> None:
        super().begin(*parts)
        self.data = fingerprint(self.train, self.evaluation, self.texts)

    def modules(self) -> Mapping[str, torch.nn.Module]:
        return {} if self.actor.value_head is None else {"value_head": self.actor.value_head}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | (
            {} if self.controller is None else {"controller": self.controller.state_dict()}
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])

    def kl_coef(self) -> float | Tensor:
        return self.config.kl_coef if self.controller is None else self.controller.value

    def learn(
        self, step: int, rollouts: list[Rollout], scores: Tensor, optimizer: Optimizer
    ) -> dict[str, float]:
        config, draw = self.config, self.draw(f"updates/{step}")
        examples = [rollout.example for rollout in rollouts]
        dealt = split_evenly(draw.sample(range(len(rollouts)), len(rollouts)), config.minibatches)
        minibatches = [pack_examples(examples, chosen, config.tokens_per_batch) for chosen in dealt]
        seen, order = self.look(rollouts, minibatches)
        found = estimate(self.estimator, config, self.rewarded(rollouts, scores, seen, order), self.kl_coef())
        parts, sums, updates = _cut(found, seen, minibatches), MetricSums(), 0
        sums.add(found.metrics)
        for chosen in self._turns(len(parts), draw):
            if not any(part.tokens for part in parts[chosen]):
                continue  # all of it is left out
            done = self._update(parts[chosen], optimizer, step, draw)
            if done is None:
                break
            sums.merge(done)
            updates += 1
        metrics = {"loss": 0.0, "grad_norm": 0.0} | sums.means()
        if self.controller is not None:
            metrics["objective/kl_coef"] = float(self.controller.value)
            self.controller.update(metrics["objective/kl"], len(rollouts))
        return metrics | {
            "policy/updates": updates,
            "learning_rate": learning_rate(step, self.steps, optimizer.config),
        }

    def _turns(self, count: int, draw: random.Random) -> list[int]:
        """The minibatches in the order of their updates: as they were dealt, then in a new order in every
        further pass."""
        passes = [list(range(count))] + [
            draw.sample(range(count), count) for _ in range(self.config.rollout_epochs - 1)
        ]
        return [chosen for each in passes for chosen in each]

    def _update(
        self, parts: list[Part], optimizer: Optimizer, step: int, draw: random.Random
    ) -> MetricSums | None:
        """One update on a minibatch: its metrics; None if the policy has moved too far for it, so that it was
        not made."""
        sums, total = MetricSums(), 0.0
        for loss in (*self._policy_losses(parts, sums), *self._text_losses(draw, sums)):
            loss.backward()
            total = total + loss.detach()
        sums.add({"loss": (total, 1), "grad_norm": (optimizer.clip(), 1)})
        means = sums.means()  # the update's only transfer from the device
        if self.config.target_kl is not None and means["policy/approxkl"] > 1.5 * self.config.target_kl:
            optimizer.discard()
            return None
        optimizer.update(step, means)
        return sums

    def _policy_losses(self, parts: list[Part], sums: MetricSums) -> Iterator[Tensor]:
        """The loss of each pack; together they are the minibatch's, whatever number of packs it needs."""
        config, counts_tokens = self.config, self.preset.aggregation == "token_mean"
        tokens, router = sum(part.tokens for part in parts), self.actor.lm.router
        whole = sum(part.seen.packed.mask.numel() for part in parts)
        items = tokens if counts_tokens else sum(part.sequences for part in parts)
        in_loss = config.kl_in == "loss" and bool(config.kl_coef)
        for part in parts:
            now, packed = self.actor.score(part.seen.packed), part.seen.packed
            penalty = (
                {"ref_logprobs": part.seen.fixed["ref_logprobs"], "kl_coef": self.kl_coef()}
                if in_loss
                else {}
            )
            output = fastalign.policy_loss(
                now["logprob"],
                part.seen.policy["logprob"],
                part.advantages,
                loss=self.preset,
                cu_seqlens=packed.cu_seqlens,
                mask=part.mask,
                entropy=now["entropy"] if self.preset.entropy_coef else now["entropy"].detach(),
                num_items=None if self.preset.aggregation == "token_sum" else items,
                **penalty,
            )
            sums.add(output.metrics())
            loss = output.loss
            if part.returns is not None:
                value = fastalign.value_loss(
                    now["value"],
                    part.seen.policy["value"],
                    part.returns,
                    mask=part.mask,
                    clip=config.value_clip or None,
                    num_items=tokens,
                )
                # The explained variance of a step is that before its first update, over all packs: see
                # advantages.estimate.
                sums.add(
                    {
                        name: metric
                        for name, metric in value.metrics().items()
                        if name != "val/explained_variance"
                    }
                )
                loss = loss + config.vf_coef * value.loss
            if router is not None:
                loss = loss + router.part(packed.mask.numel(), whole, sums)
            yield loss

    def _text_losses(self, draw: random.Random, sums: MetricSums) -> Iterator[Tensor]:
        """PPO-ptx: the weighted mean loss per token on texts drawn for this update, pack by pack."""
        if not self.texts:
            return
        chosen = draw.sample(range(len(self.texts)), min(self.config.ptx_batch, len(self.texts)))
        tokens = sum(len(self.texts[i].completions[0]) for i in chosen)
        for batch in pack_examples(self.texts, chosen, self.config.tokens_per_batch):
            packed = self.actor.lm.to_device(batch.packed)
            loss = -self.actor.lm.scores(packed).stats(packed.labels).logprob.sum()
            sums.add({"ptx/nll": (loss.detach(), packed.mask.sum())})
            yield self.config.ptx_coef / tokens * loss


def _cut(found: Estimate, seen: Sequence[Scored], minibatches: Sequence[Sequence[Batch]]) -> list[list[Part]]:
    """The step's estimate, cut along its packs, by minibatch."""
    tokens = [scored.packed.mask.numel() for scored in seen]
    sequences = [len(scored.packed.cu_seqlens) - 1 for scored in seen]
    masks = found.mask.split(tokens)
    advantages = found.advantages.split(tokens if found.per_token else sequences)
    returns = found.returns.split(tokens) if found.returns is not None else [None] * len(seen)
    filled = [
        fastalign.sequence_sum(mask.float(), scored.packed.cu_seqlens) > 0
        for mask, scored in zip(masks, seen)
    ]
    counts = torch.stack(
        [torch.stack([mask.sum(), full.sum()]) for mask, full in zip(masks, filled)]
    ).tolist()
    parts = iter([Part(*each, *count) for *each, count in zip(seen, advantages, returns, masks, counts)])
    return [[next(parts) for _ in batches] for batches in minibatches]
