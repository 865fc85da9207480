"""Sampling in which every response has a seed of its own: what stands beside it in the batch, and where a run
began, do not matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastalign.train.data.tokenise import TokenExample
from fastalign.train.sampling.rollout import Rollout, Sampler


class SeededSampler(Sampler):
    """A `Sampler` whose `each` gives a response per prompt and seed. `config` has temperature (0: the most likely
    token), top_p, top_k, max_new_tokens, sample_batch and template_options."""

    def __init__(self, lm: Any, tokenizer: Any, config: Any, vocabulary: int | None = None):
        super().__init__(lm, tokenizer, config, vocabulary)
        # Greedy: `OwnDraws` has left one token of each row.
        self.settings.update(do_sample=False, temperature=None, top_p=None, top_k=None)
        self.max_new_tokens, self.greedy = config.max_new_tokens, config.temperature == 0
        self.warpers = transformers.LogitsProcessorList()
        if not self.greedy:
            self.warpers.append(TemperatureLogitsWarper(float(config.temperature)))
            if config.top_k:
                self.warpers.append(TopKLogitsWarper(config.top_k))
            if config.top_p < 1:
                self.warpers.append(TopPLogitsWarper(config.top_p))

    @torch.no_grad()
    def each(self, prompts: Sequence[TokenExample], seeds: Sequence[int]) -> list[Rollout]:
        """One response to each prompt, all in one batch, determined by weights, prompt and seed up to rounding."""
        draws = OwnDraws(self.warpers, seeds, self.max_new_tokens)
        processors = transformers.LogitsProcessorList([] if self.greedy else [draws])
        with self.lm.generating(self.settings) as model:
            return self._generate(model, prompts, logits_processor=processors)


class OwnDraws(transformers.LogitsProcessor):
    """Leaves of each row the one token at which its distribution function passes the row's next uniform number."""

    def __init__(self, warpers: Any, seeds: Sequence[int], steps: int):
        numbers = [
            torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
        self.warpers, self.numbers, self.step = warpers, torch.stack(numbers), 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        shares = self.warpers(input_ids, scores.float()).double().softmax(-1).cumsum(-1)
        total = shares[:, -1:]
        goal = self.numbers[:, self.step, None].to(shares.device) * total
        goal = goal.minimum(total.nextafter(torch.zeros_like(total)))  # the product may round up to the total
        self.step += 1
        # right: a token of probability 0 is passed over, also by a number that is exactly 0.
        token = torch.searchsorted(shares, goal, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
