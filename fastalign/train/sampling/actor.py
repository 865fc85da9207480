"""The models of a run: what is trained, and what its samples are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import fastalign
from fastalign.train.data.examples import Batch
from fastalign.train.methods.base import Scored
from fastalign.train.models.causal import PackedCausalLM
from fastalign.train.models.heads import ValueHead
from fastalign.train.sampling.rollout import Rollout


@dataclass
class Actor:
    """The policy, its value head (None: the method has none), and frozen models: the reference, and a
    DPO-trained one (RTO). `differentiable`: what the loss reads of logprob and entropy.

    Everything is scored at the sampling temperature, on one path: models with equal weights give equal
    bits."""

    lm: PackedCausalLM
    temperature: float = 1.0
    value_head: ValueHead | None = None
    reference: PackedCausalLM | None = None
    dpo: PackedCausalLM | None = None
    differentiable: tuple[str, ...] = ("logprob", "entropy")

    def score(self, packed: fastalign.PackedBatch) -> dict[str, torch.Tensor]:
        """logprob, entropy and (with a value head) value of the batch, [T] each, differentiable. Row t is the
        state before the token that it predicts."""
        scores = self.lm.scores(packed)
        values = {} if self.value_head is None else {"value": self.value_head(scores.hidden)}
        stats = scores.stats(
            packed.labels,
            outputs=("logprob", "entropy"),
            differentiable=self.differentiable,
            temperature=self.temperature,
        )
        return {"logprob": stats.logprob, "entropy": stats.entropy, **values}

    @torch.no_grad()
    def look(self, rollouts: Sequence[Rollout], batch: Batch) -> Scored:
        """What the models say of sampled responses, before anything is learnt from them."""
        packed = self.lm.to_device(batch.packed)
        fixed = {}
        for name, model in (("ref_logprobs", self.reference), ("dpo_logprobs", self.dpo)):
            if model is not None:
                fixed[name] = model.scores(packed).stats(packed.labels, temperature=self.temperature).logprob
        return Scored([rollouts[i].example for i in batch.members], packed, self.score(packed), fixed)
