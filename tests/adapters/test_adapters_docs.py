"""The Python of docs/adapters.md that needs no other trainer than TRL runs as it is printed; of the rest
every name of ours is there. (transformers' example: test_transformers.py; commands and tables: the tests of
each trainer.)"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
from pathlib import Path

import datasets
import pytest
import trl
from dpo_runs import make_config, make_model, make_rows, tokenizer

import fastalign
from fastalign import adapters
from fastalign.adapters.trl import PackedDPOTrainer

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
OURS = sorted(set(re.findall(r"fastalign\.adapters(?:\.\w+)+", PAGE)))


def block(word):
    (code,) = (code for code in BLOCKS if word in code)
    return code


@pytest.fixture
def desk(tmp_path, monkeypatch, one_thread):
    """What the examples of TRL name: a model's directory, data, and a config for this machine."""
    monkeypatch.chdir(tmp_path)
    make_model().save_pretrained("model")
    tokenizer().save_pretrained("model")
    config = functools.partial(make_config, max_steps=1)
    monkeypatch.setattr(trl, "DPOConfig", config)
    return {"data": datasets.Dataset.from_list(make_rows(4)), "DPOConfig": config, "fastalign": fastalign}


def test_patching_as_printed(capsys):
    exec(compile(block("print(report)"), "docs/adapters.md", "exec"), {})
    assert "places patched" in capsys.readouterr().out
    assert adapters.adapter("trl").report is None


def test_the_packed_trainer_as_printed(desk):
    exec(compile(block("from trl import DPOConfig"), "docs/adapters.md", "exec"), desk)
    assert desk["trainer"].state.global_step == 1


@pytest.mark.parametrize("line", block("PackedDPOTrainer(...,").splitlines())
def test_presets_as_printed(desk, line):
    """The ellipsis stands for what the example before says."""
    made = []

    def build(_, **options):
        made.append(
            PackedDPOTrainer("model", args=desk["DPOConfig"]("out"), train_dataset=desk["data"], **options)
        )

    exec(line, {**desk, "PackedDPOTrainer": build})
    made[0].train()
    assert made[0].state.global_step == 1


@pytest.mark.parametrize("name", OURS)
def test_every_name_of_ours_is_there(name):
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(name):
            return  # a module; to import it may be to patch
    words = name.split(".")
    for end in range(len(words), 1, -1):
        try:
            found = importlib.import_module(".".join(words[:end]))
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("fastalign"):
                return  # of a trainer that is not installed here; its own tests import it
            continue
        for word in words[end:]:
            found = getattr(found, word)
        return
    pytest.fail(f"there is no {name}")


@pytest.mark.parametrize("code", BLOCKS)
def test_every_block_is_python(code):
    compile(code, "docs/adapters.md", "exec")
