"""Every snippet of README and docs runs as printed: Python blocks, command lines, lines of data, and calls
inside a sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny import (
    make_demonstrations,
    make_lists,
    make_model,
    make_responses,
    make_rows,
    make_tokenizer,
    write_jsonl,
)

import fastalign as fa
import fastalign.adapters.trl
from fastalign.cli import main as cli
from fastalign.train import UserError
from fastalign.train.data import formats
from fastalign.train.help import GROUPS
from fastalign.train.methods import METHODS

ROOT = Path(__file__).resolve().parent.parent.parent
PAPERS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a reader runs in a shell and a test must not: environments and whole suites.
ARENA_SIZES = [
    *("--steps", "1", "--responses-per-step", "8", "--sft-steps", "2", "--judged", "4", "--hidden", "16", "--layers", "1"),
    *("--heads", "2", "--max-new-tokens", "4"),
]  # fmt: skip
NOT_HERE = ("make ", "pip ", "benchmarks/")


def blocks(kind):
    return [
        (path, m[1])
        for path in PAPERS
        for m in re.finditer(rf"^```{kind}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)
    ]


def name_of(case):
    path, code = case
    return f"{path.stem}:{code.strip().splitlines()[0][:40]}"


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A working directory with every model and data file that the snippets name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    tokenizer = make_tokenizer()
    for folder in ("model", "my-model", "sft", "base"):
        make_model().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(**make_model().config.to_dict() | {"num_labels": 1, "pad_token_id": 2})
    for folder in ("reward", "rm"):
        transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for file in ("pairs", "part1", "part2"):
        write_jsonl(Path(f"{file}.jsonl"), [{**row, "task": "chat"} for row in make_rows(4)])
    for file in ("demonstrations", "demos"):
        write_jsonl(Path(f"{file}.jsonl"), make_demonstrations(4))
    for file in ("responses", "labels"):
        write_jsonl(Path(f"{file}.jsonl"), make_responses(4))
    write_jsonl(Path("lists.jsonl"), make_lists(4))
    write_jsonl(Path("prompts.jsonl"), [{"prompt": f"{i} + 1 =", "answer": str(i + 1)} for i in range(4)])
    Path("my_rewards.py").write_text(
        "def exact(completions, answer):\n    return [float(len(c) % 3) for c in completions]\n"
    )
    Path("my_judge.py").write_text("def better(completions):\n    return [0.5 for _ in completions]\n")
    for module in ("my_rewards", "my_judge"):
        sys.modules.pop(module, None)
    return tmp_path


def test_every_block_says_what_it_is():
    for path in PAPERS:
        fences = re.findall(r"^```(.*)$", path.read_text(), re.MULTILINE)
        assert all(kind in ("python", "sh", "json", "yaml", "toml", "text") for kind in fences[::2]) and set(
            fences[1::2]
        ) <= {""}, path


@pytest.mark.parametrize(
    "path",
    # Other trainers' page: tests/adapters/test_adapters_docs.py.
    [
        p
        for p in PAPERS
        if p.stem != "adapters" and re.search("^```(python|sh)$", p.read_text(), re.MULTILINE)
    ],
    ids=lambda p: p.stem,
)
def test_blocks_run(path, desk):
    """Python and commands in order, Python in one namespace, as a reader who types them in."""
    space = {}
    for match in re.finditer(r"^```(python|sh)\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE):
        if match[1] == "python":
            exec(compile(match[2], path.name, "exec"), space)
        else:
            run_commands(match[2])


def run_commands(code):
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        if words and not line.startswith(NOT_HERE):
            assert words[0] == "fastalign", line
            short = (
                ["--max-new-tokens", "4"]
                if words[1] == "train" and METHODS[words[2]].config.__name__ == "OnlineConfig"
                else ARENA_SIZES
                if words[1] == "arena"
                else []
            )
            assert cli.main([*words[1:], *short]) == 0, line


@pytest.mark.parametrize("case", blocks("json"), ids=name_of)
def test_lines_of_data(case):
    """Each is an example of one of the formats, or a prompt to sample from."""
    kinds = (formats.PREFERENCE, formats.UNPAIRED, formats.LISTWISE, formats.supervised(None))
    for line in case[1].splitlines():
        row, served = json.loads(line), []
        for kind in kinds:
            with contextlib.suppress(UserError):
                served.append(kind.parse("line 1", row))
        assert served or set(row) >= {"prompt", "answer"}, line


@pytest.mark.parametrize("case", blocks("yaml"), ids=name_of)
def test_recipes_have_nothing_wrong(case, desk):
    Path("recipe.yaml").write_text(case[1])
    assert (
        cli.main(
            [
                "run",
                "recipe.yaml",
                "--check",
                "--output",
                "out",
                "--set",
                "model=model",
                "--set",
                "pairs=pairs.jsonl",
            ]
        )
        == 0
    )


CALL = re.compile(r"`(?:fa|fastalign)(\.[a-z_.]+\([^`]*\))`")


@pytest.mark.parametrize("path,call", [(p, call) for p in PAPERS for call in CALL.findall(p.read_text())])
def test_calls_in_sentences(path, call):
    """With the usual names bound; an ellipsis stands for what the sentence leaves out, and only such a call
    is not run."""
    if re.search(r"\.\.\.(?!\w)", call) or call.startswith(".adapters."):
        assert callable(functools.reduce(getattr, call.split("(")[0].strip(".").split("."), fa))
        return
    tokens = 8
    names = {
        "fa": fa, "logits": torch.randn(tokens, 11), "labels": torch.arange(tokens), "index": torch.arange(tokens),
        "logprobs": -torch.rand(tokens), "ref_logprobs": -torch.rand(tokens), "old_logprobs": -torch.rand(tokens),
        "advantages": torch.randn(tokens), "mask": torch.ones(tokens, dtype=torch.bool), "values": torch.randn(tokens),
        "old_values": torch.randn(tokens), "returns": torch.randn(tokens), "cu_seqlens": torch.tensor([0, 2, 4, 6, 8], dtype=torch.int32),
        "list_offsets": torch.tensor([0, 2, 4]), "scores": torch.tensor([1.0, 0.0, 0.5, 2.0]), "rewards": torch.randn(4),
        "chosen": torch.randn(3), "rejected": torch.randn(3), "ref_chosen": torch.randn(3), "ref_rejected": torch.randn(3),
        "totals": torch.randn(4), "ref_totals": torch.randn(4), "desirable": torch.tensor([True, False, True, False]),
        "groups": torch.tensor([0, 0, 1, 1]), "group": None, "temperature": 0.7, "row_mask": torch.ones(tokens, dtype=torch.bool), "chunk_size": 4,
        "hidden": torch.randn(tokens, 4), "weight": torch.randn(11, 4), "ref_hidden": torch.randn(tokens, 3), "ref_weight": torch.randn(11, 3),
        "indices": torch.randint(11, (tokens, 3)), "coef": torch.tensor(0.5),
    }  # fmt: skip
    names["outputs"] = [
        fa.preference_loss(names["logprobs"], names["ref_logprobs"], names["cu_seqlens"], mask=names["mask"])
    ] * 2
    eval("fa" + call, names)


# --- --help -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_command_of_a_methods_page_runs_on_the_pages_line_of_data(method, desk, capsys):
    page = METHODS[method].page
    words = shlex.split(page.command)
    file = words[words.index("--data") + 1]
    Path(file).write_text((page.data + "\n") * 4)
    assert words[:3] == ["fastalign", "train", method]
    run_commands(page.command)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", method, "--help"])
    shown = capsys.readouterr().out
    assert (
        stop.value.code == 0
        and all(part in shown for part in page)
        and len(re.findall("  required:", shown)) == 3
    )


@pytest.mark.parametrize(
    "kind",
    sorted({command.config for command in METHODS.values()}, key=lambda k: k.__name__),
    ids=lambda k: k.__name__,
)
def test_every_setting_stands_in_one_group(kind):
    members = [name for names in GROUPS.values() for name in names]
    assert len(members) == len(set(members)) and set(kind.__dataclass_fields__) <= set(members)


@pytest.mark.parametrize(
    "words,said",
    [
        (["train", "dpo", "--beta", "0.1"], "--set beta=0.1"),
        (["train", "dpo", "--beta=0.1"], "--set beta=0.1"),
        (["train", "grpo", "--clip-high", "0.3"], "--set clip_high=0.3"),
        (["train", "dpo", "--learning-rat", "1"], "did you mean --learning-rate?"),
        (["train", "dpo", "--samples-per-prompt", "4"], "belongs to ppo, grpo"),
        (["train", "dpo", "--model", "model", "--data", "pairs.jsonl", "--output", "o", "--loss", "kto"], "'fastalign train kto' trains with it"),
        (["train", "dpo", "--model", "model", "--data", "pairs.jsonl", "--output", "o", "--loss", "lipo"], "'fastalign train listwise' trains with it"),
        (["train", "sft", "--completion_only_loss", "true"], "that is --loss-on completion"),
        (["train", "sft", "--assistant-only-loss"], "that is --loss-on assistant"),
        (["losses", "nonsense"], "'nonsense' is unknown; legal: "),
    ],
)  # fmt: skip
def test_a_wrong_word_gets_a_hint(words, said, desk, capsys):
    try:
        code = cli.main(words)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and said in error and len(error.strip().splitlines()) == 1


def test_losses_are_listed_and_shown(capsys):
    assert cli.main(["losses"]) == 0
    shown = capsys.readouterr().out
    for name in (*fa.losses.PRESETS, *fa.losses.LISTWISE, *fa.policy_losses.PRESETS, "kto", "dro"):
        assert re.search(rf"^  {name} ", shown, re.MULTILINE), name
    assert cli.main(["losses", "sdpo"]) == 0
    shown = capsys.readouterr().out
    assert "loop     train on the data part by part" in shown and "--loss sdpo" in shown


@pytest.mark.parametrize("name", [p.name for p in fa.losses.available() if p.own_options()])
def test_a_shown_own_option_has_the_value_that_gives_the_loss(name, capsys):
    """Given as it is shown, a method's own parameter changes nothing."""
    assert cli.main(["losses", name]) == 0
    shown, preset = capsys.readouterr().out, fa.losses.get(name)

    def numbers(p):
        """With the margin as one number; smooth labels of smoothing 0 are hard ones."""
        margin = round(p.gamma + p.gamma_beta_ratio * p.beta, 12)
        labels = p.labels if p.label_smoothing else preset.labels
        return dataclasses.replace(p, gamma=margin, gamma_beta_ratio=0.0, labels=labels).params()

    for option, value in preset.own_options().items():
        assert f"{option}={value}" in shown
        assert str(numbers(preset.replace(**{option: value}))) == str(numbers(preset)), option


def test_a_loss_that_is_another_plus_a_loop_says_so():
    table = fa.losses.available().markdown()
    for name, loop in fa.losses.LOOPS.items():
        assert fa.losses.get(name).params() == fa.losses.get("dpo").params(), name
        assert f"that of dpo; the method is the loop: {loop}" in table
