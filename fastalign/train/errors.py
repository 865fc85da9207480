"""The errors that the command line turns into one line on stderr and an exit code."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave is wrong and can be named in one line: a path, an option, a number. Exit code
    2."""


class DataError(UserError):
    """One example is malformed. `source` says where it stands ("pairs.jsonl, line 3"), `field` which field is
    at fault."""

    def __init__(self, source: str, field: str | None, message: str):
        super().__init__(f"{source}: {message}" if field is None else f"{source}: field '{field}': {message}")
        self.source = source
        self.field = field


class TrainingError(RuntimeError):
    """Training started and cannot go on (a gradient that is not finite, say). Exit code 1."""
