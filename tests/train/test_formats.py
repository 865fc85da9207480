"""TRL's preference formats and their errors."""

import json

import pytest

from fastalign.train import DataError, UserError
from fastalign.train.data.formats import parse_listwise, parse_preference, parse_unpaired, read_jsonl


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def parts(row):
    preference = parse_preference("x, line 1", row)
    return preference.prompt, *preference.completions


def test_standard():
    assert parts({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}) == (
        "The sky is",
        " blue.",
        " green.",
    )


def test_standard_with_implicit_prompt_gives_the_space_to_the_completion():
    assert parts({"chosen": "The sky is blue.", "rejected": "The sky is green."}) == (
        "The sky is",
        " blue.",
        " green.",
    )


def test_conversational():
    row = {"prompt": [user("hi")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}
    assert parts(row) == ([user("hi")], [assistant("yes")], [assistant("no")])


@pytest.mark.parametrize("prompt", [None, "hi", [user("hi")]], ids=["absent", "as text", "repeated"])
def test_conversational_with_the_prompt_in_both_sides(prompt):
    row = {"chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]}
    if prompt is not None:
        row["prompt"] = prompt
    assert parts(row) == ([user("hi")], [assistant("yes")], [assistant("no")])


def test_identical_sides_keep_their_completion():
    same = [user("hi"), assistant("yes")]
    assert parts({"chosen": same, "rejected": same}) == ([user("hi")], [assistant("yes")], [assistant("yes")])


def test_columns_without_meaning_here_are_left_alone():
    assert parts({"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 7, "tools": None}) == (
        "a",
        "b",
        "c",
    )


MALFORMED = [
    (["not", "an", "object"], None, "expected a JSON object, got a list"),
    ({"prompt": "a", "chosen": "b"}, "rejected", "missing"),
    ({"prompt": "a", "chosen": 3, "rejected": "c"}, "chosen", "expected text, got a number"),
    ({"prompt": None, "chosen": "b", "rejected": "c"}, "prompt", "share no beginning"),
    ({"prompt": ["a"], "chosen": "b", "rejected": "c"}, "prompt", "expected text, got a list"),
    ({"prompt": "a", "chosen": "\ud800", "rejected": "c"}, "chosen", "surrogate"),
    (
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": "c"},
        "rejected",
        "expected a list of messages",
    ),
    ({"prompt": [user("a")], "chosen": [], "rejected": [assistant("c")]}, "chosen", "no message"),
    (
        {"prompt": [user("a")], "chosen": ["b"], "rejected": [assistant("c")]},
        "chosen[0]",
        "expected an object",
    ),
    (
        {"prompt": [{"content": "a"}], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        "prompt[0].role",
        "missing",
    ),
    (
        {"prompt": [user("a")], "chosen": [assistant(None)], "rejected": [assistant("c")]},
        "chosen[0].content",
        "expected text, got null",
    ),
    (
        {"prompt": [user("a")], "chosen": [user("b")], "rejected": [assistant("c")]},
        "chosen",
        "assistant turns only",
    ),
    (
        {"prompt": [assistant("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        "prompt",
        "ends with an assistant turn",
    ),
    ({"chosen": [assistant("b")], "rejected": [assistant("c")]}, "prompt", "share no first message"),
    (
        {"prompt": "z", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
        "prompt",
        "differs",
    ),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{"name": "f"}]}, "tools", "not supported"),
    (
        {
            "prompt": [user("a")],
            "chosen": [assistant("b") | {"tool_calls": [1]}],
            "rejected": [assistant("c")],
        },
        "chosen[0].tool_calls",
        "not supported",
    ),
]


@pytest.mark.parametrize("row, field, words", MALFORMED, ids=[str(field) for _, field, _ in MALFORMED])
def test_malformed_rows_name_source_and_field(row, field, words):
    with pytest.raises(DataError) as error:
        parse_preference("pairs.jsonl, line 7", row)
    assert error.value.field == field and words in str(error.value)
    assert "pairs.jsonl, line 7" in str(error.value) and (field is None or f"'{field}'" in str(error.value))


def test_unpaired_and_listwise_rows():
    texts = parse_unpaired(
        "x", {"prompt": "a", "completion": " b", "label": False, "score": 2, "weight": 0.5}
    )
    assert (texts.prompt, texts.completions, dict(texts.values)) == (
        "a",
        (" b",),
        {"label": False, "score": 2.0, "weight": 0.5},
    )
    texts = parse_unpaired("x", {"prompt": [user("a")], "completion": [assistant("b")], "label": True})
    assert texts.conversational and texts.completions == ([assistant("b")],)
    texts = parse_listwise("x", {"prompt": "a", "completions": [" b", " c"], "scores": [1, -0.5]})
    assert texts.completions == (" b", " c") and texts.values["scores"] == (1.0, -0.5)
    texts = parse_listwise("x", {"prompt": [user("a")], "completions": [[assistant("b")]], "scores": [1]})
    assert texts.completions == ([assistant("b")],)


def test_optional_columns_of_a_pair():
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "soft_label": 1, "margin": -0.5, "weight": None}
    assert parse_preference("x", row).values == {"soft_label": 1.0, "margin": -0.5}


MALFORMED_OTHERS = [
    (
        parse_preference,
        {"prompt": "a", "chosen": "b", "rejected": "c", "soft_label": 1.1},
        "soft_label",
        "from 0 to 1",
    ),
    (
        parse_preference,
        {"prompt": "a", "chosen": "b", "rejected": "c", "weight": -1},
        "weight",
        "from 0, got -1",
    ),
    (
        parse_preference,
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": True},
        "margin",
        "expected a number, got a boolean",
    ),
    (
        parse_preference,
        {"prompt": "a", "chosen": "b", "rejected": "c", "target": float("nan")},
        "target",
        "finite",
    ),
    (parse_unpaired, {"prompt": "a", "label": True}, "completion", "missing"),
    (
        parse_unpaired,
        {"prompt": "a", "completion": "b", "label": 1},
        "label",
        "expected true or false, got a number",
    ),
    (
        parse_unpaired,
        {"prompt": "a", "completion": [assistant("b")], "label": True},
        "completion",
        "expected text",
    ),
    (
        parse_unpaired,
        {"prompt": [user("a")], "completion": "b", "label": True},
        "completion",
        "expected a list of messages",
    ),
    (
        parse_unpaired,
        {"prompt": [user("a")], "completion": [user("b")], "label": True},
        "completion",
        "assistant turns only",
    ),
    (
        parse_unpaired,
        {"prompt": "a", "completion": "b", "score": "high"},
        "score",
        "expected a number, got text",
    ),
    (parse_listwise, {"prompt": "a", "completions": ["b"]}, "scores", "missing"),
    (
        parse_listwise,
        {"prompt": "a", "completions": "b", "scores": [1]},
        "completions",
        "expected a list, got text",
    ),
    (parse_listwise, {"prompt": "a", "completions": [], "scores": []}, "completions", "1 to 64"),
    (
        parse_listwise,
        {"prompt": "a", "completions": ["b", "c"], "scores": [1]},
        "scores",
        "one for each of the 2",
    ),
    (
        parse_listwise,
        {"prompt": "a", "completions": ["b", 3], "scores": [1, 2]},
        "completions[1]",
        "expected text, got a number",
    ),
    (
        parse_listwise,
        {"prompt": "a", "completions": ["b", "c"], "scores": [1, None]},
        "scores[1]",
        "expected a number, got null",
    ),
    (
        parse_listwise,
        {"prompt": [user("a")], "completions": [[assistant("b")], [{}]], "scores": [1, 2]},
        "completions[1][0].role",
        "missing",
    ),
]


@pytest.mark.parametrize(
    "parse, row, field, words", MALFORMED_OTHERS, ids=[f"{p.__name__} {f}" for p, _, f, _ in MALFORMED_OTHERS]
)
def test_malformed_rows_of_other_formats(parse, row, field, words):
    with pytest.raises(DataError) as error:
        parse("x.jsonl, line 7", row)
    assert error.value.field == field and words in str(error.value) and "x.jsonl, line 7" in str(error.value)


def test_reading_skips_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps({"a": 1}).encode() + b"\r\n\n" + json.dumps({"b": 2}).encode()
    )
    assert list(read_jsonl(path)) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 3", {"b": 2})]


@pytest.mark.parametrize("line, words", [(b'{"a": 1', "not JSON"), (b'"\xff"', "not UTF-8")])
def test_unreadable_lines_name_file_and_line(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + line)
    with pytest.raises(DataError, match=words) as error:
        list(read_jsonl(path))
    assert f"{path}, line 2" in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        list(read_jsonl(tmp_path / "nothing.jsonl"))
