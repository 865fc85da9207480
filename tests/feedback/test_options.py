"""Probabilities of options from probabilities of tokens, by hand."""

import math

import pytest

from fastalign.feedback.judges.language import points_of
from fastalign.feedback.judges.options import contexts, from_server, mean_score, normalised, option_mass


def logs(table):
    return {context: {token: math.log(p) for token, p in row.items()} for context, row in table.items()}


def test_ten_in_two_tokens():
    """P(10) = P("1") P("0" | "1"), and that mass is taken from "1"."""
    one, two, zero = 7, 8, 9
    paths = [[(one,)], [(two,)], [(one, zero)]]
    assert contexts(paths) == {(): [one, two], (one,): [zero]}
    mass = option_mass(paths, logs({(): {one: 0.6, two: 0.3}, (one,): {zero: 0.25}}))
    assert mass == pytest.approx([0.45, 0.3, 0.15])
    assert sum(mass) == pytest.approx(0.9)  # no mass is made or lost
    assert normalised(mass) == pytest.approx([0.5, 1 / 3, 1 / 6])


def test_ten_in_one_token_takes_nothing_from_one():
    assert option_mass([[(1,)], [(10,)]], logs({(): {1: 0.5, 10: 0.2}})) == pytest.approx([0.5, 0.2])


def test_every_way_to_write_an_option_counts():
    """With and without a space, each with its own continuation; a chain 1, 10, 100 takes each part once."""
    one, spaced, zero = 1, 2, 3
    paths = [[(one,), (spaced,)], [(one, zero), (spaced, zero)]]
    table = {(): {one: 0.3, spaced: 0.5}, (one,): {zero: 0.1}, (spaced,): {zero: 0.2}}
    assert option_mass(paths, logs(table)) == pytest.approx([0.27 + 0.4, 0.03 + 0.1])
    paths = [[(one,)], [(one, zero)], [(one, zero, zero)]]
    table = {(): {one: 0.8}, (one,): {zero: 0.5}, (one, zero): {zero: 0.5}}
    assert option_mass(paths, logs(table)) == pytest.approx([0.4, 0.2, 0.2])


def token(word, p, *others):
    """An entry of `logprobs.content`."""
    tops = [{"token": t, "logprob": math.log(q)} for t, q in ((word, p), *others)]
    return {"token": word, "top_logprobs": tops}


@pytest.mark.parametrize(
    ("options", "text", "entries", "mass"),
    [
        (("1", "2"), "1", [], [1, 0]),
        (("1", "2"), " **2**, because it is shorter than 1.", [], [0, 1]),
        (("1", "2"), "Response 2", [], [0, 1]),
        (("1", "2"), "Answer: 1.", [], [1, 0]),
        (("1", "2"), "12", [], None),
        (("1", "2"), "neither", [], None),
        (("1", "2"), "", [], None),
        (("1", "10"), "10", [], [0, 1]),
        (("1", "10"), "1", [], [1, 0]),
        (("1", "10"), "100", [], None),
        (("1", "2"), "1", [{"nonsense": 1}], [1, 0]),
        (("1", "2"), "1", [token("x", 0.9)], [1, 0]),
        (("1", "2"), "2", [token("2", 0.6, (" 1", 0.2), ("1", 0.1))], [0.3, 0.6]),
        (("1", "2"), "\n2", [token("\n", 1.0), token("2", 0.75, ("1", 0.25))], [0.25, 0.75]),
        (("1", "2"), "Answer: 2", [token("Answer", 0.9, ("1", 0.01)), token(":", 1.0), token(" 2", 0.7, (" 1", 0.3))], [0.3, 0.7]),
        (("1", "2"), "Neither", [token("Neither", 0.9, ("1", 0.02), ("2", 0.06))], [0.02, 0.06]),
        (("1", "10"), "10", [token("1", 0.8), token("0", 0.25)], [0.6, 0.2]),
        (("1", "10"), "10", [token("10", 0.8)], [0, 0.8]),
        (("1", "10"), "1", [token("1", 0.8), token(".", 0.5)], [0.8, 0]),
    ],
)  # fmt: skip
def test_a_servers_answer(options, text, entries, mass):
    found = from_server(options, text, entries)
    assert found is None if mass is None else found == pytest.approx(mass)


def test_scores_span_the_range():
    for i in range(10):
        assert mean_score([float(i == j) for j in range(10)]) == pytest.approx(-1 + 2 * i / 9)
    assert mean_score([0.1] * 10) == pytest.approx(0)
    assert normalised([0.0, 0.0]) is None and normalised([math.nan, 1.0]) is None


@pytest.mark.parametrize(
    ("review", "points"),
    [
        ("Fine. Score: 4", 4), ("Score: 3/5", 3), ("**Score:** 5", 5), ("score 2 out of 5", 2), ("Score: 3.5", 3.5),
        ("The maximum score: 5 is for experts.\nScore: 1", 1), ("Score: 8", None), ("Score: 4/10", None), ("4", None), ("", None),
    ],
)  # fmt: skip
def test_points(review, points):
    assert points_of(review) == points
