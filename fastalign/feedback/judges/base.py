"""What a judge is: `compare` and `score`, on lists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from fastalign.feedback.server import Failure
from fastalign.train.data.formats import Messages


class Pair(NamedTuple):
    """Two responses to a prompt. source: where it stands; row: its line, columns included."""

    source: str
    prompt: str | Messages
    first: str
    second: str
    row: dict[str, Any]


class Response(NamedTuple):
    """A response to a prompt."""

    source: str
    prompt: str | Messages
    text: str
    row: dict[str, Any]


class Verdict(NamedTuple):
    """value: P(the first is better), or a score; None: there is none, and `failure` says why."""

    value: float | None
    failure: Failure | None = None


class Judge(Protocol):
    """A judge has one of the two methods, or both. at_once: how many items it wants together; None: it waits for
    a server, and items may be given to it one by one from several threads."""

    at_once: int | None

    def compare(self, items: Sequence[Pair]) -> list[Verdict]:
        """P(first is better) of each."""
        ...

    def score(self, items: Sequence[Response]) -> list[Verdict]:
        """A score of each, higher is better."""
        ...

    def contents(self) -> dict[str, str]:
        """Hashes of what its verdicts depend on besides settings."""
        ...
