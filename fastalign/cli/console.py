"""What the commands share: usage errors in one line, and aligned tables that are also Markdown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Reports a usage error in one line and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def integer(low: int, high: int | None = None) -> Any:
    """An argparse type: an integer of at least `low` (and at most `high`)."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(
                f"{value} is out of range; legal: {low} " + (f"to {high}" if high is not None else "or more")
            )
        return value

    return parse


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table with aligned columns. Columns of numbers are flush right, as in the cells' own
    text."""
    cells = [[str(cell) for cell in row] for row in rows]
    right = [all(_numeric(row[i]) for row in cells) for i in range(len(headers))]
    widths = [max([3, len(header), *(len(row[i]) for row in cells)]) for i, header in enumerate(headers)]

    def line(row: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right))
            + " |"
        )

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right)) + "|"
    return "\n".join([line(headers), rule, *map(line, cells)])


def _numeric(cell: str) -> bool:
    return cell in ("", "n/a", "-") or cell[0].isdigit() or cell[0] in "+-." and cell[1:2].isdigit()
