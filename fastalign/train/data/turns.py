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
from collections.abc import Callable

from transformers.utils.chat_template_utils import render_jinja_template

from fastalign.train.data.fields import Messages, common_prefix
from fastalign.train.data.formats import Conversation
from fastalign.train.data.specials import SpecialTokens
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
    spans = _spans_of_turns(template, [messages[i]["content"].strip() for i in turns], text, spans)
    if len(spans) != len(turns):
        raise template.refusal(
            given.source,
            place,
            f"marks {len(spans)} stretches as generated ({{% generation %}}) where the assistant has "
            f"{len(turns)} turns",
        )
    limits = [*(start for start, _ in spans[1:]), len(text)]
    for count, (i, (start, end)) in enumerate(zip(turns, spans)):
        words = messages[i]["content"].strip()
        found = text.find(words, start, end)
        if found < 0:
            what = template.loss_of(words, text[start:end], "assistant")
            raise template.refusal(given.source, given.fields[i], what)
        spans[count] = start, _end_of(template, text, found + len(words), end, limits[count])
    template.find_in_order(given.source, place, messages, text)
    return text[: spans[-1][1]], spans


def _spans_of_turns(template: ChatTemplate, said: list[str], text: str, spans: Spans) -> Spans:
    """The marked stretches without those that hold no words where a turn has some: the token that closes the
    whole conversation, say."""
    kept: Spans = []
    for start, end in spans:
        words = said[len(kept)] if len(kept) < len(said) else None
        if words == "" or re.search(r"\w", template.without_markers(text[start:end])):
            kept.append((start, end))
    return kept


def _end_of(template: ChatTemplate, text: str, words_end: int, end: int, limit: int) -> int:
    """Where a marked turn ends: with the token that ends it, which stands in the mark or behind it, with no words
    between; what the mark holds behind that token (a line break) is nobody's words. Without one: where the
    mark ends."""
    tokenizer = template.tokenizer
    for token in (template.turn_end, tokenizer.eos_token_id):
        name = None if token is None else tokenizer.convert_ids_to_tokens(token)
        found = -1 if name is None else text.find(name, words_end, limit)
        if found >= 0 and not re.search(r"\w", template.without_markers(text[words_end:found])):
            return found + len(name)
    return end


def token_places(
    special: SpecialTokens, ids: Callable[[int, int], list[int]], text: str, spans: Spans, whole: list[int]
) -> tuple[Spans, bool]:
    """((first, stop) of each turn among the tokens `whole` of the conversation, whether a token straddles
    where one begins). A turn begins where the tokens of the text before it and those of the whole part; it
    ends likewise. ids(done, upto): those of a stretch of the text.

    Behind a token that ends a turn the text is tokenised anew, so that only what is new need be; where that is not
    so, everything before is."""
    places: Spans = []
    moved, done, at = False, 0, 0  # text[:done] is whole[:at]
    for start, end in spans:
        before = ids(done, start)
        same = common_prefix(before, whole[at:])
        if same < len(before) and done:
            before, at = ids(0, start), 0
            same = common_prefix(before, whole)
        moved |= same < len(before)
        first = at + same
        token = special.ending(text[start:end])
        if (start, end) == spans[-1]:
            stop = len(whole)
        elif token is not None and token in whole[first:]:
            stop = whole.index(token, first) + 1
            done, at = end, stop
        else:
            stop, done, at = common_prefix(ids(0, end), whole), 0, 0
        places.append((first, stop))
    return places, moved
