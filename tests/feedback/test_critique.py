"""`fastalign critique`: rounds, principles, forms, by a fake server and by a tiny model."""

import pytest
from train.tiny import write_jsonl

from fastalign.feedback.critique import CritiqueConfig, run
from fastalign.train.data.formats import parse_preference, parse_supervised
from fastalign.train.errors import UserError

FAST = {"backoff": 0.001, "retries": 1, "timeout": 5, "server_model": "m", "concurrency": 2}
ROWS = [{"prompt": f"question {i}", "completion": f"draft {i}", "id": i} for i in range(6)]
CONSTITUTION = "".join(
    f"- {{critique: Find {n}., revision: Mend {n}.}}\n" for n in ("alpha", "beta", "gamma")
)


def reviser(body, attempt):
    """Says which principle it was asked about; each revision is the response with a mark."""
    messages = body["messages"]
    if len(messages) == 1:
        return "critique of " + messages[0]["content"].partition("Find ")[2].partition(".")[0]
    draft = messages[0]["content"].partition("[Response]\n")[2].partition("\n\n[End]")[0]
    assert messages[1]["content"].rpartition(" ")[2] in messages[2]["content"]  # the same principle in both
    return draft + "!"


@pytest.fixture
def critique(desk, serve):
    (desk.path / "own.yaml").write_text(CONSTITUTION)

    def call(rows=ROWS, answer=reviser, **flags):
        call.server = serve(answer)
        return desk("critique", rows, server=call.server.url, constitution="own.yaml", **{**FAST, **flags})

    return call


def test_every_round_revises_what_the_last_one_gave(critique):
    code, rows = critique(rounds=3, keep_pair=True, keep_steps=True)
    assert code == 0 and [row["id"] for row in rows] == list(range(6)) and len(critique.server.seen) == 36
    for i, row in enumerate(rows):
        assert row["completion"] == row["chosen"] == f"draft {i}!!!" and row["rejected"] == f"draft {i}"
        assert row["revisions"] == [f"draft {i}!", f"draft {i}!!", f"draft {i}!!!"]
        parse_preference("a line", row)
        parse_supervised("a line", row)
    principles = {words.rpartition(" ")[2] for row in rows for words in row["critiques"]}
    assert principles == {"alpha", "beta", "gamma"}
    _, again = critique(rounds=3, keep_pair=True, keep_steps=True, output="again.jsonl")
    assert again == rows
    _, others = critique(rounds=3, keep_pair=True, keep_steps=True, output="others.jsonl", seed=1)
    assert [row["critiques"] for row in others] != [row["critiques"] for row in rows]


def test_forms(critique):
    chat = {
        "prompt": [{"role": "user", "content": "q"}],
        "completion": [{"role": "assistant", "content": "draft"}],
    }
    _, rows = critique([chat])
    assert rows == [{**chat, "completion": [{"role": "assistant", "content": "draft!"}]}]
    _, rows = critique([{"prompt": "p", "completions": ["a", "b"], "id": 1}], output="many.jsonl")
    assert rows == [
        {"prompt": "p", "id": 1, "completion": "a!"},
        {"prompt": "p", "id": 1, "completion": "b!"},
    ]


def test_what_is_not_answered_is_counted_and_kept_for_later(critique, capsys):
    down = [True]

    def answer(body, attempt):
        words = body["messages"][0]["content"]
        if "draft 1" in words and len(body["messages"]) > 1 and down:
            return None
        if "draft 2" in words:
            return "  "
        return reviser(body, attempt)

    code, rows = critique(answer=answer)
    assert code == 1 and [row["id"] for row in rows] == [0, 3, 4, 5]
    assert "1 skipped (empty answer: 1), 1 failed (no connection: 1)" in capsys.readouterr().out
    down.clear()
    code, rows = critique(None, answer=answer)
    assert code == 0 and [row["id"] for row in rows] == [0, 1, 3, 4, 5] and len(critique.server.seen) == 2


def test_a_model_revises_and_goes_on(desk, model_dir):
    folder = desk.path / "short"
    folder.mkdir()
    (folder / "critique.j2").write_text("{{ response }} {{ prompt }}?")
    (folder / "revision.j2").write_text("{{ critique }} {{ principle }}")
    (desk.path / "own.yaml").write_text(CONSTITUTION)
    flags = {
        "model": model_dir,
        "templates": "short",
        "constitution": "own.yaml",
        "max_new_tokens": 6,
        "batch": 4,
        "rounds": 2,
    }
    code, whole = desk("critique", ROWS, **flags)
    assert code == 0 and len(whole) == 6 and all(row["completion"] for row in whole)
    out = desk.path / "out.jsonl"
    text = out.read_bytes()
    out.write_bytes(text[: len(text) // 2])
    assert desk("critique", **flags) == (0, whole)
    assert desk("critique", **{**flags, "rounds": 1})[0] == 2


@pytest.mark.parametrize(
    ("row", "settings", "words"),
    [
        ({"prompt": "p"}, {}, "line 1: field 'completion': missing, as is completions (the line has: prompt)"),
        ({"prompt": "p", "completion": ["x"]}, {}, "field 'completion': expected a text"),
        ({"prompt": "p", "completion": "x", "completions": ["x"]}, {}, "stands beside completions"),
        ({"prompt": "p", "completion": "x", "chosen": "y"}, {}, "field 'chosen': is there already"),
        (ROWS[0], {"endpoint": "completions"}, "--endpoint completions: responses are criticised in conversations"),
        (ROWS[0], {"rounds": 0}, "--rounds is 0: it must be positive"),
        (ROWS[0], {"constitution": "none.yaml"}, "cannot read none.yaml"),
        (ROWS[0], {"templates": "."}, "--templates .: holds none of critique.j2, revision.j2"),
        (ROWS[0], {"server": None}, "no model: give --model DIR, or --server URL"),
    ],
)  # fmt: skip
def test_wrong_input(desk, row, settings, words):
    write_jsonl(desk.path / "data.jsonl", [row])
    server = (
        {"server": "http://127.0.0.1:9", "server_model": "m"}
        if settings.get("server", "") is not None
        else {}
    )
    with pytest.raises(UserError) as caught:
        run(CritiqueConfig(data="data.jsonl", output="out.jsonl", **{**server, **settings}))
    assert words in str(caught.value)
    assert [path.name for path in desk.path.iterdir()] == ["data.jsonl"]
