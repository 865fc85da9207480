"""Token-level DPO (Zeng et al. 2024, arXiv 2404.11999): the pair's margin holds the KL between whole
distributions at every token."""

from __future__ import annotations

from typing import Any

import torch

from fastalign.train.config import TrainConfig
from fastalign.train.data.examples import Batch
from fastalign.train.errors import UserError
from fastalign.train.methods.base import Scored, Split
from fastalign.train.methods.dpo import PreferenceMethod


class TDPO(PreferenceMethod):
    """tdpo1 and tdpo2. The reference model runs beside the policy: its whole distributions, not only its
    log-probs, enter the loss."""

    name, default_loss = "tdpo", "tdpo2"
    exact_kl = True

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        if config.precompute_ref:
            raise UserError(
                "fastalign train tdpo needs the reference's whole distribution at every token: cached "
                "log-probs of the data's tokens "
                "(--precompute-ref) do not hold it"
            )

    def score(self, lm: Any, split: Split, batch: Batch, *, policy_only: bool = False) -> Scored:
        packed = lm.to_device(batch.packed)
        with torch.no_grad():
            ref = split.reference.lm.scores(packed)
        outputs = ("ref_logprob", "kl_ref_policy", *self.outputs)
        stats = lm.scores(packed).stats(
            self.labels(packed), ref=ref, outputs=outputs, differentiable=("logprob", "kl_ref_policy")
        )
        policy = {name: value for name, value in stats._asdict().items() if value is not None}
        return Scored(
            [split.examples[i] for i in batch.members],
            packed,
            policy,
            {"ref_logprobs": policy.pop("ref_logprob")},
        )
