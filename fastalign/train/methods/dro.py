"""Single responses with a reward: DRO-V."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

import fastalign
from fastalign.train.config import TrainConfig, check_booleans
from fastalign.train.data.examples import Batch
from fastalign.train.data.formats import UNPAIRED
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.errors import UserError
from fastalign.train.methods.base import Scored, Split
from fastalign.train.methods.kto import UnpairedMethod
from fastalign.train.metrics import Metrics
from fastalign.train.models.heads import ValueHead


class DRO(UnpairedMethod):
    """DRO-V (Richemond et al. 2024, arXiv 2405.19107): (r - V(x) - tau D)^2 / 2.

    The reward r is the column `score`, or the label as 1 or 0, standardised to mean 0 and variance 1 over the
    training data (--set standardise=false: as it stands). V is a linear head on the policy's hidden state at
    the last token of the prompt, trained by the same optimizer and saved as value_head.safetensors; the paper
    has a value network of its own."""

    name, default_loss, losses = "dro", "dro", ("dro",)
    format = UNPAIRED

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        check_booleans(self.options, SimpleNamespace(standardise=True, rescale=True))
        self.standardise = self.options.pop("standardise", True)
        for name in ("rewards", "values"):
            if name in self.options:
                raise UserError(
                    f"--set {name}: rewards are the data's column 'score', values come from the value head"
                )
        self.check_options(rewards=torch.zeros(1), values=torch.zeros(1))
        self.mean, self.deviation = 0.0, 1.0

    def read(self, train: Sequence[TokenExample], evaluation: Sequence[TokenExample]) -> None:
        self.reward_column = "score" if "score" in train[0].values else "label"
        for examples in (train, evaluation):
            if examples and self.reward_column not in examples[0].values:
                raise UserError(
                    "fastalign train dro needs a 'score' or a 'label' in every line, and "
                    f"{self.reward_column!r} is not in all of the data"
                )
        rewards = [float(example.values[self.reward_column]) for example in train]
        mean, deviation = statistics.fmean(rewards), statistics.pstdev(rewards)
        if self.standardise:
            self.mean, self.deviation = mean, deviation or 1.0
        how = "standardised" if self.standardise else "as they stand"
        print(
            f"rewards: column {self.reward_column}, mean {mean:.4g}, standard deviation {deviation:.4g}, "
            f"{how}"
        )

    def start(self, lm: Any) -> None:
        self.head = ValueHead(lm.head().weight.shape[1]).to(lm.device)

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"value_head": self.head}

    def score(self, lm: Any, split: Split, batch: Batch, *, policy_only: bool = False) -> Scored:
        packed = lm.to_device(batch.packed)
        examples = [split.examples[i] for i in batch.members]
        fixed = {} if policy_only else {"ref_logprobs": split.reference(batch, packed)}
        scores = lm.scores(packed)
        last = packed.cu_seqlens[:-1].long() + torch.tensor(
            [len(e.prompt) - 1 for e in examples], device=scores.hidden.device
        )
        values = self.head(scores.hidden[last])
        stats = self.token_stats(scores, packed.labels)
        policy = {name: value for name, value in stats._asdict().items() if value is not None}
        return Scored(examples, packed, {**policy, "values": values}, fixed)

    def constants(self, lm: Any, split: Split, indices: Sequence[int]) -> dict[str, Any]:
        return {"num_items": len(indices)}

    def desirable(self, scored: Scored) -> torch.Tensor:
        return (
            scored.column("label") > 0
            if "label" in scored.examples[0].values
            else scored.column(self.reward_column) > self.mean
        )

    def loss(self, scored: Scored, *, training: bool, **known: Any) -> tuple[torch.Tensor, Metrics]:
        packed, values = scored.packed, scored.policy["values"]
        rewards = (scored.column(self.reward_column) - self.mean) / self.deviation
        output = fastalign.unpaired_loss(
            scored.policy["logprob"],
            scored.fixed["ref_logprobs"],
            packed.cu_seqlens,
            self.desirable(scored),
            loss="dro",
            mask=packed.mask,
            rewards=rewards,
            values=values,
            **known,
            **self.options,
        )
        error = (rewards - values.detach()) ** 2
        count = len(scored.examples)
        metrics = {"value/mean": (values.detach().sum(), count), "value/squared_error": (error.sum(), count)}
        return output.loss, {**self.report(scored, output), **metrics}
