"""The models beside the policy (reference, reward, DPO): refused before anything is written where they do not
fit, and never overwritten. Settings and configurations given to the wrong place."""

import json
import re
import shutil
from pathlib import Path

import pytest
import transformers
from tiny import make_model, make_responses, make_rows, make_tokenizer, write_jsonl

from fastalign.cli import main as cli
from fastalign.train import OnlineConfig, TrainConfig, UserError, train, train_dpo, train_online
from fastalign.train.models.companions import max_positions

PAIRS, RESPONSES, PROMPTS = (
    make_rows(6),
    make_responses(6),
    [{"prompt": row["prompt"]} for row in make_rows(6)],
)
BESIDE = [
    ("dpo", "ref_model"),
    ("kto", "ref_model"),
    ("ppo", "ref_model"),
    ("ppo", "dpo_model"),
    ("ppo", "reward_model"),
]
CASES = pytest.mark.parametrize("method, name", BESIDE, ids=[f"{method} {name}" for method, name in BESIDE])


def nothing(completions):
    return [0.0] * len(completions)


def gpt2(positions, vocabulary=300):
    config = transformers.GPT2Config(
        vocab_size=vocabulary,
        n_positions=positions,
        n_embd=32,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config), transformers.GPT2ForSequenceClassification


def llama(positions, vocabulary=300):
    return make_model(
        vocabulary, max_position_embeddings=positions, pad_token_id=2
    ), transformers.LlamaForSequenceClassification


def save(model, name, folder, tokenizer=None):
    """The causal LM, or a reward model of its configuration."""
    causal, classifier = model
    if name == "reward_model":
        causal.config.num_labels = 1
        causal = classifier(causal.config)
    causal.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def argv(model_dir, tmp_path):
    """`argv(method, name, directory, *flags)`: a short run with this model beside the policy."""

    def build(method, name, directory, *flags, model=model_dir):
        rows = {"dpo": PAIRS, "kto": RESPONSES, "ppo": PROMPTS}[method]
        data = write_jsonl(tmp_path / f"{method}.jsonl", rows)
        parts = [
            "train",
            method,
            "--model",
            model,
            "--data",
            data,
            "--output",
            tmp_path / "out",
            "--max-steps",
            1,
            "--no-tensorboard",
        ]
        if method == "ppo":
            parts += ["--max-new-tokens", 4, "--batch-size", 2]
            parts += [] if name == "reward_model" else ["--reward", f"{__name__}:nothing"]
        if name is not None:
            parts += ["--" + name.replace("_", "-"), directory]
        return [str(part) for part in (*parts, *flags)]

    return build


def fails(capsys, argv, *words):
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"fastalign train: error: .*\n", error), error
    for word in words:
        assert word in error, error


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@CASES
@pytest.mark.parametrize("flag", [None, "--overwrite"])
def test_output_is_no_models_directory(argv, capsys, tmp_path, tokenizer, method, name, flag):
    folder = save(llama(256), name, tmp_path / "beside", tokenizer)
    before = contents(folder)
    (tmp_path / "link").symlink_to(folder)
    words = f"--output is the directory of --{name.replace('_', '-')}"
    for output in (folder, tmp_path / "link", tmp_path / "nothing" / ".." / "beside"):
        fails(
            capsys,
            [*argv(method, name, folder, *[flag] * (flag is not None)), "--output", str(output)],
            words,
        )
    assert contents(folder) == before


@CASES
def test_a_model_among_the_outputs_checkpoints(argv, capsys, tmp_path, tokenizer, method, name):
    """--overwrite would remove it before it was read."""
    folder = save(llama(256), name, tmp_path / "out" / "checkpoints" / "step-00000001", tokenizer)
    before = contents(tmp_path)
    fails(
        capsys,
        argv(method, name, folder, "--overwrite"),
        f"--{name.replace('_', '-')} lies in 'checkpoints' of --output",
    )
    assert before.items() <= contents(tmp_path).items()


@CASES
@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_too_few_positions(argv, capsys, tmp_path, tokenizer, method, name, make):
    folder = save(make(12), name, tmp_path / "short", tokenizer)
    flag = "--" + name.replace("_", "-")
    fails(
        capsys,
        argv(method, name, folder),
        f"{flag} {folder}: it has 12 positions, and a sequence may have",
        "lower --max-length",
    )
    assert not (tmp_path / "out").exists()


def test_positions_that_suffice(argv, tmp_path, tokenizer):
    """What counts is the longest sequence, not the policy's own positions; for kto that of the mismatched
    pairs."""
    folder = save(llama(64), "ref_model", tmp_path / "short", tokenizer)
    assert cli.main(argv("dpo", "ref_model", folder)) == 0
    assert cli.main(argv("kto", "ref_model", folder, "--overwrite")) == 0


def test_ktos_mismatched_pairs_count(argv, capsys, tmp_path, tokenizer):
    rows = [
        {"prompt": "p" * 20, "completion": "c", "label": True},
        {"prompt": "p", "completion": "c" * 20, "label": False},
    ]
    data, folder = (
        write_jsonl(tmp_path / "uneven.jsonl", rows),
        save(llama(30), "ref_model", tmp_path / "short", tokenizer),
    )
    fails(
        capsys,
        argv("kto", "ref_model", folder, "--data", data),
        "30 positions, and a sequence may have 41 tokens",
    )
    assert cli.main(argv("kto", "ref_model", folder, "--data", data, "--max-length", 30)) == 0
    assert (
        cli.main(
            argv("kto", "ref_model", folder, "--data", data, "--overwrite", "--loss", "apo_zero_unpaired")
        )
        == 0
    )


@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
@pytest.mark.parametrize("method", ["dpo", "kto", "ppo"])
def test_the_policys_own_positions(argv, capsys, tmp_path, tokenizer, method, make):
    folder = save(make(12), None, tmp_path / "short", tokenizer)
    fails(capsys, argv(method, None, None, model=folder), "12" if method != "ppo" else "--max-new-tokens")
    fails(
        capsys,
        argv(method, None, None, "--max-length", 13, model=folder),
        "--max-length 13 exceeds the model's 12 positions",
    )
    assert not (tmp_path / "out").exists()


def test_where_positions_are_found():
    assert max_positions(transformers.GPT2Config(n_positions=7)) == 7
    assert max_positions(transformers.MptConfig(max_seq_len=9)) == 9
    assert max_positions(transformers.Gemma3Config(text_config={"max_position_embeddings": 11})) == 11
    assert max_positions(transformers.XLNetConfig()) is None  # -1: no bound


def exchange(folder, first, second):
    """Exchange two tokens' numbers in a saved tokenizer."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(content))


@CASES
def test_another_tokenizer(argv, capsys, tmp_path, tokenizer, method, name):
    folder, flag = save(llama(256), name, tmp_path / "other", tokenizer), "--" + name.replace("_", "-")
    exchange(folder, "q", "x")
    fails(
        capsys,
        argv(method, name, folder),
        f"{flag} {folder}: its tokenizer differs from the policy's: ",
        " there and ",
    )
    larger = make_tokenizer()
    larger.add_tokens(["<new>"])
    policy = save(llama(256, vocabulary=302), None, tmp_path / "policy", larger)
    tokenizer.save_pretrained(folder)
    fails(
        capsys,
        argv(method, name, folder, model=policy),
        "its tokenizer differs from the policy's: it lacks 1 tokens, '<new>' first",
    )
    assert not (tmp_path / "out").exists()


def test_a_reference_without_a_tokenizer(argv, capsys, tmp_path, tokenizer):
    """It must have the policy's vocabulary, since nothing else says what its tokens mean."""
    folder = save(llama(256), None, tmp_path / "bare")
    assert cli.main(argv("dpo", "ref_model", folder)) == 0
    larger = save(llama(256, vocabulary=310), None, tmp_path / "larger")
    fails(
        capsys,
        argv("dpo", "ref_model", larger, "--output", tmp_path / "none"),
        "vocabulary has 310 entries, the model's 300",
    )
    assert not (tmp_path / "none").exists()
    tokenizer.save_pretrained(larger)  # rows that no token uses
    assert cli.main(argv("dpo", "ref_model", larger, "--overwrite")) == 0


@pytest.mark.parametrize("how", ["cut", "garbage", "empty"])
@pytest.mark.parametrize("method, name", [("dpo", "model"), *BESIDE], ids=lambda value: value)
def test_weights_that_cannot_be_read(argv, capsys, tmp_path, tokenizer, method, name, how):
    folder = save(llama(256), name, tmp_path / "corrupt", tokenizer)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"\xff" * 100, "empty": b""}[how])
    argv = argv(method, None, None, model=folder) if name == "model" else argv(method, name, folder)
    fails(
        capsys,
        argv,
        f"cannot load the {'sequence classifier' if name == 'reward_model' else 'causal LM'}",
        f"in {folder}: ",
    )
    assert not (tmp_path / "out").exists()


def test_a_wrong_reference_leaves_an_earlier_run_alone(argv, capsys, tmp_path, tokenizer):
    """--overwrite removes nothing before everything is loaded."""
    assert cli.main(argv("dpo", None, None, "--save-every", 1)) == 0
    before = contents(tmp_path / "out")
    folder = save(llama(256), "ref_model", tmp_path / "corrupt", tokenizer)
    (folder / "model.safetensors").write_bytes(b"")
    fails(capsys, argv("dpo", "ref_model", folder, "--overwrite"), "cannot load")
    shutil.rmtree(folder)
    fails(capsys, argv("dpo", "ref_model", folder, "--overwrite"), "does not exist")
    assert contents(tmp_path / "out") == before


def test_a_checkpoint_with_a_broken_value_head(argv, capsys, tmp_path):
    build = argv("kto", None, None, "--save-every", 1)
    build[1] = "dro"
    assert cli.main(build) == 0
    (tmp_path / "out" / "checkpoints" / "step-00000001" / "value_head.safetensors").write_bytes(b"")
    fails(capsys, [*build, "--resume"], "--resume: ", "value_head.safetensors cannot be read")


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: train("kto", OnlineConfig()),
            r"train\('kto', config\): config must be an instance of TrainConfig, got OnlineConfig, .* "
            r"train_online",
        ),
        (
            lambda: train_dpo(OnlineConfig()),
            "must be an instance of TrainConfig, got OnlineConfig, which belongs to train_online",
        ),
        (
            lambda: train("ppo", TrainConfig()),
            r"train has no method 'ppo': call train_online\('ppo', OnlineConfig\(...\)\)",
        ),
        (lambda: train("ppo", OnlineConfig()), "call train_online"),
        (
            lambda: train_online("ppo", TrainConfig()),
            "must be an instance of OnlineConfig, got TrainConfig, which belongs to train",
        ),
        (
            lambda: train_online("dpo", TrainConfig()),
            r"train_online has no method 'dpo': call train\('dpo', TrainConfig\(...\)\)",
        ),
        (lambda: train("dpo", {"model": "x"}), "must be an instance of TrainConfig, got dict"),
        (lambda: train("nonsense", TrainConfig()), "unknown method 'nonsense'"),
        (lambda: train_online("nonsense", OnlineConfig()), "unknown method 'nonsense'"),
        (lambda: TrainConfig(batch_size="8"), "batch_size must be an integer, got '8'"),
        (lambda: TrainConfig(batch_size=8.0), "batch_size must be an integer, got 8.0"),
        (lambda: TrainConfig(max_steps=True), "max_steps must be an integer or None, got True"),
        (lambda: TrainConfig(learning_rate="1e-6"), "learning_rate must be a number, got '1e-6'"),
        (lambda: TrainConfig(learning_rate=True), "learning_rate must be a number, got True"),
        (lambda: TrainConfig(batch_size=None), "batch_size must be an integer, got None"),
        (lambda: TrainConfig(model=3), "model must be a text or None, got 3"),
        (lambda: TrainConfig(resume="yes"), "resume must be True or False, got 'yes'"),
        (lambda: TrainConfig(loss_options=[("beta", 1)]), "loss_options must be a dict, got"),
        (lambda: TrainConfig(loss=""), "--loss is empty"),
        (
            lambda: TrainConfig(seed=2**64),
            r"--seed is 18446744073709551616: it must lie in \[0, 4294967295\]",
        ),
        (lambda: OnlineConfig(kl_coef="0.1"), "kl_coef must be a number or None, got '0.1'"),
        (lambda: OnlineConfig(loss=""), "--loss is empty"),
    ],
)
def test_wrong_arguments_from_python(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_paths_and_integers_where_numbers_are_legal():
    config = TrainConfig(model=Path("a") / "b", learning_rate=1)
    assert config.model == str(Path("a") / "b") and config.learning_rate == 1
