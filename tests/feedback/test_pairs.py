"""`fastalign pairs`: every form and rule from small files, ties, penalties, wrong lines and settings."""

import json

import pytest

from fastalign.feedback.pairs import PairsConfig, run
from fastalign.train.data.formats import parse_listwise, parse_preference, parse_unpaired
from fastalign.train.errors import UserError


def said(text):
    return [{"role": "assistant", "content": text}]


ROWS = [
    {"prompt": "a", "completions": ["x", "yy", "zzz"], "scores": [1.0, 3, 2.0], "id": 7},
    {"prompt": "b", "completions": ["x", "y"], "scores": [1.0, 1.0]},
    {"prompt": "c", "completions": ["x", "y"], "scores": [None, 1.0]},
    {"prompt": [{"role": "user", "content": "d"}], "completions": [said("no"), said("yes")], "scores": [-1, 0.5]},
    {"prompt": "e", "completions": ["same", "same", "other"], "scores": [3.0, 2.0, 2.0]},
]  # fmt: skip


def test_pairs(desk, capsys):
    code, rows = desk("pairs", ROWS, keep_scores=True)
    assert code == 0
    assert rows == [
        {"prompt": "a", "id": 7, "chosen": "yy", "rejected": "x", "margin": 2.0, "score_chosen": 3.0, "score_rejected": 1.0},
        {"prompt": ROWS[3]["prompt"], "chosen": said("yes"), "rejected": said("no"),
         "margin": 1.5, "score_chosen": 0.5, "score_rejected": -1.0},
    ]  # fmt: skip
    for row in rows:
        parse_preference("a line", row)
    out = capsys.readouterr().out
    assert "2 done, 2 lines written, 3 skipped (a tie: 1, fewer than two scores: 1, the same text: 1)" in out


@pytest.mark.parametrize(
    ("flags", "pairs"),
    [
        ({"rule": "all"}, {("yy", "x"), ("yy", "zzz"), ("zzz", "x")}),
        ({"rule": "all", "margin": 1.0}, {("yy", "x")}),
        ({"rule": "max_max"}, {("yy", "zzz")}),
        ({"length_penalty": 2.5}, {("x", "zzz")}),
        ({"rule": "rejection", "num_samples": 3, "ranking": "tournament", "beta": 9.0}, None),
    ],
)
def test_rules(desk, flags, pairs):
    code, rows = desk("pairs", ROWS[:1], **flags)
    found = {(row["chosen"], row["rejected"]) for row in rows}
    assert code == 0 and (found == pairs if pairs else len(found) == 2)


def test_length_in_tokens(desk, model_dir):
    rows = [{"prompt": "a", "completions": [" the cat sat on the", "qqqqqqqqqqqq"], "scores": [1.0, 1.5]}]
    assert desk("pairs", rows, length_penalty=0.2, output="c.jsonl")[1][0]["chosen"] == "q" * 12
    _, found = desk("pairs", rows, length_penalty=0.2, tokenizer=model_dir, output="t.jsonl")
    assert found[0]["chosen"] == " the cat sat on the"


def test_unpaired_and_lists(desk):
    code, rows = desk("pairs", ROWS, to="unpaired")
    assert code == 0
    assert [(row["completion"], row["label"], row["score"]) for row in rows[:2]] == [
        ("x", False, 1.0),
        ("yy", True, 3.0),
    ]
    assert all(parse_unpaired("a line", row) for row in rows)
    _, rows = desk("pairs", ROWS, to="unpaired", threshold=1.5, output="all.jsonl")
    assert [row["label"] for row in rows] == [
        False,
        True,
        True,
        False,
        False,
        False,
        False,
        False,
        True,
        True,
        True,
    ]
    _, rows = desk("pairs", ROWS, to="lists", output="lists.jsonl")
    assert [row["prompt"] for row in rows] == ["a", ROWS[3]["prompt"], "e"] and rows[0]["id"] == 7
    assert all(parse_listwise("a line", row) for row in rows)


def test_a_run_that_goes_on_gives_the_same(desk):
    rows = [
        {"prompt": str(i), "completions": ["a", "b", "c", "d"], "scores": [i, 3, i % 5, 1]} for i in range(9)
    ]
    _, whole = desk("pairs", rows, rule="max_random", seed=5)
    out = desk.path / "out.jsonl"
    text, journal = out.read_bytes(), (desk.path / "out.jsonl.done").read_bytes()
    for cut in (0, 1, 50, len(text) // 2, len(text) - 1):
        out.write_bytes(text[:cut])
        (desk.path / "out.jsonl.done").write_bytes(journal)
        assert desk("pairs", rule="max_random", seed=5) == (0, whole) and out.read_bytes() == text


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"completions": ["x"], "scores": [1]}, "data.jsonl, line 2: field 'prompt': missing"),
        ({"prompt": "p", "scores": [1]}, "line 2: field 'completions': missing (the line has: prompt, scores)"),
        ({"prompt": "p", "completions": ["x"]}, "line 2: field 'scores': missing"),
        ({"prompt": "p", "completions": ["x"], "scores": [1, 2]}, "field 'scores': expected one for each of the 1"),
        ({"prompt": "p", "completions": "x", "scores": [1]}, "field 'completions': expected a list"),
        ({"prompt": "p", "completions": ["x"], "scores": ["1"]}, "field 'scores[0]': expected a number or null"),
        ({"prompt": "p", "completions": ["x"], "scores": [True]}, "field 'scores[0]': expected a number or null"),
        ({"prompt": "p", "completions": ["x"], "scores": [float("inf")]}, "field 'scores[0]': expected a finite"),
        ({"prompt": "p", "completions": [["x"]], "scores": [1]}, "field 'completions[0]': expected a text"),
        ({"prompt": "p", "completions": [], "scores": [], "chosen": "c"}, "field 'chosen': is there already"),
        ([1], "line 2: expected a JSON object"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named_before_anything_is_written(desk, capsys, row, words):
    code, rows = desk("pairs", [ROWS[0], row])
    error = capsys.readouterr().err
    assert code == 2 and words in error and len(error.strip().splitlines()) == 1
    assert not rows and sorted(path.name for path in desk.path.iterdir()) == ["data.jsonl"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rule": "best"}, "--rule is 'best'; legal: max_min, max_random"),
        ({"margin": -1.0}, "--margin"),
        ({"margin": float("nan")}, "--margin"),
        ({"length_penalty": float("nan")}, "--length-penalty is nan: it must be a finite number"),
        ({"ranking": "tournament"}, "--ranking goes with --rule rejection only"),
        ({"beta": 1.0, "rule": "all"}, "--beta goes with --rule rejection only"),
        ({"threshold": 0.0}, "--threshold goes with --to unpaired only"),
        ({"tokenizer": "x"}, "--tokenizer goes with a --length-penalty only"),
        ({"keep_scores": True, "to": "lists"}, "--keep-scores goes with --to pairs only"),
        ({"rule": "all", "to": "lists"}, "--rule goes with --to pairs or unpaired only"),
        ({"rule": "all", "to": "unpaired", "threshold": 1.0}, "--rule goes with no --threshold only"),
        ({"data": None}, "--data is missing"),
        ({"output": "x"}, "--output is the file of --data"),
    ],
)  # fmt: skip
def test_wrong_settings(settings, words):
    with pytest.raises(UserError) as caught:
        run(PairsConfig(**{"data": "x", "output": "y", **settings}))
    assert words in str(caught.value)


def test_nothing_to_write_is_no_success(desk, capsys):
    assert desk("pairs", ROWS[1:3])[0] == 1
    assert "0 done, 0 lines written, 2 skipped" in capsys.readouterr().out
    (desk.path / "data.jsonl").write_text("")
    assert desk("pairs", output="other.jsonl")[0] == 2


def test_numbers_of_any_size_are_written_as_json(desk):
    rows = [{"prompt": "a", "completions": ["x", "y"], "scores": [10**400, 1]}]
    assert desk("pairs", rows)[0] == 2
    assert desk("pairs", [{**rows[0], "scores": [1e300, 1]}], keep_scores=True)[0] == 0
    json.loads((desk.path / "out.jsonl").read_text(), parse_constant=pytest.fail)


def test_unscored_pairs_are_those_that_follow_each_other(desk, capsys):
    """For a judge that compares: the first with the second, the third with the fourth; the fifth is left over."""
    code, lines = desk("pairs", [{"prompt": "p", "completions": list("abcde")}], rule="unscored")
    assert code == 0 and lines == [
        {"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "c", "rejected": "d"},
    ]  # fmt: skip
    capsys.readouterr()
    for row, flags, words in (
        ({"completions": ["a", "a"]}, {}, "the same text"),
        ({"completions": ["a"]}, {}, "fewer than two responses"),
        (
            {"completions": ["a", "b"], "scores": [1, 2]},
            {},
            "field 'scores': --rule unscored would not look at them",
        ),
        ({"completions": ["a", "b"]}, {"margin": 1}, "--margin goes with rules that look at scores only"),
    ):
        code, lines = desk(
            "pairs", [{"prompt": "p", **row}], output=f"{len(words)}.jsonl", rule="unscored", **flags
        )
        assert code and not lines and words in "".join(capsys.readouterr()), words
