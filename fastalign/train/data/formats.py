"""TRL's data formats, read from JSON Lines and brought into one shape: a prompt and its completions.

    preference, standard          {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    preference, conversational    {"prompt": [{"role": "user", "content": "..."}], "chosen": [{"role": "assistant", "content": "..."}], "rejected": [...]}
    preference, implicit prompt   either of the two without "prompt": chosen and rejected begin with it
    unpaired                      {"prompt": ..., "completion": ..., "label": true}, texts or messages; or "score": a number, for some methods
    listwise                      {"prompt": ..., "completions": [..., ...], "scores": [..., ...]}, each completion text or messages
    supervised                    {"prompt": ..., "completion": ...}, or {"messages": [...]}: a conversation, or {"text": "..."}
    optional columns of a pair    "soft_label": P(chosen is better); "weight": of the pair; "margin": what chosen should win by; "target"
    with --task-weights           "task": a text or an integer, the task that the pair is of

A content is a text, or a list that holds one part of text, [{"type": "text", "text": "..."}]. A completion is
one assistant turn. An implicit prompt is what both sides share: the longest common run of messages, or the
longest common text, less the space that would end it. A conversational pair may carry its prompt as text as
well (UltraFeedback does); the messages decide then. An optional column stands in every line or in none. Other
columns are left alone, except those that would change the prompt (`tools`, `images`, `system`, ...): they are
refused, as are parts of a message that are not its content (`tool_calls`, `reasoning_content`, ...).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fastalign.train.data.fields import (
    Messages,
    Text,
    check_row,
    common_prefix,
    kind_of,
    messages_of,
    number_of,
    text_of,
)
from fastalign.train.errors import DataError, UserError

_SIDES = ("chosen", "rejected")
_ANY = (-math.inf, math.inf)
_UNPAIRED_COLUMNS = {"score": _ANY, "weight": (0.0, math.inf)}
MAX_LIST = 64  # what the list kernel takes
MAX_LINE = 16 << 20  # bytes of a line
_PAIR_COLUMNS = {"soft_label": (0.0, 1.0), "weight": (0.0, math.inf), "margin": _ANY, "target": _ANY}


@dataclass(frozen=True, slots=True)
class Texts:
    """One example with an explicit prompt: texts, or lists of messages. `source` says where it came from;
    `fields` names each completion's place in the line, for error messages; `values` holds the example's
    numbers (labels, scores, weights). `prompt_field` is the prompt's place."""

    source: str
    prompt: Text | Messages
    completions: tuple[Text | Messages, ...]
    fields: tuple[str, ...]
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt_field: str = "prompt"

    @property
    def conversational(self) -> bool:
        return isinstance(self.prompt, list)


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages whose assistant turns are learnt, all of them; the last message is one. `fields` names each
    message's place in the line."""

    source: str
    messages: Messages
    fields: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """A text of its own, without a prompt."""

    source: str
    text: Text


@dataclass(frozen=True)
class Format:
    """A data format: what an example is called, and how a line becomes one. `every_token`: prompts are learnt,
    too."""

    name: str
    noun: str
    parse: Callable[[str, Any], Texts | Conversation | Document]
    required: tuple[str, ...] = ()  # columns of numbers that every line must have
    every_token: bool = False

    def requiring(self, *columns: str) -> Format:
        """The same format with more columns that must be there."""
        return dataclasses.replace(self, required=(*self.required, *columns))

    def check_values(self, source: str, values: Mapping[str, Any], first: Mapping[str, Any]) -> None:
        """Refuse an example without a required column, and one whose columns are not those of the first
        example."""
        for column in self.required:
            if column not in values:
                raise DataError(source, column, "missing: the chosen method and loss need it in every line")
        for column in {**first, **values}:
            if column not in first or column not in values:
                raise DataError(
                    source,
                    column,
                    f"{'missing' if column in first else 'given'} here, unlike in the first line; give it in "
                    "all or none",
                )


def read_jsonl(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield ("file, line n", value) for every line of a JSON Lines file that is not blank, reading one line
    at a time."""
    path = Path(path).expanduser()
    try:
        with path.open("rb") as lines:
            number = 0
            while line := lines.readline(MAX_LINE + 1):
                number += 1
                source = f"{path}, line {number}"
                if len(line) > MAX_LINE:
                    raise DataError(
                        source,
                        None,
                        f"longer than {MAX_LINE >> 20} MiB, as no sequence of tokens is; is it one JSON "
                        "object per line?",
                    )
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                    if text:
                        yield source, json.loads(text)
                except UnicodeDecodeError as error:
                    raise DataError(source, None, f"not UTF-8 (byte {error.start})") from None
                except (ValueError, RecursionError) as error:  # JSON itself bounds no integer, Python does
                    raise DataError(source, None, f"not JSON: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read the data file {path}: {error.strerror}") from None


def parse_preference(source: str, row: Any) -> Texts:
    """Check one row and make its prompt explicit. Raises `DataError` naming the source and the field at
    fault."""
    check_row(source, row, ("chosen", "rejected"))
    conversational = isinstance(row["chosen"], list) or isinstance(row["rejected"], list)
    texts = (_conversational if conversational else _standard)(source, row)
    return dataclasses.replace(texts, values=_columns(source, row, _PAIR_COLUMNS))


def parse_task_preference(source: str, row: Any) -> Texts:
    """The same of a row that says of which task it is: a text, or an integer, which is taken as its digits."""
    texts = parse_preference(source, row)
    task = row.get("task")
    if task is None:
        return texts
    if isinstance(task, bool) or not isinstance(task, (str, int)) or task == "":
        raise DataError(
            source,
            "task",
            f"expected a text or an integer, got {kind_of(task) if task != '' else 'an empty one'}",
        )
    return dataclasses.replace(texts, values={**texts.values, "task": str(task)})


def _columns(source: str, row: dict[str, Any], legal: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The optional numbers of a row: name -> (lowest, highest legal value)."""
    return {
        name: number_of(source, name, row[name], low, high)
        for name, (low, high) in legal.items()
        if row.get(name) is not None
    }


def parse_unpaired(source: str, row: Any) -> Texts:
    """Check one row of a prompt, a completion, and what is known of it."""
    check_row(source, row, ("prompt", "completion"))
    values: dict[str, Any] = _columns(source, row, _UNPAIRED_COLUMNS)
    if row.get("label") is not None:
        if not isinstance(row["label"], bool):
            raise DataError(source, "label", f"expected true or false, got {kind_of(row['label'])}")
        values["label"] = row["label"]
    return _with_prompt(source, row, [("completion", row["completion"])], values)


def parse_listwise(source: str, row: Any) -> Texts:
    """Check one row of a prompt, its completions, and a score for each."""
    check_row(source, row, ("prompt", "completions", "scores"))
    for field in ("completions", "scores"):
        if not isinstance(row[field], list):
            raise DataError(source, field, f"expected a list, got {kind_of(row[field])}")
    if not 1 <= len(row["completions"]) <= MAX_LIST:
        raise DataError(
            source, "completions", f"expected 1 to {MAX_LIST} of them, got {len(row['completions'])}"
        )
    if len(row["scores"]) != len(row["completions"]):
        raise DataError(
            source,
            "scores",
            f"expected one for each of the {len(row['completions'])} completions, got {len(row['scores'])}",
        )
    scores = tuple(number_of(source, f"scores[{i}]", score) for i, score in enumerate(row["scores"]))
    return _with_prompt(
        source,
        row,
        [(f"completions[{i}]", each) for i, each in enumerate(row["completions"])],
        {"scores": scores},
    )


def _with_prompt(
    source: str, row: dict[str, Any], completions: list[tuple[str, Any]], values: dict[str, Any]
) -> Texts:
    """An explicit prompt and completions of its kind: all texts, or all lists of messages."""
    read = messages_of if isinstance(row["prompt"], list) else text_of
    fields = tuple(field for field, _ in completions)
    texts = Texts(
        source,
        read(source, "prompt", row["prompt"]),
        tuple(read(source, *each) for each in completions),
        fields,
        values,
    )
    return _check_roles(texts) if texts.conversational else texts


def parse_prompt(source: str, row: Any) -> Texts:
    """Check one row with a prompt to sample from; its other columns are left alone."""
    check_row(source, row, ("prompt",))
    if not isinstance(row["prompt"], list):
        return Texts(source, text_of(source, "prompt", row["prompt"]), (), ())
    return _check_roles(Texts(source, messages_of(source, "prompt", row["prompt"]), (), ()))


def parse_text(source: str, row: Any) -> str:
    """Check one row with a text."""
    check_row(source, row, ("text",))
    return text_of(source, "text", row["text"])


def _standard(source: str, row: dict[str, Any]) -> Texts:
    chosen, rejected = text_of(source, "chosen", row["chosen"]), text_of(source, "rejected", row["rejected"])
    if row.get("prompt") is not None:
        return Texts(source, text_of(source, "prompt", row["prompt"]), (chosen, rejected), _SIDES)
    shared = common_prefix(chosen, rejected)
    if chosen[shared - 1 : shared] == " ":  # a word and the space before it belong together
        shared -= 1
    if not shared:
        raise DataError(
            source, "prompt", "missing, and chosen and rejected share no beginning that could be the prompt"
        )
    return Texts(source, chosen[:shared], (chosen[shared:], rejected[shared:]), _SIDES)


def _conversational(source: str, row: dict[str, Any]) -> Texts:
    chosen, rejected = (
        messages_of(source, "chosen", row["chosen"]),
        messages_of(source, "rejected", row["rejected"]),
    )
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        prompt = messages_of(source, "prompt", prompt)
        if chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:  # repeated in both sides
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        if prompt is not None:
            text_of(source, "prompt", prompt)
        # An identical pair still has completions: the last message is never part of the prompt.
        shared = min(common_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
        if not shared:
            raise DataError(
                source, "prompt", "missing as messages, and chosen and rejected share no first message"
            )
        if prompt is not None and not any(prompt in message["content"] for message in chosen[:shared]):
            raise DataError(source, "prompt", "differs from the messages that chosen and rejected share")
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    return _check_roles(Texts(source, prompt, (chosen, rejected), _SIDES))


def _check_roles(texts: Texts) -> Texts:
    """The example, if its prompt leaves the turn to the assistant and its completions are the assistant's."""
    if texts.prompt[-1]["role"] == "assistant":
        raise DataError(
            texts.source, "prompt", "ends with an assistant turn; the completion must be a turn of its own"
        )
    for field, completion in zip(texts.fields, texts.completions):
        roles = {message["role"] for message in completion}
        if roles != {"assistant"}:
            raise DataError(
                texts.source,
                field,
                "must hold assistant turns only after the prompt, since all of it is trained on; "
                f"it has: {', '.join(sorted(roles)) or 'no message'}",
            )
        if len(completion) > 1:
            raise DataError(
                texts.source,
                field,
                f"has {len(completion)} assistant turns; a completion is one: what stands between turns is "
                "nobody's words",
            )
    return texts


_FORMS = ("messages", "completion", "text")
_NEEDS_MESSAGES = "--loss-on assistant (TRL's assistant_only_loss=True) needs messages, and this is text"


def parse_supervised(source: str, row: Any, loss_on: str | None = None) -> Texts | Conversation | Document:
    """Check one row to imitate: a prompt and a completion, a conversation, or a text. `loss_on`: see
    `supervised`."""
    check_row(source, row, ())
    found = [form for form in _FORMS if row.get(form) is not None]
    prompt = row.get("prompt")
    if len(found) != 1 or found == ["text"] and prompt is not None:
        raise DataError(
            source,
            found[-1] if found else "completion",
            f"{'beside another form' if found else 'missing'} (the line has: "
            f"{', '.join(map(str, row)) or 'nothing'}); legal: 'prompt' and 'completion', or 'messages', or "
            "'text'",
        )
    if found == ["messages"]:
        return _supervised_messages(source, row, loss_on)
    if found == ["text"]:
        text = text_of(source, "text", row["text"])
        if loss_on == "completion":
            raise DataError(
                source,
                "text",
                "has no completion: --loss-on completion (TRL's completion_only_loss=True) needs 'prompt' and "
                "'completion', or 'messages'",
            )
        if loss_on == "assistant":
            raise DataError(source, "text", _NEEDS_MESSAGES)
        return Document(source, text)
    if prompt is None:
        raise DataError(source, "prompt", f"missing (the line has: {', '.join(map(str, row))})")
    texts = _with_prompt(source, row, [("completion", row["completion"])], {})
    if loss_on != "assistant":
        return texts
    if not texts.conversational:
        raise DataError(source, "prompt", _NEEDS_MESSAGES)
    fields = (*(f"prompt[{i}]" for i in range(len(texts.prompt))), "completion[0]")
    return _conversation(source, [*texts.prompt, *texts.completions[0]], fields)


def _supervised_messages(source: str, row: dict[str, Any], loss_on: str | None) -> Texts | Conversation:
    """A conversation up to its last assistant turn. A prompt as text may stand beside it: the messages
    decide."""
    messages = messages_of(source, "messages", row["messages"])
    if (prompt := row.get("prompt")) is not None:
        words = text_of(source, "prompt", prompt)
        if not any(words in message["content"] for message in messages):
            raise DataError(source, "prompt", "is in none of the messages")
    end = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    if end < 0:
        raise DataError(source, "messages", "has no assistant turn that could be learnt")
    messages, fields = messages[: end + 1], tuple(f"messages[{i}]" for i in range(end + 1))
    conversation = _conversation(source, messages, fields)
    if loss_on in (None, "assistant"):
        return conversation
    return Texts(source, messages[:-1], ([messages[-1]],), fields[-1:], prompt_field="messages")


def _conversation(source: str, messages: Messages, fields: tuple[str, ...]) -> Conversation:
    """Refuse an assistant turn that nobody asked for."""
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and (i == 0 or messages[i - 1]["role"] == "assistant"):
            what = "opens the conversation" if i == 0 else "follows another assistant turn"
            raise DataError(source, fields[i], f"{what}: there is no prompt that it would answer")
    return Conversation(source, messages, fields)


def supervised(loss_on: str | None) -> Format:
    """The format of examples to imitate. loss_on: "completion": what follows the prompt, or the last turn of a
    conversation; "assistant": every assistant turn; "all": every token; None: of a line with a prompt its
    completion, of `messages` the assistant's turns, of a text all."""
    return Format(
        "supervised", "example", partial(parse_supervised, loss_on=loss_on), every_token=loss_on == "all"
    )


PREFERENCE = Format("preference", "pair", parse_preference)
TASK_PREFERENCE = Format("preference", "pair", parse_task_preference, ("task",))
UNPAIRED = Format("unpaired", "response", parse_unpaired)
LISTWISE = Format("listwise", "list", parse_listwise)
