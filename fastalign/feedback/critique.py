"""`fastalign critique`: responses criticised and revised under the principles of a constitution, to learn from by
SFT."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastalign.feedback import command
from fastalign.feedback.records import Counts, Line, Records, read_lines
from fastalign.feedback.server import Failure, spread
from fastalign.feedback.settings import FILES, WriterConfig
from fastalign.feedback.texts import Templates, as_text, read_constitution
from fastalign.feedback.writers import Request, completion, make_writer, parse_completions, seed_of, words_of
from fastalign.train.data.formats import parse_prompt
from fastalign.train.errors import DataError, UserError
from fastalign.train.settings import POSITIVE, setting

REVISION = "revision"
EMPTY = Failure("empty answer", final=True)
# The columns that are written; one of these names in the data would be lost.
_WRITTEN = ("chosen", "rejected", "critiques", "revisions")


@dataclasses.dataclass(frozen=True)
class CritiqueConfig(WriterConfig):
    """Settings of `fastalign critique`."""

    rounds: int = setting(
        1,
        "how often a response is criticised and revised, each time under another draw",
        POSITIVE,
        group=REVISION,
    )
    constitution: str | None = setting(
        None,
        "YAML file of principles (critique, revision); default: the project's own",
        metavar="FILE",
        group=REVISION,
        free=True,
    )
    templates: str | None = setting(
        None,
        "directory with critique.j2 or revision.j2 in place of the project's",
        metavar="DIR",
        group=REVISION,
        free=True,
    )
    keep_pair: bool = setting(
        False, "lines also get chosen (the last revision) and rejected (the response before)", group=FILES
    )
    keep_steps: bool = setting(False, "lines also get critiques and revisions, of every round", group=FILES)


class _Draft(NamedTuple):
    """A response on its way. steps: (critique, revision) of each round."""

    source: str
    prompt: Any
    original: str
    steps: tuple[tuple[str, str], ...] = ()
    failure: Failure | None = None

    @property
    def text(self) -> str:
        return self.steps[-1][1] if self.steps else self.original


def run(config: CritiqueConfig) -> Counts:
    """Lines with a prompt and a `completion` (or `completions`, each of which becomes a line) -> the prompt
    with the last revision as its `completion`: the supervised stage of constitutional AI (Bai et al. 2022,
    arXiv 2212.08073). The principle of each round is drawn at random.

    Raises:
        UserError: settings, data or an earlier run's output that do not go together; before anything is written.
        TrainingError: too many failures in a row, or a disk that is full.
    """
    data = config.paths()[0]
    config.check_writer()
    if config.endpoint != "chat":
        raise UserError("--endpoint completions: responses are criticised in conversations; legal here: chat")
    lines = read_lines(data, lambda source, row: _parse(config, source, row))
    reviser = _Reviser(config)
    with Records("critique", config, lines, reviser.contents) as records:
        at_once, workers = reviser.writer.at_once, config.concurrency
        for line, drafts in spread(
            reviser.revise, records.todo, lambda line: len(line.parsed), at_once, workers
        ):
            _record(config, records, line, drafts)
    return records.counts


class _Reviser:
    def __init__(self, config: CritiqueConfig):
        self.config = config
        self.critiques, contents = read_constitution(config.constitution, "critique")
        self.revisions, _ = read_constitution(config.constitution, "revision")
        texts = {"prompt": "", "response": "", "principle": "", "critique": ""}
        self.templates = Templates(("critique", "revision"), config.templates, texts)
        self.writer = make_writer(config)
        self.contents = self.writer.contents() | self.templates.contents | contents

    def revise(self, lines: Sequence[Line]) -> list[list[_Draft]]:
        """The drafts of each line after all rounds."""
        drafts = [draft for line in lines for draft in line.parsed]
        for round in range(self.config.rounds):
            drafts = self._round(drafts, round)
        rest = iter(drafts)
        return [[next(rest) for _ in line.parsed] for line in lines]

    def _round(self, drafts: Sequence[_Draft], round: int) -> list[_Draft]:
        """One round for every draft that has not failed; first all critiques, then all revisions."""
        done, going = list(drafts), [i for i, draft in enumerate(drafts) if draft.failure is None]
        talks, words = {}, {}
        for i in going:
            draft, seed = drafts[i], self._seed(drafts[i], round)
            which = random.Random(seed).randrange(len(self.critiques))
            words[i] = {"prompt": as_text(draft.prompt), "response": draft.text, "critique": ""}
            asked = self.templates.render("critique", **words[i], principle=self.critiques[which])
            talks[i] = [{"role": "user", "content": asked}]
            words[i]["principle"] = self.revisions[which]
        for i, text, failure in self._answers(drafts, talks, round, "critique"):
            if failure is not None:
                done[i] = drafts[i]._replace(failure=failure)
                del talks[i]
                continue
            words[i]["critique"] = text
            asked = self.templates.render("revision", **words[i])
            talks[i] += [{"role": "assistant", "content": text}, {"role": "user", "content": asked}]
        for i, text, failure in self._answers(drafts, talks, round, "revision"):
            step = (words[i]["critique"], text)
            done[i] = drafts[i]._replace(failure=failure, steps=(*drafts[i].steps, step))
        return done

    def _answers(self, drafts: Sequence[_Draft], talks: dict[int, Any], round: int, what: str) -> list[Any]:
        """(draft, what the model says, why it says nothing) for each of these conversations."""
        requests = [
            Request(drafts[i].source, talk, seed_of(self._seed(drafts[i], round), what))
            for i, talk in talks.items()
        ]
        answers = []
        for i, reply in zip([*talks], self.writer.write_here(requests)):
            text = (reply.text or "").strip()
            answers.append((i, text, None if text else reply.failure or EMPTY))
        return answers

    def _seed(self, draft: _Draft, round: int) -> int:
        return seed_of(self.config.seed, draft.prompt, draft.original, round)


def _record(config: CritiqueConfig, records: Records, line: Line, drafts: Sequence[_Draft]) -> None:
    failures = [draft.failure for draft in drafts if draft.failure is not None]
    if lasting := [failure for failure in failures if not failure.final]:
        records.fail(line, lasting[0].reason)
        return
    rows = []
    for draft in drafts:
        if draft.failure is not None:
            continue
        revised = completion(draft.prompt, draft.text)
        row = {name: value for name, value in line.row.items() if name not in ("completion", "completions")}
        row["completion"] = revised
        if config.keep_pair:
            row |= {"chosen": revised, "rejected": completion(draft.prompt, draft.original)}
        if config.keep_steps:
            row |= {
                name: [step[i] for step in draft.steps] for i, name in enumerate(("critiques", "revisions"))
            }
        rows.append(row)
    if rows:
        records.add(line, rows)
    else:
        records.skip(line, failures[0].reason if failures else "no completion", unanswered=bool(failures))


def _parse(config: CritiqueConfig, source: str, row: Any) -> list[_Draft]:
    parse_prompt(source, row)
    for name in _WRITTEN:
        if name in row:
            raise DataError(source, name, "is there already: a revision would not be what it belongs to")
    if "completion" in row and "completions" in row:
        raise DataError(source, "completion", "stands beside completions; give one of them")
    if "completion" in row:
        texts = [words_of(source, "completion", row["completion"], row["prompt"])]
    elif "completions" in row:
        texts = parse_completions(source, row)
    else:
        names = ", ".join(map(str, row))
        raise DataError(source, "completion", f"missing, as is completions (the line has: {names})")
    return [_Draft(source, row["prompt"], text) for text in texts]


def main(argv: list[str]) -> int:
    return command.main("critique", CritiqueConfig, run, argv)
