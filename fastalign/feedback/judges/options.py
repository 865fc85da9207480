"""From the probabilities of tokens to those of the options of an answer ("1" or "2"; "1" to "10").

An option may be one token or several, and begin with a space or not; all its ways count. Where one option
begins like another, "1" like "10", what belongs to the longer one is not the shorter one's: with "10" in two
tokens, P(10) = P("1") P("0" | "1"), and that mass is taken from "1"."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

Path = tuple[int, ...]


def contexts(paths: Sequence[Sequence[Path]]) -> dict[Path, list[int]]:
    """What must be asked of the model: what stands after the question so far -> the tokens whose probabilities
    are needed there. `paths`: the token ids of every way to write each option."""
    needed: dict[Path, list[int]] = {}
    for path in (path for ways in paths for path in ways):
        for i, token in enumerate(path):
            there = needed.setdefault(path[:i], [])
            if token not in there:
                there.append(token)
    return needed


def option_mass(paths: Sequence[Sequence[Path]], logprobs: Mapping[Path, Mapping[int, float]]) -> list[float]:
    """The probability of each option. logprobs: context -> token -> its log-prob there."""
    mass = {
        path: math.exp(sum(logprobs[path[:i]][token] for i, token in enumerate(path)))
        for ways in paths
        for path in ways
    }
    own = dict(mass)
    for path, p in mass.items():
        shorter = [other for other in mass if len(other) < len(path) and path[: len(other)] == other]
        if shorter:
            nearest = max(shorter, key=len)
            own[nearest] = max(0.0, own[nearest] - p)
    return [sum(own[path] for path in set(ways)) for ways in paths]


def from_server(
    options: Sequence[str], text: str, entries: Sequence[Mapping[str, Any]]
) -> list[float] | None:
    """The probability of each option from a server's answer: by its log-probs where it gives them, else certain
    of the option that the text begins with. None: it names no option."""
    by_logprobs = _from_logprobs(options, entries)
    if by_logprobs is not None:
        return by_logprobs
    longest_first = "|".join(sorted(map(re.escape, options), key=len, reverse=True))
    before = r"\W*(?:(?:the|answer|score|response|is)\W+)*"
    found = re.match(rf"{before}({longest_first})(?![\w.,]*\d)", text, re.IGNORECASE)
    return None if found is None else [float(option == found[1]) for option in options]


def _from_logprobs(options: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """entries: `logprobs.content` of a chat completion, one per token of the answer. What follows a token is
    known for the one that was written only."""
    try:
        tables = [
            {str(top["token"]): float(top["logprob"]) for top in entry["top_logprobs"]} for entry in entries
        ]
        written = [str(entry["token"]) for entry in entries]
    except (KeyError, TypeError, ValueError):
        return None
    words = [i for i, token in enumerate(written) if token.strip()]
    if not words:
        return None
    # Where the answer stands, behind "Answer:" perhaps; if it is no option, what would have stood first.
    start = next((i for i in words if any(o.startswith(written[i].strip()) for o in options)), words[0])
    mass = dict.fromkeys(options, 0.0)

    def visit(at: int, before: str, p: float) -> None:
        """Options that the tokens from `at` on complete, after `before` with probability p."""
        for token, logprob in tables[at].items():
            word = before + (token.strip() if not before else token.rstrip())
            longer = [option for option in options if option.startswith(word) and option != word]
            share = p * math.exp(min(0.0, logprob)) if not math.isnan(logprob) else 0.0
            if word in mass:
                mass[word] += share
            if longer and token.strip() and token == written[at] and at + 1 < len(tables):
                rest = dict(mass)
                visit(at + 1, word, share)
                if word in mass:  # what went on to a longer option is not this one's
                    mass[word] = max(0.0, mass[word] - sum(mass[o] - rest[o] for o in longer))

    visit(start, "", 1.0)
    return [mass[option] for option in options] if sum(mass.values()) > 0 else None


def normalised(mass: Sequence[float]) -> list[float] | None:
    """Probabilities that add up to 1; None where there is no mass."""
    total = sum(mass)
    return [p / total for p in mass] if total > 0 and math.isfinite(total) else None


def mean_score(probabilities: Sequence[float]) -> float:
    """2 (sum of i P(i) - 1) / (n - 1) - 1 over the scores i = 1 .. n, in [-1, 1] (Lee et al. 2023, arXiv
    2309.00267)."""
    mean = sum(i * p for i, p in enumerate(probabilities, start=1))
    return 2.0 * (mean - 1.0) / (len(probabilities) - 1) - 1.0
