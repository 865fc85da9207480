"""`fastalign sample`: responses to prompts, by a model directory or a server."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from fastalign.feedback import command
from fastalign.feedback.records import Counts, Line, Records, digest, read_lines
from fastalign.feedback.settings import MODEL, SAMPLING, WriterConfig
from fastalign.feedback.writers import Reply, Request, completion, make_writer, seed_of
from fastalign.train.data.formats import parse_prompt
from fastalign.train.errors import DataError
from fastalign.train.settings import POSITIVE, setting

Unit = tuple[Line, list[Request]]


@dataclasses.dataclass(frozen=True)
class SampleConfig(WriterConfig):
    """Settings of `fastalign sample`."""

    samples: int = setting(4, "responses to each prompt", POSITIVE, group=SAMPLING)
    overlong: str = setting(
        "error",
        "what to do with a prompt that leaves no room for --max-new-tokens: stop before work begins, leave it "
        "out, or cut its start",
        choices=("error", "drop", "truncate_prompt"),
        group=MODEL,
    )


def run(config: SampleConfig) -> Counts:
    """Lines with a prompt -> the same lines with `completions`.

    A prompt's responses depend on the seed, the prompt and how often it stood in the data before, not on the
    lines around it; those of a server that keeps to its own seed depend on the server.

    Raises:
        UserError: settings, data or an earlier run's output that do not go together; before anything is written.
        TrainingError: too many failures in a row, or a disk that is full.
    """
    data = config.paths()[0]
    config.check_writer()
    lines = read_lines(data, _check)
    writer = make_writer(config)
    over = {line.number: why for line in lines if (why := writer.check(line.source, line.row["prompt"]))}
    with Records("sample", config, lines, writer.contents()) as records:
        todo = {line.number for line in records.todo}
        for line in lines:
            if line.number in over and line.number in todo:
                records.skip(line, over[line.number])
        units = [unit for unit in _units(config, lines) if unit[0].number not in over]
        # A batch is made of the same prompts whatever is done already: rounding may depend on what stands in it.
        part = max(1, writer.batch // config.samples) if writer.batch else max(1, len(units))
        for start in range(0, len(units), part):
            chunk = units[start : start + part]
            wanted = [unit for unit in chunk if unit[0].number in todo]
            for line, replies in _together(writer, chunk if writer.batch and wanted else wanted):
                if line.number in todo:
                    _record(records, line, replies)
    return records.counts


def _units(config: SampleConfig, lines: Sequence[Line]) -> list[Unit]:
    """Every line with the requests for its responses."""
    seen: Counter[str] = Counter()
    units = []
    for line in lines:
        prompt = line.row["prompt"]
        before = seen[key := digest(prompt)]
        seen[key] += 1
        seeds = [seed_of(config.seed, prompt, before, j) for j in range(config.samples)]
        units.append((line, [Request(line.source, prompt, seed) for seed in seeds]))
    return units


def _together(writer: Any, units: Sequence[Unit]) -> Iterator[tuple[Line, list[Reply]]]:
    """Each line with its replies, once it has all of them."""
    requests = [(i, request) for i, (_, own) in enumerate(units) for request in own]
    replies: dict[int, dict[int, Reply]] = {i: {} for i in range(len(units))}
    for at, reply in writer.write([request for _, request in requests]):
        i = requests[at][0]
        replies[i][at] = reply
        if len(replies[i]) == len(units[i][1]):
            yield units[i][0], [each for _, each in sorted(replies.pop(i).items())]


def _record(records: Records, line: Line, replies: list[Reply]) -> None:
    failures = [reply.failure for reply in replies if reply.failure is not None]
    if not failures:
        texts = [completion(line.row["prompt"], reply.text) for reply in replies]
        records.add(line, [{**line.row, "completions": texts}])
    elif all(failure.final for failure in failures):
        records.skip(line, failures[0].reason, unanswered=True)
    else:
        records.fail(line, next(failure.reason for failure in failures if not failure.final))


def _check(source: str, row: object) -> None:
    parse_prompt(source, row)
    if "completions" in row:
        raise DataError(source, "completions", "is there already: sampling would replace it")


def main(argv: list[str]) -> int:
    return command.main("sample", SampleConfig, run, argv)
