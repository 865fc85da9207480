"""Supervised fine-tuning: the likelihood of texts to imitate. Every other method starts from its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastalign.train.config import TrainConfig
from fastalign.train.data.formats import supervised
from fastalign.train.data.tokenise import TokenExample
from fastalign.train.errors import UserError
from fastalign.train.methods.base import Method, Scored, Split, token_metrics
from fastalign.train.metrics import Metrics

_METRICS = ("entropy", "mean_token_accuracy")


class SFT(Method):
    """-(1/N) sum of log pi(y_t | y_<t) over the N scored tokens of an optimizer step (Ouyang et al. 2022, arXiv
    2203.02155). Which tokens are scored: `--loss-on`, see `formats.supervised`.

    `--l1-coef` c adds c |theta - theta_0|_1, with theta_0 the weights that training starts from (PAFT, Pentyala
    et al. 2024, arXiv 2406.17923), as a proximal step after each update: see `shrink`."""

    name, default_loss = "sft", "sft"
    needs_reference = False

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        if self.config.loss != "sft":
            raise UserError(f"--loss {self.config.loss} is unknown to fastalign train sft; legal: sft")
        if config.loss_options:
            raise UserError(f"loss 'sft' has no option {next(iter(config.loss_options))!r}; legal: none")
        if config.loss_on == "all" and config.overlong == "truncate_prompt":
            raise UserError(
                "--overlong truncate_prompt: with --loss-on all there is no prompt; legal: error, drop, "
                "truncate_completion"
            )
        self.format = supervised(config.loss_on)
        self.outputs = ("logprob", *(("entropy", "is_top1") if config.token_metrics else ()))
        self.origin: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    def read(self, train: Sequence[TokenExample], evaluation: Sequence[TokenExample]) -> None:
        tokens = sum(example.tokens() for example in train)
        print(f"learnt: {_scored(train)} of the training data's {tokens} tokens")

    def start(self, lm: Any) -> None:
        # A resumed run begins with the same weights, whose hash it compares, and reads its checkpoint after this.
        if self.config.l1_coef:
            weights = [weight for weight in lm.model.parameters() if weight.requires_grad]
            self.origin = [(weight, weight.detach().clone()) for weight in weights]

    def constants(self, lm: Any, split: Split, indices: Sequence[int]) -> dict[str, Any]:
        return {"tokens": _scored([split.examples[i] for i in indices])}

    def loss(self, scored: Scored, *, training: bool, **known: Any) -> tuple[torch.Tensor, Metrics]:
        mask = scored.packed.mask
        loss = -scored.policy["logprob"].where(mask, 0).sum() / known["tokens"]
        every = torch.ones(len(scored.packed.cu_seqlens) - 1, dtype=torch.bool, device=mask.device)
        found = token_metrics(scored, every)
        return loss, {name: found[name] for name in _METRICS if name in found}

    @torch.no_grad()
    def updated(self, rate: float, metrics: Mapping[str, float]) -> dict[str, float]:
        """l1/zeros: share of the weights that are what they were at the start; l1/norm: the sum of the absolute
        changes."""
        if not self.origin:
            return {}
        zeros, norm, size = 0, 0.0, 0
        for weight, start in self.origin:
            weight.copy_(start + shrink(weight - start, rate * self.config.l1_coef))
            change = weight - start
            zeros, norm, size = zeros + (change == 0).sum(), norm + change.abs().sum(), size + weight.numel()
        return {"l1/zeros": float(zeros) / size, "l1/norm": float(norm)}


def shrink(change: torch.Tensor, threshold: float) -> torch.Tensor:
    """Soft threshold, the proximal step of threshold * |change|_1: sign(change) max(|change| - threshold, 0)."""
    return torch.nn.functional.softshrink(change, threshold)


def _scored(examples: Sequence[TokenExample]) -> int:
    """How many tokens are scored."""
    return sum(example.scored_tokens() for example in examples)
