"""Lines in, lines out, stopped and continued at any point.

Beside the output FILE stand FILE.json, the settings of the command, and FILE.done, the journal: one entry per
line of the data that is done, written just before its lines are appended to FILE. When the command starts
again the journal is held against FILE: an entry whose lines did not get there is taken back, with what has
come of them. Lines come as they are ready; when all are done they are brought into the order of the data."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

import fastalign
from fastalign.feedback.settings import CommandConfig
from fastalign.runtime.checks import shown
from fastalign.train.data.formats import read_jsonl
from fastalign.train.errors import DataError, TrainingError, UserError
from fastalign.train.files import replace_file, writing


class Line(NamedTuple):
    """A line of the data. `source`: "FILE, line n"; `parsed`: what the command has made of it."""

    number: int
    source: str
    row: dict[str, Any]
    parsed: Any


@dataclasses.dataclass
class Counts:
    """What became of the lines of the data. kept: of those done, how many had been done before; written: lines of
    the output; skipped, failed: reason -> lines; a failed line is tried again when the command is run again."""

    done: int = 0
    kept: int = 0
    written: int = 0
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    failed: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def exit_code(self) -> int:
        """1: something failed, or nothing came out."""
        return int(bool(self.failed) or not self.written)

    def __str__(self) -> str:
        before = f" ({self.kept} before)" if self.kept else ""
        parts = [f"{self.done} done{before}", f"{self.written} lines written"]
        for what, reasons in (("skipped", self.skipped), ("failed", self.failed)):
            if reasons:
                each = ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
                parts.append(f"{sum(reasons.values())} {what} ({each})")
        return ", ".join(parts) + ("; run it again to try the failed ones again" if self.failed else "")


def read_lines(path: Path, parse: Callable[[str, Any], Any]) -> list[Line]:
    """All lines, each checked by `parse` (source, row), before any work begins."""
    lines = []
    for source, row in read_jsonl(path):
        lines.append(Line(int(source.rpartition(" ")[2]), source, row, parse(source, row)))
    if not lines:
        raise UserError(f"{path} is empty")
    return lines


def field(source: str, row: Mapping[str, Any], name: str) -> Any:
    """A column that must be there."""
    if name not in row:
        raise DataError(source, name, f"missing (the line has: {', '.join(map(str, row)) or 'nothing'})")
    return row[name]


def digest(value: Any) -> str:
    """A short hash of anything that JSON holds."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


class Records:
    """The output of one command: `todo`, the lines that are not done; `add`, `skip` and `fail` say what became of
    one. As a context it holds off other runs, and counts on a bar.

    Args:
        contents: what the output depends on besides the settings, by name: hashes of models and templates."""

    def __init__(
        self,
        command: str,
        config: CommandConfig,
        lines: Sequence[Line],
        contents: Mapping[str, str] | None = None,
    ):
        self.config, self.lines = config, lines
        self.output = config.paths()[1]
        self.settings_file, self.journal = (
            self.output.with_name(self.output.name + end) for end in (".json", ".done")
        )
        self.record = {
            "command": command,
            "fastalign": fastalign.__version__,
            "settings": json.loads(json.dumps(config.recorded())),
            "contents": dict(contents or {}),
        }
        salt = digest([self.record[name] for name in ("command", "settings", "contents")])
        self.keys = {line.number: digest([line.number, line.row, salt]) for line in lines}
        self.counts, self.failures = Counts(), 0
        self.done: dict[int, dict[str, Any]] = {}

    @property
    def todo(self) -> list[Line]:
        return [line for line in self.lines if line.number not in self.done]

    def add(self, line: Line, rows: Iterable[Mapping[str, Any]]) -> None:
        """The line is done, and this is what it gave."""
        self._append(line, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        self.failures = 0

    def skip(self, line: Line, reason: str, *, unanswered: bool = False) -> None:
        """The line is done and gives nothing. unanswered: because what was asked gave no usable answer."""
        self._append(line, b"", skipped=reason)
        if unanswered:
            self._no_answer(reason)

    def fail(self, line: Line, reason: str) -> None:
        """The line is not done: it is tried again when the command is."""
        self.counts.failed[reason] += 1
        self.bar.update()
        self._no_answer(reason)

    def _no_answer(self, reason: str) -> None:
        """Raises `TrainingError` after too many of these from a server without an answer between."""
        self.failures += 1
        server = getattr(self.config, "server", None)
        if server is not None and self.failures >= self.config.give_up_after:
            raise TrainingError(
                f"gave up after {self.failures} lines without an answer, the last: {reason}; {self.counts}"
            )

    def __enter__(self) -> Records:
        self.stack = contextlib.ExitStack()
        try:
            self._open()
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        with self.stack:
            if kind is None:
                self._in_order()

    # --- files ----------------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._check_place()
        with writing(str(self.output)):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self.entries = self.stack.enter_context(self.journal.open("ab", buffering=0))
            self._lock()
            if self.config.overwrite or not self.settings_file.exists():
                self.output.unlink(missing_ok=True)
                self._sorted_journal.unlink(missing_ok=True)
                self.entries.truncate(0)
                text = json.dumps(self.record, indent=1) + "\n"
                replace_file(self.settings_file, lambda path: path.write_text(text, encoding="utf-8"))
            else:
                self._go_on()
            self.target = self.stack.enter_context(self.output.open("ab", buffering=0))
        self.bar = self.stack.enter_context(
            tqdm(
                total=len(self.lines),
                initial=len(self.done),
                desc=self.record["command"],
                unit=" lines",
                disable=None if self.config.progress else True,
            )
        )

    def _check_place(self) -> None:
        """Refuse to go on under other settings, and to replace what no such command has made."""
        if not self.settings_file.exists():
            for path in (self.output, self.journal):
                if path.exists() and (path is self.output or path.stat().st_size):
                    raise UserError(
                        f"{path} exists, and {self.settings_file.name}, which would say that this command made "
                        "it, is missing; choose another --output"
                    )
            return
        try:
            before = json.loads(self.settings_file.read_text(encoding="utf-8"))
            same = before["command"] == self.record["command"]
            old, new = ({**r["settings"], **r["contents"]} for r in (before, self.record))
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.settings_file} is not the record of a command; choose another --output"
            ) from None
        if not same:
            raise UserError(
                f"{self.output} was made by 'fastalign {before['command']}'; choose another --output"
            )
        if self.config.overwrite:
            return
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                flag = type(self.config).flag(name) if name in self.record["settings"] else name
                now, then = shown(new.get(name)), shown(old.get(name))
                what = f"is {now}, and was {then}" if name in new and name in old else "was not as it is now"
                raise UserError(
                    f"{flag} {what} when {self.output} was begun; take it back, or choose another --output or "
                    "--overwrite"
                )

    def _lock(self) -> None:
        try:
            fcntl.flock(self.entries, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing {self.output}; wait for it, or choose another") from None
        except OSError as error:
            print(f"warning: {self.journal}: {error.strerror}; nothing here holds off a second run")

    @property
    def _sorted_journal(self) -> Path:
        return self.journal.with_name(self.journal.name + ".new")

    def _go_on(self) -> None:
        """Take over what is done; cut off what was being written when the last run ended."""
        journal = self.journal.read_bytes()
        if self._sorted_journal.exists():  # stopped while the order was made: which of the two fits?
            other = self._sorted_journal.read_bytes()
            if self._fits(other):
                journal = other
                self.entries.truncate(0)
                self.entries.write(journal)
            self._sorted_journal.unlink()
        good, length, lines = 0, 0, self._output_lines()
        for entry, size in _entries(journal):
            written = [next(lines, b"") for _ in range(entry["rows"])]
            if not all(line.endswith(b"\n") for line in written):
                break  # it did not get there, or only in part
            self._take_over(entry, b"".join(written))
            good, length = good + size, length + sum(map(len, written))
        else:
            if (more := next(lines, b"")).endswith(b"\n"):
                raise UserError(
                    f"{self.output} holds lines that this command did not write, the first: "
                    f"{shown(more.decode(errors='replace').strip())}; choose another --output or --overwrite"
                )
        self.entries.truncate(good)
        if self.output.exists():
            with self.output.open("r+b") as output:
                output.truncate(length)
        self.counts.kept = self.counts.done

    def _take_over(self, entry: dict[str, Any], written: bytes) -> None:
        number = entry["line"]
        if self.keys.get(number) != entry["key"]:
            raise UserError(
                f"line {number} of {self.config.data} has changed, or is gone, since {self.output} was "
                "begun; choose another --output or --overwrite"
            )
        if zlib.crc32(written) != entry["sum"]:
            raise UserError(
                f"{self.output} has been changed: what stands there for line {number} of {self.config.data} is "
                "not what was written; choose another --output or --overwrite"
            )
        self._count(entry)

    def _fits(self, journal: bytes) -> bool:
        lines = self._output_lines()
        for entry, _ in _entries(journal):
            if zlib.crc32(b"".join(next(lines, b"") for _ in range(entry["rows"]))) != entry["sum"]:
                return False
        return next(lines, None) is None

    def _output_lines(self) -> Iterator[bytes]:
        if self.output.exists():
            with self.output.open("rb") as lines:
                yield from lines

    def _append(self, line: Line, text: bytes, **more: Any) -> None:
        entry = {"line": line.number, "key": self.keys[line.number], "rows": text.count(b"\n")}
        entry |= {"sum": zlib.crc32(text), **more}
        with writing(str(self.output)):
            _write_all(self.entries, _entry_line(entry))
            _write_all(self.target, text)
        self._count(entry)
        self.bar.update()

    def _count(self, entry: dict[str, Any]) -> None:
        self.done[entry["line"]] = entry
        self.counts.written += entry["rows"]
        if "skipped" in entry:
            self.counts.skipped[entry["skipped"]] += 1
        else:
            self.counts.done += 1

    def _in_order(self) -> None:
        """Bring the output into the order of the data. The journal in its new order comes first and takes its
        place last, so that one of the two fits the output at any moment."""
        if list(self.done) == sorted(self.done):
            return
        with writing(str(self.output)):
            lines = self._output_lines()
            texts = {
                number: b"".join(next(lines) for _ in range(entry["rows"]))
                for number, entry in self.done.items()
            }
            order = sorted(self.done)
            journal = b"".join(_entry_line(self.done[number]) for number in order)
            replace_file(self._sorted_journal, lambda path: path.write_bytes(journal))
            replace_file(self.output, lambda path: path.write_bytes(b"".join(texts[n] for n in order)))
            self._sorted_journal.replace(self.journal)


def _entry_line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"


def _entries(journal: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """(entry, bytes of its line), up to one that was not written to its end."""
    for line in journal.splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n"):
            return
        yield entry, len(line)


def _write_all(handle: Any, data: bytes) -> None:
    """A file without a buffer may take a part only."""
    while data:
        data = data[handle.write(data) :]
