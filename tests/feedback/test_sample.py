"""`fastalign sample`: by a tiny model and by a server that fails in every way."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from fake_server import read
from train.tiny import write_jsonl

from fastalign.feedback.sample import SampleConfig, run
from fastalign.feedback.server import Server
from fastalign.train.errors import UserError
from fastalign.train.sampling.own_draws import OwnDraws

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [{"prompt": f"the {'cat ' * (i % 4)}number {i}:", "id": i} for i in range(7)]
CHAT = [{"prompt": [{"role": "user", "content": f"question {i}"}], "id": i} for i in range(6)]
FAST = {"backoff": 0.001, "retries": 3, "timeout": 5, "server_model": "m"}


@pytest.fixture
def by_model(desk, model_dir):
    def sample(rows=PROMPTS, **flags):
        return desk(
            "sample", rows, **{"model": model_dir, "samples": 3, "max_new_tokens": 6, "batch": 6, **flags}
        )

    return sample


def test_samples_stand_in_the_order_of_the_data_with_its_columns(by_model, capsys):
    code, rows = by_model()
    assert code == 0
    assert [{name: row[name] for name in ("prompt", "id")} for row in rows] == PROMPTS
    assert all(
        len(row["completions"]) == 3 and all(isinstance(c, str) for c in row["completions"]) for row in rows
    )
    assert len({text for row in rows for text in row["completions"]}) > 15
    assert "sample: 7 done, 7 lines written (out.jsonl)" in capsys.readouterr().out


def test_a_sample_depends_on_seed_and_prompt_alone(by_model):
    _, rows = by_model()
    whole = {row["id"]: row["completions"] for row in rows}
    _, rows = by_model(PROMPTS[5:2:-1], output="some.jsonl", batch=64)
    assert [row["completions"] for row in rows] == [whole[i] for i in (5, 4, 3)]
    _, rows = by_model(PROMPTS[:2], output="other.jsonl", seed=1)
    assert rows[0]["completions"] != whole[0]
    _, rows = by_model([PROMPTS[0]] * 2, output="twice.jsonl")
    assert rows[0]["completions"] == whole[0] != rows[1]["completions"]


def test_the_most_likely_tokens(by_model):
    _, rows = by_model(temperature=0, max_new_tokens=3)
    assert all(len(set(row["completions"])) == 1 for row in rows)
    _, narrow = by_model(top_k=1, max_new_tokens=3, output="narrow.jsonl")
    assert [row["completions"] for row in narrow] == [row["completions"] for row in rows]
    _, nucleus = by_model(top_p=1e-9, max_new_tokens=3, output="nucleus.jsonl")
    assert nucleus == narrow


def test_draws_follow_the_distribution():
    """Frequencies over seeds against the softmax, at a temperature; a token of probability 0 is never drawn."""
    from transformers.generation.logits_process import TemperatureLogitsWarper

    logits = torch.tensor([[0.3, -torch.inf, 1.5, 0.0, -2.0]])
    count = 4000
    draws = OwnDraws(lambda ids, scores: TemperatureLogitsWarper(0.7)(ids, scores), range(count), 2)
    for _ in range(2):
        drawn = Counter(draws(None, logits.expand(count, -1)).argmax(-1).tolist())
        expected = (logits[0] / 0.7).softmax(-1).tolist()
        for token, p in enumerate(expected):
            assert abs(drawn[token] / count - p) <= 5 * (p * (1 - p) / count) ** 0.5


def test_conversations(by_model, model_dir):
    code, rows = by_model(CHAT[:2])
    assert code == 0 and all(
        c[0]["role"] == "assistant" and len(c) == 1 for row in rows for c in row["completions"]
    )


def test_a_run_that_was_stopped_goes_on(by_model, desk):
    _, whole = by_model()
    out, journal = desk.path / "out.jsonl", desk.path / "out.jsonl.done"
    text, done = out.read_bytes(), journal.read_bytes()
    for cut, entries in (
        (len(text) // 3, len(done)),
        (len(text) - 2, len(done) - 5),
        (len(text), len(done) // 2),
    ):
        out.write_bytes(text[:cut])
        journal.write_bytes(done[:entries])
        if entries < len(done) // 2 + 1:  # the journal is written first: this cannot come from a stop
            assert by_model()[0] == 2 and out.read_bytes() == text
        else:
            assert by_model() == (0, whole) and out.read_bytes() == text


def test_what_a_later_run_refuses(by_model, desk, capsys):
    """Other settings, other lines, a changed output, another model, somebody else's file."""
    by_model()

    def refused(words, rows=None, **flags):
        before = (desk.path / flags.get("output", "out.jsonl")).read_bytes()
        capsys.readouterr()
        assert by_model(rows, **flags)[0] == 2
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()) == 1
        assert (desk.path / flags.get("output", "out.jsonl")).read_bytes() == before

    refused("--temperature is 0.5, and was 1.0 when", temperature=0.5)
    refused(
        "line 2 of data.jsonl has changed, or is gone, since", [PROMPTS[0], {"prompt": "new"}, *PROMPTS[2:]]
    )
    by_model([*PROMPTS, {"prompt": "one more:"}])  # lines may be added
    assert len((desk.path / "out.jsonl").read_text().splitlines()) == 8
    out = desk.path / "out.jsonl"
    text = out.read_text()
    out.write_text(text.replace("number 1:", "number 9:"))
    refused("out.jsonl has been changed: what stands there for line 2")
    out.write_text(text + "{}\n")
    refused("holds lines that this command did not write, the first: '{}'")
    out.write_text(text + '{"prompt": "cut')
    assert by_model(None)[0] == 0 and out.read_text() == text
    (desk.path / "mine.jsonl").write_text('"precious"\n')
    for overwrite in ({}, {"overwrite": True}):
        refused("mine.jsonl exists, and mine.jsonl.json", output="mine.jsonl", **overwrite)
    assert by_model(PROMPTS[:2], temperature=0.5, overwrite=True)[0] == 0
    assert len(out.read_text().splitlines()) == 2


def test_another_model_is_another_run(by_model, desk, model_dir, capsys):
    import shutil

    copy = shutil.copytree(model_dir, desk.path / "copy")
    by_model(PROMPTS[:2])
    assert by_model(None, model=copy)[0] == 0  # the same contents elsewhere
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert by_model(None, model=copy)[0] == 2 and "--model" in capsys.readouterr().err


def test_over_long_prompts(by_model, capsys):
    rows = [PROMPTS[0], {"prompt": "zq" * 200}]
    assert by_model(rows)[0] == 2
    assert "data.jsonl, line 2: field 'prompt': has" in capsys.readouterr().err
    code, found = by_model(rows, overlong="drop")
    assert code == 0 and len(found) == 1 and "1 skipped (over-long: 1)" in capsys.readouterr().out
    assert by_model(rows, overlong="drop")[0] == 0
    assert "(1 before), 1 lines written, 1 skipped (over-long: 1)" in capsys.readouterr().out
    assert len(by_model(rows, overlong="truncate_prompt", output="cut.jsonl")[1]) == 2


# --- a server -----------------------------------------------------------------------------------------------


def test_a_server_answers(desk, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve(lambda body, _: f"{body['messages'][-1]['content']} {body['seed']}")
    code, rows = desk(
        "sample", CHAT, server=server.url, samples=2, temperature=0.5, top_k=7, concurrency=3, **FAST
    )
    assert code == 0 and [row["id"] for row in rows] == list(range(6))
    assert all(len({c[0]["content"] for c in row["completions"]}) == 2 for row in rows)
    path, body = server.seen[0]
    assert path == "/v1/chat/completions" and server.headers[0]["Authorization"] == "Bearer secret"
    assert (
        body["temperature"] == 0.5
        and body["top_k"] == 7
        and body["max_tokens"] == 512
        and "top_p" not in body
    )
    assert "secret" not in "".join(p.read_text() for p in desk.path.iterdir())
    assert desk("sample", server=server.url, samples=2, temperature=0.5, top_k=7, **FAST) == (0, rows)
    assert len(server.seen) == 12


def test_texts_go_to_either_endpoint(desk, serve):
    server = serve(lambda body, _: body["prompt"] if "prompt" in body else body["messages"][0]["content"])
    for endpoint in ("chat", "completions"):
        output = f"{endpoint}.jsonl"
        _, rows = desk(
            "sample", PROMPTS, server=server.url, samples=1, endpoint=endpoint, output=output, **FAST
        )
        assert [row["completions"] for row in rows] == [[row["prompt"]] for row in PROMPTS]
    assert desk("sample", CHAT, server=server.url, endpoint="completions", output="c.jsonl", **FAST)[0] == 2


def bad_once(answer):
    """Fails in this way at the first attempt for every question."""
    return lambda body, attempt: answer if attempt == 0 else "fine"


@pytest.mark.parametrize(
    "answer",
    [
        None, b"", b"not json", b"[" * 100_000, b'"text"', {}, {"choices": []}, {"choices": [{"message": {"content": None}}]},
        {"choices": [{"message": "text"}]}, (500, {}), (503, {"Retry-After": "0"}), (429, {"Retry-After": "0.01"}),
        (429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), (429, {"Retry-After": "soon"}), (200, {"Content-Length": "99"}),
    ],
    ids=str,
)  # fmt: skip
def test_what_fails_once_is_asked_again(desk, serve, answer):
    server = serve(bad_once(answer))
    code, rows = desk("sample", CHAT[:2], server=server.url, samples=1, **{**FAST, "timeout": 0.5})
    assert code == 0 and len(rows) == 2 and len(server.seen) == 4


def test_nothing_is_lost_and_the_rest_is_tried_again(desk, serve, capsys):
    """Some lines time out, some get nonsense, one is refused; the others are written, in order, and the next run
    asks for what failed only."""
    healthy = threading.Event()

    def answer(body, attempt):
        words = body["messages"][0]["content"]
        if words.endswith("1") and not healthy.is_set():
            time.sleep(0.4)
        if words.endswith("2"):
            return b"nonsense"
        if words.endswith("3") and not healthy.is_set():
            return None
        if words.endswith("4"):
            return (400, {})
        return words

    server, flags = serve(answer), {**FAST, "timeout": 0.2, "retries": 1, "samples": 1}
    code, rows = desk("sample", CHAT, server=server.url, **flags)
    out = capsys.readouterr().out
    assert code == 1 and [row["id"] for row in rows] == [0, 5]
    assert "2 skipped (malformed answer: 1, refused by the server with status 400: 1)" in out
    assert "2 failed (no connection: 1, timed out: 1); run it again" in out
    healthy.set()
    asked = len(server.seen)
    code, rows = desk("sample", server=server.url, **flags)
    assert code == 0 and [row["id"] for row in rows] == [0, 1, 3, 5] and len(server.seen) == asked + 2
    assert "4 done (2 before), 4 lines written, 2 skipped" in capsys.readouterr().out


def test_a_run_that_is_killed_loses_nothing(desk, serve):
    """SIGKILL between two answers; what was answered is not asked for again."""
    go_on = threading.Semaphore(4)
    server = serve(lambda body, _: go_on.acquire(timeout=20) and body["messages"][0]["content"])
    write_jsonl(desk.path / "data.jsonl", CHAT)
    flags = {**FAST, "server": server.url, "samples": 1, "concurrency": 2, "timeout": 30}
    words = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]
    command = [
        sys.executable,
        "-m",
        "fastalign",
        "sample",
        "--data",
        "data.jsonl",
        "--output",
        "out.jsonl",
        *words,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=desk.path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    ) as child:
        end = time.monotonic() + 60
        while len(read(desk.path / "out.jsonl")) < 4:
            assert child.poll() is None and time.monotonic() < end, child.stderr.read()
            time.sleep(0.02)
        child.kill()
    for _ in range(9):
        go_on.release()
    code, rows = desk("sample", **flags)
    assert code == 0 and [row["id"] for row in rows] == list(range(6))
    asked = Counter(body["messages"][0]["content"] for _, body in server.seen)
    assert sum(count == 1 for count in asked.values()) >= 4 and len(asked) == 6


def test_a_server_that_never_answers(desk, serve, capsys):
    flags = {**FAST, "retries": 1, "samples": 1, "concurrency": 1}
    code, rows = desk("sample", CHAT, server=serve(lambda *_: None).url, give_up_after=3, **flags)
    error = capsys.readouterr().err
    assert (
        code == 1 and not rows and "gave up after 3 lines without an answer, the last: no connection" in error
    )
    code, rows = desk(
        "sample", CHAT, server="http://127.0.0.1:9", output="nobody.jsonl", give_up_after=2, **flags
    )
    assert code == 1 and not rows
    for status, said in ((401, "status 401"), (404, "status 404"), (302, "status 302")):
        server = serve(lambda *_, status=status: (status, {"Location": "http://example.org"}))
        assert (
            desk("sample", CHAT, server=server.url, output=f"{status}.jsonl", give_up_after=2, **flags)[0]
            == 1
        )
        assert said in capsys.readouterr().err and len(server.seen) == 1


def test_retry_after_holds_for_all(serve):
    server = serve(lambda body, attempt: (429, {"Retry-After": "0.3"}) if attempt == 0 else "fine")
    config = SampleConfig(server=server.url, **FAST)
    client, start = Server(config), time.monotonic()
    assert client.write("a", 1)[0][0] == "fine" and time.monotonic() - start >= 0.3


def test_concurrency_and_rate(desk, serve):
    server = serve(lambda *_: time.sleep(0.03) or "x")
    assert desk("sample", CHAT, server=server.url, samples=3, concurrency=4, **FAST)[0] == 0
    assert 1 < server.at_once <= 4
    start = time.monotonic()
    flags = {**FAST, "requests_per_minute": 60 / 0.05}
    assert desk("sample", CHAT, server=server.url, samples=1, output="slow.jsonl", **flags)[0] == 0
    assert time.monotonic() - start >= 5 * 0.05


def test_a_slow_drip_times_out(serve, monkeypatch):
    server = serve(lambda *_: "x")
    client = Server(SampleConfig(server=server.url, **{**FAST, "timeout": 0.05, "retries": 0}))

    class Answer:
        length = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read1(self, _):
            time.sleep(0.02)
            return b" "

    monkeypatch.setattr(client.opener, "open", lambda *_, **__: Answer())
    assert client.write("a", 1)[1].reason == "timed out"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "no model: give --model DIR, or --server URL"),
        ({"model": "m", "server": "http://x", "server_model": "m"}, "exclude each other"),
        ({"server": "http://x"}, "--server-model is missing"),
        ({"server": "x:1", "server_model": "m"}, "expected an address that begins with http://"),
        ({"server": "http:///v1", "server_model": "m"}, "expected an address"),
        ({"server": "http://x", "server_model": "m", "server_key": "NO_SUCH_KEY"}, "--server-key NO_SUCH_KEY"),
        ({"model": "nowhere"}, "does not exist"),
        ({"model": "nowhere", "samples": 0}, "--samples is 0"),
        ({"model": "nowhere", "temperature": -1.0}, "--temperature is -1.0"),
        ({"model": "nowhere", "device": "tpu"}, "--device tpu"),
    ],
)  # fmt: skip
def test_wrong_settings(desk, settings, words):
    (desk.path / "data.jsonl").write_text(json.dumps(PROMPTS[0]))
    with pytest.raises(UserError) as caught:
        run(SampleConfig(data="data.jsonl", output="out.jsonl", **settings))
    assert words in str(caught.value)
    assert [path.name for path in desk.path.iterdir()] == ["data.jsonl"]
