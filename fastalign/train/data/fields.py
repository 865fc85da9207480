"""One value of a line at a time: texts, numbers, messages, each checked, and refused by its field's name."""

from __future__ import annotations

import math
import sys
from typing import Any

from fastalign.runtime.checks import shown
from fastalign.train.errors import DataError

Text = str
Messages = list[dict[str, Any]]

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


def check_row(source: str, row: Any, required: tuple[str, ...]) -> None:
    """Refuse what is no object, lacks a column, or has one that would change the prompt."""
    if not isinstance(row, dict):
        raise DataError(source, None, f"expected a JSON object, got {kind_of(row)}")
    for field in _UNSUPPORTED:
        if row.get(field):
            raise DataError(source, field, "not supported: the prompt would not be the one that was judged")
    for field in required:
        if field not in row:
            raise DataError(source, field, f"missing (the line has: {', '.join(map(str, row)) or 'nothing'})")


def text_of(source: str, field: str, value: Any) -> str:
    """The value, if it is text."""
    if not isinstance(value, str):
        raise DataError(source, field, f"expected text, got {kind_of(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # a lone surrogate such as "\ud800" is legal JSON and no character
        raise DataError(source, field, f"character {error.start} is half of a surrogate pair") from None
    return value


def number_of(source: str, field: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """The value, if it is a finite number from low to high."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(source, field, f"expected a number, got {kind_of(value)}")
    # Comparisons, which integers of any size can take: NaN fails every one of them.
    if not (-sys.float_info.max <= value <= sys.float_info.max and low <= value <= high):
        legal = (
            "a finite number"
            if math.isinf(low)
            else f"a number from {low:g}" + ("" if math.isinf(high) else f" to {high:g}")
        )
        raise DataError(source, field, f"expected {legal}, got {shown(value)}")
    return float(value)


def messages_of(source: str, field: str, value: Any) -> Messages:
    """The value, if it is a list of messages, each with a text as its content."""
    if not isinstance(value, list):
        raise DataError(
            source, field, f"expected a list of messages like the rest of the example, got {kind_of(value)}"
        )
    if not value:
        raise DataError(source, field, "has no message")
    return [_message(source, f"{field}[{i}]", message) for i, message in enumerate(value)]


def _message(source: str, field: str, message: Any) -> dict[str, Any]:
    """A message with a text as its content."""
    if not isinstance(message, dict):
        raise DataError(source, field, f"expected an object with role and content, got {kind_of(message)}")
    for key in ("role", "content"):
        if key not in message:
            raise DataError(source, f"{field}.{key}", "missing")
    for key in _BESIDE_CONTENT:
        if message.get(key):
            raise DataError(
                source, f"{field}.{key}", "not supported: what a message says must be in its content"
            )
    text_of(source, f"{field}.role", message["role"])
    content = message["content"]
    if isinstance(content, list):
        content = _one_part(source, f"{field}.content", content)
    return {**message, "content": text_of(source, f"{field}.content", content)}


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
    if a == b[: len(a)]:  # one begins with the other, as most that are asked about do
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def kind_of(value: Any) -> str:
    """What a value of JSON is called."""
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
