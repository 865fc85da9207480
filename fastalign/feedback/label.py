"""`fastalign label`: scores for responses, or soft labels for pairs, by a judge, a reward model or a function."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fastalign.feedback import command
from fastalign.feedback.judges.base import Pair, Response, Verdict
from fastalign.feedback.records import Counts, Line, Records, read_lines
from fastalign.feedback.server import Failure, spread
from fastalign.feedback.settings import SAMPLING, WriterConfig
from fastalign.feedback.writers import parse_completions
from fastalign.train.data.formats import parse_preference
from fastalign.train.errors import DataError, UserError
from fastalign.train.settings import NOT_BELOW_0, POSITIVE, setting

JUDGE = "judge"
CERTAIN = 1e-6  # P is taken as at least this, and as at most 1 less this
ASKS = ("compare", "score", "rubric")


@dataclasses.dataclass(frozen=True)
class LabelConfig(WriterConfig):
    """Settings of `fastalign label`."""

    reward_model: str | None = setting(
        None, "scores by a reward model of this directory", metavar="DIR", group=JUDGE, free=True
    )
    reward: str | None = setting(
        None,
        "scores by a Python function: function(completions=[...], prompts=[...], and the data's other columns) "
        "-> a number per completion",
        metavar="MODULE:FUNCTION",
        group=JUDGE,
    )
    preference: str | None = setting(
        None,
        "soft labels (or scores, as --ask compare) by a Python function: function(completions=[(first, "
        "second), ...], prompts=[...], ...) -> "
        "P(first is better) per pair",
        metavar="MODULE:FUNCTION",
        group=JUDGE,
    )
    ask: str = setting(
        "auto",
        "what --model or --server is asked. compare: which of two responses is better; score: a score from 1 to "
        "10, brought into [-1, 1]; rubric: a review that ends in 0 to 5 points; auto: compare pairs, score "
        "responses; responses that are compared get the score logit P(better than the first)",
        choices=("auto", *ASKS),
        group=JUDGE,
    )
    both_orders: bool = setting(
        True, "compare in both orders and take the mean, since judges favour a place", group=JUDGE
    )
    reasons: bool = setting(
        False,
        "compare: have the judge write its reasons first; the labels are then clamped to [0.4, 0.6]",
        group=JUDGE,
    )
    principles: int = setting(
        0,
        "compare: ask under each of the first N principles of the constitution and take the mean; 0: under "
        "none, as the template says",
        NOT_BELOW_0,
        group=JUDGE,
    )
    constitution: str | None = setting(
        None, "YAML file of principles; default: the project's own", metavar="FILE", group=JUDGE, free=True
    )
    judgements: int = setting(3, "rubric: reviews whose points are averaged", POSITIVE, group=JUDGE)
    templates: str | None = setting(
        None,
        "directory with templates in place of the project's, by name: compare.j2, reasons.j2, answer.j2, "
        "score.j2, rubric.j2",
        metavar="DIR",
        group=JUDGE,
        free=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        language = self.model is not None or self.server is not None
        given = [
            self.flag(name)
            for name in ("model", "server", "reward_model", "reward", "preference")
            if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other")
        self.only("--model or --server", language, "ask", "templates", "reasons", "principles")
        compares = self.ask in ("auto", "compare")
        self.only("--ask compare", compares, "reasons", "principles")
        self.only("what compares", compares and not (self.reward or self.reward_model), "both_orders")
        self.only("--ask rubric", self.ask == "rubric", "judgements")
        self.only("--principles", self.principles > 0, "constitution")

    def runs_model(self) -> bool:
        return self.model is not None or self.reward_model is not None

    def check_judge(self) -> None:
        """One judge is given."""
        if self.reward_model is self.reward is self.preference is None:
            if self.model is None and self.server is None:
                raise UserError(
                    "no judge: give --model DIR, --server URL, --reward-model DIR, --reward MODULE:FUNCTION or "
                    "--preference MODULE:FUNCTION"
                )
            self.check_writer()


def run(config: LabelConfig) -> Counts:
    """Lines with completions -> the same with `scores`; pairs -> the same with `soft_label`, P(chosen is better).
    What cannot be scored gets null; a line of which nothing can be is skipped.

    Raises:
        UserError: settings, data or an earlier run's output that do not go together; before anything is written.
        TrainingError: too many failures in a row, a function that fails, or a disk that is full.
    """
    data = config.paths()[0]
    config.check_judge()
    lines = read_lines(data, _parse)
    pairs = isinstance(lines[0].parsed, Pair)
    for line in lines:
        if isinstance(line.parsed, Pair) != pairs:
            raise DataError(line.source, None, "pairs and lines with completions do not go together")
    config = _what_is_asked(config, pairs)
    judge = _make_judge(config)
    if hasattr(judge, "check"):
        judge.check([line.parsed if pairs else line.parsed[0] for line in lines if pairs or line.parsed])
    with Records("label", config, lines, judge.contents()) as records:
        for line, verdicts in _judged(config, judge, records.todo, pairs):
            _record(records, line, verdicts, pairs)
    return records.counts


def _what_is_asked(config: LabelConfig, pairs: bool) -> LabelConfig:
    """The settings with --ask spelled out. Refuses a judge that cannot judge what the data hold."""
    if pairs and (config.reward_model or config.reward or config.ask in ("score", "rubric")):
        what = (
            "--reward-model"
            if config.reward_model
            else "--reward"
            if config.reward
            else f"--ask {config.ask}"
        )
        raise UserError(f"{what} scores responses, and {config.data} has pairs: they are compared")
    if not pairs and not config.preference and config.ask != "compare":
        config.only("--ask compare", False, "reasons", "principles", "both_orders")
    if config.model is None and config.server is None:
        return config
    if config.ask == "auto":
        config = dataclasses.replace(config, ask="compare" if pairs else "score")
    sampling = [
        name for name in WriterConfig.__dataclass_fields__ if config.metadata(name)["group"] == SAMPLING
    ]
    config.only("--reasons or --ask rubric", _writes(config), *sampling)
    return config


def _writes(config: LabelConfig) -> bool:
    return config.reasons or config.ask == "rubric"


def _make_judge(config: LabelConfig) -> Any:
    if config.reward or config.preference:
        from fastalign.feedback.judges.function import FunctionJudge

        return FunctionJudge(config)
    if config.reward_model:
        from fastalign.feedback.judges.reward_model import RewardModelJudge

        return RewardModelJudge(config)
    from fastalign.feedback.judges.asker import make_asker
    from fastalign.feedback.judges.language import LanguageJudge

    return LanguageJudge(config, make_asker(config, _writes(config)))


def _judged(
    config: LabelConfig, judge: Any, lines: Sequence[Line], pairs: bool
) -> Iterator[tuple[Line, list[Verdict]]]:
    """Each line with the verdicts on it, as they come."""
    compares = pairs or config.preference is not None or config.ask == "compare"
    ask: Callable[[Sequence[Any]], list[Verdict]] = judge.compare if compares else judge.score

    def items(line: Line) -> list[Any]:
        if pairs:
            return [line.parsed]
        if not compares:
            return line.parsed
        return [Pair(r.source, r.prompt, r.text, line.parsed[0].text, r.row) for r in line.parsed[1:]]

    def together(some: Sequence[Line]) -> list[list[Verdict]]:
        verdicts = iter(ask([item for line in some for item in items(line)]))
        found = [[next(verdicts) for _ in items(line)] for line in some]
        if compares and not pairs:
            return [[Verdict(0.0)][: len(line.parsed)] + [*map(_odds, own)] for line, own in zip(some, found)]
        return found

    return spread(together, lines, lambda line: len(items(line)), judge.at_once, config.concurrency)


def _odds(verdict: Verdict) -> Verdict:
    """logit P(better than the first response): the reward that a ranker stands for (RSO, arXiv 2309.06657)."""
    if verdict.value is None:
        return verdict
    p = min(max(verdict.value, CERTAIN), 1.0 - CERTAIN)
    return Verdict(math.log(p / (1.0 - p)))


def _record(records: Records, line: Line, verdicts: Sequence[Verdict], pairs: bool) -> None:
    values = [
        verdict.value if verdict.value is not None and math.isfinite(verdict.value) else None
        for verdict in verdicts
    ]
    failures = [verdict.failure or Failure("not a finite number", final=True) for verdict, value in zip(verdicts, values) if value is None]  # fmt: skip
    lasting = [failure for failure in failures if not failure.final]
    if lasting:
        records.fail(line, lasting[0].reason)
    elif all(value is None for value in values):
        records.skip(line, failures[0].reason if failures else "no completion", unanswered=bool(failures))
    else:
        records.add(line, [line.row | ({"soft_label": values[0]} if pairs else {"scores": values})])


def _parse(source: str, row: Any) -> Pair | list[Response]:
    if isinstance(row, dict) and "completions" in row:
        texts = parse_completions(source, row)
        if "scores" in row:
            raise DataError(source, "scores", "is there already: labelling would replace it")
        return [
            Response(f"{source}, completion {i}", row["prompt"], text, row)
            for i, text in enumerate(texts, start=1)
        ]
    if isinstance(row, dict) and not {"chosen", "rejected"} & set(row):
        raise DataError(
            source,
            "completions",
            f"missing, as are chosen and rejected (the line has: {', '.join(map(str, row)) or 'nothing'})",
        )
    texts = parse_preference(source, row)
    if "soft_label" in row:
        raise DataError(source, "soft_label", "is there already: labelling would replace it")
    words = [each if isinstance(each, str) else each[0]["content"] for each in texts.completions]
    return Pair(source, texts.prompt, *words, row)


def main(argv: list[str]) -> int:
    return command.main("label", LabelConfig, run, argv)
