"""What the tokenizer's chat template makes of messages, compared with the messages.

A chat template is a program: it may leave out a system message, move it, cut reasoning out of a turn, change
the case, walk over the letters
of a text as if they were parts, or write the prompt otherwise once an answer follows. So every example is checked, with two questions:

1. **Is every message in the prompt?** An outline is rendered from the same roles with a mark in the place of
each content. Every mark must
   come out of it, and the outline with the contents put back must be the prompt, up to white space around a
   content. The prompt is what the online methods sample from: rendered alone, with the turn left to the
   assistant.
2. **Is what follows the prompt the assistant's words and the end of the turn, nothing else?** The prompt with
its answer must begin with the very
   prompt; then, up to white space, the words, and then what the template writes behind a mark in their place.

What fails is a `DataError` that says what the template does. White space that it trims, a system message that
it moves within the prompt, and fields that it ignores are put into `notes`, which whoever counts them
empties.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fastalign.train.data.fields import Messages, common_prefix
from fastalign.train.errors import DataError, UserError

_WHO = "the tokenizer's chat template"
_GIVEN = (
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "tools",
    "documents",
    "tokenize",
    "bos_token",
    "eos_token",
)
_NOTHING = (None, "", False)
T = TypeVar("T")
TRIMMED = "with white space around a message that the chat template trims"
MOVED = "with a system message that the chat template moves"
IGNORED = "with a message field {!r} that the chat template ignores"


def plain_template(messages: Messages, add_generation_prompt: bool) -> str:
    """The chat format for tokenizers without a template of their own: `role: content`, turns separated by a
    blank line. The prompt ends with "assistant:", so that a completion begins with a space, as words inside a
    text do."""
    turns = [f"{message['role']}: {message['content']}" for message in messages]
    return "\n\n".join(turns + (["assistant:"] if add_generation_prompt else []))


def _mark(i: int) -> str:
    return f"Q{i}wZ"


def _blank(message: dict[str, Any]) -> bool:
    return not message["content"].strip()


class ChatTemplate:
    """The chat template of one tokenizer, or `plain_template` where it has none."""

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None):
        self.tokenizer, self.own = tokenizer, bool(getattr(tokenizer, "chat_template", None))
        self.options = dict(options or {})
        for name in self.options:
            if name in _GIVEN or not re.search(
                rf"\b{re.escape(name)}\b", str(tokenizer.chat_template) if self.own else ""
            ):
                where = (
                    "is set by the trainer"
                    if name in _GIVEN
                    else "is no variable of the tokenizer's chat template"
                )
                raise UserError(f"--template {name}: it {where}")
        self.notes: set[str] = set()
        self._outlines: dict[Any, str | None] = {}
        self.added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        self._in_parts = False
        self._in_parts = self.own and self._wants_parts()
        self.turn_end = self._find_turn_end() if self.own else None

    # --- the two questions ----------------------------------------------------------------------------------

    def prompt(self, source: str, messages: Messages, place: str = "prompt") -> str:
        """The prompt, with the turn left to the assistant. `place`: the field that holds the messages."""
        text = self.checked(source, place, lambda: self._render(messages, True))
        if not self.own:
            return text
        self._check_fields(source, place, messages, text, True)
        outline = self._outline(messages, True)
        shown = [i for i, message in enumerate(messages) if not _blank(message)]
        if outline is not None:
            for i in shown:
                if _mark(i) not in outline:
                    raise self.refusal(
                        source, f"{place}[{i}]", self.loss_of(_mark(i), outline, messages[i]["role"])
                    )
            places = [outline.index(_mark(i)) for i in shown if messages[i]["role"] != "system"]
            if places != sorted(places):
                raise self.refusal(source, place, "puts the messages in another order")
            places = [outline.index(_mark(i)) for i in shown]
            if places != sorted(places):
                self.notes.add(MOVED)
            if self._matches(outline, messages, text):
                return text
        self.find_in_order(source, place, messages, text)
        return text

    def answer(
        self, source: str, field: str, prompt: Messages, prompt_text: str, message: dict[str, Any]
    ) -> str:
        """What follows the prompt when the assistant says this: its words, and the end of the turn if the
        template writes one."""
        messages = [*prompt, message]
        text = self.checked(source, field, lambda: self._render(messages, False))
        if not self.own:
            return text.removeprefix(prompt_text)
        self._check_fields(source, field, messages, text, False)
        tail = self._tail(source, field, prompt, message["role"])
        kept = self._cut_at_end(source, field, tail)
        if _blank(message):
            return message["content"] + kept
        if not text.startswith(prompt_text):
            raise self.refusal(source, field, self._other_prompt(prompt, prompt_text, text))
        words, rest = message["content"].strip(), text[len(prompt_text) :]
        core = rest[: len(rest) - len(tail)] if rest.endswith(tail) else None
        if core is None or core.strip() != words:
            raise self.refusal(source, field, self._other_answer(prompt, prompt_text, words, rest, tail))
        if message["content"] not in core:
            self.notes.add(TRIMMED)
        return core + kept

    # --- what else it tells ---------------------------------------------------------------------------------

    def remarks(self) -> list[str]:
        """What a user should know of the template, whatever the data."""
        source, said = str(self.tokenizer.chat_template), []
        if self.turn_end not in (None, self.tokenizer.eos_token_id):
            ends = (
                self.tokenizer.convert_ids_to_tokens(i) for i in (self.turn_end, self.tokenizer.eos_token_id)
            )
            said.append(
                "chat template: a turn ends with {!r}, not with the tokenizer's EOS {!r}".format(*ends)
            )
        head = (self._outline(_user(), True) or "").partition(_mark(0))[0]
        if len(re.findall(r"[^\W\d_]+", self.without_markers(head))) > 3:  # more than a role's name
            said.append(
                "chat template: it opens a conversation without a system message with words of its own: "
                f"{short(head)}"
            )
        if "strftime_now" in source:
            said.append(
                "chat template: it writes the date into the prompts, so the data of another day are other "
                "data to --resume"
            )
        bos = self.tokenizer.bos_token
        if (
            bos
            and self.tokenizer.bos_token_id in self.tokenizer("a")["input_ids"]
            and bos not in (self._outline(_user(), True) or bos)
        ):
            said.append(
                "chat template: conversations have no BOS, since it writes none, though the tokenizer begins "
                f"texts with {bos!r}"
            )
        return said

    # --- rendering ------------------------------------------------------------------------------------------

    def _render(self, messages: Messages, generation: bool) -> str:
        if not self.own:
            return plain_template(messages, generation)
        return self.tokenizer.apply_chat_template(
            self.shaped(messages), tokenize=False, add_generation_prompt=generation, **self.options
        )

    def shaped(self, messages: Messages) -> Messages:
        """The messages with their contents as this template walks over them."""
        if not self._in_parts:
            return messages
        return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]

    def checked(self, source: str, field: str, render: Callable[[], T]) -> T:
        """What `render` returns; an error in the template is one of the example."""
        try:
            return render()
        except (
            Exception
        ) as error:  # templates are programs of their own: any error in one is about this example
            raise DataError(source, field, f"{_WHO} refuses it: {' '.join(str(error).split())}") from None

    def _outline(self, messages: Messages, generation: bool) -> str | None:
        """The messages rendered with a mark in the place of every content that is not blank; None if the
        template refuses that."""
        extras = tuple(
            repr({key: value for key, value in m.items() if key not in ("role", "content")}) for m in messages
        )
        key = (
            generation,
            tuple(m["role"] for m in messages),
            tuple(m["content"] if _blank(m) else None for m in messages),
            extras,
        )
        if key not in self._outlines:
            if len(self._outlines) >= 4096:  # fields of a message that are never the same
                self._outlines.clear()
            marked = [m if _blank(m) else {**m, "content": _mark(i)} for i, m in enumerate(messages)]
            try:
                self._outlines[key] = self._render(marked, generation)
            except Exception:  # see checked
                self._outlines[key] = None
        return self._outlines[key]

    def _wants_parts(self) -> bool:
        """Whether the template walks over the parts of a content, [{"type": "text", ...}], and finds none in
        a text."""
        if _mark(0) in (self._outline(_user(), True) or ""):
            return False
        self._outlines, self._in_parts = {}, True
        found = _mark(0) in (self._outline(_user(), True) or "")
        self._outlines = {}
        return found

    # --- the end of a turn ----------------------------------------------------------------------------------

    def _find_turn_end(self) -> int | None:
        """The special token behind the assistant's words that also stands there when the conversation goes on
        (some templates close the whole conversation with a token of its own); among several EOS goes first,
        since "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>" ends at the second."""
        turns = [*_user(), {"role": "assistant", "content": "a"}]
        last, within = self._outline(turns, False), self._outline([*turns, *_user()], False)
        if last is None or _mark(1) not in last:
            return None
        last = last.rpartition(_mark(1))[2]
        within = (within or "").partition(_mark(1))[2].partition(_mark(2))[0]
        eos = self.tokenizer.eos_token_id
        for text in (last[: common_prefix(last, within)], last):
            ids = [
                i
                for i in self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                if i in self.added
            ]
            ids = [
                i for i in ids if self.tokenizer.convert_ids_to_tokens(i) in text
            ]  # not those that the tokenizer puts around it
            if ids:
                return eos if eos in ids else ids[0]
        return None

    def _tail(self, source: str, field: str, prompt: Messages, role: str) -> str:
        """What the template writes behind the assistant's words after this prompt."""
        outline, mark = self._outline([*prompt, {"role": role, "content": "a"}], False), _mark(len(prompt))
        if outline is None:
            raise self.refusal(source, field, "refuses an answer of one word after this prompt")
        if mark not in outline:
            raise self.refusal(source, field, self.loss_of(mark, outline, role))
        return outline.rpartition(mark)[2]

    def _cut_at_end(self, source: str, field: str, tail: str) -> str:
        """The tail up to the end of the turn, that included; without one, up to the white space at its end.
        Nothing in it may be words."""
        ends = [
            self.tokenizer.convert_ids_to_tokens(i)
            for i in (self.turn_end, self.tokenizer.eos_token_id)
            if i is not None
        ]
        end = next((end for end in ends if end in tail), None)
        kept = tail.rstrip() if end is None else tail[: tail.index(end) + len(end)]
        if re.search(r"\w", self.without_markers(kept)):
            raise self.refusal(
                source,
                field,
                f"writes {short(kept)} behind the assistant's words, which would be trained on",
            )
        return kept

    def without_markers(self, text: str) -> str:
        """The text without special tokens and what looks like one: <...> and [...] of one word."""
        for i in self.added:
            text = text.replace(self.tokenizer.convert_ids_to_tokens(i), " ")
        return re.sub(r"<[^<>\s]*>|\[[^\[\]\s]*\]", " ", text)

    # --- comparison -----------------------------------------------------------------------------------------

    def _matches(self, outline: str, messages: Messages, text: str) -> bool:
        """Whether the text is the outline with every content in the place of its mark, as it stands or with
        white space trimmed."""
        marks = {_mark(i): message["content"] for i, message in enumerate(messages) if not _blank(message)}
        pieces = re.split(f"({'|'.join(marks)})", outline) if marks else [outline]
        if "".join(marks.get(piece, piece) for piece in pieces) == text:
            return True
        ends = {0}  # every place that the pieces so far can reach
        for piece in pieces:
            content = marks.get(piece)
            forms = (
                {piece} if content is None else {content, content.strip(), content.lstrip(), content.rstrip()}
            )
            ends = {end + len(form) for end in ends for form in forms if text.startswith(form, end)}
        if len(text) in ends:
            self.notes.add(TRIMMED)
        return len(text) in ends

    def find_in_order(self, source: str, place: str, messages: Messages, text: str) -> None:
        """For a prompt that hangs on more of its contents than that they are there: each must still be found,
        one behind the other."""
        place = 0
        for i, message in enumerate(messages):
            words, start = message["content"].strip(), 0 if message["role"] == "system" else place
            found = text.find(words, start)
            if found < 0:
                raise self.refusal(source, f"{place}[{i}]", self.loss_of(words, text, message["role"]))
            if message["role"] != "system":
                place = found + len(words)
            if message["content"] not in text:
                self.notes.add(TRIMMED)

    def _check_fields(self, source: str, field: str, messages: Messages, text: str, generation: bool) -> None:
        """Refuse a name that the template does not write, and count other fields that it ignores."""
        for key in sorted(
            {key for message in messages for key, value in message.items() if value not in _NOTHING}
            - {"role", "content"}
        ):
            without = [{k: v for k, v in message.items() if k != key} for message in messages]
            try:
                ignored = self._render(without, generation) == text
            except Exception:  # see checked
                ignored = False
            values = [message[key] for message in messages if isinstance(message.get(key), str)]
            lost = (
                next((value for value in values if value.strip() not in text), None)
                if key == "name"
                else None
            )
            if key == "name" and (ignored or lost is not None):
                raise self.refusal(
                    source,
                    field,
                    f"leaves out the {key} {short(lost if lost is not None else values[0])} of a message",
                )
            if ignored:
                self.notes.add(IGNORED.format(key))

    # --- what to say ----------------------------------------------------------------------------------------

    def refusal(self, source: str, field: str, what: str) -> DataError:
        return DataError(source, field, f"{_WHO} {what}; change the template or the data")

    def loss_of(self, words: str, text: str, role: str) -> str:
        """What happened to words that are not in the text."""
        if words.casefold() in text.casefold():
            return f"changes the case of letters in the {role} message"
        head, think, answer = words.rpartition("</think>")
        if think and answer.strip() in text:
            return f"cuts the reasoning out of the {role} message ({short(head + think)})"
        if re.fullmatch(r"Q\d+wZ", words):
            return f"leaves out the {role} message"
        return f"changes the {role} message ({short(words)} is not in what it writes)"

    def _other_prompt(self, prompt: Messages, before: str, after: str) -> str:
        for message in prompt:
            words = message["content"].strip()
            if words in before and words not in after:
                return f"leaves out the {message['role']} message ({short(words)}) once an answer follows, so it would learn without it"
        same = common_prefix(before, after)
        was, becomes = before[same:], after[same : same + len(before) - same + 20]
        return f"writes the prompt differently once an answer follows: {short(was)} becomes {short(becomes)}"

    def _other_answer(self, prompt: Messages, prompt_text: str, words: str, rest: str, tail: str) -> str:
        if words not in rest:
            return self.loss_of(words, rest, "assistant")
        before, _, behind = rest.partition(words)
        if before.strip():
            silent = self._render(prompt, False) == prompt_text
            why = " (it does not heed add_generation_prompt)" if silent else ""
            return f"writes {short(before)} before the assistant's words{why}, which would be trained on"
        return f"writes {short(behind)} behind the assistant's words, where it ends another turn with {short(tail)}"


def _user() -> Messages:
    return [{"role": "user", "content": "a"}]


def short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
