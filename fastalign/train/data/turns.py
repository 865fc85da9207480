"""Where the assistant's turns stand in what the chat template makes of a conversation, for a method that learns
all of them.

**Marks.** A template that says itself what the assistant generates ({% generation %}) is believed, as
transformers' `return_assistant_tokens_mask` does; the token that ends the turn belongs to it, whether it stands
inside the mark or behind it.

**Turn by turn** otherwise: each turn as `templates.py` finds the one answer to a prompt. What it finds must be
the beginning of the whole, so that a turn is learnt in the very text that the model answers to. A template that
rewrites earlier turns (that cuts their reasoning, moves the system message) is refused."""

from __future__ import annotations

import re

from transformers.utils.chat_template_utils import render_jinja_template

from fastalign.train.data.fields import Messages, common_prefix
from fastalign.train.data.formats import Conversation
from fastalign.train.data.templates import ChatTemplate, short
from fastalign.train.errors import DataError

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
Spans = list[tuple[int, int]]


def assistant_turns(template: ChatTemplate, given: Conversation, messages: Messages) -> tuple[str, Spans]:
    """(text, (start, end) of each assistant turn in it): words and what ends the turn. The text ends with the
    last of them. messages: those of `given`, as they are to be written."""
    marked = template.own and _MARK.search(template.tokenizer.get_chat_template())
    return (_marked if marked else _turn_by_turn)(template, given, messages)


def _turn_by_turn(template: ChatTemplate, given: Conversation, messages: Messages) -> tuple[str, Spans]:
    place = given.fields[0].partition("[")[0]
    turns = []  # (message, where its words begin, everything up to its end)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = template.prompt(given.source, messages[:i], place)
            answer = template.answer(given.source, given.fields[i], messages[:i], before, message)
            turns.append((i, len(before), before + answer))
    text = turns[-1][2]
    for i, _, turn in turns:
        if not text.startswith(turn):
            same = common_prefix(turn, text)
            was, becomes = turn[same:], text[same : same + len(turn) - same + 20]
            raise DataError(
                given.source,
                given.fields[i],
                "the tokenizer's chat template writes it differently once the conversation goes on "
                f"({short(was)} becomes {short(becomes)}), so only the last turn can be learnt as the model would "
                "say it: --loss-on completion",
            )
    return text, [(start, len(turn)) for _, start, turn in turns]


def _marked(template: ChatTemplate, given: Conversation, messages: Messages) -> tuple[str, Spans]:
    tokenizer, place = template.tokenizer, given.fields[0].partition("[")[0]
    (text,), (spans,) = template.checked(
        given.source,
        place,
        lambda: render_jinja_template(
            [template.shaped(messages)],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **template.options},
        ),
    )
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if len(spans) != len(turns):
        raise template.refusal(
            given.source,
            place,
            f"marks {len(spans)} stretches as generated ({{% generation %}}) where the assistant has "
            f"{len(turns)} turns",
        )
    for i, (start, end) in zip(turns, spans):
        words = messages[i]["content"].strip()
        if words not in text[start:end]:
            what = template.loss_of(words, text[start:end], "assistant")
            raise template.refusal(given.source, given.fields[i], what)
    template.find_in_order(given.source, place, messages, text)
    limits = [*(start for start, _ in spans[1:]), len(text)]
    spans = [
        (start, _with_end(template, text, start, end, limit)) for (start, end), limit in zip(spans, limits)
    ]
    return text[: spans[-1][1]], spans


def _with_end(template: ChatTemplate, text: str, start: int, end: int, limit: int) -> int:
    """The end of a marked turn with the token that ends it, where no words stand between them."""
    tokenizer = template.tokenizer
    ids = [i for i in (template.turn_end, tokenizer.eos_token_id) if i is not None]
    ends = [tokenizer.convert_ids_to_tokens(i) for i in ids]
    if any(text[start:end].rstrip().endswith(token) for token in ends):
        return end
    for token in ends:
        found = text.find(token, end, limit)
        if found >= 0 and not re.search(r"\w", template.without_markers(text[end:found])):
            return found + len(token)
    return end
