"""`fastalign label`: every judge, averages and clamps against closed forms, and a server that fails."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from train.tiny import make_model, make_tokenizer, write_jsonl

from fastalign.feedback.judges.asker import Choice, ModelAsker, Question
from fastalign.feedback.judges.base import Pair, Response
from fastalign.feedback.judges.language import LanguageJudge
from fastalign.feedback.label import LabelConfig, run
from fastalign.feedback.server import Failure
from fastalign.feedback.writers import Reply
from fastalign.train.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FAST = {"backoff": 0.001, "retries": 1, "timeout": 5, "server_model": "m"}
PAIRS = [
    {"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}", "id": i} for i in range(5)
]
LISTS = [{"prompt": f"question {i}", "completions": ["a" * (i + 1), "b"], "id": i} for i in range(4)]


class FakeAsker:
    """Chooses by `choose(words of the conversation)` -> P("1"), or a `Failure`."""

    at_once = 8

    def __init__(self, choose, write=lambda words: "because"):
        self.answers, self.writes, self.asked = choose, write, []

    def contents(self):
        return {}

    def choose(self, questions):
        found = []
        for question in questions:
            self.asked.append(question)
            p = self.answers("\n".join(message["content"] for message in question.messages))
            found.append(Choice(None, p) if isinstance(p, Failure) else Choice([p, 1 - p]))
        return found

    def write_here(self, requests):
        texts = [self.writes(request.prompt[-1]["content"]) for request in requests]
        return [Reply(None, t) if isinstance(t, Failure) else Reply(t) for t in texts]


def judge(asker, **settings):
    return LanguageJudge(LabelConfig(model="m", **{"ask": "compare", **settings}), asker)


PAIR = Pair("a line", "question", "AAA", "BBB", {})


def first_is_a(words):
    return words.index("AAA") < words.index("BBB")


def test_both_orders_are_averaged():
    """P = (P_12(1) + P_21(2)) / 2: a judge that favours a place says 1/2."""
    assert judge(FakeAsker(lambda words: 0.9)).compare([PAIR])[0].value == pytest.approx(0.5)
    asker = FakeAsker(lambda words: 0.9 if first_is_a(words) else 0.4)
    assert judge(asker).compare([PAIR])[0].value == pytest.approx((0.9 + 0.6) / 2)
    assert len(asker.asked) == 2
    assert judge(asker, both_orders=False).compare([PAIR])[0].value == pytest.approx(0.9)


def test_principles_are_averaged(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("- {compare: alpha}\n- {compare: beta}\n- {compare: gamma}\n")
    shares = {"alpha": (0.9, 0.2), "beta": (0.6, 0.6), "gamma": (0.0, 0.0)}

    def choose(words):
        name = next(name for name in shares if name in words)
        return shares[name][not first_is_a(words)]

    found = judge(FakeAsker(choose), principles=2, constitution=str(file)).compare([PAIR, PAIR])
    expected = ((0.9 + 0.8) / 2 + (0.6 + 0.4) / 2) / 2
    assert [verdict.value for verdict in found] == pytest.approx([expected] * 2)
    with pytest.raises(UserError, match="--principles is 4: the constitution has 3"):
        judge(FakeAsker(choose), principles=4, constitution=str(file))


@pytest.mark.parametrize(("p", "label"), [(0.99, 0.6), (0.01, 0.4), (0.55, 0.55)])
def test_labels_after_reasons_are_clamped(p, label):
    asker = FakeAsker(lambda words: p if first_is_a(words) else 1 - p, lambda words: "on reflection")
    assert judge(asker, reasons=True).compare([PAIR])[0].value == pytest.approx(label)
    roles = [message["role"] for message in asker.asked[0].messages]
    assert roles == ["user", "assistant", "user"] and asker.asked[0].messages[1]["content"] == "on reflection"
    assert judge(asker).compare([PAIR])[0].value == pytest.approx(p)


def test_an_order_that_was_not_answered_does_not_favour_the_other():
    malformed, down = Failure("malformed answer", final=True), Failure("timed out")
    found = judge(FakeAsker(lambda words: 0.9 if first_is_a(words) else malformed)).compare([PAIR])[0]
    assert found.value is None and found.failure.final
    found = judge(FakeAsker(lambda words: 0.9 if first_is_a(words) else down)).compare([PAIR])[0]
    assert found.value is None and not found.failure.final
    asker = FakeAsker(lambda words: 0.9, lambda words: "" if first_is_a(words) else "because")
    assert judge(asker, reasons=True).compare([PAIR])[0].failure.final
    # Of two principles, one is left.
    asker = FakeAsker(lambda words: (0.8 if first_is_a(words) else 0.4) if "do harm" in words else malformed)
    assert judge(asker, principles=2).compare([PAIR])[0].value == pytest.approx(0.7)


def test_reviews_are_averaged():
    reviews = iter(["Score: 2", "no points given", "Score: 5", "nonsense", "-", "?"])
    asker = FakeAsker(None, lambda words: next(reviews))
    items = [Response("a line", "question", text, {}) for text in ("x", "y")]
    found = judge(asker, ask="rubric").score(items)
    assert found[0].value == pytest.approx(3.5) and found[1].value is None and found[1].failure.final


# --- a model directory --------------------------------------------------------------------------------------


def brute(asker, question):
    """The same probabilities from whole logits, a token of the (byte-level) tokenizer at a time."""
    text = asker.to_tokens.template.prompt("", question.messages)
    ids, tokenizer = asker._read(question)[0], asker.tokenizer

    def p(words):
        bare, longer = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, text + words))
        own = longer[len(bare) :]
        whole = torch.tensor([[*ids, *own]])
        logprobs = asker.lm.model(input_ids=whole).logits[0].double().log_softmax(-1)
        return math.exp(sum(float(logprobs[len(ids) - 1 + i, token]) for i, token in enumerate(own)))

    mass = {option: p(option) + p(" " + option) for option in question.options}
    if "10" in mass:
        mass["1"] -= mass["10"]
    return [each / sum(mass.values()) for each in mass.values()]


@pytest.mark.parametrize("head", ["fused", "logits"])
@pytest.mark.parametrize("options", [("1", "2"), tuple(str(i) for i in range(1, 11))], ids=len)
def test_probabilities_of_a_models_options(model_dir, head, options):
    asker = ModelAsker(LabelConfig(model=model_dir, batch=5), writes=False)
    assert asker.lm.head_used == "fused"
    if head == "logits":
        asker.lm.use_logits("a test")
    asker.lm.restore()
    asker.lm.model.set_attn_implementation("sdpa")
    questions = [
        Question("a line", [{"role": "user", "content": "the cat " * i + "?"}], options) for i in range(1, 4)
    ]
    expected = [brute(asker, question) for question in questions]
    asker.lm._choose("auto")
    for choice, wanted in zip(asker.choose(questions), expected):
        assert choice.probabilities == pytest.approx(wanted, abs=1e-6)
    assert asker.choose([Question("a line", [{"role": "user", "content": "zq" * 300}], options)])[
        0
    ].failure.final


@pytest.fixture
def template_dir(tmp_path):
    """Short questions: the tiny model has 256 positions."""
    folder = tmp_path / "short"
    folder.mkdir()
    for name, text in {
        "compare": "{{ prompt }} 1: {{ first }} 2: {{ second }} {{ principle }}?", "score": "{{ prompt }} {{ response }}?",
        "reasons": "{{ first }} or {{ second }}?", "answer": "So?", "rubric": "{{ response }}?",
    }.items():  # fmt: skip
        (folder / f"{name}.j2").write_text(text)
    return str(folder)


def test_a_model_labels_pairs_and_scores_responses(desk, model_dir, template_dir):
    flags = {"model": model_dir, "templates": template_dir, "batch": 4}
    code, rows = desk("label", PAIRS, **flags)
    assert code == 0 and [row["id"] for row in rows] == list(range(5))
    assert all(0 < row["soft_label"] < 1 for row in rows) and len({row["soft_label"] for row in rows}) == 5
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in PAIRS]
    _, others = desk("label", swapped, output="swapped.jsonl", **flags)
    for row, other in zip(rows, others):
        assert row["soft_label"] + other["soft_label"] == pytest.approx(1)
    _, rows = desk("label", PAIRS, output="clamped.jsonl", reasons=True, max_new_tokens=8, **flags)
    assert rows and all(0.4 <= row["soft_label"] <= 0.6 for row in rows)
    code, rows = desk("label", LISTS, output="scores.jsonl", **flags)
    assert code == 0 and all(len(row["scores"]) == 2 and min(row["scores"]) >= -1 for row in rows)
    chat = [
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "completions": [[{"role": "assistant", "content": "x"}]],
        }
    ]
    assert desk("label", chat, output="chat.jsonl", **flags)[0] == 0


def test_a_reward_model_scores_as_it_was_trained(desk, tmp_path):
    """Against transformers' own pass over prompt + response + EOS."""
    folder = tmp_path / "rm"
    config = transformers.LlamaConfig(**make_model().config.to_dict() | {"num_labels": 1, "pad_token_id": 2})
    model = transformers.LlamaForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    code, rows = desk("label", LISTS, reward_model=str(folder), batch=3)
    assert code == 0
    for row in rows:
        for text, score in zip(row["completions"], row["scores"]):
            ids = tokenizer(row["prompt"] + text, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                own = model(input_ids=torch.tensor([[0, *ids, 1]])).logits
                bare = model(input_ids=torch.tensor([[*ids, 1]])).logits
            assert score == pytest.approx(float(own), abs=1e-5) or score == pytest.approx(
                float(bare), abs=1e-5
            )
    long = [{"prompt": "p", "completions": ["short", "zq" * 300]}]
    assert desk("label", long, reward_model=str(folder), output="long.jsonl")[1][0]["scores"][1] is None


def test_functions(desk, capsys):
    (desk.path / "own_judges.py").write_text(
        "def length(completions, id):\n    return [len(c) if i else None for c, i in zip(completions, id)]\n"
        "def first(completions):\n    return [0.9 for a, b in completions]\n"
        "def longer(completions, prompts, **columns):\n    return [float(len(a) > len(b)) for a, b in "
        "completions]\n"
        "def broken(completions):\n    raise RuntimeError('no more')\n"
        "def needs(completions, gold):\n    return [0.0] * len(completions)\n"
    )
    code, rows = desk("label", LISTS, reward="own_judges:length")
    assert code == 0 and [row["scores"] for row in rows] == [[2.0, 1.0], [3.0, 1.0], [4.0, 1.0]]
    assert "1 skipped (not scored by the function: 1)" in capsys.readouterr().out
    _, rows = desk("label", PAIRS, preference="own_judges:first", output="both.jsonl")
    assert [row["soft_label"] for row in rows] == pytest.approx([0.5] * 5)
    _, rows = desk("label", PAIRS, preference="own_judges:first", output="one.jsonl", no_both_orders=True)
    assert [row["soft_label"] for row in rows] == pytest.approx([0.9] * 5)
    _, rows = desk("label", PAIRS, preference="own_judges:longer", output="longer.jsonl")
    assert [row["soft_label"] for row in rows] == [1.0] * 5
    assert desk("label", LISTS, reward="own_judges:broken", output="broken.jsonl")[0] == 1
    assert "--reward own_judges:broken: RuntimeError: no more" in capsys.readouterr().err
    assert desk("label", LISTS, reward="own_judges:needs", output="needs.jsonl")[0] == 2
    assert "needs the column 'gold'" in capsys.readouterr().err
    assert desk("label", LISTS, reward="own_judges:nobody", output="nobody.jsonl")[0] == 2


def test_responses_are_scored_against_the_first(desk, serve):
    """r(y) = logit P(y better than the first): with P = a / (a + b) it is log(a / b)."""
    (desk.path / "rankers.py").write_text(
        "def by_length(completions):\n    return [len(a) / (len(a) + len(b)) for a, b in completions]\n"
    )
    rows = [
        {"prompt": "p", "completions": ["aa", "a" * 6, "a", ""]},
        {"prompt": "q", "completions": ["alone"]},
    ]
    code, found = desk("label", rows, preference="rankers:by_length")
    assert code == 0 and found[1]["scores"] == [0.0]
    assert found[0]["scores"][:3] == pytest.approx([0, math.log(3), math.log(0.5)], abs=1e-5)
    assert -14 < found[0]["scores"][3] < -13  # log 1e-6: not minus infinity
    server = serve(lambda body, _: "1" if good_first(body) else "2")
    rows = [{"prompt": "p", "completions": ["bad", "good"]}]
    _, found = desk(
        "label", rows, server=server.url, ask="compare", output="asked.jsonl", no_both_orders=True, **FAST
    )
    assert found[0]["scores"][1] > 13 and len(server.seen) == 1


# --- a server -----------------------------------------------------------------------------------------------


def chat(text, **tops):
    """An answer with log-probs of its first token."""
    content = [
        {
            "token": text,
            "top_logprobs": [{"token": t.strip("_"), "logprob": math.log(p)} for t, p in tops.items()],
        }
    ]
    return {"choices": [{"message": {"content": text}, "logprobs": {"content": content} if tops else None}]}


def good_first(body):
    words = body["messages"][0]["content"]
    return words.index("good") < words.index("bad")


def test_a_server_compares_with_and_without_logprobs(desk, serve):
    server = serve(
        lambda body, _: chat("1", _1=0.6, _2=0.2) if good_first(body) else chat("2", _1=0.3, _2=0.3)
    )
    code, rows = desk("label", PAIRS, server=server.url, **FAST)
    assert code == 0 and [row["soft_label"] for row in rows] == pytest.approx([(0.75 + 0.5) / 2] * 5)
    assert all(body["temperature"] == 0 and body["top_logprobs"] == 20 for _, body in server.seen)
    server = serve(lambda body, _: "1" if good_first(body) else "2")
    assert [
        row["soft_label"] for row in desk("label", PAIRS, server=server.url, output="t.jsonl", **FAST)[1]
    ] == [1.0] * 5


def test_a_server_that_refuses_logprobs_is_asked_without(desk, serve):
    server = serve(lambda body, _: (400, {}) if "logprobs" in body else "1" if good_first(body) else "2")
    code, rows = desk("label", PAIRS, server=server.url, concurrency=1, **FAST)
    assert code == 0 and [row["soft_label"] for row in rows] == [1.0] * 5 and len(server.seen) == 11


def test_what_a_server_does_not_answer_is_counted_and_kept_for_later(desk, serve, capsys):
    down = [True]

    def answer(body, attempt):
        words = body["messages"][0]["content"]
        if "question 1" in words and down:
            return None
        if "question 2" in words:
            return "I would rather not say"
        if "question 3" in words and attempt == 0:
            return (429, {"Retry-After": "0.01"})
        return "1" if good_first(body) else "2"

    server = serve(answer)
    code, rows = desk("label", PAIRS, server=server.url, **FAST)
    assert code == 1 and [row["id"] for row in rows] == [0, 3, 4]
    out = capsys.readouterr().out
    assert "1 skipped (malformed answer: 1), 1 failed (no connection: 1); run it again" in out
    down.clear()
    asked = len(server.seen)
    code, rows = desk("label", server=server.url, **FAST)
    assert code == 0 and [row["id"] for row in rows] == [0, 1, 3, 4] and len(server.seen) == asked + 2


def test_scores_of_a_server(desk, serve, capsys):
    server = serve(lambda body, _: "nonsense" if "\nb\n" in body["messages"][0]["content"] else "10")
    code, rows = desk("label", LISTS, server=server.url, ask="score", **FAST)
    assert code == 0 and all(row["scores"] == [1.0, None] for row in rows)
    server = serve(lambda body, _: f"Good.\nScore: {2 + body['seed'] % 2}")
    _, rows = desk(
        "label", LISTS[:1], server=server.url, ask="rubric", judgements=8, output="r.jsonl", **FAST
    )
    assert 2 < rows[0]["scores"][0] < 3 and len(server.seen) == 16


def test_a_judge_that_never_answers(desk, serve, capsys):
    server = serve(lambda *_: "no comment")
    code, rows = desk("label", PAIRS, server=server.url, **FAST)
    assert (
        code == 1
        and not rows
        and "0 lines written, 5 skipped (malformed answer: 5)" in capsys.readouterr().out
    )
    code, rows = desk("label", PAIRS, server=server.url, output="vague.jsonl", give_up_after=3, **FAST)
    error = capsys.readouterr().err
    assert (
        code == 1
        and not rows
        and "gave up after 3 lines without an answer, the last: malformed answer" in error
    )
    server = serve(lambda *_: (503, {}))
    code, rows = desk("label", PAIRS, server=server.url, output="down.jsonl", give_up_after=2, **FAST)
    error = capsys.readouterr().err
    assert code == 1 and not rows and "gave up after 2 lines without an answer, the last: status 503" in error


# --- wrong input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        (PAIRS, {}, "no judge: give --model DIR, --server URL"),
        (PAIRS, {"model": "m", "reward": "a:b"}, "--model and --reward exclude each other"),
        (PAIRS, {"reward": "a:b"}, "--reward scores responses, and data.jsonl has pairs"),
        (PAIRS, {"model": "m", "ask": "rubric"}, "--ask rubric scores responses"),
        (LISTS, {"model": "m", "reasons": True}, "--reasons goes with --ask compare only"),
        (LISTS, {"model": "m", "ask": "score", "principles": 2}, "--principles goes with --ask compare only"),
        (LISTS, {"reward": "a:b", "temperature": 0.5}, "--temperature goes with --model or --server only"),
        (LISTS, {"model": "m", "temperature": 0.5}, "--temperature goes with --reasons or --ask rubric only"),
        (LISTS, {"reward": "a:b", "device": "cpu"}, "--device goes with a model directory only"),
        (LISTS, {"model": "m", "timeout": 1.0}, "--timeout goes with --server only"),
        (PAIRS, {"model": "m", "constitution": "x"}, "--constitution goes with --principles only"),
        (PAIRS, {"server": "http://x", "server_model": "m", "endpoint": "completions"}, "--endpoint completions: a judge is asked in conversations"),
        ([*PAIRS, LISTS[0]], {"model": "m"}, "line 6: pairs and lines with completions do not go together"),
        ([{"prompt": "p"}], {"model": "m"}, "line 1: field 'completions': missing, as are chosen and rejected"),
        ([{"prompt": "p", "chosen": "c"}], {"model": "m"}, "line 1: field 'rejected': missing"),
        ([{**PAIRS[0], "soft_label": 1}], {"model": "m"}, "field 'soft_label': is there already"),
        ([{**LISTS[0], "scores": [1]}], {"model": "m"}, "field 'scores': is there already"),
        (LISTS, {"reward": "nocolon"}, "expected MODULE:FUNCTION"),
    ],
)  # fmt: skip
def test_wrong_input(desk, rows, settings, words):
    write_jsonl(desk.path / "data.jsonl", rows)
    with pytest.raises(UserError) as caught:
        run(LabelConfig(data="data.jsonl", output="out.jsonl", **settings))
    assert words in str(caught.value)
    assert [path.name for path in desk.path.iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("compare.j2", "{{ prompt }} {{ fist }}", "'fist' is undefined; its variables are first, principle, prompt, second"),
        ("compare.j2", "{{ prompt ", "compare.j2: "),
        ("own.j2", "x", "holds none of compare.j2, which are used here"),
        ("own.yaml", "- {critique: x}", "own.yaml, principle 1: field 'compare': missing"),
        ("own.yaml", "{", "own.yaml: not YAML"),
        ("own.yaml", "words", "own.yaml: expected a list of principles"),
    ],
)  # fmt: skip
def test_wrong_templates(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    settings = {"templates": str(tmp_path)}
    if name.endswith("yaml"):
        settings = {"constitution": str(tmp_path / name), "principles": 1}
    with pytest.raises(UserError) as caught:
        judge(SimpleNamespace(at_once=None, contents=dict), **settings)
    assert words in str(caught.value)


def test_other_templates_are_another_run(desk, serve, template_dir, capsys):
    server = serve(lambda body, _: "1" if good_first(body) else "2")
    assert desk("label", PAIRS, server=server.url, **FAST)[0] == 0
    assert desk("label", server=server.url, templates=template_dir, **FAST)[0] == 2
    assert "compare.j2" in capsys.readouterr().err
    json.loads((desk.path / "out.jsonl.json").read_text())


def test_what_is_asked_is_shipped():
    """The package's data names every template, and each renders with its variables."""
    assert '"fastalign.feedback" = ["templates/*"]' in (ROOT / "pyproject.toml").read_text()
    for ask, settings in (("compare", {}), ("compare", {"reasons": True}), ("score", {}), ("rubric", {})):
        judge(FakeAsker(lambda words: 0.5), ask=ask, principles=8 if ask == "compare" else 0, **settings)
