"""A tiny model on disk, servers, and commands on small files."""

import pytest
import transformers
from fake_server import FakeServer, read
from train.tiny import make_model, make_tokenizer, write_jsonl

from fastalign.cli import main as cli

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(num_hidden_layers=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """`desk(command, rows, flag=value, ...)`: the exit code, and the output's lines, in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def run(command, rows=None, *, data="data.jsonl", output="out.jsonl", **flags):
        if rows is not None:
            write_jsonl(tmp_path / data, rows)
        words = [command, "--data", data, "--output", output]
        for name, value in flags.items():
            flag = "--" + name.replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
        try:
            code = cli.main(words)
        except SystemExit as stop:
            code = stop.code
        return code, read(tmp_path / output)

    run.path = tmp_path
    return run


@pytest.fixture
def serve(monkeypatch):
    """`serve(answer)`: a `FakeServer`."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    servers = []

    def start(answer):
        servers.append(FakeServer(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
