"""From the command line to a command's settings; errors to one line and an exit code."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from fastalign.cli.console import Parser
from fastalign.feedback.records import Counts
from fastalign.feedback.settings import CommandConfig
from fastalign.train.config import add_arguments, from_arguments
from fastalign.train.help import Formatter
from fastalign.train.program import answer


def main(name: str, kind: type[CommandConfig], run: Callable[[Any], Counts], argv: list[str]) -> int:
    """0: done; 1: something failed, or nothing came out; 2: the user's mistake, before work begins; 130:
    interrupted."""
    groups: dict[str, list[str]] = {}
    for field in dataclasses.fields(kind):
        groups.setdefault(field.metadata["group"], []).append(field.name)
    parser = Parser(
        prog=f"fastalign {name}",
        usage=f"fastalign {name} --data FILE --output FILE [OPTION ...]",
        description=f"{sys.modules[kind.__module__].__doc__.split(': ', 1)[1]}\n\nFormats and examples are in "
        "docs/feedback.md.",
        formatter_class=Formatter,
        allow_abbrev=False,
    )
    add_arguments(parser, kind, list(kind.__dataclass_fields__), groups)
    arguments = parser.parse_args(argv)

    def work() -> int:
        config = from_arguments(arguments, kind)
        counts = run(config)
        print(f"{name}: {counts} ({config.output})")
        return counts.exit_code

    return answer(f"fastalign {name}", work, "the same command goes on from here")
