"""From texts to token ids: where the prompt ends, which EOS is learnt, what happens to over-long examples.

**Boundary.** Prompt and completion are tokenised together, as one text, and the prompt alone. The prompt's part is the longest run of
tokens that the prompt alone and the prompt with each of its completions have in common. Usually that is the whole prompt. Where a
token straddles the boundary (" a" + "bc" may become " abc"), the boundary moves left until all completions continue from the very
same tokens: what follows is scored in each, so the comparison stays fair. Examples whose boundary moved are counted.

**EOS.** A completion ends with the EOS that the model must emit. A chat template that puts white space after it ("<|im_end|>\\n") has
that cut off, since generation stops at EOS; a text without EOS gets one.

**Length.** The limit of a sequence is `max_length`, and an equal share of the token budget where an example's sequences together exceed it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from fastalign.train.errors import DataError, UserError
from fastalign.train.formats import Format, Messages, Text, Texts, common_prefix


@dataclass(frozen=True, slots=True)
class TokenExample:
    """Token ids (int32 tensors) of a prompt and its completions, each with its EOS, and the example's numbers. A pair has the completions
    (chosen, rejected)."""

    prompt: torch.Tensor
    completions: tuple[torch.Tensor, ...]
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def chosen(self) -> torch.Tensor:
        return self.completions[0]

    @property
    def rejected(self) -> torch.Tensor:
        return self.completions[1]

    def lengths(self) -> list[int]:
        """Tokens of each sequence, the prompt included."""
        return [len(self.prompt) + len(completion) for completion in self.completions]

    def tokens(self) -> int:
        """Tokens of all sequences together, the prompt counted in each: what the example takes from a token budget."""
        return sum(self.lengths())

    def longest(self) -> int:
        return max(self.lengths())


def token_pair(prompt: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, **values: Any) -> TokenExample:
    """A pair that is tokenised already."""
    return TokenExample(prompt, (chosen, rejected), values)


@dataclass
class DataReport:
    """What happened to the examples of one source."""

    noun: str
    count: int = 0
    tokens: int = 0
    longest: int = 0
    boundary_moved: int = 0
    truncated: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        notes = [f"{self.count} {self.noun}s, {self.tokens} tokens, longest sequence {self.longest}"]
        notes += [f"{self.truncated} truncated"] if self.truncated else []
        notes += [f"{self.dropped} dropped as over-long"] if self.dropped else []
        notes += [f"{self.boundary_moved} with a token across the prompt boundary"] if self.boundary_moved else []
        return ", ".join(notes)


def plain_template(messages: Messages, add_generation_prompt: bool) -> str:
    """The chat format for tokenizers without a template of their own: `role: content`, turns separated by a blank line. The prompt
    ends with "assistant:", so that a completion begins with a space, as words inside a text do."""
    turns = [f"{message['role']}: {message['content']}" for message in messages]
    return "\n\n".join(turns + (["assistant:"] if add_generation_prompt else []))


class ExampleTokenizer:
    """Turns texts into token ids with one tokenizer."""

    def __init__(self, tokenizer: Any):
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token, so a completion cannot end")
        self.tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))

    def __call__(self, texts: Texts) -> tuple[TokenExample, bool]:
        """The example's tokens, and whether its boundary moved."""
        prompt = self.prompt(texts)
        whole = [self._encode(texts, field, completion) for field, completion in zip(texts.fields, texts.completions)]
        end = min(common_prefix(prompt, ids) for ids in whole)
        if end == 0:
            raise DataError(
                texts.source,
                "prompt",
                "gives no token that a completion could be predicted from (it is empty and the tokenizer adds no BOS token)",
            )
        completions = tuple(torch.tensor(self._end_with_eos(ids[end:]), dtype=torch.int32) for ids in whole)
        return TokenExample(torch.tensor(prompt[:end], dtype=torch.int32), completions, texts.values), end < len(prompt)

    def prompt(self, texts: Texts) -> list[int]:
        """Ids of the prompt alone, ready for a completion."""
        return self._encode(texts, "prompt", None)

    def _encode(self, texts: Texts, field: str, completion: Text | Messages | None) -> list[int]:
        """Ids of the prompt, or of the prompt with one completion."""
        if texts.conversational:
            text = self._render(texts.source, field, texts.prompt + (completion or []))
        else:
            text = texts.prompt + (completion or "")
        # A chat template writes its special tokens itself.
        special = not (texts.conversational and self.has_template)
        return self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]

    def _render(self, source: str, field: str, messages: Messages) -> str:
        if not self.has_template:
            return plain_template(messages, add_generation_prompt=field == "prompt")
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=field == "prompt")
        except Exception as error:  # templates are programs of their own: any error in one is about this example
            raise DataError(source, field, f"the tokenizer's chat template refuses it: {error}") from None

    def _end_with_eos(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_token_id
        if eos in ids:
            last = len(ids) - 1 - ids[::-1].index(eos)
            if not self.tokenizer.decode(ids[last + 1 :], skip_special_tokens=False).strip():
                return ids[: last + 1]
        return ids + [eos]


def tokenise(
    examples: Iterable[tuple[str, Any]],
    tokenizer: Any,
    form: Format,
    *,
    budget: int,
    max_length: int | None,
    overlong: str,
    progress: bool = False,
) -> tuple[list[TokenExample], DataReport]:
    """Check, tokenise and fit every example (a row in the format `form`, or a ready `TokenExample`)."""
    to_tokens, kept, report = ExampleTokenizer(tokenizer), [], DataReport(form.noun)
    first: Mapping[str, Any] | None = None
    for source, row in tqdm(examples, desc="tokenising", unit=f" {form.noun}s", leave=False, disable=None if progress else True):
        example, moved = (row, False) if isinstance(row, TokenExample) else to_tokens(form.parse(source, row))
        first = example.values if first is None else first
        form.check_values(source, example.values, first)
        report.boundary_moved += moved
        fitted = fit(example, budget=budget, max_length=max_length, overlong=overlong, bos=tokenizer.bos_token_id, source=source)
        if fitted is None:
            report.dropped += 1
            continue
        report.truncated += fitted is not example
        report.count += 1
        report.tokens += fitted.tokens()
        report.longest = max(report.longest, fitted.longest())
        kept.append(fitted)
    return kept, report


def fit(example: TokenExample, *, budget: int, max_length: int | None, overlong: str, bos: int | None, source: str) -> TokenExample | None:
    """The example itself if it fits, else what `overlong` makes of it; None: leave it out.

    truncate_prompt keeps the end of the prompt (and its BOS), the same for every completion; truncate_completion keeps the beginning of
    each completion (its EOS goes). Neither leaves an empty prompt or completion: an example for which there is no room is left out.
    """
    limit = max_length or budget
    if example.longest() <= limit and example.tokens() <= budget:
        return example
    if overlong == "error":
        what = (
            f"a sequence of {example.longest()} tokens exceeds {limit} (--max-length, or the model's positions)"
            if example.longest() > limit
            else f"the example's {example.tokens()} tokens exceed --tokens-per-batch {budget}"
        )
        raise DataError(source, None, f"{what}; raise it, or choose --overlong drop, truncate_prompt or truncate_completion")
    if overlong == "drop":
        return None
    if sum(min(limit, length) for length in example.lengths()) > budget:
        limit = min(limit, budget // len(example.completions))
    prompt, completions = example.prompt, example.completions
    if overlong == "truncate_prompt":
        keep = limit - max(map(len, completions))
        start = prompt[:1] if prompt[0] == bos and keep > 1 else prompt[:0]
        return dataclasses.replace(example, prompt=torch.cat([start, prompt[len(start) - keep :]])) if keep > 0 else None
    room = limit - len(prompt)
    return dataclasses.replace(example, completions=tuple(c[:room] for c in completions)) if room > 0 else None
