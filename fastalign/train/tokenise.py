"""From a preference to token ids: where the prompt ends, which EOS is learnt, what happens to over-long pairs.

**Boundary.** Prompt and completion are tokenised together, as one text, and the prompt alone. The prompt's part is the longest run of
tokens that the prompt alone, prompt + chosen and prompt + rejected have in common. Usually that is the whole prompt. Where a token
straddles the boundary (" a" + "bc" may become " abc"), the boundary moves left until both sides continue from the very same
tokens: what follows is scored on both sides, so the comparison stays fair. Pairs whose boundary moved are counted.

**EOS.** A completion ends with the EOS that the model must emit. A chat template that puts white space after it ("<|im_end|>\\n") has
that cut off, since generation stops at EOS; a text without EOS gets one.

**Length.** The limit of a sequence is `max_length`, and half the token budget where the two sides together exceed the budget.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from fastalign.train.errors import DataError, UserError
from fastalign.train.formats import Messages, Preference, common_prefix, parse_preference


class TokenPair(NamedTuple):
    """Token ids (int32 tensors): the shared prompt and the two completions, each with its EOS."""

    prompt: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor

    def tokens(self) -> int:
        """Tokens of both sequences together, the prompt counted twice: what the pair takes from a token budget."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)

    def longest(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass
class DataReport:
    """What happened to the examples of one source."""

    pairs: int = 0
    tokens: int = 0
    longest: int = 0
    boundary_moved: int = 0
    truncated: int = 0
    dropped: int = 0

    def __str__(self) -> str:
        notes = [f"{self.pairs} pairs, {self.tokens} tokens, longest sequence {self.longest}"]
        notes += [f"{self.truncated} truncated"] if self.truncated else []
        notes += [f"{self.dropped} dropped as over-long"] if self.dropped else []
        notes += [f"{self.boundary_moved} with a token across the prompt boundary"] if self.boundary_moved else []
        return ", ".join(notes)


def plain_template(messages: Messages, add_generation_prompt: bool) -> str:
    """The chat format for tokenizers without a template of their own: `role: content`, turns separated by a blank line. The prompt
    ends with "assistant:", so that a completion begins with a space, as words inside a text do."""
    turns = [f"{message['role']}: {message['content']}" for message in messages]
    return "\n\n".join(turns + (["assistant:"] if add_generation_prompt else []))


class PairTokenizer:
    """Turns preferences into `TokenPair`s with one tokenizer."""

    def __init__(self, tokenizer: Any):
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token, so a completion cannot end")
        self.tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))

    def __call__(self, preference: Preference) -> tuple[TokenPair, bool]:
        """The pair's tokens, and whether its boundary moved."""
        prompt = self._encode(preference, "prompt")
        chosen, rejected = self._encode(preference, "chosen"), self._encode(preference, "rejected")
        end = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
        if end == 0:
            raise DataError(
                preference.source,
                "prompt",
                "gives no token that a completion could be predicted from (it is empty and the tokenizer adds no BOS token)",
            )
        parts = (prompt[:end], self._end_with_eos(chosen[end:]), self._end_with_eos(rejected[end:]))
        return TokenPair(*(torch.tensor(part, dtype=torch.int32) for part in parts)), end < len(prompt)

    def _encode(self, preference: Preference, field: str) -> list[int]:
        """Ids of the prompt, or of the prompt with one completion."""
        if preference.conversational:
            messages = preference.prompt + ([] if field == "prompt" else getattr(preference, field))
            text = self._render(preference.source, field, messages)
        else:
            text = preference.prompt + ("" if field == "prompt" else getattr(preference, field))
        # A chat template writes its special tokens itself.
        special = not (preference.conversational and self.has_template)
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
    examples: Iterable[tuple[str, Any]], tokenizer: Any, *, budget: int, max_length: int | None, overlong: str, progress: bool = False
) -> tuple[list[TokenPair], DataReport]:
    """Check, tokenise and fit every example (a row in one of TRL's formats, or a ready `TokenPair`)."""
    to_tokens, pairs, report = PairTokenizer(tokenizer), [], DataReport()
    for source, row in tqdm(examples, desc="tokenising", unit=" pairs", leave=False, disable=None if progress else True):
        pair, moved = (row, False) if isinstance(row, TokenPair) else to_tokens(parse_preference(source, row))
        report.boundary_moved += moved
        fitted = fit(pair, budget=budget, max_length=max_length, overlong=overlong, bos=tokenizer.bos_token_id, source=source)
        if fitted is None:
            report.dropped += 1
            continue
        report.truncated += fitted is not pair
        report.pairs += 1
        report.tokens += fitted.tokens()
        report.longest = max(report.longest, fitted.longest())
        pairs.append(fitted)
    return pairs, report


def fit(pair: TokenPair, *, budget: int, max_length: int | None, overlong: str, bos: int | None, source: str) -> TokenPair | None:
    """The pair itself if it fits, else what `overlong` makes of it; None: leave it out.

    truncate_prompt keeps the end of the prompt (and its BOS), the same for both sides; truncate_completion keeps the beginning of each
    completion (its EOS goes). Neither leaves an empty prompt or completion: a pair for which there is no room is left out.
    """
    limit = max_length or budget
    if pair.longest() <= limit and pair.tokens() <= budget:
        return pair
    if overlong == "error":
        what = (
            f"a sequence of {pair.longest()} tokens exceeds {limit} (--max-length, or the model's positions)"
            if pair.longest() > limit
            else f"the pair's {pair.tokens()} tokens exceed --tokens-per-batch {budget}"
        )
        raise DataError(source, None, f"{what}; raise it, or choose --overlong drop, truncate_prompt or truncate_completion")
    if overlong == "drop":
        return None
    if sum(min(limit, len(pair.prompt) + len(side)) for side in (pair.chosen, pair.rejected)) > budget:
        limit = min(limit, budget // 2)
    if overlong == "truncate_prompt":
        keep = limit - max(len(pair.chosen), len(pair.rejected))
        start = pair.prompt[:1] if pair.prompt[0] == bos and keep > 1 else pair.prompt[:0]
        return pair._replace(prompt=torch.cat([start, pair.prompt[len(start) - keep :]])) if keep > 0 else None
    room = limit - len(pair.prompt)
    return pair._replace(chosen=pair.chosen[:room], rejected=pair.rejected[:room]) if room > 0 else None
