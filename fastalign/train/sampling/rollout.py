"""Responses sampled from the policy by transformers' `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from fastalign.train.data.specials import stops
from fastalign.train.data.tokenise import ExampleTokenizer, TokenExample
from fastalign.train.models.causal import PackedCausalLM
from fastalign.train.online_config import OnlineConfig


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled response. `example`: the tokens of its prompt and of itself, with the EOS it came to, and the
    columns of the prompt's line; `ended`: whether it came to one; `text`: what it says, without special
    tokens."""

    example: TokenExample
    ended: bool
    text: str

    @property
    def length(self) -> int:
        """Tokens of the response, EOS included."""
        return len(self.example.completions[0])


class Sampler:
    """Samples `samples_per_prompt` responses to every prompt, those of one prompt behind each other.

    Everything that the model's own generation settings would add (top-k, penalties, ...) is left out: the
    samples are drawn from the very distribution that the trainer scores. Only ids that a model beside the
    policy does not know are never drawn (`vocabulary`: how many it knows): the padding of the policy's
    vocabulary, of which no text is made. Generation stops at the tokenizer's EOS, where the chat template
    ends a turn, and at the EOS tokens of the model's generation settings."""

    def __init__(
        self, lm: PackedCausalLM, tokenizer: Any, config: OnlineConfig, vocabulary: int | None = None
    ):
        self.lm, self.tokenizer, self.batch = lm, tokenizer, config.sample_batch
        to_tokens = ExampleTokenizer(tokenizer, template_options=config.template_options)
        self.eos = sorted(to_tokens.special.ends | stops(lm.model.generation_config))
        if tokenizer.eos_token_id >= lm.vocabulary():
            lm.check_tokens("model", [torch.tensor([tokenizer.eos_token_id])])
        pad, rows = tokenizer.pad_token_id, lm.head().weight.shape[0]
        self.pad = pad if pad is not None and pad < lm.vocabulary() else tokenizer.eos_token_id
        beyond = list(range(min(vocabulary or rows, lm.vocabulary()), rows))
        self.settings = transformers.GenerationConfig(
            do_sample=True,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=self.eos,
            pad_token_id=self.pad,
            bos_token_id=tokenizer.bos_token_id,
            suppress_tokens=beyond or None,
        )

    @torch.no_grad()
    def __call__(self, prompts: Sequence[TokenExample], count: int, seed: int) -> list[Rollout]:
        """`count` responses to each prompt. Seed, weights and prompts determine them; torch's own random
        state is not touched."""
        wanted = [prompt for prompt in prompts for _ in range(count)]
        device, rollouts = self.lm.device, []
        with (
            self.lm.generating(self.settings) as model,
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(seed)
            for start in range(0, len(wanted), self.batch):
                rollouts += self._generate(model, wanted[start : start + self.batch])
        return rollouts

    def _generate(self, model: Any, chunk: Sequence[TokenExample], **options: Any) -> list[Rollout]:
        """A response to each of these prompts. options: of `generate`."""
        width, device = max(len(prompt.prompt) for prompt in chunk), self.lm.device
        ids = torch.full((len(chunk), width), self.pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(chunk):  # left-padded: all responses begin in the same column
            ids[row, width - len(prompt.prompt) :] = prompt.prompt
            mask[row, width - len(prompt.prompt) :] = 1
        sampled = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=self.settings,
            **options,
        )
        return [self._rollout(*pair) for pair in zip(chunk, sampled[:, width:].tolist())]

    def _rollout(self, prompt: TokenExample, ids: list[int]) -> Rollout:
        end = next((i for i, token in enumerate(ids) if token in self.eos), None)
        ids, words = (ids, ids) if end is None else (ids[: end + 1], ids[:end])  # what follows is padding
        example = TokenExample(prompt.prompt, (torch.tensor(ids, dtype=torch.int32),), prompt.values)
        return Rollout(example, end is not None, self.tokenizer.decode(words, skip_special_tokens=True))
