"""Which tokens begin a text and which end a turn. Nothing else in the trainer adds a BOS or an EOS.

The tokenizer is always asked for the tokens of the text alone. What it would put around them is found out
once, from a probe: what it puts in front (BOS) is added here unless the text brings it along; what it puts
behind (EOS) is left out, since a prompt must not end and a completion ends with one token that is chosen
below, whatever the data or the tokenizer say.

**The end of a turn** is the token that a model emits to stop. In a conversation it is the one that the chat
template writes behind the assistant's words (`<end_of_turn>`, `<|eot_id|>`, `<|im_end|>`), which need not be
the tokenizer's EOS; where the template writes none, and in plain text, it is EOS. A text that holds the
template's end of turn in its prompt is a conversation that was rendered before, and ends like one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from fastalign.train.errors import DataError, UserError


def stops(*configs: Any) -> set[int]:
    """The ids at which generation stops according to these configurations (of a model, of its generation);
    None counts for nothing."""
    found: set[int] = set()
    for config in configs:
        ids = getattr(config, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return found


class SpecialTokens:
    """The special tokens of one tokenizer. `ends`: every id that ends a turn: EOS, the chat template's, and
    the `others` that generation stops at. `turn_end`: the chat template's (None: it writes none)."""

    def __init__(self, tokenizer: Any, *, turn_end: int | None = None, others: Collection[int] = ()):
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token, so a completion cannot end")
        self.tokenizer, self.turn_end = tokenizer, turn_end
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.ends = {self.eos, *others} | ({turn_end} - {None})
        tokens = (tokenizer.convert_ids_to_tokens(i) for i in self.ends if i < len(tokenizer))
        self._end_texts = sorted((token for token in tokens if token), key=len, reverse=True)
        self._inner = (*self._end_texts, *([tokenizer.bos_token] if self.bos is not None else []))
        self._before, self._forced = self._probe()

    def _probe(self) -> tuple[list[int], tuple[int, int]]:
        """(what the tokenizer puts before a text, how many special tokens stand before and behind one even
        where it is asked for none)."""
        bare, full = (
            self.tokenizer("a", add_special_tokens=special, verbose=False)["input_ids"]
            for special in (False, True)
        )
        around = {self.bos, self.eos} - {None}
        front = next((i for i, token in enumerate(bare) if token not in around), 0)
        back = next((i for i, token in enumerate(reversed(bare)) if token not in around), 0)
        before = next((full[:i] for i in range(len(full)) if full[i : i + len(bare)] == bare), [])
        if not before and self.bos is not None and full[:1] == [self.bos]:
            before = [self.bos]
        return before, (front, back)

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        front, back = self._forced
        return ids[front : len(ids) - back]

    def spells_special(self, words: str) -> bool:
        """Whether the words hold the text of a token that ends a turn or begins a text."""
        return any(token in words for token in self._inner)

    def letters(self, words: str) -> list[int]:
        """Ids of words in which the text of a special token is text."""
        return self.tokenizer(words, add_special_tokens=False, split_special_tokens=True, verbose=False)[
            "input_ids"
        ]

    def begun(self, source: str, field: str | None, ids: list[int], *, bare: bool) -> list[int]:
        """The ids of a text with what must stand before it, once. `bare`: a text that no chat template has
        rendered."""
        if (
            bare
            and ids[: len(self._before)] != self._before
            and not (self.bos in self._before and ids[:1] == [self.bos])
        ):
            ids = [*self._before, *ids]
        if self.bos is not None and ids[:2] == [self.bos, self.bos]:
            who = "it" if bare else "the tokenizer's chat template"
            raise DataError(
                source,
                field,
                f"{who} begins with the BOS token {self.tokenizer.bos_token!r} twice; a model has seen one",
            )
        return ids

    def end_of(self, conversational: bool, prompt: Collection[int]) -> int:
        """The token that ends a completion of this prompt."""
        if self.turn_end is not None and (conversational or self.turn_end in prompt):
            return self.turn_end
        return self.eos

    def without_ends(self, text: str) -> str:
        """The text without the ends of turn that it ends with, and what white space stands behind and between
        them."""
        while True:
            trimmed = text.rstrip()
            end = next((end for end in self._end_texts if trimmed.endswith(end)), None)
            if end is None:
                return text
            text = trimmed[: -len(end)]

    def ending(self, text: str) -> int | None:
        """The end of turn that this text ends with, if it holds its name there alone."""
        name = next((name for name in self._end_texts if text.endswith(name)), None)
        if name is None or text.count(name) > 1:
            return None
        return self.tokenizer.convert_tokens_to_ids(name)

    def check_completion(self, source: str, field: str, ids: Sequence[int]) -> None:
        """Refuse a completion (without its end) that holds a token at which it would have stopped, or one
        that only begins a text."""
        for token in ids:
            if token in self.ends or token == self.bos:
                what = "the end of a turn" if token in self.ends else "the BOS token"
                name = self.tokenizer.convert_ids_to_tokens(token)
                raise DataError(
                    source,
                    field,
                    f"holds {what}, {name!r}, before its end: no model writes on after it in one turn",
                )
