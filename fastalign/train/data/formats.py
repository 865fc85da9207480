"""TRL's data formats, read from JSON Lines and brought into one shape: a prompt and its completions.

    preference, standard          {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    preference, conversational    {"prompt": [{"role": "user", "content": "..."}], "chosen": [{"role": "assistant", "content": "..."}], "rejected": [...]}
    preference, implicit prompt   either of the two without "prompt": chosen and rejected begin with it
    unpaired                      {"prompt": ..., "completion": ..., "label": true}, texts or messages; or "score": a number, for some methods
    listwise                      {"prompt": ..., "completions": [..., ...], "scores": [..., ...]}, each completion text or messages
    optional columns of a pair    "soft_label": P(chosen is better); "weight": of the pair; "margin": what chosen should win by; "target"

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
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastalign.runtime.checks import shown
from fastalign.train.errors import DataError, UserError

Text = str
Messages = list[dict[str, Any]]

_SIDES = ("chosen", "rejected")
_ANY = (-math.inf, math.inf)
_UNPAIRED_COLUMNS = {"score": _ANY, "weight": (0.0, math.inf)}
MAX_LIST = 64  # what the list kernel takes
MAX_LINE = 16 << 20  # bytes of a line
_PAIR_COLUMNS = {"soft_label": (0.0, 1.0), "weight": (0.0, math.inf), "margin": _ANY, "target": _ANY}
_UNSUPPORTED = (
    "tools",
    "functions",
    "system",
    "system_prompt",
    "images",
    "image",
    "videos",
    "audio",
    "chat_template_kwargs",
)
# What a message may say beside its content. A template that writes it puts words of its own around it, most
# write it in some turns only.
_BESIDE_CONTENT = (
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
    "images",
    "image",
    "videos",
    "audio",
)


@dataclass(frozen=True, slots=True)
class Texts:
    """One example with an explicit prompt: texts, or lists of messages. `source` says where it came from;
    `fields` names each completion's place in the line, for error messages; `values` holds the example's
    numbers (labels, scores, weights)."""

    source: str
    prompt: Text | Messages
    completions: tuple[Text | Messages, ...]
    fields: tuple[str, ...]
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def conversational(self) -> bool:
        return isinstance(self.prompt, list)


@dataclass(frozen=True)
class Format:
    """A data format: what an example is called, and how a line becomes one."""

    name: str
    noun: str
    parse: Callable[[str, Any], Texts]
    required: tuple[str, ...] = ()  # columns of numbers that every line must have

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
    _check_row(source, row, ("chosen", "rejected"))
    conversational = isinstance(row["chosen"], list) or isinstance(row["rejected"], list)
    texts = (_conversational if conversational else _standard)(source, row)
    return dataclasses.replace(texts, values=_columns(source, row, _PAIR_COLUMNS))


def _columns(source: str, row: dict[str, Any], legal: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The optional numbers of a row: name -> (lowest, highest legal value)."""
    return {
        name: _number(source, name, row[name], low, high)
        for name, (low, high) in legal.items()
        if row.get(name) is not None
    }


def parse_unpaired(source: str, row: Any) -> Texts:
    """Check one row of a prompt, a completion, and what is known of it."""
    _check_row(source, row, ("prompt", "completion"))
    values: dict[str, Any] = _columns(source, row, _UNPAIRED_COLUMNS)
    if row.get("label") is not None:
        if not isinstance(row["label"], bool):
            raise DataError(source, "label", f"expected true or false, got {_kind(row['label'])}")
        values["label"] = row["label"]
    return _with_prompt(source, row, [("completion", row["completion"])], values)


def parse_listwise(source: str, row: Any) -> Texts:
    """Check one row of a prompt, its completions, and a score for each."""
    _check_row(source, row, ("prompt", "completions", "scores"))
    for field in ("completions", "scores"):
        if not isinstance(row[field], list):
            raise DataError(source, field, f"expected a list, got {_kind(row[field])}")
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
    scores = tuple(_number(source, f"scores[{i}]", score) for i, score in enumerate(row["scores"]))
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
    read = _messages if isinstance(row["prompt"], list) else _text
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
    _check_row(source, row, ("prompt",))
    if not isinstance(row["prompt"], list):
        return Texts(source, _text(source, "prompt", row["prompt"]), (), ())
    return _check_roles(Texts(source, _messages(source, "prompt", row["prompt"]), (), ()))


def parse_text(source: str, row: Any) -> str:
    """Check one row with a text."""
    _check_row(source, row, ("text",))
    return _text(source, "text", row["text"])


def _check_row(source: str, row: Any, required: tuple[str, ...]) -> None:
    if not isinstance(row, dict):
        raise DataError(source, None, f"expected a JSON object, got {_kind(row)}")
    for field in _UNSUPPORTED:
        if row.get(field):
            raise DataError(source, field, "not supported: the prompt would not be the one that was judged")
    for field in required:
        if field not in row:
            raise DataError(source, field, f"missing (the line has: {', '.join(map(str, row)) or 'nothing'})")


def _standard(source: str, row: dict[str, Any]) -> Texts:
    chosen, rejected = _text(source, "chosen", row["chosen"]), _text(source, "rejected", row["rejected"])
    if row.get("prompt") is not None:
        return Texts(source, _text(source, "prompt", row["prompt"]), (chosen, rejected), _SIDES)
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
        _messages(source, "chosen", row["chosen"]),
        _messages(source, "rejected", row["rejected"]),
    )
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        prompt = _messages(source, "prompt", prompt)
        if chosen[: len(prompt)] == prompt and rejected[: len(prompt)] == prompt:  # repeated in both sides
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        if prompt is not None:
            _text(source, "prompt", prompt)
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


def _text(source: str, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(source, field, f"expected text, got {_kind(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # a lone surrogate such as "\ud800" is legal JSON and no character
        raise DataError(source, field, f"character {error.start} is half of a surrogate pair") from None
    return value


def _number(source: str, field: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(source, field, f"expected a number, got {_kind(value)}")
    # Comparisons, which integers of any size can take: NaN fails every one of them.
    if not (-sys.float_info.max <= value <= sys.float_info.max and low <= value <= high):
        legal = (
            "a finite number"
            if math.isinf(low)
            else f"a number from {low:g}" + ("" if math.isinf(high) else f" to {high:g}")
        )
        raise DataError(source, field, f"expected {legal}, got {shown(value)}")
    return float(value)


def _messages(source: str, field: str, value: Any) -> Messages:
    if not isinstance(value, list):
        raise DataError(
            source, field, f"expected a list of messages like the rest of the example, got {_kind(value)}"
        )
    if not value:
        raise DataError(source, field, "has no message")
    return [_message(source, f"{field}[{i}]", message) for i, message in enumerate(value)]


def _message(source: str, field: str, message: Any) -> dict[str, Any]:
    """A message with a text as its content."""
    if not isinstance(message, dict):
        raise DataError(source, field, f"expected an object with role and content, got {_kind(message)}")
    for key in ("role", "content"):
        if key not in message:
            raise DataError(source, f"{field}.{key}", "missing")
    for key in _BESIDE_CONTENT:
        if message.get(key):
            raise DataError(
                source, f"{field}.{key}", "not supported: what a message says must be in its content"
            )
    _text(source, f"{field}.role", message["role"])
    content = message["content"]
    if isinstance(content, list):
        content = _one_part(source, f"{field}.content", content)
    return {**message, "content": _text(source, f"{field}.content", content)}


def _one_part(source: str, field: str, parts: list[Any]) -> Any:
    """The text of [{"type": "text", "text": text}]."""
    if (
        len(parts) != 1
        or not isinstance(parts[0], dict)
        or parts[0].get("type") != "text"
        or "text" not in parts[0]
    ):
        raise DataError(
            source,
            field,
            'expected text, or a list of one part {"type": "text", "text": ...}; join several to one',
        )
    return parts[0]["text"]


def common_prefix(a: Any, b: Any) -> int:
    """Length of the longest common beginning of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)


PREFERENCE = Format("preference", "pair", parse_preference)
UNPAIRED = Format("unpaired", "response", parse_unpaired)
LISTWISE = Format("listwise", "list", parse_listwise)
