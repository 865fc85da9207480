"""`fastalign pairs`: preference pairs, or single responses or lists, from responses and their scores."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from fastalign.feedback import command
from fastalign.feedback.records import Counts, Line, Records, field, read_lines
from fastalign.feedback.settings import FILES, FINITE, CommandConfig
from fastalign.feedback.writers import hash_directory, parse_completions, seed_of
from fastalign.runtime.checks import shown
from fastalign.train.data.formats import MAX_LIST
from fastalign.train.errors import DataError
from fastalign.train.sampling.pair_rules import PAIR_RULES, RANKINGS, penalised, pick
from fastalign.train.settings import NOT_BELOW_0, POSITIVE, SEED, setting

RULE, REJECTION = "which responses", "rule rejection"
UNSCORED = "unscored"  # a rule that looks at no score


@dataclasses.dataclass(frozen=True)
class PairsConfig(CommandConfig):
    """Settings of `fastalign pairs`."""

    to: str = setting(
        "pairs",
        "pairs: prompt, chosen, rejected; unpaired: prompt, completion, label, score (a response that won more "
        "pairs than it lost is labelled true, one that lost more false); lists: prompt, completions, scores",
        choices=("pairs", "unpaired", "lists"),
        group=FILES,
    )
    keep_scores: bool = setting(False, "pairs also get margin, score_chosen and score_rejected", group=FILES)
    rule: str = setting(
        "max_min",
        "; ".join(f"{name}: {rule.what}" for name, rule in PAIR_RULES.items())
        + f"; {UNSCORED}: the first with the second, the third with the fourth, for a judge that compares",
        choices=(*PAIR_RULES, UNSCORED),
        group=RULE,
    )
    margin: float = setting(
        0.0, "responses whose scores differ by no more are a tie and give no pair", NOT_BELOW_0, group=RULE
    )
    length_penalty: float = setting(
        0.0, "taken off a response's score for each of its characters, or tokens", FINITE, group=RULE
    )
    tokenizer: str | None = setting(
        None,
        "model directory in whose tokens --length-penalty counts; default: characters",
        metavar="DIR",
        group=RULE,
        free=True,  # its contents are recorded
    )
    threshold: float | None = setting(
        None,
        "with --to unpaired: every response is written, and labelled by whether its score is above this",
        FINITE,
        group=RULE,
    )
    seed: int = setting(0, "of the rules max_random and rejection", SEED, group=RULE)
    num_samples: int = setting(8, "responses that are accepted", POSITIVE, group=REJECTION)
    beta: float = setting(
        0.5,
        "a response is accepted with probability exp((score - highest) / beta)",
        POSITIVE,
        group=REJECTION,
    )
    ranking: str = setting(
        "first_round",
        "first_round: disjoint pairs in random order; tournament: the better of each goes on",
        choices=RANKINGS,
        group=REJECTION,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.only("--rule rejection", self.rule == "rejection", "num_samples", "beta", "ranking")
        self.only("--to pairs", self.to == "pairs", "keep_scores")
        self.only("--to unpaired", self.to == "unpaired", "threshold")
        self.only("a --length-penalty", self.length_penalty != 0, "tokenizer")
        self.only("--to pairs or unpaired", self.to != "lists", "rule")
        scored = self.rule != UNSCORED
        self.only(
            "rules that look at scores", scored, "margin", "length_penalty", "keep_scores", "threshold", "to"
        )
        self.only("no --threshold", self.threshold is None, "rule", "margin")


class _Scored(NamedTuple):
    """scores: NaN where there is none. texts: the responses' words."""

    scores: list[float]
    texts: list[str]


def run(config: PairsConfig) -> Counts:
    """Lines with completions and scores -> lines that the trainer reads. Everything is judged by score -
    length_penalty * length; responses without a score (null) are left out; other columns are kept.

    Raises:
        UserError: settings, data or an earlier run's output that do not go together; before anything is written.
        TrainingError: a disk that is full.
    """
    data = config.paths()[0]
    lines = read_lines(data, lambda source, row: _parse(config, source, row))
    length, contents = _length(config)
    with Records("pairs", config, lines, contents) as records:
        for line in records.todo:
            lengths = [length(text) for text in line.parsed.texts]
            rows, why = _FORMS[config.to](
                config, line, penalised(line.parsed.scores, lengths, config.length_penalty)
            )
            if rows:
                records.add(line, rows)
            else:
                records.skip(line, why)
    return records.counts


def _length(config: PairsConfig) -> tuple[Callable[[str], int], dict[str, str]]:
    """How a response's length is told, and what that depends on."""
    if config.tokenizer is None:
        return len, {}
    from fastalign.train.models.packed import load_tokenizer

    tokenizer = load_tokenizer(config.tokenizer)
    count = lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])  # noqa: E731
    return count, {"--tokenizer": hash_directory(config.tokenizer)}


def _pairs(config: PairsConfig, line: Line, values: list[float]) -> tuple[list[tuple[int, int]], str]:
    """The rule's pairs, and why there is none if there is none."""
    texts = line.parsed.texts
    if config.rule == UNSCORED:
        found = [(i, i + 1) for i in range(0, len(texts) - 1, 2)]
        kept = [(first, second) for first, second in found if texts[first] != texts[second]]
        return kept, "the same text" if found else "fewer than two responses"
    found = pick(
        config.rule,
        values,
        [0] * len(values),
        seed=seed_of(config.seed, line.row),
        margin=config.margin,
        num_samples=config.num_samples,
        beta=config.beta,
        ranking=config.ranking,
    )
    kept = [(best, worst) for best, worst in found if texts[best] != texts[worst]]
    return kept, "the same text" if found else _why_none(values)


def _as_pairs(config: PairsConfig, line: Line, values: list[float]) -> tuple[list[dict[str, Any]], str]:
    rows, completions = [], line.row["completions"]
    pairs, why = _pairs(config, line, values)
    for best, worst in pairs:
        row = _others(line) | {"chosen": completions[best], "rejected": completions[worst]}
        if config.keep_scores:
            row["margin"] = values[best] - values[worst]
            row |= {"score_chosen": values[best], "score_rejected": values[worst]}
        rows.append(row)
    return rows, why


def _as_unpaired(config: PairsConfig, line: Line, values: list[float]) -> tuple[list[dict[str, Any]], str]:
    if config.threshold is not None:
        labels = {i: value > config.threshold for i, value in enumerate(values) if not math.isnan(value)}
        why = "no score"
    else:
        won: Counter[int] = Counter()
        pairs, why = _pairs(config, line, values)
        for best, worst in pairs:
            won[best] += 1
            won[worst] -= 1
        labels = {i: won[i] > 0 for i in sorted(won) if won[i]}
    rows = [
        _others(line) | {"completion": line.row["completions"][i], "label": label, "score": values[i]}
        for i, label in labels.items()
    ]
    return rows, why


def _as_lists(config: PairsConfig, line: Line, values: list[float]) -> tuple[list[dict[str, Any]], str]:
    known = [i for i, value in enumerate(values) if not math.isnan(value)]
    scores = [values[i] for i in known]
    if len(known) < 2 or not max(scores) - min(scores) > config.margin:
        return [], _why_none(values)
    completions = [line.row["completions"][i] for i in known]
    return [_others(line) | {"completions": completions, "scores": scores}], ""


_FORMS = {"pairs": _as_pairs, "unpaired": _as_unpaired, "lists": _as_lists}
# The columns that each form writes; one of these names in the data would be lost.
_COLUMNS = {
    "pairs": ("chosen", "rejected", "margin", "score_chosen", "score_rejected", "soft_label"),
    "unpaired": ("completion", "label", "score"),
    "lists": (),
}


def _others(line: Line) -> dict[str, Any]:
    return {name: value for name, value in line.row.items() if name not in ("completions", "scores")}


def _why_none(values: list[float]) -> str:
    known = sum(not math.isnan(value) for value in values)
    return "a tie" if known > 1 else "fewer than two scores"


def _parse(config: PairsConfig, source: str, row: Any) -> _Scored:
    texts = parse_completions(source, row)
    if config.rule == UNSCORED:
        if "scores" in row:
            raise DataError(source, "scores", f"--rule {UNSCORED} would not look at them")
        scores: Any = [None] * len(texts)
    else:
        scores = field(source, row, "scores")
    if not isinstance(scores, list):
        raise DataError(source, "scores", f"expected a list, got {shown(scores)}")
    if len(texts) != len(scores):
        raise DataError(
            source,
            "scores",
            f"expected one for each of the {len(texts)} completions, got {len(scores)}",
        )
    if config.to == "lists" and len(texts) > MAX_LIST:
        raise DataError(source, "completions", f"a list has at most {MAX_LIST}, got {len(texts)}")
    for name in _COLUMNS[config.to]:
        if name in row:
            raise DataError(source, name, f"is there already: --to {config.to} would write over it")
    return _Scored([_score(source, f"scores[{i}]", score) for i, score in enumerate(scores)], texts)


def _score(source: str, name: str, value: Any) -> float:
    if value is None or isinstance(value, float) and math.isnan(value):
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(source, name, f"expected a number or null, got {shown(value)}")
    if not abs(value) <= sys.float_info.max:
        raise DataError(source, name, f"expected a finite number or null, got {shown(value)}")
    return float(value)


def main(argv: list[str]) -> int:
    return command.main("pairs", PairsConfig, run, argv)
