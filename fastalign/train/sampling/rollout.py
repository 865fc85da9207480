"""Responses sampled from the policy by transformers' `generate`."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Collection, Sequence
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
    ends a turn, and at the EOS tokens of the model's generation settings.

    With `other` and a `share` the samples come from the geometric mixture of the two models, token by token:
    proportional to lm^(1 - share) other^share, both at the temperature."""

    def __init__(
        self,
        lm: PackedCausalLM,
        tokenizer: Any,
        config: OnlineConfig,
        vocabulary: int | None = None,
        *,
        eos: Collection[int] | None = None,
        other: PackedCausalLM | None = None,
        share: float = 0.0,
    ):
        self.lm, self.tokenizer, self.batch = lm, tokenizer, config.sample_batch
        self.config, self.vocabulary, self.other, self.share = config, vocabulary, other, share
        to_tokens = ExampleTokenizer(tokenizer, template_options=config.template_options)
        self.eos = sorted(eos or to_tokens.special.ends | stops(lm.model.generation_config))
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

    def of(self, lm: PackedCausalLM, other: PackedCausalLM | None = None, share: float = 0.0) -> Sampler:
        """One for another model, or for a mixture, whose responses end where this one's do."""
        known = {"eos": self.eos, "other": other, "share": share}
        return Sampler(lm, self.tokenizer, self.config, self.vocabulary, **known)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[TokenExample], count: int, seed: int) -> list[Rollout]:
        """`count` responses to each prompt. Seed, weights and prompts determine them; torch's own random
        state is not touched."""
        wanted = [prompt for prompt in prompts for _ in range(count)]
        device, rollouts = self.lm.device, []
        with contextlib.ExitStack() as stack:
            model = stack.enter_context(self.lm.generating(self.settings))
            other = self.other and stack.enter_context(self.other.generating(self.settings))
            stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
            torch.manual_seed(seed)
            for start in range(0, len(wanted), self.batch):
                chunk, options = wanted[start : start + self.batch], {}
                if other is not None:
                    mixture = Mixture(other, [len(prompt.prompt) for prompt in chunk], self.share)
                    options["logits_processor"] = transformers.LogitsProcessorList([mixture])
                rollouts += self._generate(model, chunk, **options)
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


class Mixture(transformers.LogitsProcessor):
    """Makes the logits of a step of `generate` those of a geometric mixture: (1 - share) logits + share times
    those of `model` on the same tokens. `lengths`: of the prompts, which are left-padded."""

    def __init__(self, model: torch.nn.Module, lengths: Sequence[int], share: float):
        self.model, self.share, self.cache = model, share, None
        self.padding = [max(lengths) - length for length in lengths]
        self.takes = inspect.signature(model.forward).parameters

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.padding = torch.as_tensor(self.padding, device=input_ids.device)
        mask = (torch.arange(input_ids.shape[1], device=input_ids.device) >= self.padding[:, None]).long()
        new = slice(None) if self.cache is None else slice(-1, None)
        inputs = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, new], "logits_to_keep": 1}
        inputs = {name: value for name, value in inputs.items() if name in self.takes}
        cache = {} if self.cache is None else {"past_key_values": self.cache}
        output = self.model(
            input_ids=input_ids[:, new], attention_mask=mask, use_cache=True, **inputs, **cache
        )
        self.cache = getattr(output, "past_key_values", None)  # without one every step reads all tokens
        theirs = output.logits[:, -1][:, : scores.shape[1]].to(scores)
        theirs = torch.nn.functional.pad(theirs, (0, scores.shape[1] - theirs.shape[1]))
        # What is suppressed stays so, whatever its share; the other model does not know more than that.
        return torch.where(scores.isneginf(), scores, (1.0 - self.share) * scores + self.share * theirs)
