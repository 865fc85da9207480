"""The command line: flags, one-line errors with exit code 2 before training, the real command."""

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import transformers
from tiny import make_lists, make_responses, make_rows, write_jsonl

from fastalign.cli import main as cli
from fastalign.train import TrainConfig, TrainingError, UserError
from fastalign.train.config import flag_of, parse_option
from fastalign.train.methods import METHODS, of_kind
from fastalign.train.program import answer


@pytest.fixture
def command(model_dir, data_file, tmp_path):
    """`command(*flags, model=..., data=...)` -> argv of a short run."""

    def build(*flags, model=model_dir, data=data_file):
        return [
            "train",
            "dpo",
            "--model",
            str(model),
            "--data",
            str(data),
            "--output",
            str(tmp_path / "out"),
            "--batch-size",
            "4",
            "--tokens-per-batch",
            "256",
            "--max-steps",
            "2",
            "--no-tensorboard",
            *flags,
        ]

    return build


def fails(capsys, argv, *words):
    try:
        code = cli.main(argv)
    except SystemExit as end:  # argparse's own way out
        code = end.code
    error = capsys.readouterr().err
    assert code == 2 and re.fullmatch(r"fastalign( train)?( dpo)?: error: .*\n", error), error
    for word in words:
        assert word in error
    return error


def test_the_real_command(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fastalign", *command("--set", "beta=0.3", "--loss", "dpo")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "step 2/2: loss" in done.stdout
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "train_config.json").read_text())["config"]["loss_options"] == {
        "beta": 0.3
    }


def test_errors_are_one_line_and_exit_code_2(command, tmp_path, capfd):
    assert cli.main(command(model=tmp_path / "nothing")) == 2
    said = capfd.readouterr()
    assert said.out == ""
    assert (
        said.err
        == f"fastalign train: error: the model directory {tmp_path}/nothing does not exist (fetch a model from the hub first)\n"
    )


def help_of(capsys, *argv):
    with pytest.raises(SystemExit) as end:
        cli.main(["train", *argv, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_every_setting_has_a_flag_with_documentation(capsys):
    text = "".join(help_of(capsys, method) for method in of_kind(TrainConfig))
    for setting in dataclasses.fields(TrainConfig):
        flag = flag_of(setting.name)
        assert (flag in text or f"--[no-]{flag[2:]}" in text) and setting.metadata["doc"], setting.name


def test_help_lists_the_methods_and_a_method_only_its_own_settings(capsys):
    assert all(f"  {name}" in (text := help_of(capsys)) for name in METHODS), text
    text = help_of(capsys, "reward")
    assert (
        "--loss" in text and "--set" in text and "precompute-ref" not in text and "token-metrics" not in text
    )


@pytest.mark.parametrize("method", of_kind(TrainConfig))
def test_every_method_refuses_in_one_line(command, capsys, tmp_path, method):
    """Another data format, an unknown loss, an unknown option, a directory that is not there: exit code 2,
    nothing written."""
    rows = {"dpo": make_responses, "tdpo": make_responses, "reward": make_lists, "listwise": make_rows}.get(
        method, make_rows
    )
    other = write_jsonl(tmp_path / "other.jsonl", rows(3))

    def argv(*flags, **changes):
        built = command(*flags, **changes)
        return [built[0], method, *built[2:]]

    fails(capsys, argv(data=other), f"{other}, line 1: field '", "missing (the line has: prompt")
    fails(capsys, argv("--loss", "nonsense"), "nonsense", "legal")
    fails(capsys, argv("--set", "nonsense=1"), "nonsense", "legal")
    fails(capsys, argv(model=tmp_path / "nothing"), "nothing does not exist")
    fails(capsys, argv(data=tmp_path / "nothing.jsonl"), "nothing.jsonl", "No such file")
    assert not (tmp_path / "out").exists()


def test_a_setting_that_the_method_does_not_have(command, capsys):
    built = command("--ref-model", "x")
    fails(
        capsys,
        [built[0], "reward", *built[2:]],
        "fastalign train reward has no setting --ref-model",
        "--loss, --set",
    )


FLAGS = [
    (("--loss", "nonsense"), ("loss='nonsense' is unknown", "dpo", "simpo")),
    (("--set", "nonsense=1"), ("no option 'nonsense'", "beta", "label_smoothing")),
    (("--set", "beta"), ("--set beta", "OPTION=VALUE")),
    (("--set", "beta=high"), ("beta must be a number", "'high'")),
    (("--loss", "cdpo", "--set", "label_smoothing=0.7"), ("label_smoothing=0.7", "< 0.5")),
    (("--learning-rate", "fast"), ("--learning-rate", "invalid float value: 'fast'")),
    (("--learning-rate", "-1"), ("--learning-rate is -1.0", "positive")),
    (("--learning-rate", "nan"), ("--learning-rate is nan",)),
    (("--batch-size", "0"), ("--batch-size is 0", "positive")),
    (("--batch-size", "1.5"), ("--batch-size", "invalid int value")),
    (("--warmup-ratio", "2"), ("--warmup-ratio is 2.0", "[0, 1]")),
    (("--seed", "-1"), ("--seed is -1",)),
    (("--seed", str(2**64)), (f"--seed is {2**64}", "[0, 4294967295]")),
    (("--seed", str(2**32)), ("[0, 4294967295]",)),
    (("--batch-size", "9" * 400), ("--batch-size is 999", "below 2^63")),
    (("--loss", ""), ("--loss is empty",)),
    (("--loss", "sigmoid=-1"), ("--loss sigmoid=-1", "must be positive, got -1")),
    (("--set", "reference=yes"), ("--set reference must be true or false, got 'yes'",)),
    (("--set", "beta=true"), ("beta must be a number, got True",)),
    (("--dtype", "float64"), ("--dtype", "float32", "bfloat16")),
    (("--attention", "magic"), ("--attention", "packed", "eager")),
    (("--no-such-flag",), ("--no-such-flag",)),
    (("--batch", "3"), ("--batch",)),  # abbreviations are not options
    (("--eval-every", "2"), ("--eval-every needs --eval-data or --eval-fraction",)),
    (("--eval-fraction", "0.01"), ("leaves 0 for evaluation",)),
    (("--eval-fraction", "0.5", "--eval-data", "x"), ("exclude each other",)),
    (("--eval-data", "nothing.jsonl"), ("nothing.jsonl", "No such file")),
    (("--max-length", "1000"), ("--max-length 1000", "256 positions")),
    (("--max-length", "5"), ("line 1", "exceeds 5", "--overlong")),
    (("--tokens-per-batch", "20"), ("line 1", "exceed --tokens-per-batch 20", "--overlong")),
    (("--tokens-per-batch", "2", "--overlong", "drop"), ("no pair to train on", "all 12", "over-long")),
    (("--resume",), ("--resume: no checkpoint",)),
    (("--resume", "--overwrite"), ("exclude each other",)),
    (("--ref-model", "nothing"), ("model directory nothing does not exist",)),
    (("--loss", "simpo", "--precompute-ref"), ("simpo uses no reference", "--precompute-ref")),
    (("--device", "cuda:99"), ("--device cuda:99",)),
    (("--attention", "flash_attention_2"), ("flash_attention_2: ",)),
]


@pytest.mark.parametrize("flags, words", FLAGS, ids=[" ".join(flags) for flags, _ in FLAGS])
def test_wrong_flags(command, capsys, tmp_path, flags, words):
    fails(capsys, command(*flags), *words)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize("missing", ["model", "data", "output"])
def test_missing_flags(command, capsys, missing):
    argv = command()
    at = argv.index(f"--{missing}")
    fails(capsys, argv[:at] + argv[at + 2 :], f"--{missing} is missing")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ("no pair to train on", "is empty")),
        (b"\n\n", ("is empty",)),
        (b'{"prompt": "a", "chosen": "b"}\n', ("line 1", "field 'rejected'", "missing")),
        (json.dumps(make_rows()[0]).encode() + b"\n{broken\n", ("line 2", "not JSON")),
        (b'\n{"prompt": "a", "chosen": "b", "rejected": null}\n', ("line 2", "field 'rejected'", "null")),
        (b"\xff\xfe", ("line 1", "not UTF-8")),
        (
            '{"prompt": "caf\u00e9", "chosen": "b", "rejected": "c"}\n'.encode("latin-1"),
            ("line 1", "not UTF-8 (byte 15)"),
        ),
    ],
)
def test_wrong_data(command, capsys, tmp_path, content, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    fails(capsys, command(data=path), str(path), *words)
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_is_no_part_of_the_data(command, data_file, tmp_path):
    path = tmp_path / "marked.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + data_file.read_bytes())
    assert cli.main(command("--seed", str(2**32 - 1), data=path)) == 0


@pytest.mark.parametrize(
    "text, value",
    [("true", True), ("False", False), ("FALSE", False), (" true ", True), ("truest", "truest")],
)
def test_booleans_of_set(text, value):
    assert parse_option("--set", f"reference={text}") == ("reference", value)


def test_wrong_model_directories(command, capsys, tmp_path, tokenizer, model_dir, data_file):
    fails(capsys, command(model=tmp_path / "nothing"), "nothing does not exist")
    empty = tmp_path / "empty"
    empty.mkdir()
    fails(capsys, command(model=empty), "has no config.json")
    fails(capsys, command(model=data_file), f"{data_file} is a file", "the directory that holds config.json")
    (empty / "config.json").write_text("{}")
    fails(capsys, command(model=empty), f"in {empty}")
    transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
    ).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    fails(capsys, command(model=tmp_path / "bert"), "cannot train")
    fails(capsys, [*command()[:6], "--output", str(model_dir)], "directory of --model")


def test_a_directory_with_some_of_the_weights(command, capsys, tmp_path, tokenizer):
    from safetensors.torch import load_file, save_file
    from tiny import make_model

    folder = tmp_path / "partial"
    make_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fails(capsys, command(model=folder), "lacks weights", "model.layers.1.mlp.up_proj.weight")


def test_a_vocabulary_that_is_too_small(command, capsys, tmp_path, tokenizer):
    from tiny import make_model

    make_model(vocabulary=50).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    fails(capsys, command(model=tmp_path / "small"), "vocabulary has 50 entries")


def test_overlong_pairs_are_counted(command, capsys, data_file):
    rows = make_rows(6) + [{"prompt": "a" * 300, "chosen": " good", "rejected": " bad"}]
    write_jsonl(data_file, rows)
    fails(capsys, command(), "line 7", "exceeds 256")
    assert cli.main(command("--overlong", "truncate_prompt")) == 0
    assert "7 pairs" in (out := capsys.readouterr().out) and "1 truncated" in out
    assert cli.main(command("--overlong", "drop", "--overwrite")) == 0
    assert "6 pairs" in (out := capsys.readouterr().out) and "1 dropped as over-long" in out


def test_unknown_commands(capsys):
    fails(capsys, ["nonsense"], "nonsense", "train", "demo")
    fails(capsys, [], "COMMAND")
    fails(capsys, ["train", "nonsense"], "nonsense", "dpo")
    fails(capsys, ["train"], "METHOD")


@pytest.mark.parametrize(
    "error, code",
    [(UserError("no such\nfile"), 2), (TrainingError("the disk is full"), 1), (KeyboardInterrupt(), 130)],
)
def test_how_commands_end(capsys, error, code):
    def work():
        raise error

    assert answer("fastalign x", work, "--resume goes on") == code
    err = capsys.readouterr().err
    assert err.startswith("fastalign x: error: ") and err.count("\n") == 1
    assert answer("fastalign x", lambda: 3, "") == 3 and not capsys.readouterr().err
