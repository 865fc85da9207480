"""Single responses with a label, good or bad: KTO and BCO."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import fastalign
from fastalign.runtime.metric import Total
from fastalign.train.config import TrainConfig
from fastalign.train.data.examples import pack_examples
from fastalign.train.data.formats import UNPAIRED
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.errors import UserError
from fastalign.train.methods.base import Method, Scored, Split, join, token_metrics
from fastalign.train.metrics import Metrics


class UnpairedMethod(Method):
    """Base: a loss of `fastalign.unpaired_loss`, with TRL's metrics of the two classes."""

    format = UNPAIRED.requiring("label")
    losses: tuple[str, ...] = ()

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        if self.config.loss not in self.losses:
            raise UserError(
                f"--loss {self.config.loss} is unknown to fastalign train {self.name}; legal: "
                f"{', '.join(self.losses)}"
            )
        self.options = dict(self.config.loss_options)

    def check_options(self, **given: Any) -> None:
        """Refuse wrong options before anything is loaded, by evaluating the loss of one token. `given`: what
        it needs besides."""
        one = torch.zeros(1)
        try:
            fastalign.unpaired_loss(
                one,
                one,
                torch.tensor([0, 1], dtype=torch.int32),
                one > 0,
                loss=self.config.loss,
                **given,
                **self.options,
            )
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from None

    def read(self, train: Sequence[TokenExample], evaluation: Sequence[TokenExample]) -> None:
        good = sum(bool(example.values["label"]) for example in train)
        print(f"labels: {good} true, {len(train) - good} false")

    def desirable(self, scored: Scored) -> torch.Tensor:
        return scored.column("label") > 0

    def report(self, scored: Scored, output: fastalign.UnpairedOutput) -> Metrics:
        metrics = {name: metric for name, metric in output.metrics().items() if name != "anchor"}
        for side, where in (("chosen", output.desirable), ("rejected", ~output.desirable)):
            metrics[f"count/{side}"] = Total((output.valid & where).sum(), output.valid.sum())
        return {**metrics, **token_metrics(scored, output.desirable)}

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        out = dict(means)
        if "rewards/chosen" in out and "rewards/rejected" in out:
            out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
        return out


class KTO(UnpairedMethod):
    """KTO (Ethayarajh et al. 2024, arXiv 2402.01306). Its baseline z0 comes from mismatched pairs: within
    every optimizer step (and the evaluation set), each prompt with the completion of the example before it,
    scored by policy and reference without gradient."""

    name, default_loss, losses = "kto", "kto", ("kto", "apo_zero_unpaired")

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self.mismatched = fastalign.losses.UNPAIRED[self.config.loss].mismatched
        self.check_options(**({"baseline": 0.0} if self.mismatched else {}))
        if self.mismatched and config.precompute_ref:
            raise UserError(
                "--precompute-ref: KTO's baseline needs the reference's log-probs of prompts with other "
                "examples' completions, which "
                "change from step to step; a cache does not hold them (--loss apo_zero_unpaired has no "
                "baseline)"
            )
        if self.mismatched and config.batch_size == 1:
            raise UserError(
                "--batch-size 1: KTO's baseline pairs each prompt with another completion of its step, so a "
                "step needs two"
            )

    def read(self, train: Sequence[TokenExample], evaluation: Sequence[TokenExample]) -> None:
        super().read(train, evaluation)
        if self.mismatched and 1 in (len(train), len(evaluation)):
            raise UserError(
                "KTO's baseline pairs each prompt with the completion of another example: one response alone "
                "has none"
            )

    def longest(self, train: Sequence[TokenExample], evaluation: Sequence[TokenExample]) -> int:
        longest = super().longest(train, evaluation)
        if not self.mismatched:
            return longest
        examples = (*train, *evaluation)
        prompt, completion = (
            max(len(e.prompt) for e in examples),
            max(len(e.completions[0]) for e in examples),
        )
        return max(longest, min(prompt + completion, self._limit()))

    def _limit(self) -> int:
        """The most tokens of a mismatched sequence."""
        budget = self.config.tokens_per_batch
        return min(self.max_length or budget, budget)

    def constants(self, lm: Any, split: Split, indices: Sequence[int]) -> dict[str, Any]:
        known: dict[str, Any] = {"num_items": len(indices)}
        if self.mismatched:
            known["baseline"] = self._baseline(lm, split, list(indices))
        return known

    @torch.no_grad()
    def _baseline(self, lm: Any, split: Split, indices: list[int]) -> torch.Tensor:
        before = (
            [indices[-1], *indices[:-1]] if len(indices) > 1 else [indices[0] - 1]
        )  # one left over at the end of an epoch
        budget, limit = self.config.tokens_per_batch, self._limit()
        mismatched = []
        for i, j in zip(indices, before):
            prompt = split.examples[i].prompt
            completion = split.examples[j].completions[0][
                : limit - len(prompt)
            ]  # which may be longer than the prompt's own
            mismatched.append(TokenExample(prompt, (completion,)))
        pairs = dataclasses.replace(split, examples=mismatched)
        scored = join(
            [
                self.score(lm, pairs, batch)
                for batch in pack_examples(mismatched, range(len(mismatched)), budget)
            ]
        )
        packed = scored.packed
        return fastalign.kto_baseline(
            scored.policy["logprob"], scored.fixed["ref_logprobs"], packed.cu_seqlens, mask=packed.mask
        )

    def loss(self, scored: Scored, *, training: bool, **known: Any) -> tuple[torch.Tensor, Metrics]:
        packed = scored.packed
        output = fastalign.unpaired_loss(
            scored.policy["logprob"],
            scored.fixed["ref_logprobs"],
            packed.cu_seqlens,
            self.desirable(scored),
            loss=self.config.loss,
            mask=packed.mask,
            **known,
            **self.options,
        )
        count = len(scored.examples)  # weighted by examples, the mean over the batches is the baseline itself
        kl = {"kl": (known["baseline"] * count, count)} if self.mismatched else {}
        return output.loss, {**self.report(scored, output), **kl}


class BCO(UnpairedMethod):
    """BCO (Jung et al. 2024, arXiv 2404.04656). Its reward shift delta is the running mean of the rewards of
    all responses seen: it is updated by every step before use, frozen in evaluation, saved in checkpoints. A
    `weight` column weighs undesirable responses."""

    name, default_loss, losses = "bco", "bco", ("bco",)
    joint = True

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        momentum = self.options.pop("momentum", None)
        try:
            self.delta = fastalign.BCODelta(momentum=momentum)
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from None
        if "omega" in self.options:
            raise UserError("--set omega: it is one number per response; give the data a 'weight' column")
        self.check_options(baseline=0.0)

    def state_dict(self) -> dict[str, Any]:
        return self.delta.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.delta.load_state_dict(state)

    def loss(self, scored: Scored, *, training: bool, **known: Any) -> tuple[torch.Tensor, Metrics]:
        packed = scored.packed
        weights = {"omega": scored.column("weight")} if "weight" in scored.examples[0].values else {}
        output = fastalign.unpaired_loss(
            scored.policy["logprob"],
            scored.fixed["ref_logprobs"],
            packed.cu_seqlens,
            self.desirable(scored),
            loss="bco",
            mask=packed.mask,
            state=self.delta.train(training),
            **weights,
            **self.options,
        )
        return output.loss, {**self.report(scored, output), "delta": (output.anchor, 1)}
