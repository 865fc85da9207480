"""From texts to token ids: where the prompt ends, which EOS is learnt, what happens to over-long examples.

**Boundary.** Prompt and completion are tokenised together, as one text, and the prompt alone. The prompt's
part is the longest run of tokens that the prompt alone and the prompt with each of its completions have in
common. Usually that is the whole prompt. Where a token straddles the boundary (" a" + "bc" may become "
abc"), the boundary moves left until all completions continue from the very same tokens: what follows is
scored in each, so the comparison stays fair. Examples whose boundary moved are counted.

**Special tokens** come from one place, `specials.py`: one BOS before a text (from the tokenizer, or from the
text), one end of turn behind a completion, whether the data, the tokenizer or the template bring some along.
What a chat template makes of messages is compared with them, `templates.py`.

**Length.** The limit of a sequence is `max_length`, and an equal share of the token budget where an example's
sequences together exceed it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from fastalign.train.data.fields import Text, common_prefix
from fastalign.train.data.formats import Conversation, Document, Format, Texts
from fastalign.train.data.specials import SpecialTokens
from fastalign.train.data.templates import ChatTemplate, plain_template
from fastalign.train.data.turns import assistant_turns, token_places
from fastalign.train.errors import DataError

__all__ = [
    "DataReport",
    "ExampleTokenizer",
    "TokenExample",
    "fit",
    "plain_template",
    "token_pair",
    "tokenise",
]

UNKNOWN = "with characters that the tokenizer does not know"
SPELLED = "with the name of a special token inside an answer, taken as letters"
NOTHING_BEFORE = "gives no token that a completion could be predicted from (it is empty and the tokenizer adds no BOS token)"
ENDLESS = "with an earlier turn that no token ends: its end is not learnt"


@dataclass(frozen=True, slots=True)
class TokenExample:
    """Token ids (int32 tensors) of a prompt and its completions, each with its EOS, and the example's
    numbers. A pair has the completions (chosen, rejected). `scored`: a bool for each token of each completion;
    None: all are scored. The first one always is."""

    prompt: torch.Tensor
    completions: tuple[torch.Tensor, ...]
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scored: tuple[torch.Tensor, ...] | None = None

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
        """Tokens of all sequences together, the prompt counted in each: what the example takes from a token
        budget."""
        return sum(self.lengths())

    def longest(self) -> int:
        return max(self.lengths())

    def masks(self) -> list[list[bool]]:
        """Which tokens of each completion are scored."""
        if self.scored is not None:
            return [mask.tolist() for mask in self.scored]
        return [[True] * len(completion) for completion in self.completions]

    def scored_tokens(self) -> int:
        """How many tokens are scored."""
        if self.scored is not None:
            return sum(int(mask.sum()) for mask in self.scored)
        return sum(map(len, self.completions))

    def every_token(self) -> TokenExample:
        """The same tokens, all of them scored but the first, which nothing predicts. One completion."""
        ids = torch.cat([self.prompt, self.completions[0]])
        return TokenExample(ids[:1], (ids[1:],), self.values)


def token_pair(
    prompt: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, **values: Any
) -> TokenExample:
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
    notes: Counter[str] = dataclasses.field(default_factory=Counter)
    remarks: Sequence[str] = ()  # on the chat template, whatever the data

    def __str__(self) -> str:
        notes = [f"{self.count} {self.noun}s, {self.tokens} tokens, longest sequence {self.longest}"]
        notes += [f"{self.truncated} truncated"] if self.truncated else []
        notes += [f"{self.dropped} dropped as over-long"] if self.dropped else []
        notes += (
            [f"{self.boundary_moved} with a token across the prompt boundary"] if self.boundary_moved else []
        )
        notes += [f"{count} {note}" for note, count in sorted(self.notes.items())]
        return ", ".join(notes)


class ExampleTokenizer:
    """The one place where a prompt and its completions, texts or messages, become token ids: `__call__`
    (an example), `prompt` (alone, to sample from), `text` (all of it predicted). `stops`: ids at
    which the model's generation stops beside the tokenizer's EOS; `template_options`: variables for the chat
    template.

    `notes` counts what happened to the examples, `remarks()` says what is worth knowing of the chat template
    once it has been used."""

    def __init__(
        self, tokenizer: Any, stops: Collection[int] = (), template_options: Mapping[str, Any] | None = None
    ):
        self.tokenizer, self.template = tokenizer, ChatTemplate(tokenizer, template_options)
        # Configurations name ids that are letters of this tokenizer where nobody set them; those end nothing.
        others = {i for i in stops if i in self.template.added}
        self.special = SpecialTokens(tokenizer, turn_end=self.template.turn_end, others=others)
        self.notes: Counter[str] = Counter()
        self._rendered = False

    def __call__(self, given: Texts | Conversation | Document) -> tuple[TokenExample, bool]:
        """The example's tokens, and whether a boundary between prompt and completion moved."""
        if isinstance(given, Conversation):
            return self._conversation(given)
        if isinstance(given, Document):
            ids = self.text(given.source, given.text)
            self._count([ids])
            return _example(given.source, "text", ids, [(1, len(ids))]), False
        return self._completions(given)

    def _completions(self, texts: Texts) -> tuple[TokenExample, bool]:
        text, prompt = self._prompt(texts)
        end = self.special.end_of(texts.conversational, prompt)
        whole = [
            self._with_completion(texts, text, field, each, end)
            for field, each in zip(texts.fields, texts.completions)
        ]
        self._count([prompt, *whole])
        boundary = min(common_prefix(prompt, ids) for ids in whole)
        if boundary == 0:
            raise DataError(texts.source, texts.prompt_field, NOTHING_BEFORE)
        for field, ids in zip(texts.fields, whole):
            self.special.check_completion(texts.source, field, ids[boundary:-1])
        completions = tuple(torch.tensor(ids[boundary:], dtype=torch.int32) for ids in whole)
        return TokenExample(
            torch.tensor(prompt[:boundary], dtype=torch.int32), completions, texts.values
        ), boundary < len(prompt)

    def _conversation(self, given: Conversation) -> tuple[TokenExample, bool]:
        """Every assistant turn as `_completions` has the one: its words, and the token that ends it."""
        messages = [self._as_said(message) for message in given.messages]
        text, spans = assistant_turns(self.template, given, messages)
        self._rendered |= self.template.own
        last = spans[-1][0]
        text = text[:last] + self.special.without_ends(text[last:])
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spelled = []  # where the words of a turn stand that hold the name of a special token
        for i, (start, _) in zip(turns, spans):
            words = messages[i]["content"].strip()
            if self.special.spells_special(words):
                place = text.index(words, start)
                spelled.append((place, place + len(words)))
        if spelled:
            self.template.notes.add(SPELLED)

        def ids(done: int, upto: int) -> list[int]:
            """Ids of text[done:upto]; the names of special tokens among the assistant's words are letters."""
            found, whole = [], done == 0
            for start, end in spelled:
                if done <= start < upto:
                    found += self.special.encode(text[done:start])
                    found += self.special.letters(text[start : min(end, upto)])
                    done = min(end, upto)
            found += self.special.encode(text[done:upto])
            if not whole:
                return found
            return self.special.begun(given.source, given.fields[0], found, bare=not self.template.own)

        whole = [*ids(0, len(text)), self.special.end_of(True, ())]
        places, moved = token_places(self.special, ids, text, spans, whole)
        for i, (first, stop) in zip(turns, places):
            ended = stop > first and whole[stop - 1] in self.special.ends
            if not ended and (stop == first or whole[stop - 1] not in self.template.added):
                self.template.notes.add(ENDLESS)
            self.special.check_completion(given.source, given.fields[i], whole[first : stop - ended])
        self._count([whole])
        return _example(given.source, given.fields[0], whole, places), moved

    def _as_said(self, message: dict[str, Any]) -> dict[str, Any]:
        """An assistant's message without the ends of turn that its content brings along; another as it is."""
        if message["role"] != "assistant":
            return message
        content = self.special.without_ends(message["content"])
        return {**message, "content": content if content.strip() else ""}

    def prompt(self, texts: Texts) -> list[int]:
        """Ids of the prompt alone, ready for a completion."""
        ids = self._prompt(texts)[1]
        self._count([ids])
        return ids

    def text(self, source: str, text: Text) -> list[int]:
        """Ids of a text of its own, with BOS (if the tokenizer adds one) and EOS."""
        ids = self.special.begun(
            source, "text", self.special.encode(self.special.without_ends(text)), bare=True
        )
        return [*ids, self.special.end_of(False, ids)]

    def remarks(self) -> list[str]:
        return self.template.remarks() if self._rendered else []

    def _prompt(self, texts: Texts) -> tuple[str, list[int]]:
        text = (
            self.template.prompt(texts.source, texts.prompt, texts.prompt_field)
            if texts.conversational
            else texts.prompt
        )
        self._rendered |= texts.conversational and self.template.own
        return text, self._encode(texts, "prompt", text)

    def _encode(self, texts: Texts, field: str, text: str) -> list[int]:
        # A chat template writes its special tokens itself.
        bare = not (texts.conversational and self.template.own)
        return self.special.begun(texts.source, field, self.special.encode(text), bare=bare)

    def _with_completion(self, texts: Texts, prompt: str, field: str, completion: Any, end: int) -> list[int]:
        """Ids of the prompt with one completion, which ends with the token `end`, and with no other end of
        turn before that."""
        if not texts.conversational:
            return [*self._encode(texts, field, prompt + self.special.without_ends(completion)), end]
        message = {**completion[0], "content": self.special.without_ends(completion[0]["content"])}
        text = self.special.without_ends(
            self.template.answer(texts.source, field, texts.prompt, prompt, message)
        )
        words = message["content"].strip()
        if not self.special.spells_special(words):
            return [*self._encode(texts, field, prompt + text), end]
        # The content of a message is words: "</s>" in it is a text about tokens, or one that got there by
        # mistake.
        self.template.notes.add(SPELLED)
        before, _, behind = text.partition(words)
        ids = self._encode(texts, field, prompt + before)
        return [*ids, *self.special.letters(words), *self.special.encode(behind), end]

    def _count(self, sequences: list[list[int]]) -> None:
        unknown = self.tokenizer.unk_token_id
        if unknown not in (None, self.special.bos, self.special.eos) and any(
            unknown in ids for ids in sequences
        ):
            self.notes[UNKNOWN] += 1
        self.notes.update(self.template.notes)
        self.template.notes.clear()


def _example(source: str, field: str, ids: list[int], places: Sequence[tuple[int, int]]) -> TokenExample:
    """An example of one sequence, of which the tokens in `places`, (first, stop) each, are scored."""
    first = places[0][0]
    if first == 0 or first >= len(ids):
        raise DataError(
            source, field, NOTHING_BEFORE if first == 0 else "has no token that could be predicted"
        )
    whole = torch.tensor(ids, dtype=torch.int32)
    scored = torch.zeros(len(ids), dtype=torch.bool)
    for start, stop in places:
        scored[start:stop] = True
    mask = None if bool(scored[first:].all()) else (scored[first:],)
    return TokenExample(whole[:first], (whole[first:],), scored=mask)


def tokenise(
    examples: Iterable[tuple[str, Any]],
    tokenizer: Any,
    form: Format,
    *,
    budget: int,
    max_length: int | None,
    overlong: str,
    progress: bool = False,
    stops: Collection[int] = (),
    template_options: Mapping[str, Any] | None = None,
) -> tuple[list[TokenExample], DataReport]:
    """Check, tokenise and fit every example (a row in the format `form`, or a ready `TokenExample`). `stops`
    and `template_options`: see `ExampleTokenizer`."""
    to_tokens, kept, report = ExampleTokenizer(tokenizer, stops, template_options), [], DataReport(form.noun)
    first: Mapping[str, Any] | None = None
    for source, row in tqdm(
        examples, desc="tokenising", unit=f" {form.noun}s", leave=False, disable=None if progress else True
    ):
        example, moved = (row, False) if isinstance(row, TokenExample) else to_tokens(form.parse(source, row))
        if form.every_token and not isinstance(row, TokenExample):
            example, moved = example.every_token(), False
        first = example.values if first is None else first
        form.check_values(source, example.values, first)
        report.boundary_moved += moved
        fitted = fit(
            example,
            budget=budget,
            max_length=max_length,
            overlong=overlong,
            bos=tokenizer.bos_token_id,
            source=source,
        )
        if fitted is None:
            report.dropped += 1
            continue
        report.truncated += fitted is not example
        report.count += 1
        report.tokens += fitted.tokens()
        report.longest = max(report.longest, fitted.longest())
        kept.append(fitted)
    report.notes, report.remarks = to_tokens.notes, to_tokens.remarks()
    return kept, report


def fit(
    example: TokenExample, *, budget: int, max_length: int | None, overlong: str, bos: int | None, source: str
) -> TokenExample | None:
    """The example itself if it fits, else what `overlong` makes of it; None: leave it out.

    truncate_prompt keeps the end of the prompt (and its BOS), the same for every completion;
    truncate_completion keeps the beginning of each completion (its EOS goes). Neither leaves an empty prompt
    or completion: an example for which there is no room is left out.
    """
    limit = max_length or budget
    if example.longest() <= limit and example.tokens() <= budget:
        return example
    if overlong == "error":
        what = (
            f"a sequence of {example.longest()} tokens exceeds {limit} (--max-length, or the model's "
            "positions)"
            if example.longest() > limit
            else f"the example's {example.tokens()} tokens exceed --tokens-per-batch {budget}"
        )
        raise DataError(
            source,
            None,
            f"{what}; raise it, or choose --overlong drop, truncate_prompt or truncate_completion",
        )
    if overlong == "drop":
        return None
    if sum(min(limit, length) for length in example.lengths()) > budget:
        limit = min(limit, budget // len(example.completions))
    prompt, completions = example.prompt, example.completions
    if overlong == "truncate_prompt":
        keep = limit - max(map(len, completions))
        start = prompt[:1] if prompt[0] == bos and keep > 1 else prompt[:0]
        return (
            dataclasses.replace(example, prompt=torch.cat([start, prompt[len(start) - keep :]]))
            if keep > 0
            else None
        )
    room = limit - len(prompt)
    if room <= 0:
        return None
    scored = None if example.scored is None else tuple(mask[:room] for mask in example.scored)
    return dataclasses.replace(example, completions=tuple(c[:room] for c in completions), scored=scored)
