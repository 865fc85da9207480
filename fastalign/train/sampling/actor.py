"""The models of a run: what is trained, and what its samples are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import fastalign
from fastalign.train.data.examples import Batch
from fastalign.train.methods.base import Scored
from fastalign.train.models.heads import ValueHead
from fastalign.train.models.packed import PackedCausalLM
from fastalign.train.sampling.rollout import Rollout


@dataclass
class Actor:
    """The policy, its value head (None: the method has none), and frozen models: the reference, and a DPO-trained one (RTO).

    Everything is scored at the sampling temperature, on one path: models with equal weights give equal bits."""

    lm: PackedCausalLM
    temperature: float = 1.0
    value_head: ValueHead | None = None
    reference: PackedCausalLM | None = None
    dpo: PackedCausalLM | None = None

    def score(self, packed: fastalign.PackedBatch) -> dict[str, torch.Tensor]:
        """logprob, entropy and (with a value head) value of the batch, [T] each, differentiable. Row t is the state before the
        token that it predicts."""
        if self.value_head is None:
            logits, values = self.lm.logits(packed), {}
        else:
            logits, hidden = self.lm.logits_and_hidden(packed)
            values = {"value": self.value_head(hidden)}
        stats = fastalign.token_stats(
            logits, packed.labels, outputs=("logprob", "entropy"), temperature=self.temperature, inplace_backward=True
        )
        return {"logprob": stats.logprob, "entropy": stats.entropy, **values}

    @torch.no_grad()
    def look(self, rollouts: Sequence[Rollout], batch: Batch) -> Scored:
        """What the models say of sampled responses, before anything is learnt from them."""
        packed = self.lm.to_device(batch.packed)
        fixed = {}
        for name, model in (("ref_logprobs", self.reference), ("dpo_logprobs", self.dpo)):
            if model is not None:
                fixed[name] = fastalign.token_logprobs(model.logits(packed), packed.labels, temperature=self.temperature)
        return Scored([rollouts[i].example for i in batch.members], packed, self.score(packed), fixed)

    @torch.no_grad()
    def update_reference(self, mix: float) -> None:
        """reference <- mix policy + (1 - mix) reference."""
        for old, new in zip(self.reference.model.parameters(), self.lm.model.parameters(), strict=True):
            old.copy_(new if mix == 1.0 else mix * new + (1.0 - mix) * old)
